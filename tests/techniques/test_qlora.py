"""QLoRA is LoRA over the numbers that bitsandbytes reads from its own bytes."""

from __future__ import annotations

import gc
import warnings
import weakref

import bitsandbytes as bnb
import pytest
import torch

from surgeon.exporters.cache import cache_key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model


KINDS = ("bert", "llama", "gpt2", "t5", "albert")
COLUMNS = {"query": 0, "key": 32, "value": 64}


def linears(model):
    """Modules with a projection in an attention or feed-forward, by path; Conv1D's weight is `[in, out]`."""
    outside = ("classifier", "pooler", "lm_head", "score", "embedding_hidden_mapping_in", "relative_attention_bias")
    kinds = ("Linear", "Conv1D")
    return {
        name: (module, type(module).__name__ == "Conv1D")
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and not set(name.split(".")) & set(outside)
    }


def in_plain_torch(lab, model, weights, scale):
    """The base with dequantised weights, and products beside them: equation 5 of the paper."""
    theirs = lab.apart(model)
    with torch.no_grad():
        for module, turned in linears(theirs).values():
            _, numbers = lab.in_nf4(module.weight.T if turned else module.weight)
            module.weight.copy_(numbers.T if turned else numbers)
    theirs.requires_grad_(False)
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    for name in (n for n in own if n.endswith(".lora_A")):
        path, a, b = name.removesuffix(".lora_A"), own[name], own[name.removesuffix("A") + "B"]
        fused = path.rpartition(".")[2] if path.rpartition(".")[2] in COLUMNS and "c_attn" in path else ""
        module = theirs.get_submodule(path.removesuffix(f".{fused}") if fused else path)
        module.register_forward_hook(_beside(a, b, scale, COLUMNS.get(fused)))
    return theirs, own


def _beside(a, b, scale, column):
    def added(_module, inputs, output):
        product = inputs[0] @ a @ (b * scale)
        if column is None:
            return output + product
        return output + torch.nn.functional.pad(product, (column, output.shape[-1] - column - product.shape[-1]))

    return added


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_are_those_of_plain_torch_over_dequantised_weights(kind, lab):
    model = lab.base(kind)
    ours = lab.move(lab.operate(model, {"qlora": {"rank": 3, "alpha": 6}}).model("a")).eval()
    theirs, own = in_plain_torch(lab, model, ours.state_dict(), 2.0)
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-3
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, {n: t.grad for n, t in own.items()}) <= 1e-6
    assert all(p.grad.abs().max() > 0 for p in lab.own(ours).values())


def test_qlora_equals_peft_over_bitsandbytes_layers(lab):
    """Widths are multiples of the block, where bitsandbytes' kernel for CPUs is right."""
    model = lab.base("llama", hidden_size=64, intermediate_size=128)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = lab.apart(model)
    for path, (linear, _) in linears(theirs).items():
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        theirs.set_submodule(path, layer.to("cpu"))
    theirs.is_loaded_in_4bit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(theirs, LoraConfig(target_modules=targets, r=4, lora_alpha=6)).train()
    assert type(wrapped.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    compiled = lab.operate(model, {"qlora": {"rank": 4, "alpha": 6}})
    ours = lab.move(compiled.model("a")).train()
    named = dict(wrapped.named_parameters())
    twins = {n: named[f"base_model.model.{n}.default.weight"] for n in ours.state_dict()}
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            twins[name].copy_(tensor.T)
    layer = theirs.get_submodule("model.layers.1.mlp.down_proj").base_layer.weight
    assert torch.equal(compiled.program.tensor("model.layers.1.mlp.down_proj.weight.nf4"), layer.data.flatten())
    fed = lab.batch(model)
    found, wanted = ours(**fed), wrapped(**fed)
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap({n: p.grad.T for n, p in lab.own(ours).items()}, {n: p.grad for n, p in twins.items()}) <= 2e-6


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_training_goes_down_over_four_bits(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, {"qlora": {"rank": 4}}).model("a")
    held = {n: b.clone() for n, b in ours.named_buffers()}
    before = ours(**lab.batch(model)).loss.item()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        ours(**lab.batch(model)).loss.backward()
        optimizer.step()
    assert ours(**lab.batch(model)).loss.item() < before - 0.02
    assert all(torch.equal(buffer, held[n]) for n, buffer in ours.named_buffers())


def test_a_fresh_task_is_the_quantised_base_and_its_distance_from_the_checkpoint_is_told(lab):
    model = lab.base("bert")
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    theirs, _ = in_plain_torch(lab, model, {}, 1.0)
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(compiled.model("a").eval()(**fed).logits, theirs(**fed).logits) <= 1e-6
    assert 1e-4 < compiled.program.drift < 1


def test_nothing_keeps_a_weight_alive_that_is_held_in_four_bits(lab, tiny):
    model = tiny("bert", num_hidden_layers=1)
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    lab.forget(model)
    weights = [weakref.ref(m.weight) for m, _ in linears(model).values()]
    compiled.base.release(compiled.program.stored)
    gc.collect()
    assert len(weights) == 6
    assert [w() for w in weights] == [None] * 6


def test_other_bytes_are_another_base_and_another_conversion(lab):
    model = lab.apart(lab.base("bert", num_hidden_layers=1))
    one, same, single, few = (
        lab.operate(model, {"qlora": {"rank": 4, **options}}).program
        for options in ({}, {}, {"block": 128}, {"quantise": "ffn"})
    )
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, single.fingerprint, few.fingerprint}) == 3
    before = cache_key(one, "", 20)
    assert before == cache_key(same, "", 20)
    one.constants["bert.encoder.layer.0.output.dense.weight.nf4"][3] ^= 1
    assert cache_key(one, "", 20) != before


def test_a_head_that_was_quantised_starts_at_the_quantised_numbers(lab):
    model = lab.base("bert")
    surgery = {"qlora": {"rank": 2, "quantise": ["attention", "head.out"], "where": "attention"}}
    program = lab.operate(model, surgery, {"head": {}}).program
    _, wanted = lab.in_nf4(model.classifier.weight.detach())
    assert torch.equal(program.ledger.deltas["classifier.head.weight"].default, wanted.T)
