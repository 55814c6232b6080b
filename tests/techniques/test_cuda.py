"""On a GPU a task is what it is on the CPU: answers, training, and the build that is written from there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import surgeon
from surgeon.module import place

if TYPE_CHECKING:
    from techniques.conftest import Lab

    from surgeon.model import TaskModel

GPU = torch.device("cuda:0")

SURGERY = {
    "lora and biases": ("bert", [{"lora": {"rank": 3}}, {"bitfit": {}}, {"head": {}}]),
    "dora": ("llama", [{"lora": {"rank": 3, "dora": True}}]),
    "adapters": ("bert", [{"adapter": {"bottleneck": 6}}]),
    "compacter": ("t5", [{"compacter": {}}]),
    "prefix": ("gpt2", [{"prefix": {"length": 3}}, {"ia3": {}}]),
    "prefix with an MLP": ("t5", [{"prefix": {"length": 3, "hidden": 8}}]),
    "prompt": ("llama", [{"prompt": {"length": 3}}]),
    "p-tuning": ("bert", [{"p_tuning": {"encoder": "mlp"}}]),
    "vera": ("gpt2", [{"vera": {"rank": 8}}]),
    "qlora": ("llama", [{"qlora": {"rank": 3}}]),
    "full": ("bert", [{"full": {}}]),
}


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> None:
    """TensorFloat-32 would round every product to ten bits."""
    torch.set_float32_matmul_precision("highest")


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def losses(model: TaskModel, batches: list[dict[str, Tensor]]) -> list[float]:
    """Of a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-5)
    model.train()
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model.eval()
    return found


@pytest.mark.parametrize("name", ["lora and biases", "prefix", "prefix with an MLP", "prompt", "qlora"])
def test_nothing_is_made_on_another_device_than_the_models(lab: Lab, name: str) -> None:
    """Tensors without numbers pretend to be on a GPU, so that a machine without one can tell."""
    kind, surgery = SURGERY[name]
    base = lab.apart(lab.base(kind))
    model = lab.operate(base, *surgery).model("a")
    feed = {n: t for n, t in lab.batch(base).items() if n != "labels"}
    place(model._graph, GPU)
    for _ in (model.train(), model.eval()):
        with FakeTensorMode():
            tensors = {
                n: torch.empty(t.shape, dtype=t.dtype, device=GPU)
                for n, t in (*model.named_parameters(), *model.named_buffers())
            }
            given = {n: torch.ones(t.shape, dtype=t.dtype, device=GPU) for n, t in feed.items()}
            assert torch.func.functional_call(model, tensors, (), given).logits.device == GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SURGERY)
def test_a_task_answers_trains_and_is_served_as_on_the_cpu(lab: Lab, tmp_path: Path, name: str) -> None:
    kind, surgery = SURGERY[name]
    tasks: dict[str, Any] = {"a": {"labels": ["x", "y", "z"]} if {"head": {}} in surgery else {}}
    base = lab.base(kind)
    here = lab.move(lab.operate(base, *surgery, tasks=tasks).model("a"), by=0.05)
    compiled = lab.operate(lab.apart(base), *surgery, tasks=tasks)
    there = compiled.model("a")
    there.load_state_dict(here.state_dict())
    there.cuda()

    batches = [lab.batch(base, step) for step in range(6)]
    if "labels" in tasks["a"]:
        batches = [{**batch, "labels": torch.arange(3)} for batch in batches]
    with torch.no_grad():
        wanted = here.eval()(**batches[0]).logits
        assert lab.gap(there.eval()(**on_gpu(batches[0])).logits.cpu(), wanted) < 1e-5

    slow = losses(here, batches)
    fast = losses(there, [on_gpu(batch) for batch in batches])
    assert fast == pytest.approx(slow, rel=1e-4)
    moved = {n: t.detach() for n, t in here.state_dict().items()}
    assert lab.gap({n: t.detach().cpu() for n, t in there.state_dict().items()}, moved) < 1e-3

    feed = {n: t for n, t in batches[1].items() if n != "labels"}
    with torch.no_grad():
        answer = there(**on_gpu(feed)).logits.cpu()
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session:
        found = session.run({n: t.numpy() for n, t in feed.items()}, "a")["logits"]
    assert lab.gap(torch.from_numpy(found), answer) < 2e-5
