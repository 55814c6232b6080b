"""The head: a classifier of the task's own size, or the base's own where the spec says nothing."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import SpecError

TASKS = {"two": {"labels": ["no", "yes"]}, "five": {"labels": 5}}


def test_every_task_has_outputs_of_its_own_number_and_names(lab):
    model = lab.base("bert", num_labels=3)
    compiled = lab.operate(model, {"lora": {"rank": 2}}, tasks=TASKS)
    fed = lab.feed(model, 3, 7)
    assert compiled.model("two")(**fed).logits.shape == (3, 2)
    assert compiled.model("five")(**fed).logits.shape == (3, 5)
    assert compiled.model("two").config.id2label == {0: "no", 1: "yes"}


def test_a_head_is_the_bases_classifier_with_other_weights(lab):
    model = lab.base("bert", num_labels=3)
    ours = lab.operate(model, tasks={"a": {"labels": 5}}).model("a")
    lab.move(ours)
    theirs = lab.apart(model)
    theirs.classifier = torch.nn.Linear(32, 5)
    theirs.num_labels = theirs.config.num_labels = 5
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.get_parameter("classifier.head.weight").T)
        theirs.classifier.bias.copy_(ours.get_parameter("classifier.head.bias"))
    fed = {**lab.feed(model, 3, 7, pad=2), "labels": torch.tensor([4, 0, 2])}
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap(found.loss, wanted.loss) <= 1e-6
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(ours.get_parameter("classifier.head.weight").grad, theirs.classifier.weight.grad.T) <= 1e-6
    assert lab.gap(ours.get_parameter("classifier.head.bias").grad, theirs.classifier.bias.grad) <= 1e-6


def test_a_head_may_learn_at_a_rate_of_its_own(lab):
    """Few trained tokens want a small rate, and a classifier that starts anew a large one."""
    surgery = {"prompt": {"length": 3}}, {"head": {"rate": 10, "hidden": True}}
    model = lab.operate(lab.base("bert"), *surgery, tasks=TASKS).model("two")
    slow, fast = sorted(model.parameter_groups(1e-3), key=lambda group: group["lr"])
    assert (slow["lr"], fast["lr"]) == (1e-3, 1e-2)
    assert [tuple(p.shape) for p in slow["params"]] == [(3, 32)]
    assert sorted(tuple(p.shape) for p in fast["params"]) == [(2,), (32,), (32, 2), (32, 32)]


def test_without_labels_and_head_the_bases_own_head_answers(lab):
    model = lab.base("bert", num_labels=3)
    ours = lab.operate(model, {"lora": {"rank": 2}}).model("a")
    fed = lab.feed(model, 3, 7)
    assert "classifier.head.weight" not in ours.state_dict()
    assert torch.equal(ours(**fed).logits, model(**fed).logits)


def test_beside_a_task_with_labels_one_without_keeps_the_bases_head(lab):
    model = lab.base("bert", num_labels=3)
    compiled = lab.operate(model, {"lora": {"rank": 2}}, tasks={"own": {"labels": 5}, "bases": {}})
    ours = compiled.model("bases")
    fed = {**lab.feed(model, 3, 7), "labels": torch.tensor([2, 0, 1])}
    assert torch.equal(ours(**fed).logits, model(**fed).logits)
    assert not {"classifier.head.weight", "classifier.head.bias"} & {*ours.state_dict(), *ours.deployed()}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(ours.state_dict())
    ours(**fed).loss.backward()
    ours.load_state_dict(ours.state_dict())


def test_a_head_in_the_spec_and_a_task_without_labels_train_one_of_the_bases_size(lab):
    model = lab.base("bert", num_labels=3)
    ours = lab.operate(model, {"head": {}}).model("a")
    assert ours.get_parameter("classifier.head.weight").shape == (32, 3)
    assert ours(**lab.feed(model, 2, 5)).logits.shape == (2, 3)


def test_the_hidden_layer_before_the_classifier_is_trained_from_the_bases_values(lab):
    model = lab.base("bert", num_labels=3)
    ours = lab.operate(model, {"head": {"hidden": True}}).model("a")
    dense = model.bert.pooler.dense
    trained = ours.state_dict()
    assert torch.equal(trained["bert.pooler.dense.head.weight"], dense.weight)
    assert torch.equal(trained["bert.pooler.dense.head.bias"], dense.bias)
    fed = {**lab.feed(model, 3, 7), "labels": torch.tensor([2, 0, 1])}
    theirs = lab.apart(model)
    with torch.no_grad():
        theirs.classifier.weight.copy_(trained["classifier.head.weight"].T)
        theirs.classifier.bias.copy_(trained["classifier.head.bias"])
    ours(**fed).loss.backward()
    theirs(**fed).loss.backward()
    grad = ours.get_parameter("bert.pooler.dense.head.weight").grad
    assert lab.gap(grad, theirs.bert.pooler.dense.weight.grad) <= 1e-6


def test_heads_of_other_places_answer_per_token_and_per_span(lab):
    tokens = lab.base("bert", "token-classification", num_labels=3)
    fed = lab.feed(tokens, 2, 7)
    assert lab.operate(tokens, tasks={"a": {"labels": 4}}).model("a")(**fed).logits.shape == (2, 7, 4)
    spans = lab.base("bert", "question-answering")
    answer = lab.operate(spans, {"head": {}}).model("a")
    positions = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    output = answer(**fed, **positions)
    assert output.start_logits.shape == output.end_logits.shape == (2, 7)
    output.loss.backward()
    assert all(p.grad is not None for p in answer.parameters() if p.requires_grad)


def test_a_head_that_the_base_adds_a_tensor_of_its_own_to_keeps_its_labels(lab):
    """BART adds a number for each word of its vocabulary."""
    base = lab.base("bart", "seq2seq-lm")
    with pytest.raises(SpecError, match=r"head.labels: the base adds '\w+' to its own 100"):
        lab.operate(base, {"head": {"labels": 3}})
    assert {len(d.free) for d in lab.operate(base, {"head": {}}).program.ledger.deltas.values()} == {0}
