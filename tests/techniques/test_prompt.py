"""A prompt is what a truly larger vocabulary would hold, wherever the text is padded."""

from __future__ import annotations

import pytest
import torch

LENGTH = 4


@pytest.fixture
def enlarged(lab):
    """A copy of a base whose vocabulary has the prompt's rows behind its own, and the ids that call them."""

    def make(model, prompt):
        larger = lab.apart(model)
        words = model.get_input_embeddings().weight.detach()
        larger.config.tie_word_embeddings = False
        table = torch.nn.Embedding.from_pretrained(torch.cat([words, prompt.detach()]))
        larger.set_input_embeddings(table)
        return larger, torch.arange(len(words), len(words) + len(prompt))

    return make


def with_prompt(fed, ids, place):
    """The same inputs with virtual ids in them."""
    batch, own = fed["input_ids"].shape[0], fed["input_ids"]
    first = 0 if place == "front" else 1
    mask = fed["attention_mask"]
    return {
        **fed,
        "input_ids": torch.cat([own[:, :first], ids.expand(batch, -1), own[:, first:]], 1),
        "attention_mask": torch.cat([mask[:, :first], mask.new_ones(batch, len(ids)), mask[:, first:]], 1),
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "head"), [("bert", None), ("llama", None), ("gpt2", None), ("gpt2", "classifier")])
def test_a_prompt_equals_an_enlarged_vocabulary(kind, head, side, lab, enlarged):
    name = "sequence-classification" if head else None
    model = lab.base(kind, name, **({"pad_token_id": 0} if head else {}))
    ours = lab.operate(model, {"prompt": {"length": LENGTH}}).model("a").eval()
    lab.move(ours)
    larger, ids = enlarged(model, next(iter(ours.state_dict().values())))
    fed = lab.feed(model, 3, 9, pad=3, side=side)
    found, wanted = ours(**fed).logits, larger(**with_prompt(fed, ids, "front")).logits
    if wanted.dim() == 3:
        wanted = wanted[:, LENGTH:]
        seen = fed["attention_mask"].bool()
        found, wanted = found[seen], wanted[seen]
    assert lab.gap(found, wanted) < 1e-6


def test_after_the_first_token_the_first_token_stays_first(lab, enlarged):
    model = lab.base("bert")
    ours = lab.operate(model, {"prompt": {"length": LENGTH, "place": "after"}}).model("a").eval()
    larger, ids = enlarged(model, next(iter(ours.state_dict().values())))
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(ours(**fed).logits, larger(**with_prompt(fed, ids, "after")).logits) < 1e-6


def test_an_encoder_decoder_has_its_prompt_in_front_of_the_encoders_text(lab, enlarged):
    model = lab.base("bart")
    ours = lab.operate(model, {"prompt": {"length": LENGTH}}).model("a").eval()
    lab.move(ours)
    larger = lab.apart(model)
    prompt = next(iter(ours.state_dict().values()))
    words = model.get_input_embeddings().weight.detach()
    larger.model.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(torch.cat([words, prompt]))
    fed = lab.feed(model, 3, 9, pad=2)
    ids = torch.arange(len(words), len(words) + LENGTH)
    assert lab.gap(ours(**fed).logits, larger(**with_prompt(fed, ids, "front")).logits) < 1e-6


def test_a_prompt_of_no_tokens_is_the_base_exactly(lab):
    model = lab.base("llama")
    ours = lab.operate(model, {"prompt": {"length": LENGTH}}).model("a").eval()
    ours.load_state_dict({name: tensor[:0] for name, tensor in ours.state_dict().items()})
    fed = lab.feed(model, 3, 9)
    assert torch.equal(ours(**fed).logits, model(**fed).logits)
