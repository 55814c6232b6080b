"""The oracle tells a wrong anatomy from a right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import fx
from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy, find
from surgeon.trace import trace
from sweep.cases import Case, base
from sweep.oracle import faults, peft_targets


@pytest.fixture(scope="module")
def reading() -> tuple[PreTrainedModel, fx.GraphModule, Anatomy]:
    model = base(Case("bert", "sequence-classification"))
    graph_module = trace(model)
    return model, graph_module, find(graph_module)


def _swapped(anatomy: Anatomy) -> Anatomy:
    """Query and feed-forward of a layer in each other's place."""
    roles = {"attention.query": "ffn.up", "ffn.up": "attention.query"}
    return replace(anatomy, projections=tuple(replace(p, role=roles.get(p.role, p.role)) for p in anatomy.projections))


def _crossed(anatomy: Anatomy) -> Anatomy:
    """Each layer's output projection taken for the other's."""
    return replace(
        anatomy,
        projections=tuple(
            replace(p, layer=1 - p.layer) if p.role == "attention.output" and p.layer is not None else p
            for p in anatomy.projections
        ),
    )


WRONG: dict[str, tuple[Callable[[Anatomy], Anatomy], str]] = {
    "a join missing": (lambda a: replace(a, joins=a.joins[1:]), "1 mixing and 2 feed-forward sublayers in 2 layers"),
    "roles swapped": (_swapped, "query gives 96 features, its heads take 64"),
    "layers crossed": (_crossed, "taken out, the answer is"),
    "no values": (
        lambda a: replace(a, projections=tuple(p for p in a.projections if p.role != "attention.value")),
        "has no value",
    ),
}


def test_a_right_anatomy_has_no_fault(reading: tuple[PreTrainedModel, fx.GraphModule, Anatomy]) -> None:
    assert faults(*reading) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_anatomy_has_one(name: str, reading: tuple[PreTrainedModel, fx.GraphModule, Anatomy]) -> None:
    model, graph_module, anatomy = reading
    spoil, said = WRONG[name]
    assert any(said in fault for fault in faults(model, graph_module, spoil(anatomy)))


def test_the_model_is_left_as_it_was(reading: tuple[PreTrainedModel, fx.GraphModule, Anatomy]) -> None:
    before = {name: t.clone() for name, t in reading[0].named_parameters()}
    faults(*reading)
    assert all(before[name].equal(t) for name, t in reading[0].named_parameters())


def test_what_peft_adapts_and_no_site_stands_for_is_told(
    reading: tuple[PreTrainedModel, fx.GraphModule, Anatomy],
) -> None:
    model, graph_module, anatomy = reading
    (said,) = peft_targets(model, graph_module, replace(anatomy, projections=()))
    assert said == "PEFT adapts bert.encoder.layer.0.attention.self.query, which is no site"


def test_what_the_model_never_calls_is_not_asked_for() -> None:
    model = base(Case("bart", "causal-lm"))  # its layers keep weights to attend to an encoder
    graph_module = trace(model)
    assert not list(peft_targets(model, graph_module, find(graph_module)))
