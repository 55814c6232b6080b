"""Front end: a base model becomes a flat FX graph, with the checkpoint's names and dynamic sizes.

`torch.export` in train mode gives an unlifted graph of high-level ops; it is then normalised once: guards and
metadata assertions go, `no_grad` blocks are inlined, tied weights take the name the checkpoint uses.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from transformers import PreTrainedModel

from surgeon.cached import PARTS, PAST, cache_shapes, cached_forward
from surgeon.errors import TraceError

SAMPLE = {"batch": 2, "sequence": 7, "decoder_sequence": 5, "rows": 3, "past": 4}


@dataclass(frozen=True)
class Input:
    """A model input: integer ids or masks `[batch, sequence]`, or what earlier tokens left behind.

    That is a tensor of the cache, `[batch, heads, past, width]`.
    `fill` is what an absent one is taken to be: 1 for masks, 0 for token types, None where it is required. An axis may
    be a sum, `past+sequence`.
    """

    name: str
    axes: tuple[str | int, ...]
    fill: int | None = None
    dtype: torch.dtype = torch.int64

    @property
    def cached(self) -> bool:
        """Whether it is a part of the cache: without earlier tokens it has no columns."""
        return self.dtype.is_floating_point

    def shape(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape where the axes have these sizes."""
        return [a if isinstance(a, int) else sum(sizes[word] for word in a.split("+")) for a in self.axes]

    def absent(self, ids: Tensor) -> Tensor:
        """What stands for it where only `ids` [batch, sequence] are given; these themselves where it is required."""
        if self.fill is None:
            return ids
        sizes = {"batch": ids.shape[0], "sequence": ids.shape[1], "decoder_sequence": ids.shape[1], "past": 0}
        return torch.full(self.shape(sizes), self.fill, dtype=self.dtype, device=ids.device)


def text_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """The inputs that a text model's forward takes and a tokenizer gives."""
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" not in accepted:
        raise TraceError(
            f"{type(model).__name__} takes no input_ids",
            there_is=list(accepted),
            try_="Surgeon traces text models so far",
        )
    known = [Input("input_ids", ("batch", "sequence")), Input("attention_mask", ("batch", "sequence"), 1)]
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        known.append(Input("token_type_ids", ("batch", "sequence"), 0))
    if model.config.is_encoder_decoder:
        known.append(Input("decoder_input_ids", ("batch", "decoder_sequence")))
    return tuple(i for i in known if i.name in accepted)


def cached_inputs(model: PreTrainedModel) -> tuple[Input, ...]:
    """The inputs of a decoder that generates: the new tokens, a mask over all tokens, and the cache of earlier ones."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    past = [
        Input(f"{PAST}_{PARTS[i % 2]}_{i // 2}", ("batch", heads, "past", width), 0, dtype)
        for i, (heads, width) in enumerate(cache_shapes(model))
    ]
    text = (Input("input_ids", ("batch", "sequence")), Input("attention_mask", ("batch", "past+sequence"), 1))
    return (*text, *past)


def sample_inputs(inputs: tuple[Input, ...], vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Small valid inputs, every size different and at least two; ids are random but fixed."""
    rng = torch.Generator().manual_seed(0)
    low = min(3, vocabulary - 1)

    def sample(i: Input) -> Tensor:
        shape = i.shape(SAMPLE)
        if i.cached:
            return torch.randn(shape, generator=rng).to(i.dtype)
        return torch.randint(low, vocabulary, shape, generator=rng) if i.fill is None else torch.full(shape, i.fill)

    return {i.name: sample(i).to(device) for i in inputs}


def vocabulary(model: PreTrainedModel) -> int:
    """How many ids there are: rows of the table of tokens, or what the configuration says where ids are hashed."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # transformers' word for a model without one table of tokens
        table = None
    rows = getattr(getattr(table, "weight", None), "shape", (getattr(model.config, "vocab_size", None) or 100,))
    return int(rows[0])


def trace(model: PreTrainedModel, inputs: tuple[Input, ...] | None = None) -> fx.GraphModule:
    """Trace `model` to a flat `GraphModule` called as the model is, with batch and sequence dynamic.

    With the inputs of a cache it is the model in eval mode, from tokens and cache to the last token's logits and the
    cache after it. Parameters and buffers are the model's own tensors, not copies. Raises TraceError where torch.export
    cannot follow the model or freezes one of its sizes.
    """
    inputs = inputs or text_inputs(model)
    generates = any(i.cached for i in inputs)
    sample = sample_inputs(inputs, vocabulary(model), next(model.parameters()).device)
    training = model.training
    with _traceable(model, [i.name for i in inputs] if generates else None), _quiet():
        try:
            exported = torch.export.export(
                model.train(not generates),
                (),
                sample,
                dynamic_shapes=_cached_dims(inputs) if generates else _dims(inputs),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:
            raise TraceError(
                f"torch.export cannot trace {type(model).__name__}: {_reason(error)}",
                try_="call torch.export.export on the model alone to see the whole reason",
            ) from error
        finally:
            model.train(training)
        unlifted = exported.module(check_guards=False)
    graph_module = fx.GraphModule(unlifted, unlifted.graph)
    normalise(graph_module, model)
    return graph_module


def _reason(error: Exception) -> str:
    """The first line of what the exporter says, with the next where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _dims(inputs: tuple[Input, ...]) -> dict[str, Any]:
    return {i.name: dict.fromkeys(range(len(i.axes)), Dim.DYNAMIC) for i in inputs}


def _cached_dims(inputs: tuple[Input, ...]) -> dict[str, Any]:
    """One symbol for the length of the past in all layers. The least total is that of the least past and sequence."""
    words = {axis for i in inputs for axis in i.axes if isinstance(axis, str)}
    dims = {word: Dim(word.replace("+", "_"), min=4) if "+" in word else Dim(word) for word in words}
    return {i.name: {at: dims[axis] for at, axis in enumerate(i.axes) if isinstance(axis, str)} for i in inputs}


@contextmanager
def _traceable(model: PreTrainedModel, cached: Sequence[str] | None) -> Iterator[None]:
    """Switch off what stops a trace (layer drop, auxiliary losses, an unwanted cache) and restore it afterwards."""
    configs = list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())
    wanted = {"use_cache": cached is not None, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    saved = [(c, k, getattr(c, k)) for c in configs for k in wanted if hasattr(c, k)]
    attributes = [(m, "layerdrop", m.layerdrop) for m in model.modules() if hasattr(m, "layerdrop")]
    try:
        for config, key, _ in saved:
            setattr(config, key, wanted[key])
        for module, key, _ in attributes:
            setattr(module, key, 0.0)
        if cached is not None:
            # Without gradients: attention of a mask that requires them is laid out in another way.
            with cached_forward(model, cached), torch.no_grad():
                yield
        else:
            yield
    finally:
        for owner, key, value in [*saved, *attributes]:
            setattr(owner, key, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own chatter; what fails is raised."""
    level = logging.getLogger("torch").level
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch").setLevel(level)


def normalise(graph_module: fx.GraphModule, model: torch.nn.Module) -> None:
    """Bring a fresh trace into the one form that anatomy and passes read."""
    for node in list(graph_module.graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in (
            torch.ops.aten._assert_tensor_metadata.default,
            torch.ops.aten._assert_scalar.default,
        ):
            graph_module.graph.erase_node(node)
    _inline_grad_blocks(graph_module)
    _canonical_names(graph_module, _checkpoint_names(model))
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()


def _inline_grad_blocks(graph_module: fx.GraphModule) -> None:
    """Replace `wrap_with_set_grad_enabled(flag, block, *args)` by the block's own nodes."""
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        block = graph_module.get_submodule(node.args[1].target)
        assert isinstance(block, fx.GraphModule)
        with graph_module.graph.inserting_before(node):
            places = iter(node.args[2:])
            env = {inner: next(places) for inner in block.graph.nodes if inner.op == "placeholder"}
            result = graph_module.graph.graph_copy(block.graph, env)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)


def _checkpoint_names(model: torch.nn.Module) -> Mapping[int, str]:
    """For each parameter and buffer (by identity) the first name it is registered under."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(id(tensor), name)
    return names


def _canonical_names(graph_module: fx.GraphModule, names: Mapping[int, str]) -> None:
    """Let every `get_attr` read a tied weight under its checkpoint name.

    torch.export keeps one node per alias and lets only the last registered one have users.
    """
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor: Any = graph_module
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        wanted = names.get(id(tensor))
        if wanted and wanted != node.target:
            owner, _, leaf = wanted.rpartition(".")
            module = graph_module
            for part in filter(None, owner.split(".")):
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            if not hasattr(module, leaf):
                if isinstance(tensor, torch.nn.Parameter):
                    module.register_parameter(leaf, tensor)
                else:
                    module.register_buffer(leaf, tensor)
            node.target = wanted
