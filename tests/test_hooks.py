"""What a technique may ask of training and of the graph beyond its deltas, with a technique that asks for all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor

import surgeon
from surgeon.anatomy import Join, select, selectors
from surgeon.base import Base
from surgeon.compiler import Compiled, study
from surgeon.ledger import Schedule
from surgeon.passes import Pass, PassResult
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import Spec, read_spec
from surgeon.starts import ones, zeros
from surgeon.train import Row, TrainOptions, load_tokenizer, train_task
from surgeon.train.schedules import ScheduleCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Counted(Schedule):
    """Writes down what it is told, and zeroes the last rank at the end."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.steps = 0

    def begin(self, model: Any, steps: int) -> None:
        self.told, self.steps = [], steps

    def before(self, model: Any, step: int) -> None:
        self.told.append(("before", step))

    def after(self, model: Any, step: int) -> None:
        assert all(model.get_parameter(n).grad is not None for n in model.state_dict() if n.endswith("scale"))
        self.told.append(("after", step))

    def settled(self, step: int) -> bool:
        return step == self.steps

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(len(self.told))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.told = [("restored", int(state["count"]))]


class Everything(Pass):
    """Adds `(x · R) · diag(scale) · Rᵀ` to every branch, R being one random matrix that all tasks share."""

    name: ClassVar[str] = "everything"
    title: ClassVar[str] = "Everything"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = True

    def call(self, program: Program) -> PassResult:
        for join in select(program.anatomy, selectors("residual.ffn"), Join):
            shared = program.constant("everything.R", lambda: torch.ones(join.width, 4) / join.width)  # noqa: B023
            scale = program.delta(join, "scale", (4,), zeros, rate=16.0, droppable=True)
            gain = program.delta(join, "gain", (1,), ones)

            def added(b: Tensor, r: Tensor, s: Tensor, g: Tensor) -> Tensor:
                return b + ((b @ r) * s @ r.T) * g

            program.replace_operand([join.add], join.branch, added, (scale, gain), also=(shared,))
            program.penalty([scale.name], lambda s: 10 + s.square().sum())
        program.schedule(Counted)
        return PassResult(program, modified=True)


@pytest.fixture(scope="module")
def operated(base_folder: Path) -> tuple[Spec, Base, Program]:
    """A tiny classifier under that technique, with a head."""
    spec = read_spec({"base": {"model": str(base_folder)}, "surgery": [{"head": {}}], "tasks": {"a": {"labels": 2}}})
    assert spec.base is not None
    opened, program = study(spec.base)
    return spec, opened, run_passes(program, [Everything(), *spec.steps])


@pytest.fixture
def compiled(operated: tuple[Spec, Base, Program]) -> Compiled:
    """The same, its task as it is born."""
    return Compiled(*operated)


ROWS = [Row("good film", 1), Row("bad film", 0), Row("the great film was fine", 1), Row("dull", 0)]


def test_a_penalty_is_part_of_the_loss_in_training_only(compiled: Compiled) -> None:
    model = compiled.model("a")
    batch = {"input_ids": torch.tensor([[2, 4, 3]]), "labels": torch.tensor([1])}
    plain = model.eval()(**batch).loss
    model.train()
    torch.manual_seed(0)
    assert 9 < (model(**batch).loss - plain).item() < 11


def test_schedules_are_told_of_every_step_and_go_on_after_a_stop(
    compiled: Compiled, base_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = compiled.model("a"), load_tokenizer(base_folder)
    options = TrainOptions(epochs=2, batch_size=2, checkpoint_steps=1)
    seen: list[int] = []

    def stop(_: object, step: int, __: int) -> None:
        seen.append(step)
        if seen == [1, 2, 3]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(model, tokenizer, ROWS, ROWS, options, checkpoint_dir=tmp_path, callbacks=[stop])
    (schedule,) = model.schedules
    assert isinstance(schedule, Counted)
    assert schedule.told == [(w, s) for s in (1, 2, 3) for w in ("before", "after")]
    result = train_task(model, tokenizer, ROWS, ROWS, options, checkpoint_dir=tmp_path)
    assert result.resumed_from == 2
    assert schedule.told == [("restored", 4), *((w, s) for s in (3, 4) for w in ("before", "after"))]
    assert result.best_epoch == 2, "weights of an epoch before the schedule has settled are not kept"


def test_the_trainer_of_transformers_drives_schedules_and_rates(compiled: Compiled, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = compiled.model("a")
    data = [{"input_ids": [2, 4, 3], "labels": 1}, {"input_ids": [2, 7, 3], "labels": 0}]
    groups = model.parameter_groups(1e-3)
    assert sorted(group["lr"] for group in groups) == [1e-3, 16e-3]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[ScheduleCallback(model)],
        optimizers=(torch.optim.AdamW(groups), None),
    ).train()
    (schedule,) = model.schedules
    assert isinstance(schedule, Counted)
    assert schedule.told == [(w, s) for s in (1, 2, 3) for w in ("before", "after")]


def test_what_is_dropped_is_the_default_below_that_layer_and_nowhere_else(
    tiny: Callable[..., PreTrainedModel],
) -> None:
    base = tiny("bert")
    compiled = surgeon.compile({"surgery": [{"adapter": {"norms": False}}], "tasks": {"a": {}}}, base)
    model = compiled.model("a").eval()
    with torch.no_grad():
        for name in model.state_dict():
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids = torch.tensor([[2, 4, 5, 3]])
    full = model(ids).logits
    model.drop(2)
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-6)
    model.drop(1)
    assert not torch.allclose(model(ids).logits, full)
    empty = {n for n, t in model.deployed().items() if t.numel() == 0}
    assert empty
    assert all(model.ledger.deltas[n].layer == 0 for n in empty)
    model(ids).logits.sum().backward()
    assert {model.ledger.deltas[n].layer for n in model.state_dict() if model.get_parameter(n).grad is not None} == {1}
    model.drop(0)
    assert torch.equal(model(ids).logits, full)


def test_a_shared_constant_is_in_the_graph_and_in_no_task_file(compiled: Compiled, tmp_path: Path) -> None:
    build = compiled.save(tmp_path / "build")
    model = compiled.model("a")
    assert not [n for n in model.state_dict() if n.endswith(".R")]
    with torch.no_grad():
        for name in model.state_dict():
            model.get_parameter(name).add_(0.1)
    compiled.pack(build, "a")
    ids = torch.tensor([[2, 4, 5, 3]])
    with surgeon.Session(build) as session:
        found = session.run({"input_ids": ids.numpy()}, "a")["logits"]
    assert torch.allclose(torch.from_numpy(found), model.eval()(ids).logits, atol=1e-5)
