"""Pictures: what is drawn is the graph's, before is what the base was, and nothing lies on anything else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgeon
from surgeon.cli import main
from surgeon.errors import SelectorError
from surgeon.picture import picture
from surgeon.picture.layout import place, rows
from surgeon.picture.scene import Scene, scene
from surgeon.program import Program
from surgeon.spec import read_spec

if TYPE_CHECKING:
    from conftest import Traces
    from transformers import PreTrainedModel

CASES = {
    "lora": ("bert", [{"lora": None}]),
    "pfeiffer": ("roberta", [{"adapter": {"placement": "pfeiffer", "bottleneck": 8}}]),
    "gated": ("llama", [{"lora": {"where": ["ffn", "attention"]}}, {"prefix": {"length": 3}}]),
    "fused": ("gpt2", [{"lora": {"where": "attention.query"}}, {"bitfit": None}]),
    "cross": ("t5", [{"prefix": {"length": 3}}, {"adapter": {"norms": False, "bottleneck": 4}}]),
    "head": ("bert", [{"head": {"hidden": True}}]),
    "prompt": ("bert", [{"prompt": {"length": 3}}]),
}


@pytest.fixture(scope="module")
def bases(tiny) -> dict[str, PreTrainedModel]:
    return {kind: tiny(kind).to("meta") for kind in dict(CASES.values())}


@pytest.fixture(scope="module")
def programs(bases: dict[str, PreTrainedModel], traces: Traces) -> dict[str, Program]:
    specs = {name: (kind, read_spec({"surgery": surgery})) for name, (kind, surgery) in CASES.items()}
    return {name: traces.compile(spec, bases[kind]).program for name, (kind, spec) in specs.items()}


@pytest.mark.parametrize("name", CASES)
def test_before_surgery_is_the_base_as_it_was(
    name: str, programs: dict[str, Program], bases: dict[str, PreTrainedModel], traces: Traces
) -> None:
    _, untouched = traces.study(bases[CASES[name][0]])
    for stack, depth in untouched.anatomy.layers.items():
        for layer in range(depth):
            drawn, bare = scene(programs[name], stack, layer), scene(untouched, stack, layer)
            assert flow(drawn, drawn.before) == flow(bare, bare.after)


def flow(drawn: Scene, edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Edges by name of node and first line of the box."""
    return sorted((f"{a} {drawn.boxes[a].lines[0].text}", f"{b} {drawn.boxes[b].lines[0].text}") for a, b in edges)


@pytest.mark.parametrize("name", CASES)
def test_every_delta_of_the_layer_is_drawn_with_its_shape(name: str, programs: dict[str, Program]) -> None:
    program = programs[name]
    drawn = scene(program)
    text = "\n".join(line.text for box in drawn.boxes.values() for line in box.lines)
    assert drawn.techniques == list(dict.fromkeys(program.applied))
    layered = [d for d in program.ledger.deltas.values() if ".0." in d.name and drawn.title.split()[2] in d.name]
    for delta in layered:
        assert delta.part in text


def test_a_free_size_is_a_word_and_a_fixed_one_a_number(programs: dict[str, Program]) -> None:
    assert "32 × rank" in picture(programs["lora"])
    assert "+ down.bias (bottleneck)" in picture(programs["pfeiffer"])
    assert "prefix.key (2 × length × 8)" in picture(programs["gated"])


def test_the_same_surgery_gives_the_same_text_and_it_is_xml(tiny, programs: dict[str, Program]) -> None:
    text = picture(programs["gated"])
    kind, surgery = CASES["gated"]
    assert picture(surgeon.compile({"surgery": surgery}, base=tiny(kind).to("meta")).program) == text
    ElementTree.fromstring(text)


def test_what_stands_in_no_layer_is_drawn_where_it_stands(programs: dict[str, Program]) -> None:
    assert "bert · encoder head" in picture(programs["head"])
    assert "bert · encoder input" in picture(programs["prompt"])


def test_a_layer_can_be_asked_for_and_one_that_is_not_there_is_refused(programs: dict[str, Program]) -> None:
    assert "encoder layer 1 of 2" in picture(programs["lora"], layer=1)
    assert "decoder layer 0 of 2" in picture(programs["cross"], stack="decoder")
    with pytest.raises(SelectorError, match="there is no layer 7"):
        picture(programs["lora"], layer=7)


def test_the_command_writes_it(tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"base: {{model: {base_folder}}}\nsurgery: [{{lora: null}}]\n")
    assert main(["plan", str(spec), "--picture", str(tmp_path / "lora.svg")]) == 0
    assert "lora_A" in (tmp_path / "lora.svg").read_text(encoding="utf-8")
    assert main(["plan", str(spec), "--picture", str(tmp_path / "no" / "lora.svg")]) == 1
    capsys.readouterr()


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Edges of an acyclic graph in which every box but the first is reached."""
    count = draw(st.integers(2, 12))
    edges = {(f"n{draw(st.integers(0, i - 1))}", f"n{i}") for i in range(1, count)}
    more = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=8))
    return sorted(edges | {(f"n{a}", f"n{b}") for a, b in more if a < b})


@given(edges=graphs(), seed=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_boxes_do_not_overlap_and_no_lane_runs_through_one(edges, seed) -> None:
    row = rows(edges)
    wide = {name: seed.uniform(20, 200) for name in row}
    weights = {edge: seed.choice([0.0, 1.0, 12.0]) for edge in edges}
    placed = place(row, wide, weights)
    for line in range(max(row.values()) + 1):
        inside = sorted((placed.x[n], n) for n in row if row[n] == line)
        for (x, a), (y, b) in pairwise(inside):
            assert y - x >= (wide[a] + wide[b]) / 2
        for (a, b), lane in placed.lanes.items():
            if row[a] < line < row[b]:
                assert all(abs(lane - x) > wide[n] / 2 for x, n in inside)
    assert all(row[a] < row[b] for a, b in edges)
    assert set(placed.lanes) == {(a, b) for a, b in edges if row[b] - row[a] > 1}
