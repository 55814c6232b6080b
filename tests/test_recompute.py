"""Gradient checkpointing: the same gradients, dropout and all, from fewer values kept."""

from __future__ import annotations

import pytest
import torch

import surgeon
from surgeon.errors import SpecError
from surgeon.recompute import recomputed


def step(model, ids):
    """Loss, gradients, and how many numbers were kept for the backward pass beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [model.get_parameter(n).grad.clone() for n in model.state_dict()]
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(("kind", "sizes"), [("llama", {"num_hidden_layers": 4}), ("gpt2", {"n_layer": 4}), ("t5", {})])
def test_gradients_are_the_same_and_fewer_values_are_kept(tiny, kind, sizes):
    """Dropout too falls as it did, and what a prefix's reparametrisation and an adapter make is no part of it."""
    surgery = [{"prefix": {"length": 3, "hidden": 8}}, {"adapter": {}}]
    model = surgeon.compile({"surgery": surgery, "tasks": {"a": {}}}, base=tiny(kind, **sizes)).model("a").train()
    ids = torch.randint(3, 100, (4, 20), generator=torch.Generator().manual_seed(0))
    loss, gradients, plain = step(model, ids)
    model.gradient_checkpointing_enable()
    again, found, frugal = step(model, ids)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)
    assert frugal < 0.5 * plain
    assert step(model, ids)[2] == plain


def test_a_base_that_changes_what_it_is_given_is_refused():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)))
    with pytest.raises(SpecError, match=r"changes what it is given in place \(aten.add_.Tensor\)"):
        recomputed(torch.fx.GraphModule(torch.nn.Module(), graph))
