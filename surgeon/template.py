"""Writes the spec a user starts from: every option with its default, and its description as the comment above it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap

from surgeon.catalog import Option, Technique, described, options
from surgeon.errors import SpecError
from surgeon.spec import BaseSpec, ExportSpec
from surgeon.spec.source import dump

WIDTH = 100


def template(names: Sequence[str], *, base: str | None = None, head: str | None = None) -> str:
    """A commented spec of these techniques, in this order. It compiles as it is once `base` names a model.

    Raises SpecError for a technique that there is not, or one that must follow another.
    """
    chosen = [described(name) for name in names]
    for place, one in enumerate(chosen):
        if one.after and not set(one.after) & set(names[:place]):
            raise SpecError(
                f"'{one.name}' must come after one of {', '.join(one.after)}", try_=f"{one.after[0]}+{one.name}"
            )
    given: dict[str, object] = {"model": base or "path/to/a/model", "head": head or "sequence-classification"}
    lines = [
        *_comment(f"{' + '.join(one.title for one in chosen)}. `surgeon plan` shows what this inserts.", ""),
        "base:",
        *_options(options(BaseSpec.model_json_schema()), given, "  ", only=("model", "head")),
        "",
        "# Techniques, in the order they are applied.",
        "surgery:",
        *(line for one in chosen for line in _item(one)),
        "",
        *_comment(
            "The tasks, by name: the labels of each, by name or how many. A task without labels keeps the base's head.",
            "",
        ),
        "tasks:",
        "  sentiment: {labels: [negative, positive]}",
        "",
        "export:",
        *_options(options(ExportSpec.model_json_schema()), {}, "  "),
        "",
        "# Seed of every random number.",
        "seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _item(one: Technique) -> Iterator[str]:
    paper = f" ({one.paper})" if one.paper else ""
    yield from _comment(f"{one.title}{paper}: {one.summary}", "  ")
    yield f"  - {one.name}:"
    yield from _options(one.options, {}, "      ")


def _options(
    known: Iterable[Option], given: dict[str, object], indent: str, only: tuple[str, ...] = ()
) -> Iterator[str]:
    for option in known:
        if only and option.name not in only:
            continue
        choices = f" One of: {', '.join(map(str, option.choices))}." if option.choices else ""
        yield from _comment(option.description + choices, indent)
        if option.required and option.name not in given:
            yield f"{indent}{option.name}:  # must be given"
        else:
            yield indent + _entry(option.name, given.get(option.name, option.default))


def _entry(name: str, value: object) -> str:
    """`name: value` on one line."""
    if isinstance(value, dict | list):
        return dump({name: value}).rstrip()
    return f"{name}: {dump([value]).rstrip()[1:-1]}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"
