"""A prompt is what a truly larger vocabulary would hold, wherever the text is padded."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import SpecError

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


@pytest.mark.parametrize("start", ["vocabulary", "labels"])
def test_a_prompt_starts_at_words_and_at_the_mean_of_each_labels_words(start, lab, base_folder, monkeypatch):
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    model = lab.base("bert")
    tasks = {"a": {"labels": ["good film", "bad"]}}
    ours = lab.operate(model, {"prompt": {"length": LENGTH, "start": start}}, tasks=tasks).model("a")
    prompt = next(t for name, t in ours.state_dict().items() if name.endswith(".prompt"))
    table = model.get_input_embeddings().weight
    if start == "labels":
        assert torch.equal(prompt[0], table[[4, 12]].mean(0))
        assert torch.equal(prompt[1], table[7])
        prompt = prompt[2:]
    assert all((row == table).all(1).any() for row in prompt)


def test_a_start_from_labels_needs_a_tokenizer_names_and_room_for_them(lab, base_folder, monkeypatch):
    model, surgery = lab.base("bert"), {"prompt": {"length": 2, "start": "labels"}}
    with pytest.raises(SpecError, match="this base has no tokenizer"):
        lab.operate(model, surgery)
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    for labels in (None, 3, ["good", "bad", "poor"]):
        compiled = lab.operate(model, surgery, tasks={"a": {"labels": labels}})
        with pytest.raises(SpecError, match=r"gives each label a token, and there are [03] for 2 tokens"):
            compiled.model("a")


def test_a_prompt_that_leaves_no_room_for_the_text_is_an_error(lab):
    with pytest.raises(SpecError, match="'prompt' leaves no position for the text: 64 of 64 are taken"):
        lab.operate(lab.base("gpt2"), {"prompt": {"length": 64}})
