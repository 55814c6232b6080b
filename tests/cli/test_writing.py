"""init, list, schema: what helps a person to write a spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon import catalog, registry
from surgeon.spec import parse_spec

TECHNIQUES = registry.names()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_template_is_the_techniques_defaults_each_under_its_description(surgeon, technique):
    needed = registry.technique(technique).after[:1]
    text = surgeon("init", "+".join([*needed, technique])).out
    *_, step = parse_spec(text).steps
    assert step == registry.technique(technique)()
    words = " ".join(line.strip(" #") for line in text.splitlines())
    for option in catalog.described(technique).options:
        assert option.description in words


def test_a_template_of_several_keeps_their_order(surgeon):
    assert [s.name for s in parse_spec(surgeon("init", "prefix+lora+bitfit").out).steps] == ["prefix", "lora", "bitfit"]


def test_a_template_names_the_base_and_the_head_it_was_given(surgeon):
    spec = parse_spec(surgeon("init", "lora", "--base", "package:some/model", "--head", "causal-lm").out)
    assert (spec.base.model, spec.base.head) == ("package:some/model", "causal-lm")


def test_init_writes_a_file_but_never_over_one(surgeon, refused, tmp_path):
    path = tmp_path / "spec.yaml"
    assert surgeon("init", "lora", "-o", path).code == 0
    written = path.read_text()
    refused(1, ("already",), "init", "bitfit", "-o", path)
    assert path.read_text() == written


def test_init_knows_what_an_unknown_technique_was_meant_to_be(refused):
    refused(2, ("unknown technique 'lorra'", "did you mean 'lora'?"), "init", "lorra+bitfit")


def test_list_has_every_technique_in_every_form(surgeon):
    known = surgeon("list", "--json").json
    assert [one["name"] for one in known] == list(TECHNIQUES)
    assert all(option["description"] for one in known for option in one["options"])
    for form in ("list",), ("list", "--markdown"):
        shown = surgeon(*form).out
        assert all(name in shown for name in TECHNIQUES)


def test_the_schema_names_every_technique_and_option(surgeon):
    ran = surgeon("schema")
    items = ran.json["properties"]["surgery"]["items"]["properties"]
    assert set(items) == set(TECHNIQUES)
    for one in catalog.techniques():
        assert all(json.dumps(option.name) in ran.out for option in one.options)


def test_a_template_is_where_the_help_says(surgeon, tmp_path: Path):
    ran = surgeon("init", "lora", "-o", tmp_path / "spec.yaml")
    assert ran.out == ""
    assert "surgeon plan" in ran.err
