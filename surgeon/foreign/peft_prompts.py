"""PEFT's methods of virtual tokens: prefix tuning, prompt tuning and P-tuning. The file holds their final rows."""

from __future__ import annotations

from torch import Tensor

from surgeon.errors import DeltaError
from surgeon.foreign.files import Options
from surgeon.foreign.pieces import Piece, Prefix, Prompt

Tensors = dict[str, Tensor]


def prefix(options: Options, left: Tensors, where: str) -> tuple[list[Piece], None]:
    # A projection is folded before PEFT saves, so it makes no difference here.
    options.ignore("encoder_hidden_size", "prefix_projection", "init_weights")
    sets, rows = _virtual(options, left, where, repeated=False)
    layers, heads, width = (options.need(k, int) for k in ("num_layers", "num_attention_heads", "token_dim"))
    if rows.shape[1] != 2 * layers * width or width % heads:
        raise DeltaError(f"{rows.shape[1]} numbers a token are not 2 · {layers} layers · {width}", where=where)
    slots = rows.reshape(len(rows), layers, 2, width)
    keys, values = (slots[:, :, i].unbind(1) for i in (0, 1))
    if sets == 1:
        return [Prefix(keys=keys, values=values, shift=True, distances="before")], None
    # Of two stacks PEFT repeats the rows and deals out four slots a layer, two of which are for cross-attention and are
    # dropped: the decoder's layer i reads pair 2i modulo L, and the encoder has no prefix.
    own = [2 * i % layers for i in range(layers)]
    keys, values = (tuple(slots[i] for i in own) for slots in (keys, values))
    return [Prefix(keys=keys, values=values, shift=True, distances="before", stack="decoder")], None


def prompt(options: Options, left: Tensors, where: str) -> tuple[list[Piece], None]:
    options.ignore("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    options.ignore("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    options.ignore("token_dim", "num_layers", "num_attention_heads")
    sets, rows = _virtual(options, left, where, repeated=True)
    # An encoder-decoder's second half is never read: the prompt stands before the encoder's text alone.
    return [Prompt(rows=rows[: len(rows) // sets])], None


def _virtual(options: Options, left: Tensors, where: str, *, repeated: bool) -> tuple[int, Tensor]:
    """How many stacks the base has, and the rows: `num_virtual_tokens`, of each stack where they are `repeated`."""
    count, sets = options.need("num_virtual_tokens", int), options.get("num_transformer_submodules", int, 1)
    if sets not in (1, 2):
        raise DeltaError(
            f"`num_transformer_submodules` is {sets}, and a base has one stack or two", where=options.where
        )
    rows = left.pop("prompt_embeddings", None)
    if rows is None:
        raise DeltaError("prompt_embeddings is missing", where=where, there_is=left or "no tensors")
    if rows.dim() != 2 or len(rows) != (count * sets if repeated else count):
        raise DeltaError(f"prompt_embeddings is {list(rows.shape)} for {count} virtual tokens", where=where)
    return sets, rows
