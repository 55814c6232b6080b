"""Front end: a base model becomes a flat FX graph, with the checkpoint's names and dynamic sizes.

`torch.export` in train mode gives an unlifted graph of high-level ops; it is then normalised once: guards and
metadata assertions go, `no_grad` blocks are inlined, tied weights take the name the checkpoint uses.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from surgeon.cached import cached_forward
from surgeon.errors import TraceError
from surgeon.inputs import SAMPLE, Input, base_inputs, sample_inputs, vocabulary

aten = torch.ops.aten

LONGEST = "longest"
"""Key of a graph's meta: the most tokens that it holds for, or None."""
FACTORS = (2, 4, 8, 16, 32, 64, 128)
LIMIT = 4096
"""How long a text may become for a trace."""


def trace(model: PreTrainedModel, inputs: tuple[Input, ...] | None = None) -> fx.GraphModule:
    """Trace `model` to a flat `GraphModule` called as the model is, with batch and sequence dynamic.

    With the inputs of a cache it is the model in eval mode, from tokens and cache to the last token's logits and the
    cache after it. Parameters and buffers are the model's own tensors, not copies. Raises TraceError where torch.export
    cannot follow the model or freezes one of its sizes.
    """
    inputs = inputs or base_inputs(model)
    device = next(model.parameters()).device
    generates = any(i.cached for i in inputs)
    sizes: Mapping[str, int] | None = SAMPLE
    while sizes is not None:
        sample = sample_inputs(inputs, vocabulary(model), device, sizes)
        exported = _exported(model, inputs, sample, generates=generates)
        sizes = _larger(exported, inputs, sizes)
    unlifted = exported.module(check_guards=False)
    graph_module = fx.GraphModule(unlifted, unlifted.graph)
    graph_module.meta[LONGEST] = _longest(exported, inputs)
    normalise(graph_module, model)
    return graph_module


def _exported(
    model: PreTrainedModel, inputs: tuple[Input, ...], sample: Mapping[str, Tensor], *, generates: bool
) -> ExportedProgram:
    training = model.training
    with _traceable(model, [i.name for i in inputs] if generates else None), _quiet():
        try:
            model.train(not generates)
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a frozen base keeps its running statistics: in training too it is the base
            return torch.export.export(
                model,
                (),
                dict(sample),
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


def _larger(exported: ExportedProgram, inputs: tuple[Input, ...], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Sizes to trace with again, where a count that hangs on them was one and is one in the trace for good.

    Such is the number of chunks that a recurrence cuts a text into. Raises TraceError where no size helps.
    """
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    words = {
        str(size): axis
        for i in inputs
        for size, axis in zip(values[i.name].shape, i.axes, strict=True)
        if isinstance(axis, str) and "+" not in axis
    }
    asserted = [n.args[0].meta["val"] for n in exported.graph.nodes if n.target is aten._assert_scalar.default]
    counts = [
        expr.lhs
        for condition in asserted
        if isinstance(condition, torch.SymBool) and isinstance(expr := condition.node.expr, sympy.Eq) and expr.rhs == 1
        if {str(symbol) for symbol in expr.lhs.free_symbols} <= words.keys()
    ]
    if not counts:
        return None
    needed = {words[str(symbol)] for count in counts for symbol in count.free_symbols}
    for factor in FACTORS:
        larger = {word: size * factor + 1 if word in needed else size for word, size in sizes.items()}
        if max(larger[word] for word in needed) > LIMIT:
            break
        if all(count.subs({s: larger[words[str(s)]] for s in count.free_symbols}) > 1 for count in counts):
            return larger
    raise TraceError(f"the trace holds only where {counts[0]} is 1", try_="a base that treats all lengths alike")


def _longest(exported: ExportedProgram, inputs: tuple[Input, ...]) -> int | None:
    """The longest text that the trace is the model for, which may go another way with longer ones; None for any."""
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    sizes = [s for i in inputs for s, axis in zip(values[i.name].shape, i.axes, strict=True) if axis == "sequence"]
    ranges = [exported.range_constraints.get(s.node.expr) for s in sizes if isinstance(s, torch.SymInt)]
    uppers = [int(r.upper) for r in ranges if r is not None and r.upper.is_Integer]
    return min((upper for upper in uppers if upper < sys.maxsize - 1), default=None)


def _reason(error: Exception) -> str:
    """The first line of what the exporter says, with the next where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _dims(inputs: tuple[Input, ...]) -> dict[str, Any]:
    return {i.name: {at: Dim.DYNAMIC for at, axis in enumerate(i.axes) if isinstance(axis, str)} for i in inputs}


def _cached_dims(inputs: tuple[Input, ...]) -> dict[str, Any]:
    """One symbol for the length of the past in all layers. The least total is that of the least past and sequence."""
    words = {axis for i in inputs for axis in i.axes if isinstance(axis, str)}
    dims = {word: Dim(word.replace("+", "_"), min=4) if "+" in word else Dim(word) for word in words}
    return {i.name: {at: dims[axis] for at, axis in enumerate(i.axes) if isinstance(axis, str)} for i in inputs}


@contextmanager
def _traceable(model: PreTrainedModel, cached: Sequence[str] | None) -> Iterator[None]:
    """Switch off what stops a trace (dropped layers, masked features, an unwanted cache) and restore it later."""
    configs = list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())
    wanted: dict[str, Any] = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    wanted |= {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    if cached is None:
        wanted["use_cache"] = False
    saved = [(c, k, getattr(c, k)) for c in configs for k in wanted if hasattr(c, k)]
    dropped = ("layerdrop", "drop_prob")
    attributes = [(m, k, getattr(m, k)) for m in model.modules() for k in dropped if hasattr(m, k)]
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
            aten._assert_tensor_metadata.default,
            aten._assert_scalar.default,
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
