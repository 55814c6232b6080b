"""LoRA is PEFT's LoRA, number for number, wherever PEFT has the same function."""

from __future__ import annotations

import warnings

import pytest
import torch

from surgeon.errors import CompositionError, SpecError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model


QV = ["attention.query", "attention.value"]
T5_QV = [*QV, "cross_attention.query", "cross_attention.value"]
# base, our `where`, PEFT's targets
PEERS = {
    "post_norm": ("bert", QV, ["query", "value"]),
    "pre_norm": ("llama", QV, ["q_proj", "v_proj"]),
    "every_linear": (
        "llama",
        ["attention", "ffn"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "weights_in_first": ("gpt2", ["attention.output", "ffn"], ["c_proj", "c_fc"]),
    "encoder_decoder": ("t5", T5_QV, ["q", "v"]),
    "shared_layer": ("albert", QV, ["query", "value"]),
}


def peer(model, targets, seed=3, **options):
    """PEFT's LoRA on a copy, off its birth values; base parameters are frozen by PEFT."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT draws from the global generator, whose state depends on which tests ran before
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **options)).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return wrapped


OURS = {
    ".default.weight": "",
    ".default": "",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_B.bias": "lora_bias",
    "base_model.model.": "",
}


def by_our_names(wrapped, read=lambda p: p.detach()):
    """PEFT's tensors under our names, turned the way we multiply."""
    found = {}
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            for theirs, ours in OURS.items():
                name = name.replace(theirs, ours)  # noqa: PLW2901
            found[name] = read(parameter).T if parameter.dim() == 2 else read(parameter)
    return found


@pytest.fixture
def pair(lab):
    """Ours and PEFT's with the same weights."""

    def make(kind, where, targets, ours=None, **theirs):
        model = lab.base(kind)
        wrapped = peer(lab.apart(model), targets, **{"r": 4, "lora_alpha": 6, **theirs})
        ours = lab.operate(model, {"lora": {"rank": 4, "alpha": 6, "where": where, **(ours or {})}}).model("a")
        ours.load_state_dict(by_our_names(wrapped))
        return ours.eval(), wrapped

    return make


def both_answer(ours, theirs, fed):
    """Outputs and gradients by name of ours, then of PEFT's."""
    for model in (ours, theirs):
        model.zero_grad()
    found, wanted = ours(**fed), theirs(**fed)
    found.loss.backward()
    wanted.loss.backward()
    grads = by_our_names(theirs, lambda p: p.grad)
    return (found, {n: ours.get_parameter(n).grad for n in grads}), (wanted, grads)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("anatomy", PEERS)
def test_lora_equals_peft_with_copied_weights(anatomy, dora, pair, lab):
    kind, where, targets = PEERS[anatomy]
    model = lab.base(kind)
    ours, theirs = pair(kind, where, targets, {"dora": dora}, use_dora=dora)
    for training in (False, True):
        fed = lab.batch(model)
        (found, grads), (wanted, peft_grads) = both_answer(ours.train(training), theirs.train(training), fed)
        assert lab.gap(model(**fed).logits, wanted.logits) > 1e-3
        assert lab.gap(found.logits, wanted.logits) <= 1e-6
        assert lab.gap(grads, peft_grads) <= 3e-6  # rounding: in double precision, below, it is 1e-11


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("anatomy", ["post_norm", "pre_norm", "weights_in_first", "encoder_decoder"])
def test_twenty_steps_of_training_end_where_pefts_do(anatomy, dora, pair, lab):
    kind, where, targets = PEERS[anatomy]
    ours, theirs = pair(kind, where, targets, {"dora": dora}, use_dora=dora)
    start = by_our_names(theirs, lambda p: p.detach().clone())
    for model in (ours, theirs):
        lab.train(model, lab.base(kind), [p for p in model.parameters() if p.requires_grad])
    assert lab.gap(start, by_our_names(theirs)) > 1e-2
    assert lab.gap(ours.state_dict(), by_our_names(theirs)) <= 1e-5


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("anatomy", ["post_norm", "weights_in_first"])
def test_in_double_precision_nothing_is_left_of_the_difference(anatomy, dora, lab):
    """So what single precision shows is rounding. (RMS norms of transformers compute in single precision always.)"""
    kind, where, targets = PEERS[anatomy]
    model = lab.apart(lab.base(kind)).double()
    theirs = peer(lab.apart(model), targets, r=4, lora_alpha=6, use_dora=dora)
    ours = lab.operate(model, {"lora": {"rank": 4, "alpha": 6, "where": where, "dora": dora}}).model("a")
    ours.load_state_dict(by_our_names(theirs))
    (found, grads), (wanted, peft_grads) = both_answer(ours, theirs, lab.batch(model))
    assert lab.gap(found.logits, wanted.logits) <= 1e-13
    for name, grad in peft_grads.items():
        assert lab.gap(grads[name], grad) <= 1e-11


def test_rank_stabilised_scale_is_pefts(pair, lab):
    ours, theirs = pair("bert", QV, ["query", "value"], {"rslora": True}, use_rslora=True)
    fed = lab.feed(lab.base("bert"), 2, 7)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_ranks_and_alphas_of_single_layers_are_pefts_patterns(pair, lab):
    ranks = {"layer.1.attention.self.query": 2, "layer.0.attention.self.value": 1}
    alphas = {"layer.1.attention.self.query": 9, "layer.1.attention.self.value": 11}
    own = {
        "ranks": {"attention.query@1": 2, "attention.value@0": 1},
        "alphas": {"attention.query": 9, "attention.query@0": 6, "attention.value@1": 11},
    }
    ours, theirs = pair("bert", QV, ["query", "value"], own, rank_pattern=ranks, alpha_pattern=alphas)
    assert ours.get_parameter("bert.encoder.layer.1.attention.self.query.lora_A").shape == (32, 2)
    fed = lab.feed(lab.base("bert"), 2, 7)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_a_bias_of_the_product_is_pefts_where_the_base_has_none_too(pair, lab):
    for kind, targets in (("llama", ["q_proj", "v_proj"]), ("bert", ["query", "value"])):
        ours, theirs = pair(kind, QV, targets, {"bias": True}, lora_bias=True)
        (found, grads), (wanted, peft_grads) = both_answer(ours, theirs, lab.batch(lab.base(kind)))
        assert len(grads) == 3 * 4
        assert lab.gap(found.logits, wanted.logits) <= 1e-6
        assert lab.gap(grads, peft_grads) <= 3e-6


EMBEDDINGS = {
    "bert": ["word_embeddings"],
    "llama": ["embed_tokens"],
    "gpt2": ["wte"],  # its head reads the same table, and stays the base's
    "gemma2": ["embed_tokens"],  # scaled by √d
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_lora_on_a_table_of_tokens_is_pefts(kind, pair, lab):
    ours, theirs = pair(kind, ["embedding.token"], EMBEDDINGS[kind])
    (found, grads), (wanted, peft_grads) = both_answer(ours, theirs, lab.batch(lab.base(kind)))
    assert {tuple(g.shape) for g in grads.values()} == {(100, 4), (4, 32)}
    assert lab.gap(lab.base(kind)(**lab.batch(lab.base(kind))).logits, wanted.logits) > 1e-3
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap(grads, peft_grads) <= 3e-6


def test_a_table_that_two_stacks_look_up_in_has_one_product(lab):
    model = lab.base("t5")
    where = ["embedding.token", "attention.query"]
    ours = lab.move(lab.operate(model, {"lora": {"rank": 3, "alpha": 6, "where": where}}).model("a"))
    weights, theirs = ours.state_dict(), lab.apart(model)
    assert len(weights) == 2 + 2 * 4
    a, b = weights["shared.lora_embedding_A"], weights["shared.lora_embedding_B"]
    for stack in (theirs.encoder, theirs.decoder):
        stack.embed_tokens.register_forward_hook(lambda _, ids, rows: rows + 2 * a[ids[0]] @ b)
        for i, block in enumerate(stack.block):
            path = f"{'encoder' if stack is theirs.encoder else 'decoder'}.block.{i}.layer.0.SelfAttention.q"
            products = [(0, weights[f"{path}.lora_A"], weights[f"{path}.lora_B"], 2)]
            beside(block.layer[0].SelfAttention.q, 32, products)
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6
    encoder = lab.operate(model, {"lora": {"where": "encoder/embedding.token"}}).program
    assert sum(str(n.target) == "shared.lora_embedding_A" for n in encoder.graph.nodes) == 1


def test_rows_of_a_batch_may_bring_a_table_each(lab):
    """What batches of several tasks are built on: every delta may have a batch axis in front."""
    compiled = lab.operate(lab.base("bert"), {"lora": {"where": "embedding.token", "rank": 3}})
    one, two = (lab.move(compiled.model("a"), seed=s).deployed() for s in (1, 2))
    fed = {**lab.feed(lab.base("bert"), 2, 7), "token_type_ids": torch.zeros(2, 7, dtype=torch.long)}
    graph = compiled.program.graph_module
    one = {n: t.detach().clone() for n, t in one.items()}
    both = {n: torch.stack([one[n], two[n]]) for n in one}
    mixed = torch.func.functional_call(graph, both, (), fed)["logits"]
    for i, deltas in enumerate((one, two)):
        assert lab.gap(mixed[i], torch.func.functional_call(graph, deltas, (), fed)["logits"][i]) <= 1e-6


def test_a_prompt_stays_what_it_is_over_an_adapted_table(lab):
    model = lab.base("bert")
    lora, prompt = {"lora": {"where": "embedding.token", "rank": 3}}, {"prompt": {"length": 4}}
    both, alone = (lab.operate(model, *surgery).model("a").eval() for surgery in ([lora, prompt], [prompt]))
    alone.load_state_dict({n: t for n, t in both.state_dict().items() if n.endswith("prompt")})
    fed = lab.feed(model, 2, 7)
    assert lab.gap(both(**fed).logits, alone(**fed).logits) <= 1e-6
    weights = lab.move(both).state_dict()
    alone.load_state_dict({n: t for n, t in weights.items() if n.endswith("prompt")})
    with torch.no_grad():
        path = "bert.embeddings.word_embeddings"
        own = model.get_parameter(f"{path}.weight")
        before = own.clone()
        own.add_(16 / 3 * weights[f"{path}.lora_embedding_A"] @ weights[f"{path}.lora_embedding_B"])
        wanted = alone(**fed).logits
        own.copy_(before)
    assert lab.gap(both(**fed).logits, wanted) <= 1e-6
    with pytest.raises(CompositionError, match="lora further up"):
        lab.operate(model, prompt, lora)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dora": True, "where": "embedding.token"}, "lora.dora is not defined for encoder/embedding.token"),
        ({"dora": True, "bias": True}, "lora.bias is not defined with lora.dora"),
        ({"where": "embedding.position"}, "embedding.position is no table of tokens"),
        ({"where": "embedding.token", "rank": 33}, r"lora.rank 33 is larger than .*embedding.token"),
        ({"alphas": {"ffn": 4}}, "lora.alphas: 'ffn' selects .*, which `where` does not"),
        ({"alphas": {"attention.query": 0}}, "lora.alphas.* must be more than 0.0"),
        ({"alphas": {"atention": 4}}, "did you mean 'attention'"),
        ({"plus": 0}, "lora.plus must be more than 0.0"),
        ({"start": "pissa"}, "lora.start"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, said, lab):
    with pytest.raises(SpecError, match=said):
        lab.operate(lab.base("bert"), {"lora": options})


def test_dropout_is_on_the_input_of_the_product_alone(pair, lab):
    """The base has none here, so with the same seed both draw the same masks, in the same order."""
    ours, theirs = pair("llama", QV, ["q_proj", "v_proj"], {"dropout": 0.5}, lora_dropout=0.5)
    fed = lab.feed(lab.base("llama"), 2, 7)
    answers = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        answers.append(model(**fed).logits)
    assert lab.gap(*answers) <= 1e-6
    assert lab.gap(ours.eval()(**fed).logits, answers[0]) > 1e-2


def beside(linear, width, products):
    """Add `s · x·A·B` to the given columns of a projection's output."""

    def added(_module, inputs, output):
        extra = torch.zeros(*output.shape[:-1], width)
        for start, a, b, scale in products:
            extra[..., start : start + b.shape[1]] = inputs[0] @ a @ (b * scale)
        return output + extra

    linear.register_forward_hook(added)


@pytest.mark.parametrize("sides", [("query",), ("query", "key", "value")])
def test_each_role_of_a_fused_projection_gets_a_product_of_its_own(sides, lab):
    """As in the authors' `MergedLinear`. PEFT gives the fused projection one A and adapts all of it."""
    model = lab.base("gpt2")
    where = [f"attention.{side}" for side in sides]
    ours = lab.operate(model, {"lora": {"rank": 3, "alpha": 5, "where": where}}).model("a")
    lab.move(ours)
    weights, theirs = ours.state_dict(), lab.apart(model)
    for i, block in enumerate(theirs.transformer.h):
        own = {side: [weights[f"transformer.h.{i}.attn.c_attn.{side}.lora_{x}"] for x in "AB"] for side in sides}
        beside(block.attn.c_attn, 96, [(32 * column, a, b, 5 / 3) for column, (a, b) in enumerate(own.values())])
    assert {tuple(t.shape) for t in weights.values()} == {(32, 3), (3, 32)}
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6
