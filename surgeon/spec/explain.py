"""Turns what pydantic found into sentences about the spec: close matches, what there is, and the line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from surgeon.errors import did_you_mean
from surgeon.registry import technique
from surgeon.spec.problems import Loc, Problem, dotted, listed
from surgeon.spec.source import Origin

LIMITS = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
          "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}  # fmt: skip


def problems(error: ValidationError, root: type[BaseModel], data: object, origin: Origin) -> list[Problem]:
    """Every mistake once, in the order of the text. The branches of a union tell theirs as one."""
    found: dict[tuple[Loc, bool], list[Problem]] = {}
    for detail in error.errors(include_url=False):
        path, key, problem = _problem(detail, root, data, origin)
        alternatives = found.setdefault((path, key), [])
        if problem not in alternatives:
            alternatives.append(problem)
    merged = [_merge(alternatives) for alternatives in found.values()]
    return sorted(merged, key=lambda problem: (problem.excerpt.line, problem.excerpt.start) if problem.excerpt else ())


def _merge(alternatives: list[Problem]) -> Problem:
    """Problems at one place as one: what a value could have been, joined by `or`."""
    first, *rest = alternatives
    whats = " or ".join([first.what, *(problem.what.partition(" ")[2] for problem in rest)])
    return Problem(whats, first.where, first.there_is, first.try_, first.excerpt)


def _problem(detail: ErrorDetails, root: type[BaseModel], data: object, origin: Origin) -> tuple[Loc, bool, Problem]:
    """Where in the spec one mistake is, whether at the key, and what to say."""
    kind, loc = detail["type"], detail["loc"]
    path = _written(loc, data)
    key = kind in ("extra_forbidden", "technique", "task_name", "missing") or loc[-1:] == ("[key]",)
    what, there_is, try_ = _words(detail, path, root)
    where = origin.where(path, key=key)
    return path, key, Problem(what, where, there_is, try_, origin.excerpt(path, key=key))


def _words(detail: ErrorDetails, path: Loc, root: type[BaseModel]) -> tuple[str, str | None, str | None]:
    """What is wrong, what there is instead, what to try."""
    context, message, shown, subject = detail.get("ctx", {}), detail["msg"], _shown(detail["input"]), _name(path)
    there_is = try_ = None
    match detail["type"]:
        case "technique":
            what, there_is, try_ = context["what"], context["there_is"], context["try_"]
        case "task_name":
            what = f"{shown} {message}"
        case "extra_forbidden":
            known = _options(root, path[:-1])
            what = f"{_owner(path[:-1])} has no option '{path[-1]}'"
            there_is, try_ = listed(known), did_you_mean(str(path[-1]), known)
        case "missing":
            what = f"{_owner(path)} needs '{detail['loc'][-1]}'"
        case "literal_error":
            choices = [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")]
            what = f"{subject} cannot be {shown}"
            there_is, try_ = listed(choices), did_you_mean(str(detail["input"]), choices)
        case kind if kind in LIMITS:
            words, bound = LIMITS[kind]
            if bound == "gt" and isinstance(detail["input"], int) and isinstance(context[bound], int):
                words, context = LIMITS["greater_than_equal"][0], {bound: context[bound] + 1}
            what = f"{subject} must be {words} {context[bound]}, got {shown}"
        case kind if kind.endswith(("_type", "_parsing")):
            what = f"{subject} must be {_kind(kind, message)}, got {shown}"
        case "value_error":
            what = f"{subject}: {context.get('error', message)}"
        case _:
            what = f"{subject} {message[:1].lower()}{message[1:]}"
    return what, there_is, try_


def _written(loc: Loc, data: Any) -> Loc:
    """The part of a pydantic location that exists in the data: without the names of a union's branches."""
    path: list[str | int] = []
    for part in loc:
        if part in (data if isinstance(data, Mapping) else range(len(data)) if isinstance(data, list | tuple) else ()):
            data = data[part]
            path.append(part)
    return tuple(path)


def _name(path: Loc) -> str:
    """How a person names an option: `lora.rank`, `tasks.topic.labels`, or `the spec`."""
    return dotted(path[2:] if path[:1] == ("surgery",) and len(path) > 2 else path) or "the spec"


def _owner(path: Loc) -> str:
    """How a person names what holds an option."""
    return f"'{_name(path)}'" if path else "the spec"


def _shown(value: object) -> str:
    """A value as it was written, cut short."""
    text = "nothing" if value is None else "a mapping" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _kind(kind: str, message: str) -> str:
    """What pydantic's type errors ask for, in the reader's words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
             "tuple": "a list", "list": "a list", "dict": "a mapping", "model": "a mapping"}  # fmt: skip
    return words.get(kind.partition("_")[0], message.removeprefix("Input should be "))


def _options(root: type[BaseModel], path: Loc) -> list[str]:
    """The options of the part of a spec at `path`, in the order of its class."""
    model: object = root
    for place, part in enumerate(path):
        if place == 2 and path[0] == "surgery":
            model = technique(str(part))
        elif isinstance(model, type) and issubclass(model, BaseModel):
            fields = model.model_fields
            model = fields[part].annotation if part in fields else None
        else:
            model = next((argument for argument in reversed(get_args(model)) if argument is not type(None)), None)
        model = _inside(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _inside(annotation: object) -> object:
    """An annotation without `Annotated` and `| None` around it."""
    while True:
        arguments = get_args(annotation)
        if hasattr(annotation, "__metadata__"):
            annotation = arguments[0]
        elif type(None) in arguments and get_origin(annotation) is not tuple:
            annotation = next(argument for argument in arguments if argument is not type(None))
        else:
            return annotation
