"""What stands beside a method in PEFT's file: modules saved whole, biases, and copies of the base's own tensors."""

from __future__ import annotations

import re

from torch import Tensor

from surgeon.errors import DeltaError
from surgeon.foreign.files import Options
from surgeon.foreign.pieces import Piece, Same, Targets, Whole

CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to `modules_to_save` by itself; any one of them is what the base calls its head."""

Tensors = dict[str, Tensor]


def saved_whole(options: Options, left: Tensors, targets: Targets | None, task: str | None, where: str) -> list[Piece]:
    """Take out of `left` what is no part of a method: modules saved whole, biases, copies of the base's own."""
    names = list(dict.fromkeys(options.get("modules_to_save", list, [])))
    saved: Tensors = {}
    pieces: list[Piece] = []
    for key in list(left):
        owner, _, leaf = key.rpartition(".")
        if owner.endswith(".base_layer"):
            module = owner.removesuffix(".base_layer")
            if leaf == "bias" and targets is not None and targets.biases != "none":
                saved[f"{module}.bias"] = left.pop(key)
            elif leaf == "weight" and targets is not None and module in targets.found:
                pieces.append(Same(name=f"{module}.weight", tensor=left.pop(key)))
        elif any(holds(name, owner) for name in names) or (targets and targets.biases == "all" and leaf == "bias"):
            saved[key] = left.pop(key)
    pieces += [Whole(name=name, tensor=tensor) for name, tensor in _once(saved, where).items()]
    _all_saved(names, saved, task, where)
    return pieces


def _once(saved: Tensors, where: str) -> Tensors:
    """Each tensor once: beside a bias of a saved module PEFT may write the base's and its own inner copy too."""
    once = {key: t for key, t in saved.items() if not re.search(r"\.(original_module|modules_to_save)\.", key)}
    for key in saved.keys() - once.keys():
        name = re.sub(r"\.(original_module|modules_to_save)\.", ".", key)
        differs = ".modules_to_save." in key and name in once and not saved[key].equal(once[name])
        if name not in once or differs:
            raise DeltaError(f"{key} is there and {name} is {'another' if differs else 'not'}", where=where)
    return once


def holds(name: str, owner: str) -> bool:
    """Whether PEFT saves the module at `owner`, or one around it, for this entry: it goes by the bare end of a path."""
    parts = owner.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def _all_saved(names: list[str], saved: Tensors, task: str | None, where: str) -> None:
    """Raise DeltaError where an entry of `modules_to_save` has no tensor."""
    owners = {key.rpartition(".")[0] for key in saved}
    idle = [name for name in names if not any(holds(name, owner) for owner in owners)]
    classifiers = CLASSIFIERS.get(task or "", ())
    if set(names) & set(classifiers) - set(idle):
        idle = [name for name in idle if name not in classifiers]
    if idle:
        raise DeltaError(
            f"`modules_to_save` names what no tensor belongs to: {', '.join(idle)}",
            where=where,
            there_is=sorted(saved) or "no module saved whole",
            try_="PEFT says nothing when a name matches no module: it was not trained, and is not here",
        )
