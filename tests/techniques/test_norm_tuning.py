"""Norm tuning trains the base's own gains and biases, and no others."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_gradients_and_twenty_steps_are_those_of_the_bases_norms(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, {"norm_tuning": {}}).model("a")
    theirs = lab.apart(model)
    names = {n.replace(".norm_tuning.", "."): n for n in ours.state_dict()}
    norms = {n for n, p in theirs.named_parameters() if p.dim() == 1 and ("norm" in n.lower() or ".ln_" in n)}
    assert set(names) == norms
    trained = [p.requires_grad_(n in norms) for n, p in theirs.named_parameters()]
    lab.train(theirs, model, [p for p in trained if p.requires_grad])
    lab.train(ours, model, [p for p in ours.parameters() if p.requires_grad])
    reference = dict(theirs.named_parameters())
    with torch.no_grad():
        found = {n: ours.get_parameter(own) for n, own in names.items()}
        assert lab.gap(found, {n: reference[n] for n in names}) < 1e-5
