"""Finds techniques and exporters by name, through entry points: ours and anybody's by the same door.

Nothing is imported before it is named; two packages that claim one name are an error naming both.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from surgeon.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from surgeon.passes import Pass

PASSES = "surgeon.passes"
EXPORTERS = "surgeon.exporters"


def names(group: str = PASSES) -> tuple[str, ...]:
    """Every installed technique's name (or exporter's), sorted; imports none."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def technique(name: str) -> type[Pass]:
    """The pass class of this name. Raises SpecError with close matches where there is none."""
    found = _load(PASSES, "technique", name)
    from surgeon.passes import Pass  # here: reading the list of names must not import torch

    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == name):
        raise SpecError(
            f"technique '{name}' is not a pass of that name but {found!r}",
            try_=f"its entry point must name a subclass of surgeon.passes.Pass with `name = '{name}'`",
        )
    return found


def exporter(name: str) -> object:
    """What the exporter's entry point names. Raises SpecError with close matches where there is none."""
    return _load(EXPORTERS, "exporter", name)


def _load(group: str, kind: str, name: str) -> object:
    """Import the one object of this name."""
    claims = list(entry_points(group=group, name=name))
    if not claims:
        known = names(group)
        raise SpecError(f"unknown {kind} '{name}'", there_is=known, try_=did_you_mean(name, known))
    if len(claims) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in claims))
        raise SpecError(f"two packages claim the {kind} '{name}': {owners}", try_="uninstall one of them")
    try:
        loaded: object = claims[0].load()
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{kind} '{name}' of {_owner(claims[0])} cannot be imported: {error}",
            try_="install what it needs; Surgeon's own need `pip install 'modelsurgeon[compile]'`",
        ) from error
    return loaded


def _owner(entry: EntryPoint) -> str:
    """The distribution an entry point comes from, with its target."""
    return f"{entry.dist.name if entry.dist else 'an unnamed package'} ({entry.value})"
