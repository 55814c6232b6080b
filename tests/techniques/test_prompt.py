"""A prompt is what a truly larger vocabulary would hold, wherever the text is padded."""

from __future__ import annotations

import pytest
import torch

import surgeon
from surgeon.errors import CompositionError, DataError, DeltaError, SpecError
from surgeon.runtime.taskfile import write_adapter

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


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_prompt_starts_at_the_size_of_the_embeddings_that_it_stands_beside(kind, lab):
    """Gemma's embedding module multiplies its rows by √d."""
    model = lab.base(kind)
    embeddings = model.get_input_embeddings()(torch.arange(100)).detach()
    drawn, random, told = (
        next(iter(lab.operate(model, {"prompt": {"length": 50, **start}}).model("a").state_dict().values()))
        for start in ({}, {"start": "random"}, {"start": "random", "std": 3.0})
    )
    assert all((row - embeddings).abs().amax(1).min() < 1e-6 for row in drawn)
    assert float(random.std()) == pytest.approx(float(embeddings.std()), rel=0.1)
    assert float(told.std()) == pytest.approx(3, rel=0.1)


def test_a_start_from_labels_needs_a_tokenizer_names_and_room_for_them(lab, base_folder, monkeypatch):
    model, surgery = lab.base("bert"), {"prompt": {"length": 2, "start": "labels"}}
    with pytest.raises(SpecError, match="this base has no tokenizer"):
        lab.operate(model, surgery)
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    for labels in (None, 3, ["good", "bad", "poor"]):
        compiled = lab.operate(model, surgery, tasks={"a": {"labels": labels}})
        with pytest.raises(SpecError, match=r"gives each label a token: there are [03] for 2 tokens"):
            compiled.model("a")


@pytest.mark.parametrize("surgery", [{"prompt": {"length": LENGTH}}, {"prefix": {"length": LENGTH}}])
def test_at_run_time_the_text_must_fit_beside_the_tasks_own_tokens(surgery, lab, tmp_path):
    model = lab.base("bert")
    compiled = lab.operate(model, surgery, tasks={"a": {"labels": 2}})
    assert compiled.model("a").occupied() == LENGTH
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session:
        fed = {"input_ids": torch.full((1, 64), 5).numpy()}
        assert session.run(fed)["logits"].shape == (1, 2)
        with pytest.raises(DataError, match="has 64 tokens, the base takes 64 at most") as caught:
            session.run(fed, "a")
        assert "tokens of the task's own: 4, which leaves 60" in str(caught.value)
        with torch.no_grad():
            wanted = compiled.model("a").eval()(torch.full((1, 60), 5)).logits
        found = session.run({"input_ids": fed["input_ids"][:, :60]}, "a")["logits"]
        assert lab.gap(torch.from_numpy(found), wanted) <= 1e-5


def test_a_prompt_that_leaves_no_room_for_the_text_is_an_error(lab):
    with pytest.raises(SpecError, match="'prompt' leaves no position for the text: 64 of 64 are taken"):
        lab.operate(lab.base("gpt2"), {"prompt": {"length": 64}})


N = 3
ENSEMBLE = {"prompt": {"length": LENGTH, "ensemble": N}}


def shallow(lab, kind, head=None):
    """A base of one layer, as prompts act on the input and on the answers; of four classes, so that votes may tie."""
    layers = {"gpt2": {"n_layer": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}
    classes = {"num_labels": 4} if kind == "bert" and head != "feature-extraction" else {}
    return lab.base(kind, head, **layers.get(kind, {"num_hidden_layers": 1}), **classes)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "head"), [("bert", None), ("bert", "token-classification"), ("gpt2", None)])
def test_an_ensemble_votes_and_each_of_its_prompts_answers_as_one_alone(kind, head, side, lab):
    model = shallow(lab, kind, head)
    ours = lab.operate(model, ENSEMBLE).model("a")
    lab.move(ours, by=1.0)
    (name, prompts), *_ = ours.state_dict().items()
    assert prompts.shape == (N, LENGTH, 32)
    alone = lab.operate(model, {"prompt": {"length": LENGTH}}).model("a").eval()
    fed = lab.feed(model, 3, 9, pad=3, side=side)
    each = []
    for prompt in prompts:
        alone.load_state_dict({name: prompt})
        each.append(alone(**fed).logits)
    each = torch.stack(each)
    assert lab.gap(ours.train()(**fed).logits, each.flatten(0, 1)) <= 1e-6
    votes = torch.nn.functional.one_hot(each.argmax(-1), each.shape[-1]).sum(0)
    share = (votes + each.softmax(-1).mean(0)) / (N + 1)
    found = ours.eval()(**fed).logits
    assert lab.gap(found.softmax(-1), share) <= 1e-5
    assert (votes.gather(-1, found.argmax(-1, keepdim=True)) == votes.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_every_prompt_of_an_ensemble_learns_on_its_own(kind, lab):
    model = shallow(lab, kind)
    ours = lab.operate(model, ENSEMBLE).model("a").train()
    (name, prompts), *_ = lab.own(ours).items()
    fed = lab.batch(model)
    ours(**fed).loss.backward()
    alone = lab.operate(model, {"prompt": {"length": LENGTH}}).model("a").train()
    for prompt, grad in zip(prompts.detach(), prompts.grad, strict=True):
        alone.zero_grad()
        alone.load_state_dict({name: prompt})
        alone(**fed).loss.backward()
        assert lab.gap(N * grad, lab.own(alone)[name].grad) <= 1e-5


@pytest.mark.parametrize("kind", ["bert", pytest.param("t5", marks=pytest.mark.sweep)])
def test_ensembles_of_other_sizes_run_in_onnx_runtime(kind, lab, tmp_path):
    model = shallow(lab, kind)
    labels = [{"labels": 3}, {"labels": 4}] if kind == "bert" else [{}, {}]
    compiled = lab.operate(model, {"lora": {"rank": 2}}, ENSEMBLE, tasks=dict(zip("ab", labels, strict=True)))
    lab.move(compiled.model("a"), by=0.5)
    lab.resize(compiled.model("b"), ensemble=1, length=6)
    feeds = [lab.feed(model, *sizes, pad=pad) for *sizes, pad in ((3, 11, 4), (1, 5, 0))]
    assert lab.served(compiled, tmp_path, feeds) <= 1e-4


def test_an_ensemble_of_one_prompt_of_no_tokens_is_the_base(lab):
    model = shallow(lab, "gpt2")
    ours = lab.operate(model, ENSEMBLE).model("a").eval()
    ours.load_state_dict({name: tensor[:1, :0] for name, tensor in ours.state_dict().items()})
    fed = lab.feed(model, 3, 9)
    assert torch.equal(ours(**fed).logits, model(**fed).logits)


def test_an_ensemble_of_no_prompts_is_refused(lab, tmp_path):
    """In training, and in a task file; there would be nobody to answer."""
    compiled = lab.operate(shallow(lab, "gpt2"), ENSEMBLE)
    ours = compiled.model("a")
    with pytest.raises(DeltaError, match=r"ensemble is 0 in .*, and must be 1 at least"):
        ours.load_state_dict({name: tensor[:0] for name, tensor in ours.state_dict().items()})
    build = compiled.save(tmp_path / "build")
    for count in (1, 0):
        arrays = {name: tensor[:count].detach().numpy() for name, tensor in ours.deployed().items()}
        write_adapter(tmp_path / f"{count}.onnx_adapter", arrays, compiled.program.fingerprint)
    with surgeon.Session(build) as session:
        session.add_task(tmp_path / "1.onnx_adapter", "one")
        with pytest.raises(DeltaError, match=r"ensemble is 0 in .*, and must be 1 at least"):
            session.add_task(tmp_path / "0.onnx_adapter", "none")


def test_features_cannot_vote(lab):
    with pytest.raises(CompositionError, match="features are no answers that could vote"):
        lab.operate(shallow(lab, "bert", "feature-extraction"), ENSEMBLE)
