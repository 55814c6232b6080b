"""Encoder-decoders that classify: their decoder reads the text itself, and answers where that ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from surgeon.inputs import ended, text_inputs

if TYPE_CHECKING:
    from techniques.conftest import Lab
    from transformers import PreTrainedModel

HEAD = "sequence-classification"
KINDS = ("bart", "t5")
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "deltas": [{"lora": {"rank": 3}}, {"adapter": {"bottleneck": 5}}, {"ia3": {}}, {"head": {}}],
    "biases": [{"bitfit": {}}],
    "prefix": [{"prefix": {"length": 3}}],
    "prompt": [{"prompt": {"length": 3}}],
    "p_tuning": [{"p_tuning": {"template": "[P]*2 {text} [P]"}}],
    "p_tuning_v2": [{"p_tuning_v2": {"length": 3}}],
}


def base(lab: Lab, kind: str) -> PreTrainedModel:
    return lab.base(kind, HEAD, **({"decoder_start_token_id": 0} if kind == "t5" else {}))


def texts(model: PreTrainedModel, *lengths: int) -> dict[str, Tensor]:
    """Texts with their ends, padded to the longest."""
    end, draw = text_inputs(model)[0].end, torch.Generator().manual_seed(2)
    rows = [ended(torch.randint(3, 100, (1, length), generator=draw), end)[0] for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()}


@pytest.mark.parametrize(
    ("kind", "technique"), [(k, t) for k in KINDS for t in TECHNIQUES if (k, t) != ("t5", "biases")]
)
def test_tasks_are_the_same_in_onnx_runtime(lab: Lab, tmp_path: Path, kind: str, technique: str) -> None:
    model = base(lab, kind)
    made = lab.operate(model, *TECHNIQUES[technique], tasks={"a": {}, "b": {}})
    for seed, task in enumerate(made.tasks):
        lab.move(made.model(task), seed=seed)
    assert lab.served(made, tmp_path, [texts(model, 9, 5, 11), texts(model, 4)]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_learns(lab: Lab, kind: str) -> None:
    model = base(lab, kind)
    ours = lab.operate(model, *TECHNIQUES["deltas"], tasks={"a": {"labels": 2}}).model("a").train()
    optimizer = torch.optim.AdamW(lab.own(ours).values(), lr=1e-2)
    fed, losses = texts(model, 9, 6, 8, 5), []
    for _ in range(12):
        loss = ours(**fed, labels=torch.tensor([0, 1, 1, 0])).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_a_prefix_stands_where_it_does_in_a_model_that_writes(lab: Lab) -> None:
    """BART's decoder counts positions behind it: seen through the words that it would write, of the same weights."""
    model = base(lab, "bart")
    writer = lab.apart(lab.base("bart"))
    writer.model.load_state_dict(model.model.state_dict())
    ours, peer = (lab.operate(m, {"prefix": {"length": 3}}).model("a").eval() for m in (model, writer))
    lab.move(ours)
    peer.load_state_dict(ours.state_dict())
    fed = texts(model, 9, 6)
    shifted = torch.cat([torch.full((2, 1), model.config.decoder_start_token_id), fed["input_ids"][:, :-1]], 1)
    with torch.no_grad():
        logits = peer(**fed, decoder_input_ids=shifted).logits - writer.final_logits_bias
        states = logits @ torch.linalg.pinv(writer.lm_head.weight.T)
        wanted = model.classification_head(states[torch.arange(2), torch.tensor([8, 5])])
        assert lab.gap(ours(**fed).logits, wanted) < 1e-4


def test_a_prompt_stands_in_front_of_the_text_that_both_read(lab: Lab) -> None:
    model = base(lab, "bart")
    ours = lab.operate(model, {"prompt": {"length": 3}}).model("a").eval()
    lab.move(ours)
    (prompt,) = ours.state_dict().values()
    words = model.get_input_embeddings().weight.detach()
    larger = lab.apart(model)
    larger.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([words, prompt])))
    fed = texts(model, 9, 6)
    virtual = torch.arange(len(words), len(words) + 3).expand(2, -1)
    longer = {
        "input_ids": torch.cat([virtual, fed["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(virtual), fed["attention_mask"]], 1),
    }
    with torch.no_grad():
        assert lab.gap(ours(**fed).logits, larger(**longer).logits) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_more_ends_than_its_neighbour_is_answered_as_alone(lab: Lab, kind: str) -> None:
    """transformers refuses such a batch. A text without an end has no answer."""
    model = base(lab, kind)
    ours = lab.operate(model, {"lora": {"rank": 3}}).model("a").eval()
    fed = texts(model, 9, 6, 7)
    end = text_inputs(model)[0].end
    fed["input_ids"][0, 4] = end
    fed["input_ids"][2, 6] = 50
    alone = {name: tensor[:1] for name, tensor in fed.items()}
    with torch.no_grad():
        found = ours(**fed).logits
        assert lab.gap(found[:1], model(**alone).logits) < 1e-6
    assert found[2].isnan().all()
    assert found[1].isfinite().all()
