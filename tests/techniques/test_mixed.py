"""Sessions that run batches of several tasks, from a bounded number of them at hand."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

import surgeon
from surgeon.audit import audit
from surgeon.errors import BuildError, DataError, SpecError
from surgeon.runtime.document import seal
from surgeon.runtime.files import hash_file
from surgeon.runtime.manifest import MANIFEST, NO_TASK
from surgeon.runtime.taskfile import read_adapter, write_adapter
from surgeon.spec.envelope import ExportSpec

QVF = ["attention.query", "attention.value", "ffn.up"]
LABELLED = {"sentiment": {"labels": 2}, "topic": {"labels": 5}, "spam": {"labels": ["no", "yes"]}, "plain": {}}


@pytest.fixture(scope="module")
def served(lab, tmp_path_factory):
    """A build of both modes, and its tasks: of other ranks, and of 2, 5, 2 and the base's labels."""
    compiled = lab.operate(lab.base("bert"), {"lora": {"rank": 3, "where": QVF}}, tasks=LABELLED)
    compiled.spec = compiled.spec.model_copy(update={"export": ExportSpec(modes=("switch", "mixed"))})
    for i, task in enumerate(compiled.tasks):
        model = lab.move(compiled.model(task), seed=i)
        if i % 2:
            lab.resize(model, rank=4 + i)
    folder = compiled.save(tmp_path_factory.mktemp("mixed") / "build")
    return folder, {n: t.numpy() for n, t in lab.feed(lab.base("bert"), 4, 9, pad=2).items()}


def same(session, fed, found, pairs, equal=False):
    """Compare rows with runs of one text and one task."""
    assert len(found) == len(pairs)
    for row, (text, task) in zip(found, pairs, strict=True):
        alone = session.run({n: t[text : text + 1] for n, t in fed.items()}, task)
        assert row.keys() == alone.keys()
        for name, array in alone.items():
            assert row[name].shape == array[0].shape
            assert np.isfinite(row[name]).all()
            if equal:
                np.testing.assert_array_equal(row[name], array[0])
            else:
                assert np.abs(row[name] - array[0]).max() <= 1e-6 * max(1, np.abs(array).max())


def test_onnx_runtime_gives_every_row_its_task(served):
    folder, fed = served
    with surgeon.Session(folder, threads=1) as session:
        tasks = ["sentiment", None, "topic", "plain"]
        same(session, fed, session.run(fed, tasks), list(enumerate(tasks)))
        same(session, fed, session.run(fed, tuple(reversed(tasks))), list(enumerate(reversed(tasks))))
        same(session, fed, session.run(fed, [None] * 4), [(i, None) for i in range(4)], equal=True)
        each = [["topic", "sentiment", None], [], ["spam"], ["plain", "topic"]]
        same(session, fed, session.run(fed, each), [(i, task) for i, own in enumerate(each) for task in own])
        found = session.run(fed, ["spam", "topic", None], rows=[3, 0, 0])
        same(session, fed, found, [(3, "spam"), (0, "topic"), (0, None)])
        assert session.run(fed, "topic")["logits"].shape == (4, 5)


def test_at_equal_rank_a_row_is_the_single_run_to_the_bit(served):
    folder, fed = served
    with surgeon.Session(folder, threads=1) as session:
        tasks = ["sentiment", "spam"] * 2
        same(session, fed, session.run(fed, tasks), list(enumerate(tasks)), equal=True)


def test_the_graph_of_several_tasks_serves_batches_of_one_too(served):
    folder, fed = served
    with surgeon.Session(folder, threads=1) as session, surgeon.Session(folder, threads=1, mixed=True) as alone:
        for task in ("sentiment", None, "topic"):
            wanted, found = session.run(fed, task), alone.run(fed, task)
            assert found.keys() == wanted.keys()
            for name, array in wanted.items():
                np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6 * np.abs(array).max())
        same(
            session,
            fed,
            alone.run(fed, ["spam", None, "topic", "plain"]),
            list(enumerate(["spam", None, "topic", "plain"])),
        )


def test_the_second_graph_holds_no_weights_of_its_own(served):
    folder, _ = served
    graph = onnx.load(str(folder / "mixed.onnx"), load_external_data=False).graph
    outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    files = {entry.value for t in outside for entry in t.external_data if entry.key == "location"}
    assert files == {"model.onnx.data"}
    weights = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer
    assert len(outside) == sum(t.data_location == onnx.TensorProto.EXTERNAL for t in weights)
    symbols = {d.dim_param for i in graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    assert {"batch", "sequence", "rows", "tasks", "labels"} <= symbols


def test_few_places_serve_many_tasks_in_turn(served):
    folder, fed = served
    with surgeon.Session(folder, threads=1, resident=2) as session:
        for tasks in (["sentiment", "topic"], ["spam", "topic"], ["plain", None], ["sentiment", "spam"]):
            same(session, fed, session.run(fed, tasks * 2), list(enumerate(tasks * 2)))
            assert set(session.resident) >= set(tasks) - {None}
            assert len(session.resident) <= 2
        session.run(fed, ["topic", "sentiment"] * 2)
        session.run(fed, ["spam"] * 4)
        assert session.resident == ("sentiment", "spam")
        with pytest.raises(SpecError, match="names 3 tasks, and 2 can be at hand"):
            session.run(fed, ["sentiment", "topic", "spam", None])


def test_many_threads_share_the_places(served):
    folder, fed = served
    names = [*LABELLED, None]
    with surgeon.Session(folder, threads=1, resident=3) as session, ThreadPoolExecutor(6) as pool:
        chosen = [[names[(i + k * (i % 3)) % 5] for k in range(4)] for i in range(48)]
        chosen = [tasks if len(set(tasks) - {None}) <= 3 else [*tasks[:3], None] for tasks in chosen]
        for tasks, found in zip(chosen, pool.map(lambda tasks: session.run(fed, tasks), chosen), strict=True):
            same(session, fed, found, list(enumerate(tasks)))


def test_tasks_come_and_go_meanwhile(served):
    folder, fed = served
    with surgeon.Session(folder, threads=1, resident=2) as session:
        first = session.run(fed, ["sentiment"] * 4)
        session.add_task(folder / session.manifest.tasks["topic"].adapter, "sentiment", replace=True)
        second = session.run(fed, ["sentiment"] * 4)
        same(session, fed, second, [(i, "topic") for i in range(4)])
        assert first[0]["logits"].shape == (2,)
        session.remove_task("sentiment")
        with pytest.raises(SpecError, match="no task 'sentiment'"):
            session.run(fed, ["sentiment"] * 4)


@pytest.mark.parametrize("number", [1.0, 3e38], ids=["another", "nan"])
def test_verify_compares_the_graph_of_several_tasks_too(number, served, tmp_path):
    folder, _ = served
    with surgeon.Session(folder) as session:
        fingerprint = session.manifest.base.fingerprint
    assert all(task.difference < 1e-5 for task in audit(folder).tasks)
    wrong = Path(shutil.copytree(folder, tmp_path / "build"))
    base = read_adapter(wrong / NO_TASK).tensors
    write_adapter(wrong / NO_TASK, {n: a + np.float32(number) for n, a in base.items()}, fingerprint)
    document = json.loads((wrong / MANIFEST).read_text(encoding="utf-8"))
    document["files"][NO_TASK] = {"sha256": hash_file(wrong / NO_TASK), "bytes": (wrong / NO_TASK).stat().st_size}
    (wrong / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")
    with pytest.raises(BuildError, match=r"different answers[\s\S]*the base: "):
        audit(wrong)


@pytest.mark.parametrize("surgery", [[{"prefix": {"length": 3}}], [{"prompt": {"length": 3}}]], ids=str)
def test_tasks_of_several_lengths_share_a_batch_in_onnx_runtime(surgery, lab, tmp_path):
    """And one that is longer takes no room from the texts of the others: 60 tokens and 4 of its own fill the table."""
    compiled = lab.operate(lab.base("bert"), *surgery, tasks={"short": {}, "long": {}})
    compiled.spec = compiled.spec.model_copy(update={"export": ExportSpec(modes=("switch", "mixed"))})
    lab.move(compiled.model("short"))
    lab.resize(compiled.model("long"), length=9)
    fed = {n: t.numpy() for n, t in lab.feed(lab.base("bert"), 3, 9, pad=2).items()}
    full = {n: t.numpy() for n, t in lab.feed(lab.base("bert"), 2, 61).items()}
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session:
        tasks = ["short", None, "long"]
        same(session, fed, session.run(fed, tasks), list(enumerate(tasks)))
        same(session, full, session.run(full, ["short", None]), [(0, "short"), (1, None)])
        with pytest.raises(DataError, match="61 tokens"):
            session.run(full, ["short", "long"])


def test_texts_are_classified_each_by_its_task(base_folder, tmp_path):
    spec = {
        "base": {"model": str(base_folder)},
        "surgery": [{"lora": {"rank": 2}}],
        "tasks": {"mood": {"labels": ["bad", "good"]}, "kind": {"labels": ["a", "b", "c"]}},
        "export": {"modes": ["switch", "mixed"]},
    }
    build = tmp_path / "build"
    surgeon.compile(spec, out=build)
    texts, tasks = ["good film", "the film was dull", "a fine film", "bad"], ["kind", "mood", "mood", "kind"]
    with surgeon.Session(build, threads=1) as session:
        found = session.classify(texts, tasks, batch=3)
        for text, task, answer in zip(texts, tasks, found, strict=True):
            [alone] = session.classify([text], task)
            assert answer.label == alone.label
            assert answer.scores.keys() == alone.scores.keys()
            assert answer.score == pytest.approx(alone.score, abs=1e-6)
        with pytest.raises(DataError, match="1 tasks for 4 texts"):
            session.classify(texts, ["kind"])


@pytest.mark.parametrize(
    ("tasks", "rows", "kind", "said"),
    [
        (["topic"], None, DataError, "1 tasks for 4 texts"),
        (["topic", "topik", None, None], None, SpecError, "no task 'topik'.*\n.*\n.*topic"),
        ([["topic"], "topic", None, None], None, SpecError, "one a row, or a list of them"),
        ([["topic"]], None, DataError, "1 lists of tasks for 4 texts"),
        ([[], [], [], []], None, DataError, "no rows"),
        ([], [], DataError, "no rows"),
        (["topic"], [4], DataError, "rows are numbers of texts"),
        (["topic"], [-1], DataError, "rows are numbers of texts"),
        (["topic"], [0.5], DataError, "rows are numbers of texts"),
        (["topic", None], [0], DataError, "2 tasks for 1 rows"),
        ("topic", [0], SpecError, "rows need a task each"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tasks, rows, kind, said, served):
    folder, fed = served
    with surgeon.Session(folder, threads=1) as session, pytest.raises(kind, match=said):
        session.run(fed, tasks, rows=rows)


def test_a_build_without_the_mode_says_so(lab, tmp_path):
    build = lab.operate(lab.base("bert"), {"lora": {"rank": 2}}).save(tmp_path / "build")
    fed = {n: t.numpy() for n, t in lab.feed(lab.base("bert"), 1, 5).items()}
    with surgeon.Session(build) as session, pytest.raises(SpecError, match=r"modes: \[switch, mixed\]"):
        session.run(fed, ["a"])


@pytest.mark.parametrize("bounds", [{"resident": 0}, {"resident": -1}, {"resident_bytes": 0}], ids=str)
def test_bounds_are_numbers_from_one(bounds, served):
    with pytest.raises(SpecError, match="resident"):
        surgeon.Session(served[0], **bounds)
