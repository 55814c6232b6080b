"""Reads a spec from a file, a text or a mapping, and tells all its mistakes at once."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

from pydantic import ValidationError

from surgeon.errors import SpecError
from surgeon.spec.envelope import Spec
from surgeon.spec.explain import problems
from surgeon.spec.problems import Problem, SpecProblems
from surgeon.spec.source import MAX_CHARACTERS, Origin, parse


def read_spec(source: Spec | str | PathLike[str] | Mapping[str, object]) -> Spec:
    """A spec from a YAML file or a mapping; one in hand is given back. Raises SpecError with every mistake."""
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return _validate(dict(source), Origin(), [])
    if not isinstance(source, str | PathLike):
        raise SpecError(f"a spec is a file, a mapping or a Spec, not {type(source).__name__}")
    name = fspath(source)
    try:
        with Path(name).open("rb") as file:
            text = file.read(4 * MAX_CHARACTERS + 1).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SpecError("there is no such spec", where=name, try_="`surgeon init TECHNIQUE` writes one") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the spec is not UTF-8 text (byte {error.start})", where=name) from error
    except (OSError, ValueError) as error:
        raise SpecError(f"the spec cannot be read: {getattr(error, 'strerror', None) or error}", where=name) from error
    return parse_spec(text, name)


def parse_spec(text: str, name: str = "spec.yaml") -> Spec:
    """A spec from YAML text; `name` is what its mistakes are told under."""
    data, origin, mistakes = parse(text, name)
    if not isinstance(data, dict):
        what = "the spec is empty" if data is None else "a spec is a mapping"
        raise SpecProblems([*mistakes, Problem(what, where=name, there_is=", ".join(Spec.model_fields))])
    return _validate(data, origin, mistakes)


def _validate(data: dict[str, object], origin: Origin, mistakes: list[Problem]) -> Spec:
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise SpecProblems([*mistakes, *problems(error, Spec, data, origin)]) from None
    if mistakes:
        raise SpecProblems(mistakes)
    spec._origin = origin
    return spec
