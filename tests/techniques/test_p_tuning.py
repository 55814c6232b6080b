"""P-Tuning: a template is what a larger vocabulary would write; its encoder is PEFT's, and folds away."""

from __future__ import annotations

import warnings

import pytest
import torch

from surgeon.errors import CompositionError, SpecError
from surgeon.spec import read_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PromptEncoder, PromptEncoderConfig

TEMPLATE = "[P]*2 good [P] {text} film was [P]"
GOOD, FILM, WAS = 4, 12, 13
FRONT, BACK = (100, 101, GOOD, 102), (FILM, WAS, 103)  # 100 words are real
PLAIN = {"p_tuning": {"template": TEMPLATE, "encoder": "none"}}


@pytest.fixture
def words(lab, base_folder, monkeypatch):
    """The laboratory with a tokenizer of a few words."""
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    return lab


def larger(lab, model, tokens):
    """A copy of a base whose vocabulary has the trained tokens behind its own."""
    theirs = lab.apart(model)
    table = torch.cat([model.get_input_embeddings().weight.detach(), tokens.detach()])
    theirs.config.tie_word_embeddings = False
    theirs.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    return theirs


def written(fed, behind=0):
    """The same inputs with the template in them, row by row, and where the real tokens went."""
    rows, masks, places = [], [], []
    for ids, mask in zip(fed["input_ids"].tolist(), fed["attention_mask"].tolist(), strict=True):
        end = max(i for i, m in enumerate(mask) if m) + 1
        rows.append([*ids[:behind], *FRONT, *ids[behind:end], *BACK, *ids[end:]])
        masks.append([*mask[:behind], *[1] * len(FRONT), *mask[behind:end], *[1] * len(BACK), *mask[end:]])
        moved = [i + len(FRONT) * (i >= behind) + len(BACK) * (i >= end) for i in range(len(ids))]
        places.append(moved)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}, torch.tensor(places)


CASES = [("bert", None), ("bert", "token-classification"), ("gpt2", None), ("llama", None), ("llama", "classifier")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_template_is_what_a_larger_vocabulary_would_write(kind, head, side, words):
    model = words.base(kind, "sequence-classification" if head == "classifier" else head)
    ours = words.operate(model, PLAIN).model("a").eval()
    tokens = next(t for name, t in ours.state_dict().items() if name.endswith(".embedding"))
    fed = words.feed(model, 3, 9, pad=3, side=side)
    long, places = written(fed)
    found, wanted = ours(**fed).logits, larger(words, model, tokens)(**long).logits
    if wanted.dim() == 3:
        seen = fed["attention_mask"].bool()
        rows = torch.arange(3).unsqueeze(1)
        found, wanted = found[seen], wanted[rows, places][seen]
    assert words.gap(found, wanted) <= 1e-6


def test_spans_are_cut_back_to_the_text_and_the_first_token_may_stay_first(words):
    model = words.base("bert", "question-answering")
    ours = words.operate(model, {"p_tuning": {**PLAIN["p_tuning"], "place": "after"}}).model("a").eval()
    tokens = next(t for name, t in ours.state_dict().items() if name.endswith(".embedding"))
    fed = words.feed(model, 3, 9, pad=3)
    long, places = written(fed, behind=1)
    found, wanted = ours(**fed).start_logits, larger(words, model, tokens)(**long).start_logits.gather(1, places)
    assert words.gap(found, wanted) <= 1e-6


def test_a_head_of_the_tasks_own_labels_every_token_of_the_text(words, tmp_path):
    model = words.base("bert", "token-classification")
    compiled = words.operate(model, PLAIN, tasks={"a": {"labels": 3}, "b": {"labels": 5}})
    feeds = [words.feed(model, 3, 11, pad=4, side="left"), words.feed(model, 2, 6, pad=2)]
    assert words.served(compiled, tmp_path, feeds) <= 1e-4


def test_a_mask_in_the_template_would_have_no_answer(words):
    """It is an anchor like any other where nobody reads it out."""
    surgery = {"p_tuning": {"template": "{text} [P]*2 was [MASK] [P]"}}
    with pytest.raises(SpecError, match=r"\[MASK\] stands in the template, .*\n.*write \[MASK\] into the text"):
        words.operate(words.base("bert", "masked-lm"), surgery)
    with pytest.raises(SpecError, match=r"'\[MASK\]' is no token of this base"):
        words.operate(words.base("bert"), surgery)


def test_an_encoder_decoder_has_the_template_around_the_encoders_text(words):
    model = words.base("t5")
    ours = words.operate(model, PLAIN).model("a").eval()
    theirs = words.apart(model)
    tokens = next(t for name, t in ours.state_dict().items() if name.endswith(".embedding"))
    table = torch.cat([model.get_input_embeddings().weight.detach(), tokens])
    theirs.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(table)
    fed = words.feed(model, 3, 9, pad=3)
    assert words.gap(ours(**fed).logits, theirs(**{**fed, **written(fed)[0]}).logits) <= 1e-6


@pytest.mark.parametrize(("encoder", "hidden"), [("lstm", None), ("lstm", 6), ("mlp", None), ("mlp", 7)])
def test_the_encoder_is_pefts_and_is_trained_through_the_fold(encoder, hidden, lab):
    model = lab.base("bert")
    surgery = {"p_tuning": {"template": "[P]*5 {text}", "encoder": encoder, "hidden": hidden}}
    ours = lab.operate(model, surgery).model("a").eval()
    own = {name.partition(".p_tuning.")[2]: tensor for name, tensor in lab.own(ours).items()}
    config = PromptEncoderConfig(
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden or (16 if encoder == "lstm" else 32),
        encoder_dropout=0.0,
        num_virtual_tokens=5,
        token_dim=32,
        num_transformer_submodules=1,
    )
    theirs = PromptEncoder(config)
    names = {"embedding": "embedding.weight"}
    names |= {n: n.replace("lstm.", "lstm_head.").replace("mlp.", "mlp_head.") for n in own if n != "embedding"}
    assert set(names.values()) == set(theirs.state_dict())
    with torch.no_grad():
        for name, tensor in own.items():
            theirs.get_parameter(names[name]).copy_(tensor)
    wanted = theirs(torch.arange(5).unsqueeze(0))[0]
    assert lab.gap(next(iter(ours.deployed().values())), wanted) <= 1e-6
    fed = lab.batch(model)
    ours(**fed).loss.backward()
    (grad,) = torch.autograd.grad(larger_loss(lab, model, wanted, fed), wanted, retain_graph=True)
    wanted.backward(grad)
    grads = {name: theirs.get_parameter(names[name]).grad for name in own}
    assert lab.gap({name: tensor.grad for name, tensor in own.items()}, grads) <= 1e-5


def larger_loss(lab, model, prompt, fed):
    """The base's loss with a prompt in front, by embeddings; every row of its text is seen but the padding."""
    embedded = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(fed["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, len(prompt), dtype=torch.int64), fed["attention_mask"]], 1)
    return model(inputs_embeds=embedded, attention_mask=mask, labels=fed["labels"]).loss


def test_words_are_the_tasks_own_but_frozen(words):
    model = words.base("bert")
    ours = words.operate(model, {"p_tuning": {"template": TEMPLATE}}).model("a")
    kept = next(name for name in ours.state_dict() if name.endswith(".words"))
    table = model.get_input_embeddings().weight
    assert torch.equal(ours.get_parameter(kept), table[[GOOD, FILM, WAS]])
    assert not ours.get_parameter(kept).requires_grad
    ours(**words.batch(model)).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in words.own(ours).items() if name != kept)


SLOW = [pytest.param(kind, marks=pytest.mark.sweep) for kind in ("llama", "gpt2", "t5")]


@pytest.mark.parametrize("kind", ["bert", *SLOW])
def test_every_template_runs_on_one_graph_in_onnx_runtime(kind, words, tmp_path):
    """Composed with others; a task of another template is other numbers of rows in front and behind."""
    model = words.base(kind)
    others = [{"lora": {"rank": 2}}, *([] if kind in ("llama", "t5") else [{"bitfit": {"where": "ffn"}}])]
    labels = ({"labels": 3}, {"labels": 5}) if kind == "bert" else ({}, {})
    surgery = [*others, {"p_tuning": {"template": TEMPLATE}}]
    compiled = words.operate(model, *surgery, tasks=dict(zip("ab", labels, strict=True)))
    other = {"p_tuning": {"template": "[P] {text} the [P]*4 film", "encoder": "none"}}
    compiled._models["b"] = words.operate(model, *others, other, tasks={"b": labels[1]}).model("b")
    feeds = [words.feed(model, *sizes, pad=pad) for *sizes, pad in ((3, 11, 4), (1, 5, 0))]
    assert words.served(compiled, tmp_path, feeds) <= 1e-4


@pytest.mark.parametrize(
    ("template", "mistake"),
    [
        ("[P]*3 it was", "must have the slot {text} once, and has it 0 times"),
        ("{text} [P] {text}", "must have the slot {text} once, and has it 2 times"),
        ("it was {text}", "has no trained token"),
        ("[P]*0 {text}", "has '[P]*0', which is neither"),
        ("[P]{text}", "has '[P]{text}', which is neither"),
        ("[P] {txt}", "has '{txt}', which is neither"),
    ],
)
def test_a_template_that_is_none_says_why(template, mistake):
    with pytest.raises(SpecError) as caught:
        read_spec({"surgery": [{"p_tuning": {"template": template}}]})
    assert mistake in str(caught.value)


def test_words_need_a_tokenizer_that_knows_them(lab, words, monkeypatch):
    model = lab.base("bert")
    with pytest.raises(SpecError, match="does not know 'awful'"):
        words.operate(model, {"p_tuning": {"template": "[P] awful {text}"}})
    with pytest.raises(SpecError, match=r"'\[MASK\]' is no token of this base"):
        words.operate(model, {"p_tuning": {"template": "[P] [MASK] {text}"}})
    monkeypatch.setattr(lab, "tokenizer", None)
    with pytest.raises(SpecError, match="'good' are words, and this base has no tokenizer"):
        lab.operate(model, {"p_tuning": {"template": "[P] good {text}"}})


def test_what_leaves_no_room_for_the_text_or_doubles_the_tokens_is_an_error(lab):
    model = lab.base("bert")
    with pytest.raises(SpecError, match="'p_tuning' leaves no position for the text: 64 of 64 are taken"):
        lab.operate(model, {"p_tuning": {"template": "[P]*64 {text}"}})
    with pytest.raises(CompositionError, match="'p_tuning' and 'prompt' would both put virtual tokens into the text"):
        lab.operate(model, {"prompt": {"length": 3}}, {"p_tuning": {}})
