"""What techniques there are, as plain data for people: the rows of `surgeon list` and of the README's table."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgeon.registry import names, technique


@dataclass(frozen=True)
class Option:
    """An option of a technique. `default` is a JSON value; `choices` are all there are, where they are few."""

    name: str
    description: str
    required: bool
    default: Any
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Technique:
    """A technique: where it comes from, whether a fresh task is exactly the base, its options and its file's lines."""

    name: str
    title: str
    paper: str
    summary: str
    identity_at_birth: bool
    after: tuple[str, ...]
    options: tuple[Option, ...]
    lines: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def techniques() -> tuple[Technique, ...]:
    """Every installed technique, by name."""
    return tuple(described(name) for name in names())


def described(name: str) -> Technique:
    """One technique. Raises SpecError with close matches where there is none of this name."""
    kind = technique(name)
    return Technique(
        name=kind.name,
        title=kind.title,
        paper=kind.paper,
        summary=(kind.__doc__ or "").strip().partition("\n")[0],
        identity_at_birth=kind.identity_at_birth,
        after=kind.after,
        options=tuple(options(kind.model_json_schema())),
        lines=len(inspect.getsource(sys.modules[kind.__module__]).splitlines()),
    )


def options(schema: Mapping[str, Any]) -> Iterator[Option]:
    """The options that the JSON schema of a part of a spec describes."""
    for name, entry in schema["properties"].items():
        yield Option(
            name=name,
            description=entry.get("description", ""),
            required=name in schema.get("required", ()),
            default=entry.get("default"),
            choices=tuple(_choices(entry)),
        )


def _choices(entry: Mapping[str, Any]) -> Iterator[str]:
    for branch in (entry, *entry.get("anyOf", ())):
        yield from branch.get("enum", ())


def markdown(known: Iterable[Technique]) -> str:
    """The techniques as a Markdown table."""
    lines = [
        "| technique | what it does | paper | a fresh task is the base | options | lines of code |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for one in known:
        words = ", ".join(f"`{option.name}`" for option in one.options)
        born = "yes" if one.identity_at_birth else "no"
        lines.append(
            f"| `{one.name}` | {one.title}: {one.summary} | {_link(one.paper)} | {born} | {words} | {one.lines} |"
        )
    return "\n".join(lines)


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper
