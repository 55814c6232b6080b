"""The where-language: what is written comes back, what matches nothing says so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from surgeon.anatomy import Join, Norm, Projection, Selector, Where, select
from surgeon.anatomy.select import Span
from surgeon.anatomy.sites import Site
from surgeon.errors import SelectorError

words = st.text("abcdefgh_.*?-0123456789", min_size=1, max_size=12)
numbers = st.integers(-40, 40).map(lambda n: Span(n, n))
ranges = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda ends: Span(min(ends), max(ends)))
layers = st.none() | st.just("all") | st.lists(numbers | ranges, min_size=1, max_size=4).map(tuple)
by_role = st.builds(Selector, role=words, stack=st.none() | words, layers=layers)
by_name = st.builds(Selector, name=st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1))


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    where: Where = ("norm",)


@given(by_role | by_name)
def test_a_selector_written_out_reads_back_as_itself(selector: Selector) -> None:
    assert Selector.parse(str(selector)) == selector


@given(st.lists(by_role | by_name, min_size=1, max_size=3))
def test_an_option_written_out_reads_back_as_itself(selectors: list[Selector]) -> None:
    options = Options(where=tuple(selectors))
    assert Options.model_validate_json(options.model_dump_json()) == options
    assert options.model_dump()["where"] == [str(s) for s in selectors]


def test_an_option_is_text_or_a_list_of_text() -> None:
    assert Options(where="ffn@0-1") == Options(where=["ffn@0-1"])
    assert Options().where == (Selector(role="norm"),)
    schema = Options.model_json_schema()["properties"]["where"]
    assert schema["items"] == {"type": "string"}
    for wrong in ([], "", "two words", "ffn@3-1", "ffn@x", "name:", 3, [3]):
        with pytest.raises(ValidationError):
            Options(where=wrong)


@pytest.mark.parametrize(
    ("where", "labels"),
    [
        ("attention.query", ["encoder/attention.query@0", "encoder/attention.query@1"]),
        ("attention.query@-1", ["encoder/attention.query@1"]),
        ("ffn@0", ["encoder/ffn.up@0", "encoder/ffn.down@0"]),
        ("ffn.d*@all", ["encoder/ffn.down@0", "encoder/ffn.down@1"]),
        ("encoder/head", ["encoder/head.dense", "encoder/head.out"]),
        ("name:*.layer.1.*query*", ["encoder/attention.query@1"]),
        ("name:classifier.bias", ["encoder/head.out"]),
        (["head.out", "ffn.up@0-1", "ffn.up@0"], ["encoder/ffn.up@0", "encoder/ffn.up@1", "encoder/head.out"]),
    ],
)
def test_selection_is_in_graph_order_without_repeats(where: Any, labels: list[str], read: Any) -> None:
    assert [site.label for site in select(read("bert", "classes").anatomy, where, Projection)] == labels


def test_layers_leave_out_what_stands_in_none(read: Any) -> None:
    anatomy = read("gpt2", "causal").anatomy
    assert {n.place for n in select(anatomy, "norm", Norm)} == {"pre", "final"}
    assert {n.place for n in select(anatomy, "norm@all", Norm)} == {"pre"}


def test_negative_layers_count_from_the_end_of_each_stack(read: Any) -> None:
    anatomy = read("bart", "seq2seq").anatomy
    assert [j.label for j in select(anatomy, "residual.ffn@-1", Join)] == [
        "encoder/residual.ffn@1",
        "decoder/residual.ffn@0",
    ]
    assert [j.label for j in select(anatomy, "decoder/residual@0", Join)] == [
        "decoder/residual.attention@0",
        "decoder/residual.cross_attention@0",
        "decoder/residual.ffn@0",
    ]


@pytest.mark.parametrize(
    ("kind", "where", "says"),
    [
        (
            Projection,
            "attention.qury",
            ["none has the role 'attention.qury'", "attention.query 2", "'attention.query'?"],
        ),
        (Projection, ["ffn.up", "cross_attention.query"], ["'cross_attention.query' selects no projection"]),
        (Join, "attention.query", ["selects no join", "residual.attention 2 · encoder/residual.ffn 2"]),
        (Projection, "decoder/ffn", ["no site in a stack 'decoder'", "encoder/ffn.up 2"]),
        (Projection, "encodr/ffn", ["no site in a stack 'encodr'", "did you mean 'encoder'?"]),
        (Projection, "ffn@0,2", ["there is no layer 2", "2 layers in encoder (0-1)"]),
        (Projection, "ffn@-3", ["there is no layer -3"]),
        (Projection, "ffn@0-5", ["there is no layer 2"]),
        (Projection, "head.out@0", ["layer 0 has no 'head.out'"]),
        (Projection, "head.out@all", ["stands in no layer", "leave the layers out"]),
        (Projection, "name:*.layers.0.*", ["matches no path or parameter of a projection"]),
        (Site, "nothing", ["selects no site"]),
    ],
)
def test_a_selector_that_matches_nothing_says_what_there_is(kind: type, where: Any, says: list[str], read: Any) -> None:
    with pytest.raises(SelectorError) as error:
        select(read("bert", "classes").anatomy, where, kind)
    for text in says:
        assert text in str(error.value)
