"""A module that several layers call has one delta for all of its calls, or one for each, as the spec says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import relu

from surgeon.errors import DeltaError
from surgeon.foreign.peft_writer import write
from surgeon.merging import merge

LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
LORA = {"rank": 3, "alpha": 6, "where": "attention.query"}
ADAPTER = {"bottleneck": 5, "placement": "parallel", "activation": "relu", "scale": 1, "where": "residual.ffn"}


def each_call(module, functions):
    """Let the calls of a module add these functions of its input, one after the other, round and round."""
    turn = itertools.cycle(functions)
    module.register_forward_hook(lambda _m, args, y: y + next(turn)(args[0]))


@pytest.mark.parametrize("shared", [True, False])
def test_products_and_adapters_of_calls_are_the_equations(shared, lab, tmp_path):
    model = lab.base("albert")
    surgery = [{"lora": {**LORA, "shared": shared}}, {"adapter": {**ADAPTER, "shared": shared}}]
    compiled = lab.operate(model, *surgery)
    ours = compiled.model("a").eval()
    fed = lab.batch(model)
    assert torch.equal(ours(**fed).logits, model(**fed).logits)
    own, theirs = lab.move(ours).state_dict(), lab.apart(model)
    calls = [""] * 2 if shared else [".layer_0", ".layer_1"]
    assert len(own) == (2 + 4) * len(set(calls))
    query = [f"{LAYER}.attention.query{call}.lora" for call in calls]
    each_call(
        theirs.get_submodule(f"{LAYER}.attention.query"),
        [lambda x, q=q: 2 * x @ own[f"{q}_A"] @ own[f"{q}_B"] for q in query],
    )
    names = [
        [f"{LAYER}.ffn_output{call}.adapter.{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
        for call in calls
    ]
    functions = [lambda z, w=[own[n] for n in four]: relu(z @ w[0] + w[1]) @ w[2] + w[3] for four in names]
    turn = itertools.cycle(functions)
    layer = theirs.get_submodule(LAYER)
    inner = layer.ff_chunk
    layer.ff_chunk = lambda x: inner(x) + next(turn)(x)
    wanted = theirs(**fed).logits
    assert lab.gap(model(**fed).logits, wanted) > 1e-2
    assert lab.gap(ours(**fed).logits, wanted) <= 1e-6
    if not shared:  # the one that is new to a build
        assert lab.served(compiled, tmp_path, [lab.feed(model, 2, 7), lab.feed(model, 1, 12)]) <= 1e-4


def test_each_call_has_a_magnitude_of_its_own(lab):
    ours = lab.operate(lab.base("albert"), {"lora": {**LORA, "dora": True, "shared": False}}).model("a")
    assert {name.removeprefix(f"{LAYER}.attention.query.") for name in ours.state_dict()} == {
        f"layer_{call}.{part}" for call in range(2) for part in ("lora_A", "lora_B", "lora_magnitude")
    }


@pytest.mark.sweep
def test_modules_of_one_layer_keep_their_names(lab):
    (one, other) = (
        lab.operate(lab.base("bert"), {"lora": {**LORA, "shared": shared}}).program for shared in (True, False)
    )
    assert list(one.ledger.deltas) == list(other.ledger.deltas)


def test_a_product_for_each_call_has_no_place_in_a_weight_that_all_read(lab):
    compiled = lab.operate(lab.base("albert"), {"lora": {**LORA, "shared": False}})
    lab.move(compiled.model("a"))
    with pytest.raises(DeltaError, match="read in several places of the base"):
        merge(compiled, "a")
    with pytest.raises(DeltaError, match="PEFT has one product for all calls of"):
        write(compiled, "a")
