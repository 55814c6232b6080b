"""A trace is the model for every length that a build takes, whichever way the model goes with longer texts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import surgeon
from surgeon.module import switchable
from surgeon.trace import LONGEST, trace
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


@pytest.mark.parametrize("family", ["nemotron_h", pytest.param("bamba", marks=pytest.mark.sweep)])
def test_a_recurrence_in_chunks_takes_texts_of_any_number_of_chunks(family: str) -> None:
    model: PreTrainedModel = base(Case(family, "causal-lm"), LADDER)
    graph = switchable(trace(model)).eval()
    for shape in ((2, 7, 0), (3, 8, 2), (1, 9, 0), (2, 33, 5)):
        given = feed(model, *shape)
        with torch.no_grad():
            found, wanted = graph(**given)["logits"], model(**given).logits
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class Chunks(PreTrainedModel):
    """Sums up a text chunk by chunk, in a loop that a trace writes out."""

    config_class = PretrainedConfig
    length = 16

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.words, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.words(input_ids)
        size = x.shape[1]
        pad = (self.length - size % self.length) % self.length
        x = nn.functional.pad(x, (0, 0, 0, pad)).reshape(x.shape[0], -1, self.length, 8)
        total, sums = x.new_zeros(x.shape[0], 1, 8), torch.zeros_like(x)
        for chunk in range((size + pad) // self.length):
            sums[:, chunk] = total + x[:, chunk].cumsum(1)
            total = sums[:, chunk, -1:]
        return CausalLMOutput(logits=self.out(sums.flatten(1, 2)[:, :size]))


def test_a_loop_over_chunks_that_is_written_out_takes_texts_of_one_chunk() -> None:
    model = Chunks(PretrainedConfig(vocab_size=50)).eval()
    graph = trace(model)
    assert graph.meta[LONGEST] == Chunks.length
    for size in (1, 7, Chunks.length):
        ids = torch.randint(50, (3, size))
        torch.testing.assert_close(graph(input_ids=ids)["logits"], model(ids).logits)
