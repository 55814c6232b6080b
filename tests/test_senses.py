"""Images and sounds go the whole way as texts do: their inputs are told by the forward and the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import surgeon
from surgeon.audit import audit
from surgeon.compiler import Compiled
from surgeon.errors import DataError, DeltaError, SelectorError, SpecError, TraceError
from surgeon.inputs import base_inputs
from surgeon.module import switchable
from surgeon.trace import trace
from surgeon.train.kinds import takes_labels

LABELS = ["cat", "dog", "bird"]
SURGERY: list[dict[str, Any]] = [{"lora": {"rank": 2}}, {"bitfit": {}}, {"prefix": {"length": 3}}, {"head": {}}]


@pytest.fixture(scope="module")
def vit() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        return ViTForImageClassification(ViTConfig(image_size=(16, 24), patch_size=8, num_labels=2, **sizes)).eval()


@pytest.fixture(scope="module")
def compiled(vit: PreTrainedModel) -> Compiled:
    return surgeon.compile({"surgery": SURGERY, "tasks": {"pets": {"labels": LABELS}, "plain": {}}}, vit)


def pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(batch))


def test_an_image_classifier_is_trained_and_deployed(vit: PreTrainedModel, compiled: Compiled, tmp_path: Path) -> None:
    model = compiled.model("pets")
    labels = torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    losses = []
    for _ in range(5):
        loss = model(pixel_values=pixels(4), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session, torch.no_grad():
        for batch in (1, 3):
            given = pixels(batch)
            for task in ("pets", None, "pets"):
                peer = vit if task is None else model.eval()
                logits = session.run({"pixel_values": given.numpy()}, task)["logits"]
                np.testing.assert_allclose(logits, peer(pixel_values=given).logits.numpy(), atol=1e-5)
        with pytest.raises(DataError, match="its axis 3 is 20"):
            session.run({"pixel_values": given[..., :20].numpy()}, "pets")
    found = audit(tmp_path / "build")
    assert [task.difference is not None and task.difference < 1e-4 for task in found.tasks] == [True] * 3


def test_what_is_of_texts_is_refused(vit: PreTrainedModel, compiled: Compiled) -> None:
    with pytest.raises(DeltaError, match="'pixel_values' is missing"):
        compiled.model("plain")()
    with pytest.raises(DeltaError, match="takes no"):
        compiled.model("plain")(pixel_values=pixels(1), attention_mask=torch.ones(1, 7))
    with pytest.raises(SelectorError, match="in front of a text, and this base reads none"):
        surgeon.compile({"surgery": [{"prompt": {}}], "tasks": {"a": {}}}, vit)
    with pytest.raises(SpecError, match="rows from a file train no task of head 'image-classification'"):
        takes_labels("image-classification")


def test_a_base_of_other_inputs_is_refused() -> None:
    class Odd(ViTForImageClassification):
        def forward(self, clouds: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return clouds

    with pytest.raises(TraceError, match="takes none of the inputs that Surgeon knows"):
        base_inputs(Odd(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)))


def test_the_size_of_an_image_is_the_configuration_s_own() -> None:
    config = AutoConfig.for_model("resnet", depths=[1], hidden_sizes=[8], embedding_size=8, num_channels=1)
    (pixel_values,) = base_inputs(AutoModelForImageClassification.from_config(config))
    assert pixel_values.axes == ("batch", 1, 224, 224)


def test_a_frozen_base_norms_by_its_running_statistics_in_training_too() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "image_size": 16}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    graph = switchable(trace(model)).train()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(graph(pixel_values=images)["logits"], model(images).logits)
    assert all(before[name].equal(buffer) for name, buffer in model.named_buffers())
