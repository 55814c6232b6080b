"""Where a spec was written: YAML text to plain values, with the line and column of every one kept beside them.

Reads YAML 1.2's core words, so `no` and `on` are text and `1e-3` is a number; tags, merge keys and duplicate keys
are mistakes. Built on the parser's events, so no object is ever constructed from a tag and an alias costs what it
stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import yaml

from surgeon.spec.problems import Excerpt, Loc, Problem, SpecProblems, dotted

MAX_CHARACTERS = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40

LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Span:
    """A place in the text, counted from 0; `end` is a column of the same line."""

    line: int
    column: int
    end: int


@dataclass(eq=False)
class Origin:
    """The text a spec came from. Equal to any other: where a value was written is no part of the value."""

    name: str | None = None
    lines: tuple[str, ...] = ()
    values: dict[Loc, Span] = field(default_factory=dict)
    keys: dict[Loc, Span] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    __hash__ = None  # type: ignore[assignment]

    def span(self, path: Loc, *, key: bool = False) -> Span | None:
        """Where `path` (or the nearest thing around it) was written."""
        if self.name is None:
            return None
        while path not in self.values and path:
            path = path[:-1]
        return self.keys.get(path) if key and path in self.keys else self.values.get(path)

    def where(self, path: Loc, *, key: bool = False) -> str | None:
        """`file:line:column` of a path, or the dotted path where the spec is no text."""
        span = self.span(path, key=key)
        return f"{self.name}:{span.line + 1}:{span.column + 1}" if span else dotted(path)

    def excerpt(self, path: Loc, *, key: bool = False) -> Excerpt | None:
        """The line a path was written on."""
        span = self.span(path, key=key)
        return self.quote(span) if span else None

    def quote(self, span: Span) -> Excerpt | None:
        """The text at a span."""
        return Excerpt(self.lines[span.line], span.line, span.column, span.end) if span.line < len(self.lines) else None


def parse(text: str, name: str) -> tuple[object, Origin, list[Problem]]:
    """The value of a YAML text, where each part of it stands, and the mistakes that left it readable.

    Raises SpecError where it is not readable.
    """
    origin = Origin(name, tuple(LINE_BREAK.split(text)))
    if len(text) > MAX_CHARACTERS:
        raise SpecProblems([Problem(f"{len(text)} characters, where a spec has at most {MAX_CHARACTERS}", where=name)])
    reader = _Reader(origin)
    try:
        value = reader.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "this is not YAML: " + ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecProblems([reader.problem(what, mark)]) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SpecProblems([Problem(f"this is not YAML: {str(error).splitlines()[0]}", where=name)]) from error
    return value, origin, reader.problems


class _Mark(Protocol):
    """A place as the parser gives it."""

    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


@dataclass
class _Reader:
    """Turns events into values; mistakes that are no syntax errors are gathered, so that all are told at once."""

    origin: Origin
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, tuple[object, int]] = field(default_factory=dict)
    nodes: int = 0

    def document(self, events: Iterator[yaml.Event]) -> object:
        """The single document of the text."""
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self.node(next(events), events, ())
        next(events)
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            self.problems.append(self.problem("a second document starts here; a spec is one", after.start_mark))
        return value

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], path: Loc) -> object:
        """The value that starts with `event`."""
        self.origin.values[path] = self.span(event.start_mark, event.end_mark)
        self.spend(1, event)
        if len(path) > MAX_DEPTH:
            raise SpecProblems([self.problem(f"nested more than {MAX_DEPTH} deep", event.start_mark)])
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise SpecProblems([self.problem(f"there is no anchor '{event.anchor}' above", event.start_mark)])
            value, cost = self.anchors[event.anchor]
            self.spend(cost, event)
            return value
        before = self.nodes
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            self.problems.append(self.problem(f"tags are not read: {event.tag}", event.start_mark))
        result: object
        if isinstance(event, yaml.MappingStartEvent):
            result = self.mapping(events, path)
        elif isinstance(event, yaml.CollectionStartEvent):
            result = self.sequence(events, path)
        else:
            result = self.scalar(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = (result, self.nodes - before)
        return result

    def mapping(self, events: Iterator[yaml.Event], path: Loc) -> dict[str, object]:
        """A mapping; its keys are words, each written once."""
        result: dict[str, object] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise SpecProblems([self.problem("a key must be a word", event.start_mark)])
            key = event.value
            if key in result:
                first = self.origin.keys[*path, key].line + 1
                what = f"'{key}' is written twice; the first is at line {first}"
                self.problems.append(self.problem(what, event.start_mark, event.end_mark))
            span = self.span(event.start_mark, event.end_mark)
            result[key] = self.node(next(events), events, (*path, key))
            self.origin.keys[*path, key] = span
        return result

    def sequence(self, events: Iterator[yaml.Event], path: Loc) -> list[object]:
        """A list."""
        result: list[object] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            result.append(self.node(event, events, (*path, len(result))))
        return result

    def scalar(self, event: yaml.ScalarEvent) -> object:
        """A word, a number, true, false or null."""
        text = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.problems.append(self.problem("half of a surrogate pair is no character", event.start_mark))
        return plain_value(text) if event.implicit[0] else text

    def spend(self, nodes: int, event: yaml.Event) -> None:
        """Count what was read, aliases at their full size."""
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise SpecProblems([self.problem(f"more than {MAX_NODES} values", event.start_mark)])

    def span(self, start: _Mark | None, end: _Mark | None) -> Span:
        """The part of a value that stands on its first line."""
        assert start is not None
        assert end is not None
        return Span(start.line, start.column, end.column if end.line == start.line else start.column + 1)

    def problem(self, what: str, mark: _Mark | None, end: _Mark | None = None) -> Problem:
        """A problem at a mark of the parser."""
        if mark is None:
            return Problem(what, where=self.origin.name)
        where = f"{self.origin.name}:{mark.line + 1}:{mark.column + 1}"
        return Problem(what, where=where, excerpt=self.origin.quote(self.span(mark, end or mark)))


def plain_value(text: str) -> object:
    """The value of an unquoted scalar."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(re.sub(r"(?i)\.(inf|nan)", r"\1", text))
    return text


class _Dumper(yaml.SafeDumper):
    """Writes what this reader and those of YAML 1.1 both read as it was meant."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text with a line break in quotes: YAML's versions and readers differ over what ends a line."""
        style = '"' if LINE_BREAK.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))


def dump(value: object) -> str:
    """YAML text of a plain value, the same for equal values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
