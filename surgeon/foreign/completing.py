"""Completes a task: what a foreign checkpoint does not bring is left as the base has it, where it can be."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.compiler import Compiled
from surgeon.errors import DeltaError
from surgeon.ledger import Ledger
from surgeon.starts import generator


def complete(compiled: Compiled, task: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The trained tensors of `task`: those given, and for the rest what leaves the base as it is.

    Raises DeltaError where a tensor that is not given has no such value, or belongs to no task of this kind.
    """
    ledger, wanted = compiled.program.ledger, compiled.model(task).state_dict()
    folded = [n for n in tensors if n in ledger.deltas and ledger.deltas[n].init is None]
    if folded:
        raise DeltaError(
            f"{folded[0]} is trained in another form in this build, and the file holds the final one",
            where=where,
            try_="compile a spec without the reparametrisation (`hidden`) for weights that are only run",
        )
    foreign = sorted(set(tensors) - set(wanted))
    if foreign:
        raise DeltaError(
            f"the folder brings a head and the task '{task}' keeps the base's own",
            where=where,
            there_is=foreign,
            try_=f"`tasks: {{{task}: {{labels: …}}}}` in the spec",
        )
    full = {name: tensors[name] if name in tensors else _empty(ledger, name) for name in wanted}
    kept = {name: d.default for name, d in ledger.deltas.items() if name not in wanted and d.init is not None}
    deployed = ledger.deploy({**kept, **full})
    touched = set(tensors) | {o for f in ledger.folds if set(f.inputs) & set(tensors) for o in f.outputs}
    own = compiled.spec.tasks[task].labels
    for name, delta in ledger.deltas.items():
        if name in touched or deployed[name].equal(delta.default):
            continue
        raise DeltaError(f"{name} is trained in another form, which has no empty state", where=where)
    if own is not None and not any(delta.optional and n in tensors for n, delta in ledger.deltas.items()):
        raise DeltaError(
            f"the folder brings no head, and the task '{task}' has labels",
            where=where,
            try_="PEFT saves the head where `task_type` is SEQ_CLS or it stands in `modules_to_save`; else it is lost",
        )
    return full


def _empty(ledger: Ledger, name: str) -> Tensor:
    """What a trained tensor is where the technique is not used."""
    if name in ledger.deltas:
        return ledger.deltas[name].default
    entry = ledger.trained[name]
    if not entry.free:
        return entry.init(entry.shape, generator(name)).to(entry.dtype)
    return torch.zeros([0 if axis in entry.free else size for axis, size in enumerate(entry.shape)], dtype=entry.dtype)
