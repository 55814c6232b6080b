"""AdapterDrop: a dropped layer is one that never had an adapter, in training and at run time."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch

import surgeon
from surgeon.errors import SurgeonError
from surgeon.runtime.taskfile import write_adapter
from surgeon.train import Row, TrainOptions, load_tokenizer, train_task

ADAPTER = {"adapter": {"placement": "pfeiffer", "bottleneck": 5}}
FUSION = {"fusion": {"of": 3, "bottleneck": 5}}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("technique", ["adapter", "fusion"])
def test_a_dropped_layer_is_one_that_never_had_an_adapter(kind, technique, lab):
    model = lab.base(kind)
    item = {"adapter": ADAPTER, "fusion": FUSION}[technique]
    ours = lab.move(lab.operate(model, item, {"drop": {"layers": 1}}).model("a")).eval()
    upper = {technique: {**item[technique], "where": "residual.ffn@1"}}
    theirs = lab.operate(model, upper).model("a").eval()
    theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if n in theirs.state_dict()})
    fed = lab.batch(model)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6
    ours.train()(**fed).loss.backward()
    theirs.train()(**fed).loss.backward()
    moved = {n for n, p in lab.own(ours).items() if p.grad is not None}
    assert moved == {n for n, p in lab.own(theirs).items() if p.grad is not None}, (
        "no gradient below the lowest adapter"
    )
    assert lab.gap(*({n: p.grad for n, p in lab.own(m).items() if n in moved} for m in (ours, theirs))) <= 1e-5


def test_what_is_dropped_for_good_is_not_counted_and_not_in_the_task_file(lab):
    model = lab.base("bert")
    whole, half = lab.operate(model, ADAPTER), lab.operate(model, ADAPTER, {"drop": {"layers": 1}})
    assert 2 * half.plan.parameters == whole.plan.parameters
    assert {d.layer for d in half.program.ledger.deltas.values()} == {1}
    assert not any("layer.0." in name for name in half.model("a").deployed())


@pytest.mark.parametrize(
    ("item", "joins"),
    [
        (ADAPTER, ["ffn"]),
        ({"adapter": {"bottleneck": 5, "scale": 2.0, "norms": False}}, ["attention", "ffn"]),
        (FUSION, ["ffn"]),
        ({"compacter": {"bottleneck": 4, "norms": False}}, ["attention", "ffn"]),
    ],
)
def test_what_is_dropped_for_good_leaves_no_trace_in_the_graph(item, joins, lab):
    model, (technique, options) = lab.base("bert", num_hidden_layers=3), next(iter(item.items()))
    above = {technique: {**options, "where": [f"residual.{join}@2" for join in joins]}}
    rest = [{"lora": {"rank": 2}}, {"bitfit": {}}]
    with_drop, without = (
        lab.operate(model, *surgery, *rest).program for surgery in ([item, {"drop": {"layers": 2}}], [above])
    )
    ours, theirs = ([(n.op, str(n.target)) for n in program.graph.nodes] for program in (with_drop, without))
    assert ours == theirs
    assert with_drop.ledger.deltas.keys() == without.ledger.deltas.keys()
    assert with_drop.ledger.trained.keys() == without.ledger.trained.keys()
    assert [fold.outputs for fold in with_drop.ledger.folds] == [fold.outputs for fold in without.ledger.folds]
    names = [{n for n, _ in program.graph_module.named_parameters()} for program in (with_drop, without)]
    assert names[0] == names[1]


ROWS = [Row("good film", 1), Row("bad film", 0), Row("the great film was fine", 1), Row("dull", 0)]


def test_a_robust_run_draws_every_number_and_is_evaluated_whole_and_resumed_alike(lab, base_folder, tmp_path):
    model = lab.base("bert", num_hidden_layers=3)
    compiled = lab.operate(model, ADAPTER, {"drop": {}}, tasks={"a": {"labels": 2}, "b": {"labels": 2}})
    tokenizer = load_tokenizer(base_folder)
    options = TrainOptions(epochs=12, batch_size=2, checkpoint_steps=1)
    drawn: Counter[int] = Counter()

    def watch(task, step, steps):
        trained = {task.ledger.deltas[n].layer for n in task.state_dict() if task.get_parameter(n).grad is not None}
        drawn[min(layer for layer in trained if layer is not None)] += 1
        assert max(layer for layer in trained if layer is not None) == 2
        assert task._dropped == {}, "whole again before anybody evaluates"

    one = compiled.model("a")
    start = {n: t.clone() for n, t in one.state_dict().items()}
    train_task(one, tokenizer, ROWS, ROWS, options, callbacks=[watch])
    assert set(drawn) == {0, 1, 2}
    wanted = {n: t.clone() for n, t in one.state_dict().items()}

    def stop(_, step, __):
        if step == 7:
            raise KeyboardInterrupt

    one.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        train_task(one, tokenizer, ROWS, ROWS, options, checkpoint_dir=tmp_path, callbacks=[stop])
    assert one._dropped == {}
    result = train_task(one, tokenizer, ROWS, ROWS, options, checkpoint_dir=tmp_path)
    assert result.resumed_from == 6
    assert all(torch.equal(t, wanted[n]) for n, t in one.state_dict().items())


@pytest.fixture(scope="module", params=["adapter", "fusion"])
def deployed(request, lab, tmp_path_factory):
    """A build of three layers whose task has adapters in all of them, and a head of its own."""
    model = lab.base("bert", num_hidden_layers=3)
    item = {"adapter": ADAPTER, "fusion": FUSION}[request.param]
    compiled = lab.operate(model, item, {"lora": {"rank": 2}}, tasks={"a": {"labels": 3}, "b": {"labels": 2}})
    for seed, task in enumerate("ab"):
        lab.move(compiled.model(task), seed=seed).eval()
    folder = compiled.save(tmp_path_factory.mktemp("drop") / "build")
    with surgeon.Session(folder, threads=1) as session:
        yield compiled, session, lab.feed(model, 3, 11, pad=4), folder.parent


def test_dropping_at_a_call_is_a_task_packed_without_those_layers(deployed):
    compiled, session, fed, folder = deployed
    arrays = {n: t.numpy() for n, t in fed.items()}
    model, whole = compiled.model("a"), session.run(arrays, "a")["logits"]
    seen = [whole]
    for layers in (1, 2, 0, 1):
        model.drop(layers)
        tensors = {n: t.detach().contiguous().numpy() for n, t in model.deployed().items()}
        write_adapter(folder / "packed.onnx_adapter", tensors, compiled.base.fingerprint)
        session.add_task(folder / "packed.onnx_adapter", "packed", replace=True)
        found = session.run(arrays, "a", drop=layers)["logits"]
        assert np.array_equal(found, session.run(arrays, "packed")["logits"])
        with torch.no_grad():
            assert np.abs(found - model(**fed).logits.numpy()).max() <= 1e-4
        seen.append(found)
    model.drop(0)
    assert np.array_equal(seen[0], seen[3])
    assert np.array_equal(seen[1], seen[4])
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[1], seen[2])


def test_threads_that_drop_differently_disturb_no_answer(deployed):
    _, session, fed, _ = deployed
    arrays = {n: t.numpy() for n, t in fed.items()}
    calls = [(task, drop) for task in "ab" for drop in (0, 1, 2)]
    wanted = {call: session.run(arrays, call[0], drop=call[1])["logits"] for call in calls}
    for task in session._table._tasks.values():
        task._reduced.clear()
    wrong = []

    def work(shift):
        for i in range(24):
            task, drop = calls[(i + shift) % len(calls)]
            if not np.array_equal(session.run(arrays, task, drop=drop)["logits"], wanted[task, drop]):
                wrong.append((task, drop))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_removed_task_takes_its_reduced_files_along(deployed, tmp_path):
    _, session, fed, folder = deployed
    arrays = {n: t.numpy() for n, t in fed.items()}
    before = set(session._table.private.iterdir())
    session.add_task(next((folder / "build" / "tasks").glob("b.*.onnx_adapter")), "c")
    session.run(arrays, "c", drop=1)
    assert len(set(session._table.private.iterdir()) - before) == 2
    session.remove_task("c")
    assert set(session._table.private.iterdir()) == before


@pytest.mark.parametrize("layers", [-1, 3, 12, True, 1.5, "1"])
def test_a_number_that_leaves_nothing_or_is_none_is_refused_at_a_call(layers, deployed):
    _, session, fed, _ = deployed
    arrays = {n: t.numpy() for n, t in fed.items()}
    with pytest.raises(SurgeonError, match="adapters in 3 layers, so 0 to 2"):
        session.run(arrays, "a", drop=layers)


def test_dropping_without_a_task_is_refused(deployed):
    _, session, fed, _ = deployed
    with pytest.raises(SurgeonError, match="no task is named"):
        session.run({n: t.numpy() for n, t in fed.items()}, drop=1)


BAD = {
    "all layers": ([ADAPTER, {"drop": {"layers": 2}}], "leaves no adapter[\\s\\S]*at most 1"),
    "more than there are": ([ADAPTER, {"drop": {"layers": 9}}], "leaves no adapter"),
    "below zero": ([ADAPTER, {"drop": {"layers": -1}}], "from 0 up"),
    "another word": ([ADAPTER, {"drop": {"layers": "some"}}], "'some'"),
    "half a layer": ([ADAPTER, {"drop": {"layers": 0.5}}], "got 0.5"),
    "no adapter before it": ([{"drop": {"layers": 1}}, ADAPTER], "needs one of adapter, fusion"),
    "twice": ([ADAPTER, {"drop": {"layers": 1}}, {"drop": {"layers": 1}}], "applied already"),
    "adapters below only": (
        [{"adapter": {**ADAPTER["adapter"], "where": "residual.ffn@0"}}, {"drop": {}}],
        "nothing to draw from 1 layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_dropped_is_refused(case, lab):
    surgery, words = BAD[case]
    with pytest.raises(SurgeonError, match=words):
        lab.operate(lab.base("bert"), *surgery)
