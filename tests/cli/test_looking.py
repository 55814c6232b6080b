"""inspect, plan: what a base is made of, and what a spec would insert."""

from __future__ import annotations

from math import prod

import pytest


def test_inspect_shows_every_site_of_a_folder_and_of_a_spec(surgeon, base_folder, write_spec):
    whole = surgeon("inspect", base_folder, "--json").json
    assert whole["layers"] == {"encoder": 1}
    assert whole["roles"]["attention.query"] == 1
    assert surgeon("inspect", write_spec(), "--json").json == whole
    table = surgeon("inspect", base_folder, "--head", "token-classification").out
    assert all(site["path"] in table for site in whole["sites"] if site["role"] != "head.dense")


@pytest.mark.parametrize("name", ["nowhere/model", "./nowhere"])
def test_inspect_of_nothing_says_so(refused, name):
    refused(1, (name,), "inspect", name)


def test_a_plan_counts_what_the_formula_says_and_writes_nothing(surgeon, write_spec, unchanged, tmp_path):
    spec = write_spec("[lora: {rank: 3, where: [attention.query]}]")
    with unchanged(tmp_path):
        plan = surgeon("plan", spec, "--json").json
    assert plan["by_technique"] == {"lora": 3 * (32 + 32), "head": 32 * 2 + 2}
    assert plan["parameters"] == sum(plan["by_technique"].values())
    assert all(row["parameters"] == prod(row["shape"]) for row in plan["rows"])


def test_a_plan_is_shown_by_role_and_by_tensor(surgeon, write_spec):
    spec = write_spec()
    assert "attention.query" in surgeon("plan", spec).out
    rows = surgeon("plan", spec, "--rows").out
    assert "bert.encoder.layer.0.attention.self.value.lora_B" in rows
    assert "32×2*" in rows


def test_the_papers_numbers_are_counted_and_shown(surgeon, monkeypatch):
    from surgeon.counts import CASES, counting

    rows = surgeon("count", "adalora", "--json").json
    assert {tuple(row["techniques"]) for row in rows} == {("adalora",)}
    wrong = [row for row in rows if not row["agrees"]]
    assert all(row["reproduces"] for row in rows)
    assert [row["printed"] for row in wrong] == ["1.27M", "0.32M"]
    monkeypatch.setattr(counting, "CASES", tuple(case for case in CASES if case.printed in {"1.27M", "1,991,520"}))
    shown = surgeon("count", "adalora").out
    assert "1,327,680" in shown
    assert "1 of 2 come out as printed" in shown
    monkeypatch.setattr(counting, "CASES", counting.CASES[:1])
    assert surgeon("count", "adalora", "--markdown").out.startswith("# Parameter counts\n")


def test_a_number_that_no_longer_comes_out_is_an_error(surgeon, monkeypatch):
    from dataclasses import replace

    from surgeon.counts import CASES, counting

    case = next(case for case in CASES if case.base == "BERT-base" and not case.reason)
    monkeypatch.setattr(counting, "CASES", (replace(case, printed="590M", reason=""), replace(case, reason="none")))
    ran = surgeon("count")
    assert ran.code == 1
    assert "2 of 2 numbers come out other than known" in ran.err


def test_a_technique_without_numbers_is_named(refused):
    refused(2, ("no paper's number is known of 'ai3'", "ia3"), "count", "ai3")
