"""Prefixes are PEFT's where it is right, the base's own cache where it takes one, and attention by hand elsewhere."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from surgeon.errors import CompositionError, SpecError
from sweep.cases import Case, base

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PrefixTuningConfig, get_peft_model

N = 5
PREFIX = {"prefix": {"length": N, "std": 1.0}}


def stacked(prefixes):
    """Our tensors in PEFT's flat form `[n, 2·layers·heads·d]`: slot 2i is layer i's key, slot 2i + 1 its value."""
    return torch.stack(list(prefixes.values())).permute(2, 0, 1, 3).flatten(1)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_decoders_prefix_equals_pefts(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, PREFIX).model("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
        theirs = get_peft_model(lab.apart(model), config).eval()
    embedding = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(stacked(ours.state_dict()))
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-2
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(stacked({n: p.grad for n, p in lab.own(ours).items()}), embedding.grad) <= 1e-6
    lab.train(ours, model, lab.own(ours).values())
    lab.train(theirs, model, [embedding])
    assert lab.gap(stacked(ours.state_dict()), embedding) <= 1e-5


def test_an_encoders_prefix_is_what_its_own_cache_would_hold(lab):
    """PEFT refuses classifiers; the backbone takes a cache, and the head is applied by hand."""
    model = lab.base("bert")
    ours = lab.operate(model, PREFIX).model("a")
    tensors = list(ours.state_dict().values())
    for side in ("right", "left"):
        fed = lab.feed(model, 3, 9, pad=3, side=side)
        pairs = [
            (k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in zip(tensors[::2], tensors[1::2], strict=True)
        ]
        mask = torch.cat([torch.ones(3, N, dtype=torch.int64), fed["attention_mask"]], 1)
        pooled = model.bert(input_ids=fed["input_ids"], attention_mask=mask, cache=DynamicCache(pairs)).pooler_output
        assert lab.gap(ours(**fed).logits, model.classifier(pooled)) <= 1e-6


def attend(module, query, key, value, mask, prefixes, scaling=None, position_bias=None, **_):
    """softmax(q·[P_k; k]ᵀ + [0, mask + bias])·[P_v; v], in as many words."""
    p_key, p_value = (
        p.repeat_interleave(query.shape[1] // p.shape[0], 0).expand(len(query), -1, -1, -1) for p in prefixes[module]
    )
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
    scores = query @ torch.cat([p_key, key], 2).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias = sum(b for b in (mask, position_bias) if b is not None)
    scores = torch.cat([scores[..., :N], scores[..., N:] + bias], -1)
    return (scores.softmax(-1) @ torch.cat([p_value, value], 2)).transpose(1, 2), None


@pytest.fixture
def by_hand(lab):
    """A copy of a base whose attention is written above, with the prefixes of `ours`."""

    def make(model, ours):
        theirs = lab.apart(model)
        own = ours.state_dict(keep_vars=True)
        prefixes = {
            theirs.get_submodule(name.removesuffix(".prefix.key")): (own[name], own[name.replace(".key", ".value")])
            for name in own
            if name.endswith(".prefix.key")
        }
        AttentionInterface.register("by_hand", partial(attend, prefixes=prefixes))
        AttentionMaskInterface.register("by_hand", eager_mask)
        theirs.set_attn_implementation("by_hand")
        return theirs

    return make


def test_an_encoder_decoder_has_prefixes_in_encoder_decoder_and_cross_attention(by_hand, lab):
    """T5: no positions to shift, and its relative bias is zero over a prefix."""
    model = lab.base("t5")
    ours = lab.operate(model, PREFIX).model("a")
    theirs = by_hand(model, ours)
    assert len(ours.state_dict()) == 2 * (2 + 2 + 2)
    fed = lab.feed(model, 3, 11, pad=4)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


@pytest.mark.parametrize("shift", [True, False])
def test_learned_positions_move_up_by_the_prefix_where_the_spec_says_so(shift, by_hand, lab):
    model = lab.base("bart")
    ours = lab.operate(model, {"prefix": {**PREFIX["prefix"], "shift": shift}}).model("a")
    theirs = by_hand(model, ours)
    for stack in (theirs.model.encoder, theirs.model.decoder):
        stack.embed_positions.offset += N if shift else 0
    fed = lab.feed(model, 3, 11, pad=4)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_gradients_of_an_encoder_decoders_prefixes_are_those_of_attention_by_hand(by_hand, lab):
    model = lab.base("t5")
    ours = lab.operate(model, PREFIX).model("a")
    fed = lab.feed(model, 3, 11, pad=4)
    fed["labels"] = fed["decoder_input_ids"]
    grads = []
    for peer in (ours, by_hand(model, ours)):  # both hold the same tensors
        ours.zero_grad()
        peer(**fed).loss.backward()
        grads.append({name: ours.get_parameter(name).grad.clone() for name in ours.state_dict()})
    assert lab.gap(*grads) <= 1e-6


def test_the_mlp_of_the_reparametrisation_folds_away(lab):
    """P = MLP(P'), as the authors' code has it: one row of P holds key and value of layer 0, of layer 1, …"""
    model = lab.base("llama")
    ours = lab.operate(model, {"prefix": {"length": N, "hidden": 7}}).model("a")
    t = {name.rpartition("prefix.")[2]: tensor for name, tensor in ours.state_dict().items()}
    assert t["embedding"].shape == (N, 16)  # two kv heads of 8
    assert t["up.weight"].shape == (7, 2 * 2 * 16)
    rows = torch.tanh(t["embedding"] @ t["down.weight"] + t["down.bias"]) @ t["up.weight"] + t["up.bias"]
    deployed = ours.deployed()
    assert lab.gap(stacked(deployed), rows) <= 1e-7
    flat = lab.operate(model, PREFIX).model("a")
    flat.load_state_dict(deployed)
    fed = lab.feed(model, 2, 7)
    assert torch.equal(flat(**fed).logits, ours(**fed).logits)
    ours(**fed, labels=fed["input_ids"]).loss.backward()
    assert all(ours.get_parameter(name).grad.abs().max() > 0 for name in ours.state_dict())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "bart", "albert"])
def test_a_prefix_of_no_tokens_is_the_base_exactly(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, PREFIX).model("a")
    ours.load_state_dict({name: tensor[:, :0] for name, tensor in ours.state_dict().items()})
    fed = lab.feed(model, 3, 9, pad=2)
    assert torch.equal(ours(**fed).logits, model(**fed).logits)


def test_two_items_of_one_stack_share_their_length_and_shift_positions_once(lab):
    model = lab.base("gpt2")
    items = [{"prefix": {"length": N, "where": f"attention@{layer}"}} for layer in (0, 1)]
    ours, one = lab.operate(model, *items).model("a"), lab.operate(model, PREFIX).model("a")
    one.load_state_dict(lab.move(ours).state_dict())
    fed = lab.batch(model)
    assert torch.equal(ours(**fed).logits, one(**fed).logits)
    with pytest.raises(CompositionError, match=r"wants prefix.length.decoder to be 7, and it is 5 already"):
        lab.operate(model, items[0], {"prefix": {"length": 7, "where": "attention@1"}})


def test_attentions_that_add_their_scores_to_each_others_get_no_prefix(lab):
    """LiLT's, of a text and of the boxes of its words."""
    model = base(Case("lilt", "sequence-classification"))
    with pytest.raises(CompositionError, match="encoder/attention@0 adds the scores of stack1/attention@0 to its own"):
        lab.operate(model, PREFIX)
    lab.forget(model)


def test_queries_that_meet_two_kinds_of_keys_in_one_softmax_get_no_prefix(lab):
    """PEGASUS-X's, of a block and of the whole text."""
    model = base(Case("pegasus_x", "seq2seq-lm"))
    with pytest.raises(CompositionError, match="encoder/attention@0 has its queries meet other keys as well"):
        lab.operate(model, PREFIX)
    lab.forget(model)


def test_two_attentions_in_one_of_other_heads_get_no_prefix(lab):
    """ProphetNet's, for the next token and, with other axes, for those after it."""
    model = base(Case("prophetnet", "causal-lm"))
    with pytest.raises(CompositionError, match="decoder/attention@0 is two attentions, of 4 and of 2 heads"):
        lab.operate(model, PREFIX)
    lab.forget(model)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_behind_a_prompt_the_positions_move_up_too(kind, lab):
    """The prompt's tokens are in the graph's lengths, so the positions it counts hold a delta's size."""
    model = lab.base(kind)
    ours = lab.operate(model, {"prompt": {"length": 3}}, PREFIX).model("a")
    prompt = next(t for name, t in ours.state_dict().items() if "prefix" not in name).expand(2, -1, -1)
    flat = [t.expand(2, -1, -1, -1) for name, t in ours.state_dict().items() if "prefix" in name]
    cache = DynamicCache(list(zip(flat[::2], flat[1::2], strict=True)))
    fed = lab.feed(model, 2, 7)
    embedded = torch.cat([prompt, model.get_input_embeddings()(fed["input_ids"])], 1)
    mask, positions = torch.ones(2, N + 3 + 7, dtype=torch.int64), torch.arange(N, N + 3 + 7)[None]
    backbone = model.bert if kind == "bert" else model.transformer
    hidden = backbone(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, cache=cache)
    of_text = hidden.last_hidden_state[:, 3:]
    wanted = model.classifier(hidden.pooler_output) if kind == "bert" else model.lm_head(of_text)
    assert lab.gap(ours(**fed).logits, wanted) <= 1e-6


def test_rows_drop_out_on_their_own_in_training_alone(lab):
    model = lab.base("bert")
    ours = lab.operate(model, {"prefix": {"length": N, "std": 1.0, "dropout": 0.5}}).model("a")
    one = lab.feed(model, 1, 7)
    fed = {name: tensor.expand(2, -1) for name, tensor in one.items()}
    dropped = ours.train()(**fed).logits
    assert lab.gap(dropped[0], dropped[1]) > 1e-3
    kept = ours.eval()(**fed).logits
    assert torch.equal(kept, ours(**fed).logits)
    assert lab.gap(kept[0], kept[1]) <= 1e-6


@pytest.fixture
def words(lab, base_folder, monkeypatch):
    """The laboratory with a tokenizer of a few words."""
    monkeypatch.setattr(lab, "tokenizer", base_folder / "tokenizer.json")
    return lab


OF_WORDS = {"prefix": {"length": N, "start": "words", "words": "good film great"}}
IDS = [4, 12, 6, 4, 12]  # repeated to the length


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_prefix_of_words_is_a_decoder_that_has_read_them(kind, words):
    model = words.base(kind)
    ours = words.operate(model, {"lora": {"rank": 2}}, OF_WORDS).model("a").eval()
    fed = words.feed(model, 3, 9, pad=2)
    read = torch.tensor(IDS).expand(3, -1)
    mask = torch.cat([torch.ones_like(read), fed["attention_mask"]], 1)
    wanted = model(input_ids=torch.cat([read, fed["input_ids"]], 1), attention_mask=mask).logits[:, N:]
    seen = fed["attention_mask"].bool()
    assert words.gap(ours(**fed).logits[seen], wanted[seen]) <= 1e-6


def test_a_prefix_of_words_is_what_projections_give_in_every_stack(words):
    model = words.base("t5")
    ours = words.operate(model, OF_WORDS).model("a").state_dict()
    read = torch.tensor([IDS])
    kept = {}
    for name, module in model.named_modules():
        if name.endswith((".k", ".v")):
            module.register_forward_hook(lambda _m, _i, output, name=name: kept.update({name: output}))
    model(input_ids=read, decoder_input_ids=read)
    for module in model.modules():
        module._forward_hooks.clear()
    assert len(kept) == len(ours) == 12
    for name, states in kept.items():
        part = "key" if name.endswith(".k") else "value"
        prefix = ours[f"{name.rpartition('.')[0]}.prefix.{part}"]
        assert words.gap(prefix, states.view(N, 4, 8).transpose(0, 1)) <= 1e-6


def test_a_start_from_words_that_cannot_be_says_why(lab, words, monkeypatch):
    for options in ({"start": "words"}, {"words": "good"}, {"start": "words", "words": "good", "hidden": 3}):
        with pytest.raises(SpecError, match="start"):
            words.operate(words.base("bert"), {"prefix": options})
    with pytest.raises(SpecError, match="does not know 'awful'"):
        words.operate(words.base("bert"), {"prefix": {"start": "words", "words": "awful"}})
    monkeypatch.setattr(lab, "tokenizer", None)
    with pytest.raises(SpecError, match="no tokenizer"):
        lab.operate(lab.base("bert"), OF_WORDS)


def test_a_prefix_that_leaves_no_position_for_the_text_is_an_error(lab):
    with pytest.raises(SpecError, match="'prefix' leaves no position for the text: 70 of 64 are taken"):
        lab.operate(lab.base("gpt2"), {"prefix": {"length": 70}})
    lab.operate(lab.base("gpt2"), {"prefix": {"length": 70, "shift": False}})
