"""YAML as a spec is read from: core words only, nothing constructed, nothing unbounded."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surgeon.errors import SpecError
from surgeon.spec import Spec, parse_spec, read_spec
from surgeon.spec.source import MAX_CHARACTERS, MAX_NODES, Origin, dump, parse


def value(text: str) -> object:
    read, _, mistakes = parse(text, "a.yaml")
    assert not mistakes
    return read


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[no, yes, on, off, y, n]", ["no", "yes", "on", "off", "y", "n"]),
        ("[true, False, null, ~, ]", [True, False, None, None]),
        ("[1, -2, +3, 007]", [1, -2, 3, 7]),
        ("[1e-3, 1.5, .5, -1.0E3, 3.]", [0.001, 1.5, 0.5, -1000.0, 3.0]),
        ("[1:30, 2020-01-01, 0x1F, 1_000]", ["1:30", "2020-01-01", "0x1F", "1_000"]),
        ("""["1", '2', "true"]""", ["1", "2", "true"]),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("{1: a, true: b, <<: {c: d}}", {"1": "a", "true": "b", "<<": {"c": "d"}}),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
    ],
)
def test_words_mean_what_they_look_like(text: str, meant: object) -> None:
    assert value(text) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "a.yaml:1:5: this is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "a.yaml:1:4: tags are not read"),
        ("a: ! b", "a.yaml:1:4: tags are not read"),
        ("a: 1\n---\nb: 2", "a.yaml:2:1: a second document starts here"),
        ("a: 1\nb: 2\na: 3", "a.yaml:3:1: 'a' is written twice; the first is at line 1"),
        ("[a]: 1", "a.yaml:1:1: a key must be a word"),
        ("a: *b", "a.yaml:1:4: there is no anchor 'b' above"),
        ("a: &a [*a]", "a.yaml:1:8: there is no anchor 'a' above"),
        ("[" * 1000, "nested more than 40 deep"),
        ("[" + "1," * MAX_NODES + "]", f"more than {MAX_NODES} values"),
        ("#" * (MAX_CHARACTERS + 1), f"a spec has at most {MAX_CHARACTERS}"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("a: \x00", "this is not YAML"),
        ("a: " + "9" * 5000, "this is not YAML"),
        ("\t- a", "a.yaml:1:1: this is not YAML"),
    ],
)
def test_what_is_no_spec_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    assert said in str(caught.value)


def test_an_alias_costs_what_it_stands_for() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    with pytest.raises(SpecError, match=f"more than {MAX_NODES} values"):
        parse_spec(bomb)


def test_a_mistake_far_along_a_long_line_is_shown_around_its_place() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec("{" + " " * 500 + "sed: 1" + " " * 500 + "}")
    line, carets = str(caught.value).splitlines()[1:]
    assert len(line) < 150
    assert line[carets.index("^") :].startswith("sed")


TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
WORDS = "base surgery tasks lora rank labels model a 1 -1 null [ ] { } ' \" | > # ? % @ \\ &x *x !t << --- ... é 🙂"
BREAKS = [": ", ":", "- ", ", ", " ", "\t", "\n", "\n  ", "\n    ", "\x85", "\u2028", "\ufeff"]
SPECLIKE = st.lists(st.sampled_from([*WORDS.split(), *BREAKS]), max_size=40).map("".join)


@given(TEXT | SPECLIKE)
@example("%YAML 1." + "9" * 5000 + "\n---\na: 1")
@example('"\\UFFFFFFFF"')
@example('"\\U00110000"')
@example("a: 1\n\x85b: [")
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    told: SpecError | None = None
    try:
        assert isinstance(parse_spec(text), Spec)
    except SpecError as error:
        told = error
    assert told is None or (str(told).encode() and told.to_dict()["problems"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    max_leaves=8,
)
KEY = st.sampled_from(["base", "surgery", "tasks", "export", "seed"]) | TEXT
ITEM = st.dictionaries(st.sampled_from(["lora", "bitfit", "prefix"]) | TEXT, JSON, max_size=2)


@given(st.dictionaries(KEY, JSON | st.lists(ITEM | JSON, max_size=3), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_mapping_is_a_spec_or_a_spec_error(data: dict[str, object]) -> None:
    with contextlib.suppress(SpecError):
        assert isinstance(read_spec(data), Spec)


TREE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT.filter(lambda key: len(key) < 100), inner),
    max_leaves=12,
)


@given(TREE)
@example({"a": ["1e-3", "1e5", "-.5", "08", "0o7", "1_0", "no", "~", "", "<<", "=", "1:30", "\x85", "\u2028", "a\n b"]})
@settings(max_examples=300, deadline=None)
def test_what_is_written_reads_back_the_same(tree: object) -> None:
    assert value(dump(tree)) == tree


@given(st.lists(st.from_regex(r"[-+.0-9eE_:xo]{1,8}|no|yes|on|off|null|~", fullmatch=True), min_size=1))
@settings(max_examples=200, deadline=None)
def test_what_is_written_means_the_same_to_other_readers(words: list[str]) -> None:
    assert yaml.safe_load(dump(words)) == words == value(dump(words))


def test_where_a_value_was_written_is_no_part_of_the_value() -> None:
    assert Origin("a", ("x",)) == Origin("b")
    assert Origin() != "a"
