"""A bias by distance counts a prefix; what that comes to, PEFT and AdapterHub say where their folders are read."""

from __future__ import annotations

import pytest
import torch
from transformers import MPNetConfig, MPNetForMaskedLM

from surgeon.errors import CompositionError

PREFIX = {"length": 5, "std": 1.0}


@pytest.mark.parametrize("distances", ["before", "first"])
def test_a_bias_by_distance_counts_a_prefix_of_no_tokens_as_none(distances, lab):
    model = lab.base("t5")
    ours = lab.operate(model, {"prefix": {**PREFIX, "distances": distances}}).model("a")
    fed, none = lab.feed(model, 3, 9, pad=2), lab.operate(model, {"prefix": PREFIX}).model("a")
    none.load_state_dict(ours.state_dict())
    assert lab.gap(ours(**fed).logits, none(**fed).logits) > 1e-3
    ours.load_state_dict({name: tensor[:, :0] for name, tensor in ours.state_dict().items()})
    assert torch.equal(ours(**fed).logits, model(**fed).logits)


@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
def test_where_no_bias_counts_distances_none_counts_a_prefix(kind, lab):
    with pytest.raises(CompositionError, match=r"prefix\.distances: no bias of this base"):
        lab.operate(lab.base(kind), {"prefix": {"distances": "before"}})


def test_layers_that_share_a_bias_count_one_prefix_or_none(lab):
    with pytest.raises(CompositionError, match="encoder/attention@1 adds the same bias by distance as encoder/attent"):
        lab.operate(lab.base("t5"), {"prefix": {"distances": "before", "where": "encoder/attention@0"}})
    halves = [{"prefix": {"distances": d, "where": f"encoder/attention@{i}"}} for i, d in enumerate(("none", "first"))]
    with pytest.raises(CompositionError, match="encoder/attention@0 adds the same bias by distance"):
        lab.operate(lab.base("t5"), *halves)


def test_a_prefix_before_the_distances_of_one_layer_is_a_text_that_begins_with_its_words(lab, base_folder, monkeypatch):
    """MPNet's bias stands beside the mask."""
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MPNetForMaskedLM(MPNetConfig(vocab_size=100, max_position_embeddings=64, **sizes)).eval()
        model.mpnet.encoder.relative_attention_bias.weight.normal_()
    counted, none = (
        lab.operate(
            model, {"prefix": {"length": 3, "start": "words", "words": "good film great", "distances": distances}}
        )
        .model("a")
        .eval()
        for distances in ("before", "none")
    )
    fed = lab.feed(model, 3, 9, pad=2)
    read = torch.tensor([4, 12, 6]).expand(3, -1)
    mask = torch.cat([torch.ones_like(read), fed["attention_mask"]], 1)
    wanted = model(input_ids=torch.cat([read, fed["input_ids"]], 1), attention_mask=mask).logits[:, 3:]
    assert lab.gap(counted(**fed).logits, wanted) <= 1e-6
    assert lab.gap(none(**fed).logits, wanted) > 1e-4
    lab.forget(model)
