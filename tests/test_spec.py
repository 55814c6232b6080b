"""The spec: what is read is what was written, and every mistake is told at once, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import SpecError
from surgeon.registry import names
from surgeon.spec import BaseSpec, Spec, SpecProblems, TaskSpec, json_schema, parse_spec, read_spec

GOOD = """\
base: {model: some/base, head: token-classification}
surgery:
  - lora: {rank: 4, where: [attention.query]}
  - bitfit:
tasks:
  sentiment: {labels: [negative, positive]}
  topic: {labels: 4}
  plain:
seed: 7
"""


def problems(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "my.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_spec_reads_as_written() -> None:
    spec = parse_spec(GOOD)
    assert spec.base == BaseSpec(model="some/base", head="token-classification")
    assert [step.name for step in spec.steps] == ["lora", "bitfit"]
    assert spec.steps[0].rank == 4  # type: ignore[attr-defined]
    assert spec.tasks["sentiment"].labels == ("negative", "positive")
    assert spec.tasks["topic"].labels == 4
    assert spec.tasks["plain"] == TaskSpec()
    assert (spec.export.modes, spec.export.opset, spec.seed) == (("switch",), 20, 7)


def test_a_spec_without_a_base_is_fine() -> None:
    assert read_spec({"surgery": [{"lora": None}], "tasks": {"a": {"labels": 2}}}).base is None


def test_a_file_a_mapping_and_a_spec_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    spec = read_spec(path)
    again = read_spec(
        {
            "base": {"model": "some/base", "head": "token-classification"},
            "surgery": [{"lora": {"rank": 4, "where": ["attention.query"]}}, {"bitfit": None}],
            "tasks": {"sentiment": {"labels": ["negative", "positive"]}, "topic": {"labels": 4}, "plain": None},
            "seed": 7,
        }
    )
    assert spec == read_spec(str(path)) == again == read_spec(again) == parse_spec(GOOD, "other.yaml")
    assert read_spec({"surgery": list(spec.surgery)}).surgery == spec.surgery


def test_the_resolved_spec_writes_every_option_and_reads_back_to_the_same_bytes() -> None:
    spec = parse_spec(GOOD)
    text = spec.to_yaml()
    assert "dropout: 0.0" in text
    assert "opset: 20" in text
    assert parse_spec(text) == spec
    assert parse_spec(text).to_yaml() == text


@pytest.mark.parametrize("name", names())
def test_every_technique_with_its_defaults_round_trips(name: str) -> None:
    spec = read_spec({"surgery": [{name: None}]})
    assert parse_spec(spec.to_yaml()) == spec
    assert parse_spec(spec.to_yaml()).to_yaml() == spec.to_yaml()


LABEL = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


VALUE = st.none() | st.booleans() | st.floats(allow_nan=False) | LABEL | st.lists(LABEL)
SPECS = st.fixed_dictionaries(
    {
        "base": st.fixed_dictionaries({"model": LABEL})
        | st.fixed_dictionaries({"config": st.dictionaries(LABEL, VALUE)}),
        "surgery": st.lists(
            st.fixed_dictionaries({"lora": st.fixed_dictionaries({"alpha": st.floats(1e-9, 1e9)})}), max_size=2
        ),
        "tasks": st.dictionaries(
            st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True),
            st.fixed_dictionaries(
                {"labels": st.none() | st.integers(2, 10**6) | st.lists(LABEL, min_size=2, max_size=4, unique=True)}
            ),
            max_size=2,
        ),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@given(SPECS)
@settings(max_examples=50, deadline=None)
def test_whatever_is_in_a_spec_it_round_trips(data: dict[str, Any]) -> None:
    spec = read_spec(data)
    text = spec.to_yaml()
    assert parse_spec(text) == spec
    assert parse_spec(text).to_yaml() == text


def test_all_mistakes_are_told_at_once_with_line_caret_and_close_match() -> None:
    text = """\
base: {model: some/base, hed: x}
surgery:
  - lorra: {rank: 8}
  - lora: {rank: 8, alfa: 16}
  - lora: {rank: 0}
tasks:
  ../x: {labels: 2}
"""
    message = problems(text)
    assert (
        """\
my.yaml:3:5: unknown technique 'lorra'
      3 |   - lorra: {rank: 8}
        |     ^^^^^  did you mean 'lora'?  there is: """
        in message
    )
    assert (
        """\
my.yaml:4:21: 'lora' has no option 'alfa'
      4 |   - lora: {rank: 8, alfa: 16}
        |                     ^^^^  did you mean 'alpha'?  there is: """
        in message
    )
    assert "my.yaml:5:18: lora.rank must be at least 1, got 0\n" in message
    assert "my.yaml:1:26: 'base' has no option 'hed'" in message
    assert "my.yaml:7:3: '../x' cannot be a task's name" in message
    assert message.index(":1:26") < message.index(":3:5") < message.index(":7:3")


def test_the_mistakes_of_a_mapping_are_told_by_path() -> None:
    with pytest.raises(SpecProblems) as caught:
        read_spec({"surgery": [{"lora": {"rank": -1}}, {"lora": 3}], "seed": "x"})
    told = caught.value.to_dict()["problems"]
    assert [problem["where"] for problem in told] == ["surgery[0].lora.rank", "surgery[1].lora", "seed"]
    assert told[0]["what"] == "lora.rank must be at least 1, got -1"
    assert "surgery[0].lora.rank: lora.rank must be at least 1, got -1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the spec is empty"),
        ("- a", "a spec is a mapping"),
        ("sed: 1", "did you mean 'seed'?"),
        ("seed: true", "seed must be a whole number, got True"),
        ("seed: 1.5", "seed must be a whole number, got 1.5"),
        ("seed: -1", "seed must be at least 0, got -1"),
        ("base: {}", "base needs either `model` or `config`"),
        ("base: {model: a, config: {model_type: b}}", "base needs either `model` or `config`"),
        ("base: {model: a, head: causal}", "there is: sequence-classification"),
        ("base: {model: a, trust_remote_code: 'yes'}", "base.trust_remote_code must be true or false, got 'yes'"),
        ("surgery: {lora: 1}", "surgery must be a list, got a mapping"),
        ("surgery: [lora]", "must be one technique with its options"),
        ("surgery: [{lora: , bitfit: }]", "must be one technique with its options"),
        ("surgery: [{lora: {where: nosuchrole@@}}]", "lora.where"),
        ("tasks: {a: {labels: 1}}", "tasks.a.labels must be at least 2 labels, got 1"),
        ("tasks: {a: {labels: 0}}", "tasks.a.labels must be at least 2 labels, got 0"),
        ("tasks: {a: {labels: [x]}}", "tasks.a.labels must be at least 2 labels, got 1"),
        ("tasks: {a: {labels: [x, y, x]}}", "must differ from each other; twice: x"),
        ("tasks: {a: {labels: [1, 2]}}", "numbers as labels are quoted"),
        ("tasks: {a: {labels: true}}", "must be a number or a list of words"),
        ("tasks: {a: {labels: 2}, a: {labels: 3}}", "my.yaml:1:25: 'a' is written twice; the first is at line 1"),
        ("tasks: {.a: }", "cannot be a task's name"),
        ("tasks: {a/b: }", "cannot be a task's name"),
        ("tasks: {'': }", "cannot be a task's name"),
        ("tasks: {" + "a" * 101 + ": }", "cannot be a task's name"),
        ("tasks: {a: 3}", "tasks.a must be a mapping, got 3"),
        ("export: {modes: [swich]}", "did you mean 'switch'?"),
        ("export: {modes: []}", "must name at least one mode"),
        ("export: {modes: [mixed]}", "must name `switch` too"),
        ("export: {modes: [switch, switch]}", "must name at least one mode, and each once"),
        ("export: {opset: 9}", "export.opset must be at least 18, got 9"),
    ],
)
def test_a_mistake_is_named(text: str, said: str) -> None:
    assert said in problems(text)


def test_a_union_of_types_tells_one_mistake_in_one_line() -> None:
    message = problems("surgery: [{lora: {where: {a: b}}}]")
    assert message.count("my.yaml:") == 1


def test_a_file_that_is_missing_a_folder_or_no_text_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff")
    for path, said in (
        (tmp_path / "none.yaml", "there is no such spec"),
        (tmp_path, "cannot be read"),
        (binary, "not UTF-8 text (byte 6)"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(SpecError) as caught:
            read_spec(path)
        assert said in str(caught.value)
    with pytest.raises(SpecError, match="not int"):
        read_spec(3)  # type: ignore[arg-type]


def test_later_errors_can_point_to_the_line() -> None:
    spec = parse_spec(GOOD, "my.yaml")
    assert spec.locate(("surgery", 0, "lora", "where", 0)) == "my.yaml:3:29"
    assert spec.locate(("surgery", 0, "lora", "where")) == "my.yaml:3:28"
    assert spec.locate(("surgery", 0, "lora"), key=True) == "my.yaml:3:5"
    assert spec.locate(("surgery", 0, "lora", "alpha")) == spec.locate(("surgery", 0, "lora"))
    assert spec.locate(("surgery", 1)) == "my.yaml:4:5"
    assert read_spec({"surgery": [{"lora": None}]}).locate(("surgery", 0, "lora")) == "surgery[0].lora"
    assert "my.yaml" not in spec.to_yaml()


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_spec(GOOD).seed = 3  # type: ignore[misc]


def test_the_schema_knows_every_option_of_every_technique_with_its_description() -> None:
    schema = json_schema()
    items = schema["properties"]["surgery"]["items"]
    assert set(items["properties"]) == set(names())
    for item in items["properties"].values():
        options = schema["$defs"][item["anyOf"][0]["$ref"].rpartition("/")[2]]
        assert options["additionalProperties"] is False
        for name, option in options["properties"].items():
            assert option.get("description"), name
    for part in (schema, schema["$defs"]["BaseSpec"], schema["$defs"]["ExportSpec"], schema["$defs"]["TaskSpec"]):
        assert part["additionalProperties"] is False
        assert all(option.get("description") for name, option in part["properties"].items() if name != "export")


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(_references, value.values()))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def test_the_schema_holds_what_it_refers_to_and_nothing_else() -> None:
    schema = json_schema()
    assert _references(schema) == {f"#/$defs/{name}" for name in schema["$defs"]}


def test_types_may_be_built_in_python() -> None:
    spec = Spec(base=BaseSpec(model="x"), tasks={"a": TaskSpec(labels=3)})
    assert parse_spec(spec.to_yaml()) == spec
