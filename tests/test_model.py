"""The trainable module keeps the contract: names, shapes, sites; what is shared and what is a task's own."""

from __future__ import annotations

import pytest
import torch

import surgeon
from surgeon.errors import DeltaError, SpecError

SPEC = {
    "surgery": [
        {"lora": {"rank": 4, "alpha": 8}},
        {"adapter": {"bottleneck": 6, "where": "residual.ffn@1", "norms": True}},
        {"bitfit": {"where": "ffn.up@0"}},
        {"prefix": {"length": 3}},
    ],
    "tasks": {"two": {"labels": ["no", "yes"]}, "five": {"labels": 5}},
}
LAYER = "bert.encoder.layer.{}"
QUERY_A = f"{LAYER.format(0)}.attention.self.query.lora_A"
# part -> (site, shape) of one delta of each kind, as the contract has them
CONTRACT = {
    "lora_A": (f"{LAYER.format(0)}.attention.self.query", [32, 4]),
    "lora_B": (f"{LAYER.format(0)}.attention.self.query", [4, 32]),
    "down.weight": (f"{LAYER.format(1)}.output.dense", [32, 6]),
    "down.bias": (f"{LAYER.format(1)}.output.dense", [6]),
    "up.weight": (f"{LAYER.format(1)}.output.dense", [6, 32]),
    "up.bias": (f"{LAYER.format(1)}.output.dense", [32]),
    "bias": (f"{LAYER.format(0)}.intermediate.dense", [64]),
    "weight": (f"{LAYER.format(0)}.output.LayerNorm", [32]),
    "prefix.key": (f"{LAYER.format(0)}.attention.self", [4, 3, 8]),
    "prefix.value": (f"{LAYER.format(0)}.attention.self", [4, 3, 8]),
    "head.weight": ("classifier", [32, 2]),
    "head.bias": ("classifier", [2]),
}


@pytest.fixture(scope="module")
def compiled(tiny):
    torch.set_num_threads(1)
    return surgeon.compile(SPEC, base=tiny("bert"))


@pytest.fixture
def ids():
    return {"input_ids": torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("part", CONTRACT)
def test_site_part_and_shape_are_the_contracts(part, compiled):
    site, shape = CONTRACT[part]
    (delta,) = [d for d in compiled.program.ledger.deltas.values() if (d.site, d.part) == (site, part)]
    assert list(delta.shape) == shape
    trained = dict(compiled.model("two").named_parameters())[delta.name]
    assert list(trained.shape) == shape
    assert trained.requires_grad


def test_names_are_the_tensors_as_trained_and_deployment_scales_b(compiled):
    model = compiled.model("two")
    name = f"{LAYER.format(0)}.attention.self.query.lora_B"
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(1.0)
    assert torch.equal(model.state_dict()[name], torch.ones(4, 32))
    assert torch.equal(model.deployed()[name], torch.full((4, 32), 8 / 4))


def test_only_the_ledgers_tensors_are_trained(compiled):
    model = compiled.model("two")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(compiled.program.ledger.parameters()) == set(model.state_dict())


def test_gradients_reach_every_delta_and_nothing_else(compiled, ids):
    model = compiled.model("five")
    with torch.no_grad():
        for name in model.state_dict():  # beyond birth, where B and up are zero and hide A and down
            model.get_parameter(name).add_(0.1)
    model(**ids, labels=torch.tensor([4, 0, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in model.state_dict()), name
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in model.state_dict())


def test_tasks_share_the_base_and_no_delta(compiled):
    two, five, base = (
        dict(m.named_parameters()) for m in (compiled.model("two"), compiled.model("five"), compiled.base.model)
    )
    own = set(compiled.model("two").state_dict())
    for name, parameter in two.items():
        if name in own:
            assert parameter.data_ptr() != five[name].data_ptr()
        else:
            assert parameter is five[name] is base[name]


def test_training_one_task_leaves_the_other_and_the_base(compiled, ids):
    two, five = compiled.model("two").eval(), compiled.model("five")
    before, base = two(**ids).logits, compiled.base.model(**ids).logits
    optimizer = torch.optim.SGD([p for p in five.parameters() if p.requires_grad], lr=0.1)
    five(**ids, labels=torch.tensor([1, 2, 3])).loss.backward()
    optimizer.step()
    assert torch.equal(two(**ids).logits, before)
    assert torch.equal(compiled.base.model(**ids).logits, base)


def test_the_output_is_the_bases_own_class_and_labels_add_the_loss(compiled, ids):
    model, base = compiled.model("two").eval(), compiled.base.model
    labels = torch.tensor([0, 1, 1])
    output = model(**ids, labels=labels)
    assert type(output) is type(base(**ids, labels=labels))
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert model(**ids).loss is None


def test_absent_masks_are_ones_as_in_the_base(compiled, ids):
    model = compiled.model("two").eval()
    assert torch.equal(model(**ids).logits, model(**ids, attention_mask=torch.ones(3, 9, dtype=torch.int64)).logits)


def test_dropout_follows_train_and_eval(compiled, ids):
    model = compiled.model("two")
    assert not torch.equal(model.train()(**ids).logits, model(**ids).logits)
    assert torch.equal(model.eval()(**ids).logits, model(**ids).logits)


def test_free_sizes_of_loaded_weights_may_differ_from_the_specs(compiled, ids):
    model = compiled.model("two").eval()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {n: t[:, :2] if "lora_A" in n else t[:2] if "lora_B" in n else t for n, t in saved.items()}
    model.load_state_dict(other)
    assert model.get_parameter(f"{LAYER.format(0)}.attention.self.query.lora_A").shape == (32, 2)
    model(**ids)
    model.load_state_dict(saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "1 of .* are missing"),
        (lambda t: t.update(stray=torch.zeros(1)), "1 do not belong here"),
        (lambda t: t.update({QUERY_A: torch.zeros(31, 4)}), r"has shape \[31, 4\], expected \[32, any\]"),
        (lambda t: t.update({QUERY_A: torch.zeros(32, 1)}), r"lora_B has shape \[4, 32\], expected \[1, 32\]"),
        (lambda t: t.update({"classifier.head.bias": torch.zeros(5)}), r"has shape \[5\], expected \[2\]"),
        (lambda t: t.update({QUERY_A: torch.full((32, 4), float("nan"))}), "NaN or infinity"),
    ],
    ids=["missing", "extra", "misshapen", "two_ranks_at_one_site", "another_number_of_labels", "nan"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(spoil, message, compiled):
    model = compiled.model("two")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = dict(before)
    spoil(tensors)
    with pytest.raises(DeltaError, match=message):
        model.load_state_dict(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_task_or_input_is_refused_with_what_there_is(compiled, ids):
    with pytest.raises(SpecError, match="did you mean 'two'"):
        compiled.model("tow")
    with pytest.raises(DeltaError, match="'input_ids' is missing"):
        compiled.model("two")(attention_mask=torch.ones(2, 3))


def test_it_runs_under_torch_compile(compiled, ids):
    model = compiled.model("two").eval()
    fast = torch.compile(model, backend="eager")
    assert torch.allclose(fast(**ids).logits, model(**ids).logits, atol=1e-6)
    loss = fast(**ids, labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in model.state_dict())


def test_the_plan_counts_what_is_trained(compiled):
    trained = sum(tensor.numel() for tensor in compiled.model("two").state_dict().values())
    assert compiled.plan.parameters == trained
    assert sum(compiled.plan.by_technique().values()) == trained
    assert compiled.plan.base_parameters == sum(p.numel() for p in compiled.base.model.parameters())
