"""Mixtures of experts: a product of its own for every expert, the papers' equation and PEFT's, into ONNX Runtime."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import relu

from surgeon.errors import CompositionError, DeltaError, SpecError
from surgeon.foreign.peft_writer import write
from surgeon.merging import merge
from surgeon.mixed import mixed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

EXPERTS, RANK, ALPHA = 4, 3, 6
EVERY = {"lora": {"rank": RANK, "alpha": ALPHA, "where": ["moe.gate", "moe.up", "moe.down"]}}
WAYS = ("grouped_mm", "batched_mm")
"""Rows sorted into runs, an expert each; or the expert's weights picked for every row."""
BASES = {"mixtral": 64, "qwen2_moe": 24, "gpt_oss": 64}
OTHERS = pytest.param("qwen2_moe", "batched_mm", marks=pytest.mark.sweep)
CASES = [("mixtral", "grouped_mm"), ("mixtral", "batched_mm"), ("gpt_oss", "grouped_mm"), OTHERS]
"""qwen2_moe has a shared expert too; gpt_oss weights `[experts, in, out]`, gate and up interleaved, and biases."""


@pytest.fixture(scope="module")
def moe(lab):
    """A tiny base that computes its experts in one of the ways transformers has."""
    made = {}

    def make(kind, way="grouped_mm"):
        if (kind, way) not in made:
            made[kind, way] = lab.apart(lab.base(kind))
            made[kind, way].set_experts_implementation(way)
        return made[kind, way]

    return make


def product(own, site):
    """s · A·B of every expert: `[experts, in, out]`."""
    return ALPHA / RANK * own[f"{site}.lora_A"] @ own[f"{site}.lora_B"]


def written_in(model, own):
    """Let a copy of the base have each expert's product in its weights."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf not in {"gate_up_proj", "down_proj"} or parameter.dim() != 3:
            continue
        if leaf == "down_proj":
            change = product(own, f"{owner}.down")
        else:
            parts = product(own, f"{owner}.gate"), product(own, f"{owner}.up")
            interleaved = "bias" in "".join(n for n, _ in model.get_submodule(owner).named_parameters())
            change = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        with torch.no_grad():
            parameter.add_(change if change.shape == parameter.shape else change.transpose(-1, -2))
    return model


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_experts_are_sites_with_a_weight_each(kind, way, moe, lab):
    program = lab.operate(moe(kind, way), EVERY).program
    inner = BASES[kind]
    found = [p for p in program.anatomy.projections if p.experts]
    assert [(p.layer, p.role, p.in_features, p.out_features) for p in found] == [
        (layer, *site)
        for layer in range(2)
        for site in (("moe.gate", 32, inner), ("moe.up", 32, inner), ("moe.down", inner, 32))
    ]
    assert {(p.experts.count, p.experts.sorted) for p in found} == {(EXPERTS, way == "grouped_mm")}
    assert {name.split(".lora")[0] for name in program.ledger.deltas} == {
        f"model.layers.{layer}.mlp.experts.{side}" for layer in range(2) for side in ("gate", "up", "down")
    }
    shapes = {tuple(d.shape) for d in program.ledger.deltas.values()}
    assert shapes == {(4, 32, 3), (4, 3, inner), (4, inner, 3), (4, 3, 32)}


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_product_for_each_expert_is_that_product_in_its_weight(kind, way, moe, lab):
    model = moe(kind, way)
    ours = lab.operate(model, EVERY).model("a").eval()
    fed = lab.batch(model)
    assert torch.equal(ours(**fed).logits, model(**fed).logits)
    lab.move(ours)
    wanted = written_in(lab.apart(model), ours.state_dict())(**fed).logits
    assert lab.gap(model(**fed).logits, wanted) > 1e-2
    assert lab.gap(ours(**fed).logits, wanted) <= 3e-6
    ours.train()(**fed).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lab.own(ours).values())


def pefts(lab, model):
    """PEFT's LoRA on the parameters of the experts, off its birth values; its wrapper of each parameter."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_modules": [], "target_parameters": targets, "r": RANK, "lora_alpha": ALPHA}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        wrapped = get_peft_model(lab.apart(model), LoraConfig(**options)).eval()
        for module in wrapped.modules():
            if hasattr(module, "parameter_name"):
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    prefix = "base_model.model."
    return wrapped, {
        f"{name.removeprefix(prefix).removesuffix('.base_layer')}.{module.parameter_name}": module
        for name, module in wrapped.named_modules()
        if hasattr(module, "parameter_name")
    }


def by_our_names(wrappers, read):
    """A and B of PEFT's two products a layer under the names of our three; gate and up have one A there."""
    found = {}
    for name, module in wrappers.items():
        a = read(module.lora_A["default"].weight).reshape(EXPERTS, RANK, -1).transpose(-1, -2)
        b = read(module.lora_B["default"].weight).reshape(-1, RANK, EXPERTS).permute(2, 1, 0)
        owner, _, leaf = name.rpartition(".")
        if leaf == "down_proj":
            found |= {f"{owner}.down.lora_A": a, f"{owner}.down.lora_B": b}
            continue
        gate, up = b.chunk(2, -1)
        found |= {f"{owner}.gate.lora_A": a, f"{owner}.gate.lora_B": gate}
        found |= {f"{owner}.up.lora_A": a, f"{owner}.up.lora_B": up}
    return found


@pytest.mark.parametrize(("kind", "way"), [*CASES[:2], OTHERS])
def test_products_of_experts_are_pefts(kind, way, moe, lab):
    model = moe(kind, way)
    theirs, wrappers = pefts(lab, model)
    assert len(wrappers) == 4
    ours = lab.operate(model, EVERY).model("a").eval()
    ours.load_state_dict(by_our_names(wrappers, lambda p: p.detach()))
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-3
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    found.loss.backward()
    wanted.loss.backward()
    grads = {name: p.grad for name, p in lab.own(ours).items()}
    for layer in range(2):  # one A there is two here
        gate, up = (f"model.layers.{layer}.mlp.experts.{side}.lora_A" for side in ("gate", "up"))
        grads[gate] = grads[up] = grads[gate] + grads[up]
    assert lab.gap(grads, by_our_names(wrappers, lambda p: p.grad)) <= 1e-5


@pytest.mark.parametrize(("kind", "way"), [CASES[0], OTHERS, pytest.param(*CASES[2], marks=pytest.mark.sweep)])
def test_experts_answer_the_same_in_onnx_runtime(kind, way, moe, lab, tmp_path):
    model = moe(kind, way)
    surgery = [EVERY, {"lora": {"rank": 2}}, {"adapter": {"bottleneck": 5, "placement": "pfeiffer"}}]
    compiled = lab.operate(model, *surgery, tasks={"a": {}, "b": {}})
    for seed, task in enumerate(compiled.tasks):
        lab.move(compiled.model(task), seed=seed)
    lab.resize(compiled.model("b"), rank=1)
    feeds = [lab.feed(model, 3, 9), lab.feed(model, 1, 1), lab.feed(model, 2, 14)]
    assert lab.served(compiled, tmp_path, feeds) <= 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_stands_behind_a_block_of_experts(way, moe, lab):
    """Pre-norm: join + f(join)."""
    model = moe("mixtral", way)
    options = {"bottleneck": 6, "placement": "pfeiffer", "activation": "relu", "norms": False}
    ours = lab.move(lab.operate(model, {"adapter": options}).model("a"))
    own, theirs = ours.state_dict(), lab.apart(model)
    for i, layer in enumerate(theirs.model.layers):
        site = f"model.layers.{i}.mlp.experts.adapter"
        down, back, up, forth = (own[f"{site}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias"))
        lab.behind(layer, lambda z, d=down, b=back, u=up, f=forth: relu(z @ d + b) @ u + f)
    fed = lab.batch(model)
    wanted = theirs(**fed).logits
    assert lab.gap(model(**fed).logits, wanted) > 1e-2
    assert lab.gap(ours(**fed).logits, wanted) <= 1e-6


def test_what_experts_cannot_have_is_refused(moe, lab):
    model = moe("mixtral")
    for option in ("dora", "bias"):
        with pytest.raises(SpecError, match=rf"lora.{option} is not defined for decoder/moe.gate@0"):
            lab.operate(model, {"lora": {**EVERY["lora"], option: True}})
    with pytest.raises(SpecError, match=r"rank 33 is larger than decoder/moe.gate@0"):
        lab.operate(model, {"lora": {"rank": 33, "where": "moe.gate"}})
    compiled = lab.operate(model, EVERY)
    lab.move(compiled.model("a"))
    with pytest.raises(DeltaError, match="no place for what lora does"):
        merge(compiled, "a")
    with pytest.raises(DeltaError, match="belongs to experts, which PEFT has in a layout of its own"):
        write(compiled, "a")
    with pytest.raises(CompositionError, match="rows of several tasks"):
        mixed(compiled.program)
