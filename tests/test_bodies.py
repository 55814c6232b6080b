"""Bodies that are traced once: what is reused is what a fresh trace gives, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import surgeon
from surgeon.bodies import Bodies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture
def mode() -> FakeTensorMode:
    """Where fakes of one graph live."""
    return FakeTensorMode(shape_env=ShapeEnv())


def fake(mode: FakeTensorMode, *shape: int, free: tuple[int, ...] = (0,)) -> FakeTensor:
    """With free axes, each a symbol of its own."""
    sizes = [DimDynamic.DYNAMIC if axis in free else DimDynamic.STATIC for axis in range(len(shape))]
    return mode.from_tensor(torch.ones(shape), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def scaled(by: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A body that closes over a number."""
    return lambda x, a: (x @ a).reshape(-1, a.shape[-1]) * by


def sizes(bodies: Bodies, body: Callable[..., Tensor], *tensors: FakeTensor) -> list[str]:
    """Sizes of all its values, as text."""
    return [str(getattr(v, "shape", v)) for n, v in bodies.trace(body, tensors[:1], tensors[1:]) if n.op != "output"][
        1:
    ]


def test_a_body_used_again_has_the_sizes_of_a_fresh_trace(mode: FakeTensorMode) -> None:
    x, one, other = fake(mode, 3, 5, 4), fake(mode, 4, 2, free=(1,)), fake(mode, 4, 2, free=(1,))
    bodies = Bodies()
    first, again = sizes(bodies, scaled(2.0), x, one), sizes(bodies, scaled(2.0), x, other)
    assert first == sizes(Bodies(), scaled(2.0), x, one)
    assert again == sizes(Bodies(), scaled(2.0), x, other)
    assert first != again  # the ranks are symbols of their own
    assert len(bodies._known) == 1


def test_ranks_that_must_be_equal_are_one_symbol_when_a_body_is_used_again(mode: FakeTensorMode) -> None:
    bodies, x = Bodies(), fake(mode, 3, 5, 4)
    for _ in range(2):
        a, b = fake(mode, 4, 2, free=(1,)), fake(mode, 2, 4, free=(0,))
        assert str(a.shape[1]) != str(b.shape[0])
        sizes(bodies, lambda x, a, b: (x @ a) @ b, x, a, b)
        assert str(a.shape[1]) == str(b.shape[0])
    assert len(bodies._known) == 1


def test_another_number_or_shape_or_code_is_another_body(mode: FakeTensorMode) -> None:
    x, a, wide = fake(mode, 3, 5, 4), fake(mode, 4, 2, free=(1,)), fake(mode, 4, 3, free=())
    bodies = Bodies()
    for body, delta in [(scaled(2.0), a), (scaled(3.0), a), (scaled(2.0), wide), (lambda x, a: x @ a, a)]:
        sizes(bodies, body, x, delta)
    assert len(bodies._known) == 4
    factors = [n.args[1] for body in bodies._known.values() for n in body.graph.nodes if "mul.Tensor" in str(n.target)]
    assert factors == [2.0, 3.0, 2.0]


def test_a_body_that_holds_an_object_is_traced_each_time(mode: FakeTensorMode) -> None:
    held = {"by": 2.0}
    bodies = Bodies()
    for _ in range(2):
        sizes(bodies, lambda x, a: x @ a * held["by"], fake(mode, 3, 5, 4), fake(mode, 4, 2, free=(1,)))
    assert not bodies._known


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_at_a_fused_projection_a_role_has_one_body_for_all_layers(
    tiny: Callable[..., PreTrainedModel], kind: str
) -> None:
    """What it closes over says where the role's features lie: in one run (GPT-2), in every head (NeoX)."""
    surgery = [{"lora": {"rank": 3, "where": ["attention.query", "attention.value"]}}]
    made = surgeon.compile({"surgery": surgery, "tasks": {"a": {}}}, tiny(kind))
    assert len({delta.site for delta in made.program.ledger.deltas.values()}) == 2
    assert len(made.program._bodies._known) == 2
