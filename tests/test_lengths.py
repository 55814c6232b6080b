"""A trace is the model for every length that a build takes, whichever way the model goes with longer texts."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import surgeon
from surgeon.module import switchable
from surgeon.trace import trace
from sweep.cases import Case, base
from sweep.chain import feed
from sweep.shrinking import LADDER, Sizes

ONE_LAYER = [Sizes(layers=1)]


def test_a_model_that_goes_another_way_with_long_texts_takes_none() -> None:
    model = base(Case("doge", "sequence-classification"), ONE_LAYER)
    window = model.config.keep_window_size
    assert window < model.config.max_position_embeddings
    compiled = surgeon.compile({"surgery": [{"lora": {"rank": 2}}], "tasks": {"a": {}}}, model)
    assert compiled.base.max_length == compiled.program.max_length == window


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["bamba", "nemotron_h"])
def test_a_recurrence_in_chunks_takes_texts_of_any_number_of_chunks(family: str) -> None:
    model: PreTrainedModel = base(Case(family, "causal-lm"), LADDER)
    graph = switchable(trace(model)).eval()
    for shape in ((2, 7, 0), (3, 8, 2), (1, 9, 0), (2, 33, 5)):
        given = feed(model, *shape)
        with torch.no_grad():
            found, wanted = graph(**given)["logits"], model(**given).logits
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
