"""Compiles every case on the meta device and counts it, so it is the real passes that are counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import Any

from torch import fx

from surgeon.base import Base, open_base
from surgeon.compiler import begin, passes
from surgeon.counts.bases import BASES
from surgeon.counts.cases import CASES, Case, Count, Surgery
from surgeon.errors import SpecError, did_you_mean
from surgeon.ledger import symbols
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import BaseSpec, read_spec
from surgeon.trace import trace

UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "MB": 1e6, "%": 0.01}
PRINTED = re.compile(r"([\d.,]+)\s*(MB|[kKM%])?")


@dataclass(frozen=True)
class Row:
    """A number that a paper prints, and what is counted for it.

    `agrees` says whether it is the same in the paper's unit, rounded or cut after its last digit; `reason` why not,
    where that is known.
    """

    paper: str
    configuration: str
    techniques: tuple[str, ...]
    printed: str
    counted: int
    share: float
    agrees: bool
    reason: str

    @property
    def reproduces(self) -> bool:
        """It agrees, or is known not to."""
        return self.agrees == (not self.reason)


def count_rows(
    techniques: Collection[str] = (), *, whole: bool = False, report: Callable[[str], None] | None = None
) -> Iterator[Row]:
    """Count the cases that use any of these techniques, by default all; `report` is told each model.

    Of each stack one and two layers are compiled, and every other one counts as the second; `whole` compiles them all,
    for minutes. Raises SpecError for a technique of which no number is known.
    """
    known = sorted({name for case in CASES for name in case.techniques})
    for name in techniques:
        if name not in known:
            raise SpecError(f"no paper's number is known of '{name}'", there_is=known, try_=did_you_mean(name, known))
    wanted = [case for case in CASES if not techniques or set(techniques) & set(case.techniques)]
    told = ""
    for case in wanted:
        if report is not None and case.base != told:
            report(case.base)
        told = case.base
        yield row(case, whole=whole)


def row(case: Case, *, whole: bool = False) -> Row:
    """One case, counted."""
    found = counted(case, whole=whole)
    number = case.of(found)
    share = number / found.base
    return Row(
        paper=case.paper,
        configuration=f"{case.base}, {case.configuration}",
        techniques=case.techniques,
        printed=case.printed,
        counted=number,
        share=share,
        agrees=agreement(case.printed, number, share),
        reason=case.reason,
    )


def counted(case: Case, *, whole: bool = False) -> Count:
    """The tensors of a task at the sizes of the case. Unless `whole`, a layer counts as its second does."""
    model = BASES[case.base]
    if whole:
        return _count(case.base, model.depth, case.surgery, case.sizes)
    one, two = (_count(case.base, depth, case.surgery, case.sizes) for depth in (1, 2))
    parts = set(one.parts) | set(two.parts)
    each = {part: two.parts.get(part, 0) - one.parts.get(part, 0) for part in parts}
    more = model.depth - 1
    return Count(
        {part: one.parts.get(part, 0) + more * each[part] for part in parts},
        one.base + more * (two.base - one.base),
    )


def _count(base: str, depth: int, surgery: Surgery, sizes: tuple[tuple[str, int], ...]) -> Count:
    program = _program(base, depth, surgery)
    deltas = program.ledger.deltas
    chosen = {
        symbol: size for pattern, size in sizes for symbol in symbols(deltas.values()) if fnmatchcase(symbol, pattern)
    }
    parts: dict[tuple[str, str], int] = {}
    for name, start in program.ledger.parameters(chosen).items():
        delta = deltas.get(name)
        part = (delta.technique, delta.part) if delta else (program.ledger.trained[name].technique, name)
        if not start.frozen:
            parts[part] = parts.get(part, 0) + prod(start.shape)
    parameters = dict(program.graph_module.named_parameters())
    plain = sum(parameters[name].numel() for name in program.frozen if name in parameters)
    return Count(parts, plain + sum(prod(entry.shape) for entry in program.stored.values()))


@cache
def _program(base: str, depth: int, surgery: Surgery) -> Program:
    opened, traced = _traced(base, depth)
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    graph._codegen = traced.graph._codegen
    spec = read_spec({"surgery": [{name: dict(options)} for name, options in surgery], "tasks": {"a": {}}})
    return run_passes(begin(opened, fx.GraphModule(traced, graph)), list(passes(spec)))


@cache
def _traced(base: str, depth: int) -> tuple[Base, fx.GraphModule]:
    opened = open_base(BaseSpec.model_validate(BASES[base].spec(depth)), weights=False)
    return opened, trace(opened.model)


def agreement(printed: str, count: int, share: float) -> bool:
    """Whether a number, in the unit of the printed one, is what was printed. Without a unit it must be the same."""
    bounds = []
    for text, unit in PRINTED.findall(printed):
        if not unit:
            return int(text.replace(",", "")) == count
        last_digit = 10.0 if unit == "K" else 10.0 ** -len(text.partition(".")[2])  # 250K: two figures are meant
        value = (share if unit == "%" else count) / UNITS[unit]
        bounds.append((value, float(text), last_digit))
    value, low, last_digit = bounds[0]
    if len(bounds) == 2:
        return low <= value <= bounds[1][1]
    return -last_digit / 2 <= value - low < last_digit


def page(rows: Collection[Row]) -> str:
    """`docs/counts.md`."""
    lines = ["| paper | configuration | printed | counted | of the base | agrees |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {r.paper} | {r.configuration} | {r.printed} | {r.counted:,} | {r.share:.3%} | {verdict(r, bold=True)} |"
        for r in rows
    ]
    missed = [r for r in rows if not r.agrees]
    head = (
        "# Parameter counts\n\nWritten by `make counts`, which is `surgeon count --markdown`: the papers' own "
        "configurations, compiled on the meta device without weights and counted from the ledger, beside what the "
        f"papers print. {len(rows) - len(missed)} of {len(rows)} agree, rounded as printed; the others say why not.\n\n"
        "Sizes that are free per task (ranks, widths, lengths) are set on one compiled graph. One and two layers of "
        "each stack are compiled, and every other layer counts as the second; `--whole` compiles them all, to the same "
        "numbers. A row that names a library is no paper's: the paper prints no number, and the library's is counted.\n"
    )
    return f"{head}\n" + "\n".join(lines) + "\n"


def verdict(row: Row, *, bold: bool = False) -> str:
    """`yes`, or `no` and why."""
    if row.agrees:
        return "yes" if row.reproduces else f"yes, and was known not to: {row.reason}"
    no = "**no**" if bold else "no"
    return f"{no}: {row.reason or 'nobody knows why'}"


def to_dict(row: Row) -> Mapping[str, Any]:
    """For `--json`."""
    return {**vars(row), "techniques": list(row.techniques), "reproduces": row.reproduces}
