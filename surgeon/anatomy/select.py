"""The where-language: short text that selects sites by what they do, on the way from a spec to its passes.

    [STACK/]ROLE[@LAYERS]     encoder/attention.query@0-5,-1      norm      ffn.*@all
    name:GLOB                 name:bert.encoder.layer.0.*

ROLE is exact, a dotted prefix (`norm` is every norm) or a glob. LAYERS are numbers, ranges or numbers from the end
(`-1` is the last layer), with commas; `all` means every layer and leaves out what stands in none. GLOB is held
against the module path of a site and the names of its parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, GetCoreSchemaHandler, PlainSerializer, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from surgeon.anatomy.sites import Anatomy, Norm, Projection, Site, graph_order
from surgeon.errors import SelectorError, did_you_mean

S = TypeVar("S", bound=Site)

_WORD = r"[A-Za-z0-9_.*?\[\]!-]+"
_SELECTOR = re.compile(rf"(?:(?P<stack>{_WORD})/)?(?P<role>{_WORD})(?:@(?P<layers>.*))?")
_SPAN = re.compile(r"(?P<first>\d+)-(?P<last>\d+)|(?P<one>-?\d+)")
_FORM = "write [STACK/]ROLE[@LAYERS], as in 'encoder/attention.query@0-5,-1', or name:GLOB"


@dataclass(frozen=True)
class Span:
    """Layers `first` to `last`, both counted in; one negative number counts from the end."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Selector:
    """One item of a `where`."""

    role: str | None = None
    stack: str | None = None
    layers: tuple[Span, ...] | Literal["all"] | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one selector. Raises SelectorError saying what is wrong with it."""
        if text.startswith("name:"):
            if not text[5:].strip():
                raise SelectorError(f"'{text}' names nothing", try_="write a glob over paths, as in 'name:*.layer.0.*'")
            return cls(name=text[5:])
        found = _SELECTOR.fullmatch(text)
        if found is None:
            raise SelectorError(f"'{text}' is no selector", try_=_FORM)
        return cls(role=found["role"], stack=found["stack"], layers=_layers(text, found["layers"]))

    def __str__(self) -> str:
        if self.name is not None:
            return f"name:{self.name}"
        layers = self.layers if self.layers is None or self.layers == "all" else ",".join(map(str, self.layers))
        return f"{self.stack + '/' if self.stack else ''}{self.role}{'' if layers is None else f'@{layers}'}"

    def matches(self, site: Site, anatomy: Anatomy) -> bool:
        """Whether this selects `site`."""
        if self.name is not None:
            return any(fnmatchcase(name, self.name) for name in names(site))
        if not self.matches_role(site) or not (self.stack is None or fnmatchcase(site.stack, self.stack)):
            return False
        if self.layers is None:
            return True
        if site.layer is None:
            return False
        depth = anatomy.layers.get(site.stack, 0)
        return self.layers == "all" or any(site.layer in _numbers(span, depth) for span in self.layers)

    def matches_role(self, site: Site) -> bool:
        """Whether `site` has this selector's role, wherever it stands."""
        role = self.role or ""
        return site.role == role or site.role.startswith(f"{role}.") or fnmatchcase(site.role, role)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _selector,
            serialization=core_schema.to_string_ser_schema(),
            json_schema_input_schema=core_schema.str_schema(),
        )


def _layers(text: str, layers: str | None) -> tuple[Span, ...] | Literal["all"] | None:
    if layers is None or layers == "all":
        return "all" if layers else None
    spans = []
    for part in layers.split(","):
        found = _SPAN.fullmatch(part.strip())
        if found is None:
            raise SelectorError(
                f"'{text}': '{part}' is no layer", try_="write all, or numbers and ranges, as in '0-5,-1'"
            )
        first, last = (int(found["one"]),) * 2 if found["one"] else (int(found["first"]), int(found["last"]))
        if last < first:
            raise SelectorError(f"'{text}': the range {part.strip()} runs backwards", try_=f"write {last}-{first}")
        spans.append(Span(first, last))
    return tuple(spans)


def _numbers(span: Span, depth: int) -> range:
    return range(depth + span.first, depth + span.first + 1) if span.first < 0 else range(span.first, span.last + 1)


def _selector(value: Any) -> Selector:
    if isinstance(value, Selector):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a selector is text, not {type(value).__name__}")
    try:
        return Selector.parse(value)
    except SelectorError as error:
        raise ValueError(f"{error.what}; {error.try_}") from error


def _listed(value: Any) -> Any:
    if isinstance(value, (str, Selector)):
        return (value,)
    if isinstance(value, Sequence) and not value:
        raise ValueError("it selects nothing; leave the option out to take its default")
    return value


Where = Annotated[
    tuple[Selector, ...],
    BeforeValidator(_listed),
    PlainSerializer(lambda where: [str(selector) for selector in where], return_type=list[str]),
    WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}, "minItems": 1}),
]
"""Type of a `where` option: a selector or a list of them."""


def selectors(*texts: str) -> tuple[Selector, ...]:
    """A `where` from its text."""
    return tuple(map(Selector.parse, texts))


def names(site: Site) -> list[str]:
    """The module path of a site and the names of its parameters."""
    parameters = [site.weight, site.bias] if isinstance(site, (Projection, Norm)) else [getattr(site, "weight", None)]
    return [site.path, *(name for name in parameters if name)]


def select(anatomy: Anatomy, where: Iterable[Selector | str], kind: type[S]) -> tuple[S, ...]:
    """The sites of one kind that `where` selects, in graph order, each once.

    Raises SelectorError where a selector, or one of its layers, selects no site of that kind.
    """
    selectors = [Selector.parse(w) if isinstance(w, str) else w for w in ([where] if isinstance(where, str) else where)]
    sites = [site for site in graph_order(anatomy) if isinstance(site, kind)]
    for selector in selectors:
        _require(selector, sites, anatomy, kind)
    return tuple(site for site in sites if any(s.matches(site, anatomy) for s in selectors))


def _require(selector: Selector, sites: Sequence[Site], anatomy: Anatomy, kind: type[Site]) -> None:
    """Raise unless every part of `selector` matches something."""
    if selector.name is not None:
        if not any(selector.matches(site, anatomy) for site in sites):
            raise SelectorError(
                f"'{selector}' matches no path or parameter of a {_noun(kind)}",
                there_is=dict.fromkeys(site.path for site in sites),
                try_=did_you_mean(selector.name, dict.fromkeys(name for site in sites for name in names(site))),
            )
        return
    playing = [site for site in sites if selector.matches_role(site)]
    if not playing:
        raise SelectorError(
            f"'{selector}' selects no {_noun(kind)}: none has the role '{selector.role}'",
            there_is=_counted(sites),
            try_=did_you_mean(selector.role or "", _families(sites)),
        )
    placed = [s for s in playing if selector.stack is None or fnmatchcase(s.stack, selector.stack)]
    if not placed:
        raise SelectorError(
            f"'{selector}' selects nothing: '{selector.role}' has no site in a stack '{selector.stack}'",
            there_is=_counted(playing),
            try_=did_you_mean(selector.stack or "", anatomy.layers),
        )
    _require_layers(selector, placed, anatomy)


def _require_layers(selector: Selector, placed: Sequence[Site], anatomy: Anatomy) -> None:
    depths = {site.stack: anatomy.layers.get(site.stack, 0) for site in placed}
    if selector.layers == "all" and all(site.layer is None for site in placed):
        raise SelectorError(
            f"'{selector}': '{selector.role}' stands in no layer", try_=f"leave the layers out: '{selector.role}'"
        )
    for span in selector.layers if isinstance(selector.layers, tuple) else ():
        for number in range(span.first, span.last + 1):
            at = {stack: number if number >= 0 else depth + number for stack, depth in depths.items()}
            if not any(0 <= at[stack] < depth for stack, depth in depths.items()):
                raise SelectorError(f"'{selector}': there is no layer {number}", there_is=_depths(anatomy))
            if not any(site.layer == at[site.stack] for site in placed):
                where = sorted({site.layer for site in placed if site.layer is not None})
                raise SelectorError(
                    f"'{selector}': layer {number} has no '{selector.role}'",
                    there_is=f"'{selector.role}' in layers {', '.join(map(str, where))}" if where else _counted(placed),
                )


def _noun(kind: type[Site]) -> str:
    return kind.__name__.lower()


def _depths(anatomy: Anatomy) -> str:
    return ", ".join(f"{depth} layers in {stack} (0-{depth - 1})" for stack, depth in anatomy.layers.items())


def _counted(sites: Iterable[Site]) -> str:
    """`encoder/attention.query 2 · …`, in graph order."""
    counts = Counter(f"{site.stack}/{site.role}" for site in sites)
    return " · ".join(f"{role} {count}" for role, count in counts.items()) or "none"


def _families(sites: Iterable[Site]) -> list[str]:
    """Every role and dotted prefix of one."""
    roles = dict.fromkeys(site.role for site in sites)
    return list(dict.fromkeys(prefix for role in roles for prefix in (role, role.split(".")[0])))
