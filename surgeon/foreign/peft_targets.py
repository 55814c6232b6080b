"""Which modules a PEFT configuration selects, by PEFT's rules: so that what a checkpoint lacks can be told."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.errors import DeltaError
from surgeon.foreign.pieces import Targets


@dataclass(frozen=True, kw_only=True)
class PeftTargets(Targets):
    """The selection of one PEFT configuration."""

    modules: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def wanted(self, paths: Collection[str]) -> frozenset[str]:
        """Paths that PEFT would have given tensors."""
        return frozenset(path for path in paths if self._selects(path))

    def _selects(self, path: str) -> bool:
        if _matches(self.excluded, path) or any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.saved):
            return False
        if not _matches(self.modules, path):
            return False
        return self.layers is None or isinstance(self.modules, str) or self._layer(path) in self.layers

    def _layer(self, path: str) -> int | None:
        """The first number of the path, behind one of the names in `layers_pattern` if there are any."""
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for m in (re.match(p, path) for p in patterns) if m), None)
        return int(found[1]) if found else None

    def check(self, where: str) -> None:
        """Raise DeltaError for an entry of `target_modules` that no tensor of the file belongs to."""
        entries = () if isinstance(self.modules, str) else self.modules
        idle = [e for e in entries if not any(_matches((e,), path) for path in self.found)]
        if idle:
            raise DeltaError(
                f"`target_modules` names what no tensor belongs to: {', '.join(idle)}",
                where=where,
                there_is=sorted({path.rpartition(".")[2] for path in self.found}),
                try_="PEFT says nothing when an entry matches no module: was it spelled right when this was trained?",
            )


def _matches(wanted: str | tuple[str, ...], path: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path, as `rank_pattern` and `alpha_pattern` do."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
