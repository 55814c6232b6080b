"""What a base is called with: the inputs of its forward, their free axes, and small samples of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.cached import PARTS, PAST, cache_shapes
from surgeon.errors import TraceError

SAMPLE: Mapping[str, int] = {
    "batch": 2,
    "sequence": 7,
    "decoder_sequence": 5,
    "rows": 3,
    "past": 4,
    "source": 6,
    "samples": 3051,
    "frames": 29,
}
"""Sizes of free axes in a trace: all different, of a sound as many samples as a few tokens are made of.

Some pair these, and pad where one is left over: it is an odd number of them, for what pads nothing then holds too."""
IMAGE = 224
"""Height and width of an image where the configuration names none."""


@dataclass(frozen=True)
class Input:
    """A model input: integer ids or masks `[batch, sequence]`, numbers such as pixels, or what earlier tokens left.

    The last is a tensor of the cache, `[batch, heads, past, width]`.
    `fill` is what an absent one is taken to be: 1 for masks, 0 for token types, None where it is required. An axis may
    be a sum, `past+sequence`.
    """

    name: str
    axes: tuple[str | int, ...]
    fill: int | None = None
    dtype: torch.dtype = torch.int64
    cached: bool = False
    """Whether it is a part of the cache: without earlier tokens it has no columns."""
    end: int | None = None
    """The token that ends every text, where the model looks for it; it stands nowhere else."""

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape where the axes have these sizes."""
        return [a if isinstance(a, int) else sum(sizes[word] for word in a.split("+")) for a in self.axes]

    def absent(self, like: Tensor) -> Tensor:
        """What stands for it where only `like` [batch, length, …] is given; that itself where it is required."""
        if self.fill is None:
            return like
        length = like.shape[1]
        sizes = dict.fromkeys(("sequence", "decoder_sequence", "samples", "frames"), length)
        sizes |= {"batch": like.shape[0], "past": 0}
        return torch.full(self.shape(sizes), self.fill, dtype=self.dtype, device=like.device)


def sizes_of(inputs: Sequence[Input], given: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that free axes have in what is `given`, or had in the trace; those of the cache by their parts."""
    found: dict[str, int] = {}
    for i in inputs:
        if i.name in given:
            for axis, size in zip(i.axes, given[i.name].shape, strict=True):
                if isinstance(axis, str) and "+" not in axis:
                    found[axis] = size.node.hint if isinstance(size, torch.SymInt) else size
    return found


def base_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """The inputs that a model's forward takes and a tokenizer or a processor gives.

    Raises TraceError for a model whose main input is none that is known here.
    """
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" in accepted:
        return text_inputs(model)
    known = {"pixel_values": _image, "input_values": _sound, "input_features": _spectrum}
    for name, make in known.items():
        if name in accepted:
            return tuple(i for i in make(model) if i.name in accepted)
    raise TraceError(
        f"{type(model).__name__} takes none of the inputs that Surgeon knows",
        there_is=list(accepted),
        try_=f"a model of one of input_ids, {', '.join(known)}",
    )


def text_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """The inputs that a text model's forward takes and a tokenizer gives.

    An encoder-decoder that writes nothing, such as a classifier, has its decoder read the text itself up to its end.
    """
    accepted = inspect.signature(model.forward).parameters
    decodes = accepted.get("decoder_input_ids")
    writes = model.can_generate() or (decodes is not None and decodes.default is decodes.empty)
    ends = model.config.eos_token_id if model.config.is_encoder_decoder and not writes else None
    end = ends if isinstance(ends, int) else None
    known = [Input("input_ids", ("batch", "sequence"), end=end), Input("attention_mask", ("batch", "sequence"), 1)]
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        known.append(Input("token_type_ids", ("batch", "sequence"), 0))
    if model.config.is_encoder_decoder and writes:
        known.append(Input("decoder_input_ids", ("batch", "decoder_sequence")))
    return tuple(i for i in known if i.name in accepted)


def _image(model: PreTrainedModel) -> tuple[Input, ...]:
    """Pixels `[batch, channels, height, width]` of the size that the configuration says."""
    size = _field(model.config, "image_size") or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _field(model.config, "num_channels") or 3
    return (Input("pixel_values", ("batch", int(channels), int(height), int(width)), dtype=_dtype(model)),)


def _sound(model: PreTrainedModel) -> tuple[Input, ...]:
    """Samples `[batch, samples]`, or a spectrogram of fixed length where the configuration counts its bins."""
    bins = _field(model.config, "num_mel_bins")
    if bins is not None and (length := _field(model.config, "max_length")):
        return (Input("input_values", ("batch", int(length), int(bins)), dtype=_dtype(model)),)
    return (
        Input("input_values", ("batch", "samples"), dtype=_dtype(model)),
        Input("attention_mask", ("batch", "samples"), 1),
    )


def _spectrum(model: PreTrainedModel) -> tuple[Input, ...]:
    """A spectrogram: bins by a fixed number of frames where positions are a table, else frames by features."""
    if (bins := _field(model.config, "num_mel_bins")) and (places := _field(model.config, "max_source_positions")):
        return (Input("input_features", ("batch", int(bins), 2 * int(places)), dtype=_dtype(model)),)
    width = _field(model.config, "feature_projection_input_dim") or bins
    if not width:
        raise TraceError(f"the configuration of {type(model).__name__} does not say how wide input_features are")
    return (
        Input("input_features", ("batch", "frames", int(width)), dtype=_dtype(model)),
        Input("attention_mask", ("batch", "frames"), 1),
    )


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _field(config: PretrainedConfig, name: str) -> Any:
    """A field of a configuration, or of the first of those within it that has it."""
    return next((value for part in _parts(config) if (value := getattr(part, name, None)) is not None), None)


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def cached_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """The inputs of a decoder that generates: the new tokens, a mask over all tokens, and the cache of earlier ones.

    Those of an encoder-decoder: the source, the new tokens, and the cache of earlier ones.
    """
    past = [
        Input(f"{PAST}_{PARTS[i % 2]}_{i // 2}", ("batch", heads, "past", width), 0, _dtype(model), cached=True)
        for i, (heads, width) in enumerate(cache_shapes(model))
    ]
    if model.config.is_encoder_decoder:
        return (*text_inputs(model), *past)
    text = (Input("input_ids", ("batch", "sequence")), Input("attention_mask", ("batch", "past+sequence"), 1))
    return (*text, *past)


def sample_inputs(
    inputs: Sequence[Input], vocabulary: int, device: torch.device, sizes: Mapping[str, int] = SAMPLE
) -> dict[str, Tensor]:
    """Small valid inputs, every free size different and at least two; ids and numbers are random but fixed."""
    rng = torch.Generator().manual_seed(0)
    low = min(3, vocabulary - 1)

    def sample(i: Input) -> Tensor:
        shape = i.shape(sizes)
        if i.dtype.is_floating_point:
            return torch.randn(shape, generator=rng).to(i.dtype)
        if i.fill is not None:
            return torch.full(shape, i.fill)
        return ended(torch.randint(low, vocabulary, shape, generator=rng), i.end)

    return {i.name: sample(i).to(device) for i in inputs}


def ended(ids: Tensor, end: int | None) -> Tensor:
    """Texts `[batch, tokens]` with the token that ends them at their end and nowhere else."""
    if end is None:
        return ids
    other = torch.where(ids == end, ids + (1 if end == 0 else -1), ids)
    return torch.cat([other[:, :-1], torch.full_like(ids[:, :1], end)], 1)


def vocabulary(model: PreTrainedModel) -> int:
    """How many ids there are: rows of the table of tokens, or what the configuration says where ids are hashed."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # transformers' word for a model without one table of tokens
        table = None
    rows = getattr(getattr(table, "weight", None), "shape", (getattr(model.config, "vocab_size", None) or 100,))
    return int(rows[0])
