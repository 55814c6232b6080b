"""The invariants of the compiler, as named checks that run after every pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from surgeon.dataflow import ancestors
from surgeon.errors import CompositionError, InvariantError
from surgeon.inputs import sample_inputs
from surgeon.ledger import initial
from surgeon.module import switchable
from surgeon.program import Program


@dataclass(frozen=True)
class Reference:
    """What the base was before surgery: its tensors with their versions, and its answer on a small sample.

    `graph` is the base's own; `checkpoint` its answer with the checkpoint's tensors, `answer` with those it has now.
    """

    tensors: Mapping[str, tuple[int, int, int]]
    inputs: Mapping[str, Tensor]
    graph: fx.Graph
    checkpoint: Tensor | None
    answer: Tensor | None


def reference(program: Program) -> Reference:
    """Take the reference. On a base without weights (meta device) there is no answer to compare."""
    parameter = next(program.graph_module.parameters())
    vocabulary = max((e.rows for e in program.anatomy.embeddings if e.role == "embedding.token"), default=100)
    inputs = sample_inputs(program.inputs, vocabulary, parameter.device)
    answer = None if parameter.is_meta else run(program, {}, inputs)
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    graph._codegen = program.graph._codegen
    return Reference(_marks(program), inputs, graph, answer, answer)


def renewed(program: Program, before: Reference) -> Reference:
    """The reference after a pass that holds base tensors in another form, by the base's own graph.

    The base is then what it answers with the tensors that the forms stand for; `program.drift` says how far that is
    from the checkpoint's answer, relative to its largest value where that is above one.
    """
    if before.checkpoint is None:
        return replace(before, tensors=_marks(program))
    names = {node.target for node in before.graph.nodes if node.op == "get_attr"}
    module = fx.GraphModule({str(n): program.tensor(str(n)) for n in names}, before.graph)
    with torch.no_grad():
        answer = first_output(switchable(module).eval()(**before.inputs))
    drift = float((answer - before.checkpoint).abs().max()) / max(1.0, float(before.checkpoint.abs().max()))
    if not math.isfinite(drift):
        raise InvariantError("I2: the base gives no finite answer in its new form")
    program.drift = drift
    return replace(before, tensors=_marks(program), answer=answer)


def _marks(program: Program) -> dict[str, tuple[int, int, int]]:
    tensors = [*program.graph_module.named_parameters(), *program.graph_module.named_buffers()]
    return {name: _mark(tensor) for name, tensor in tensors}


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    """Changes with the tensor: another object, other memory, or written into."""
    return id(tensor), tensor._version, tensor.data_ptr()


def run(program: Program, deltas: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The program's first output in eval mode with these deployed deltas."""
    module = switchable(program.graph_module).eval()
    with torch.no_grad():
        return first_output(functional_call(module, dict(deltas), (), dict(inputs)))


def first_output(output: Any) -> Tensor:
    """Logits, or the first tensor of an output that has none."""
    found = next(t for t in output.values() if isinstance(t, Tensor)) if isinstance(output, dict) else output[0]
    logits = output.get("logits") if isinstance(output, dict) else None
    return logits if logits is not None else found


def verify(program: Program, before: Reference, *, identity: bool) -> None:
    """Raise InvariantError where an invariant does not hold.

    I1 the graph lints and every value has a shape; I2 base tensors are the checkpoint's, or what their form's maker
    reads from it; I3 what is trained is the
    ledger's; I4 with default deltas (and, where `identity`, with fresh ones) the program is the base; I5 two
    tasks share no tensor with each other or the base; I6 the same seed starts with the same bytes; I7 no place has the
    same part twice by two steps of one technique.
    """
    _i1_graph(program)
    _i2_base(program, before)
    _i3_ledger(program)
    _i7_once(program)
    if before.answer is not None:
        _i4_identity(program, before, fresh=identity)
        one, other = initial(program.ledger, "verify/one"), initial(program.ledger, "verify/other")
        _i5_apart(program, one, other)
        _i6_repeatable(one, initial(program.ledger, "verify/one"))


def _i1_graph(program: Program) -> None:
    program.graph.lint()
    for node in program.graph.nodes:
        if node.op in ("call_function", "call_module", "get_attr") and node.users and node.meta.get("val") is None:
            raise InvariantError(f"I1: {node} ({node.target}) has no shape", where=str(node.meta.get("surgeon")))


def _i2_base(program: Program, before: Reference) -> None:
    for name in program.frozen:
        tensor = program.tensor(name)
        if _mark(tensor) != before.tensors[name]:
            raise InvariantError("I2: a base tensor was changed", where=name)


def _i3_ledger(program: Program) -> None:
    read = {n.target for n in program.graph.nodes if n.op == "get_attr" and n.users}
    own = {n for n, _ in program.graph_module.named_parameters()} - program.frozen
    if own != set(program.ledger.deltas):
        raise InvariantError(f"I3: tensors and ledger differ: {sorted(own ^ set(program.ledger.deltas))}")
    if unread := set(program.ledger.deltas) - read:
        raise InvariantError(f"I3: deltas that nothing reads: {sorted(unread)}")
    live = {n.target for n in ancestors(program.output) if n.op == "get_attr"}
    if dead := [d for name, d in program.ledger.deltas.items() if name not in live]:
        raise CompositionError(
            f"what '{dead[0].technique}' does at {dead[0].site} has no effect any more",
            there_is=f"no output depends on {dead[0].name}",
            try_="leave that site out of its `where`: a technique after it replaces what is there",
        )


def _i4_identity(program: Program, before: Reference, *, fresh: bool) -> None:
    states = {"default": program.ledger.defaults()}
    if fresh:
        states["fresh"] = program.ledger.deploy(initial(program.ledger, "verify"))
    for name, deltas in states.items():
        answer = run(program, deltas, before.inputs)
        assert before.answer is not None
        if answer.shape != before.answer.shape:
            raise InvariantError(f"I4: with {name} deltas the output has shape {list(answer.shape)}")
        gap = float((answer - before.answer).abs().max())
        # Equal but for rounding: `h @ W` and `linear(h, W.T)` may take kernels that sum in another order.
        if not gap <= 8 * torch.finfo(answer.dtype).eps * max(1.0, float(before.answer.abs().max())):
            raise InvariantError(f"I4: with {name} deltas the program is not the base (largest difference {gap:g})")


def _i5_apart(program: Program, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    taken = {program.tensor(name).untyped_storage().data_ptr(): name for name in program.frozen}
    taken |= {tensor.untyped_storage().data_ptr(): name for name, tensor in one.items()}
    for name, tensor in other.items():
        shared = taken.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if shared:
            raise InvariantError(f"I5: {name} of one task shares its memory with {shared}")


def _i6_repeatable(once: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    if changed := [name for name, tensor in once.items() if not torch.equal(tensor, again[name])]:
        raise InvariantError(f"I6: the same seed gives other starting values: {changed}")


def _i7_once(program: Program) -> None:
    makers: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, delta in program.ledger.deltas.items():
        place = (delta.technique, delta.site, delta.role, delta.part)
        if makers.setdefault(place, program.maker(name)) != program.maker(name):
            raise InvariantError(f"I7: '{delta.technique}' was applied twice at {delta.site}", where=name)
