"""Front end: a base model becomes a flat FX graph, with the checkpoint's names and dynamic sizes.

`torch.export` in train mode gives an unlifted graph of high-level ops; it is then normalised once: guards and
metadata assertions go, `no_grad` blocks are inlined, tied weights take the name the checkpoint uses.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from surgeon.cached import cached_forward
from surgeon.dataflow import ancestors
from surgeon.errors import TraceError
from surgeon.inputs import SAMPLE, Input, base_inputs, sample_inputs, vocabulary
from surgeon.normalising import normalise

aten = torch.ops.aten

LONGEST = "longest"
"""Key of a graph's meta: the most tokens that it holds for, or None."""
FACTORS = (2, 4, 8, 16, 32, 64, 128)
LIMIT = 4096
"""How long a text may become for a trace."""
SWITCHES = {"train", "training", "dropout_p"}
"""What arguments are called by which an operator that draws in training is told not to."""


def trace(model: PreTrainedModel, inputs: tuple[Input, ...] | None = None) -> fx.GraphModule:
    """Trace `model` to a flat `GraphModule` called as the model is, with batch and sequence dynamic.

    With the inputs of a cache it is the model in eval mode, from tokens and cache to the last token's logits and the
    cache after it. Parameters and buffers are the model's own tensors, not copies. What draws in training by other
    means than dropout, such as a router that tries other experts, is traced as it is in eval mode: a frozen base is
    the base in training too. Raises TraceError where torch.export cannot follow the model or freezes one of its sizes.
    """
    inputs = inputs or base_inputs(model)
    calm: frozenset[str] = frozenset()
    graph_module = _traced(model, inputs, calm)
    trains = not any(i.cached for i in inputs)
    while trains and (drawing := _drawing(graph_module) - calm):
        calm |= drawing
        graph_module = _traced(model, inputs, calm)
    return graph_module


def _traced(model: PreTrainedModel, inputs: tuple[Input, ...], calm: Collection[str]) -> fx.GraphModule:
    """The trace, with the modules of the paths in `calm` in eval mode."""
    device = next(model.parameters()).device
    generates = any(i.cached for i in inputs)

    def export(sizes: Mapping[str, int]) -> ExportedProgram:
        sample = sample_inputs(inputs, vocabulary(model), device, sizes)
        return _exported(model, inputs, sample, calm, generates=generates)

    exported, longest = _settled(export, inputs)
    unlifted = exported.module(check_guards=False)
    graph_module = fx.GraphModule(unlifted, unlifted.graph)
    graph_module.meta[LONGEST] = longest
    normalise(graph_module, model)
    return graph_module


def _drawing(graph_module: fx.GraphModule) -> frozenset[str]:
    """Paths of the modules that draw random numbers for what the graph returns, by an operator without a switch."""
    read = ancestors(graph_module.graph.output_node())
    found = set()
    for node in graph_module.graph.nodes:
        schema: Any = getattr(node.target, "_schema", None)
        draws = schema is not None and torch.Tag.nondeterministic_seeded in node.target.tags
        if not draws or SWITCHES & {argument.name for argument in schema.arguments}:
            continue
        modules = [*(node.meta.get("nn_module_stack") or {}).values()]
        written = schema.is_mutable and node.args[0] in read
        if modules and (node in read or written):
            found.add(re.sub(r"@\d+", "", modules[-1][0]))
    return frozenset(found)


def _exported(
    model: PreTrainedModel,
    inputs: tuple[Input, ...],
    sample: Mapping[str, Tensor],
    calm: Collection[str],
    *,
    generates: bool,
) -> ExportedProgram:
    training = model.training
    with _traceable(model, [i.name for i in inputs] if generates else None), _quiet():
        try:
            model.train(not generates)
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a frozen base keeps its running statistics: in training too it is the base
            for path in calm:
                model.get_submodule(path).training = False
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


def _settled(
    export: Callable[[Mapping[str, int]], ExportedProgram], inputs: tuple[Input, ...]
) -> tuple[ExportedProgram, int | None]:
    """The trace, and the longest text that it is right for; None for any.

    Where a count that hangs on free sizes was one, it is one in the trace for good: such is the number of chunks that a
    recurrence cuts a text into. Then it is traced with larger sizes. If a count is a number even so, a loop was written
    out, and the first trace is right for all texts of one chunk. Raises TraceError where neither helps.
    """
    sizes = SAMPLE
    first = exported = export(sizes)
    while ones := [count for count, number in _counts(exported, inputs) if number == 1]:
        sizes = _larger(ones, sizes)
        exported = export(sizes)
        if any(number > 1 and _varies(count, number) for count, number in _counts(exported, inputs)):
            ones = [count for count, number in _counts(first, inputs) if number == 1]
            limits = [_while_one(ones), _longest(first, inputs)]
            return first, min(limit for limit in limits if limit is not None)
    return exported, _longest(exported, inputs)


def _counts(exported: ExportedProgram, inputs: tuple[Input, ...]) -> list[tuple[Any, int]]:
    """What the trace takes for a positive number although it hangs on free sizes: expressions of their words."""
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    words = {
        size.node.expr: _word(axis)
        for i in inputs
        for size, axis in zip(values[i.name].shape, i.axes, strict=True)
        if isinstance(axis, str) and "+" not in axis and isinstance(size, torch.SymInt)
    }
    asserted = [n.args[0].meta["val"] for n in exported.graph.nodes if n.target is aten._assert_scalar.default]
    equal = [c.node.expr for c in asserted if isinstance(c, torch.SymBool) and isinstance(c.node.expr, sympy.Eq)]
    return [
        (expr.lhs.subs(words), int(expr.rhs))
        for expr in equal
        if expr.rhs.is_Integer and expr.rhs > 0 and expr.lhs.free_symbols <= words.keys()
    ]


def _word(axis: str) -> sympy.Symbol:
    return sympy.Symbol(axis, integer=True, positive=True)


def _at(count: Any, sizes: Mapping[str, int]) -> int:
    return int(count.subs({_word(axis): size for axis, size in sizes.items()}))


def _varies(count: Any, number: int) -> bool:
    """Whether larger sizes give another number: what none changes, such as a chunk's own length, limits no text."""
    return any(_at(count, {word: size * factor + 1 for word, size in SAMPLE.items()}) != number for factor in FACTORS)


def _larger(counts: Sequence[Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes to trace with again, by which no count is one. Raises TraceError where there are none."""
    needed = {str(word) for count in counts for word in count.free_symbols}
    for factor in FACTORS:
        larger = {word: size * factor + 1 if word in needed else size for word, size in sizes.items()}
        if max(larger[word] for word in needed) > LIMIT:
            break
        if all(_at(count, larger) > 1 for count in counts):
            return larger
    raise TraceError(f"the trace holds only where {counts[0]} is 1", try_="a base that treats all lengths alike")


def _while_one(counts: Sequence[Any]) -> int:
    """The longest text by which every count is one. Raises TraceError where they hang on another size than a text's."""
    words = {str(word) for count in counts for word in count.free_symbols}
    if words != {"sequence"}:
        raise TraceError(
            f"the trace holds only where {counts[0]} is 1: the model's code loops over them",
            try_="a base that treats all lengths alike",
        )
    lengths = range(SAMPLE["sequence"], LIMIT)
    return next((n for n in lengths if any(_at(count, {"sequence": n + 1}) != 1 for count in counts)), LIMIT)


def _longest(exported: ExportedProgram, inputs: tuple[Input, ...]) -> int | None:
    """The longest text that the trace is the model for, which may go another way with longer ones; None for any."""
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    sizes = [s for i in inputs for s, axis in zip(values[i.name].shape, i.axes, strict=True) if axis == "sequence"]
    ranges = [exported.range_constraints.get(s.node.expr) for s in sizes if isinstance(s, torch.SymInt)]
    uppers = [int(r.upper) for r in ranges if r is not None and r.upper.is_Integer]
    return min((upper for upper in uppers if upper < sys.maxsize - 1), default=None)


REASONS = {
    "inferred a static shape": "its code takes a free size for a number, as a loop over tokens does",
    "data-dependent": "its code goes one way or another by what the data are",
    "Couldn't swap": "its code casts a module when it is called",
}
"""What it is in a model's code that the exporter stops at, by a part of the exporter's words."""


def _reason(error: Exception) -> str:
    """The first line of what the exporter says, with the next where the first announces it; and what it stems from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    known = next((f"{reason}. " for words, reason in REASONS.items() if words in said), "")
    return known + said


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
        with _masks_by_broadcast():
            if cached is None:
                yield
            else:
                # Without gradients: attention of a mask that requires them is laid out in another way.
                with cached_forward(model, cached), torch.no_grad():
                    yield
    finally:
        for owner, key, value in [*saved, *attributes]:
            setattr(owner, key, value)


@contextmanager
def _masks_by_broadcast() -> Iterator[None]:
    """Have transformers make every mask by broadcasting, as it does when it exports: a trace holds no vmap."""
    from transformers import masking_utils
    from transformers.exporters.utils import patch_attributes

    def expansion(_: Any) -> Any:
        def expand(mask_function: Any) -> Any:
            def expanded(*axes: Tensor) -> Tensor:
                mask: Tensor = mask_function(*masking_utils._non_vmap_expansion_sdpa(*axes))
                return mask.expand([axis.shape[0] for axis in axes])

            return expanded

        return expand

    patches: Any = patch_attributes
    places = [("_vmap_expansion_sdpa", expansion), ("TransformGetItemToIndex", lambda _: nullcontext)]
    with patches([(masking_utils, name, factory) for name, factory in places]):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own chatter, and have it write no line of code down for every node: a tenth of its time.

    What fails is raised.
    """
    level, without_lines = logging.getLogger("torch").level, fx.config.do_not_emit_stack_traces
    logging.getLogger("torch").setLevel(logging.ERROR)
    fx.config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fx.config.do_not_emit_stack_traces = without_lines
        logging.getLogger("torch").setLevel(level)
