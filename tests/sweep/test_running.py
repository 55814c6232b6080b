"""A sweep is resumable, and no case can take more than its share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sweep.cases import EXCEPTIONS, Case, cases
from sweep.causes import CAUSES, told
from sweep.chain import TECHNIQUES
from sweep.running import Limits, forget, results, run
from sweep.table import page

LIMITS = Limits(seconds=2, gigabytes=0.5)
GOOD, BAD = Case("bert", "masked-lm"), Case("gpt2", "causal-lm")


def ok(case: Case, notes: dict[str, Any]) -> None:
    notes["step"] = "done"
    notes["faults"] = []
    notes["export"] = "ok"


def test_every_case_is_kept_as_it_comes_and_run_once(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run([GOOD], ok, out, limits=LIMITS)

    def counted(case: Case, notes: dict[str, Any]) -> None:
        (tmp_path / case.family).touch()
        ok(case, notes)

    run([GOOD, BAD], counted, out, limits=LIMITS, jobs=2)
    assert not (tmp_path / GOOD.family).exists()
    assert (tmp_path / BAD.family).exists()
    assert [r["family"] for r in results(out)] == ["bert", "gpt2"]


def test_results_of_other_code_can_be_run_anew(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run([GOOD], ok, out, limits=LIMITS, code="old")
    run([GOOD, BAD], ok, out, limits=LIMITS, code="new")
    assert {r["family"]: r["code"] for r in results(out)} == {"bert": "old", "gpt2": "new"}
    forget(out, [GOOD, BAD], failed=False, but="new")
    assert [r["family"] for r in results(out)] == ["gpt2"]


def hungry(case: Case, notes: dict[str, Any]) -> None:
    notes["step"] = "trace"
    bytearray(2**30)


def endless(case: Case, notes: dict[str, Any]) -> None:
    notes["step"] = "export"
    while True:
        time.monotonic()


@pytest.mark.parametrize(
    ("work", "said"), [(hungry, "trace: the process ended with 1"), (endless, "export: took too long")]
)
def test_a_case_that_takes_too_much_is_ended_and_says_where(work: Any, said: str, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run([BAD], work, out, limits=LIMITS)
    assert results(out)[0]["cause"] == said
    run([BAD], ok, out, limits=LIMITS)
    assert "cause" in results(out)[0]
    forget(out, [BAD])
    run([BAD], ok, out, limits=LIMITS)
    assert "cause" not in results(out)[0]


def test_each_family_comes_first_with_one_head() -> None:
    found = cases()
    families = {case.family for case in found}
    assert len(families) > 200
    assert not families & set(EXCEPTIONS)
    assert len({case.family for case in found[: len(families)]}) == len(families)
    assert len(set(found)) == len(found)


def test_the_page_counts_what_it_shows(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run([GOOD], ok, out, limits=LIMITS)
    run([BAD], endless, out, limits=LIMITS)
    text = page(results(out), [GOOD, BAD])
    assert "2 of 2 cases have been run, 2 of 2 families. **1 families are green" in text
    assert "What stopped the others: export 1." in text
    assert "| gpt2 | causal-lm |" in text


def test_a_cause_read_in_the_code_stands_only_for_the_step_it_was_read_for() -> None:
    assert told("mamba", "trace: TraceError: a static shape of 7") == CAUSES["mamba"]
    assert told("mamba", "export: base is 1e-3 off") == "export: base is 1e-3 off"
    assert told("mamba", "") == told("bert", "") == ""
    assert CAUSES.keys() <= {case.family for case in cases()}
    steps = {"build", "trace", "anatomy", "export", *TECHNIQUES}
    assert {line.partition(":")[0] for line in CAUSES.values()} <= steps
