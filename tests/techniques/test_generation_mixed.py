"""Texts of several tasks written in one batch: every row has the tokens of its task alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import surgeon
from surgeon.errors import DataError, SpecError
from surgeon.runtime.generation import Row

if TYPE_CHECKING:
    from techniques.conftest import Decoding, Lab

MODES = ("switch", "mixed")
LONG = 24
LLAMA: list[dict[str, Any]] = [{"lora": {"rank": 4, "where": ["attention.value"]}}, {"prefix": {"length": 5}}]
OTHER: dict[str, list[dict[str, Any]]] = {
    "llama": [{"lora": {"rank": 4}}, {"adapter": {"bottleneck": 4}}, {"prompt": {"length": 3}}],
    "gpt2": [{"bitfit": {}}, {"lora": {"rank": 2}}, {"prompt": {"length": 2}}],
    "gemma2": [{"adapter": {"bottleneck": 4}}, {"prefix": {"length": 3}}],
    "qwen3": [{"lora": {"rank": 2, "dora": True}}, {"norm_tuning": {}}],
    "opt": [{"lora": {"rank": 4}}, {"prefix": {"length": 3, "shift": False}}],
}


def build(lab: Lab, decoding: Decoding, kind: str, surgery: list[dict[str, Any]], folder: Path) -> Path:
    """Of two tasks with other ranks, widths and lengths."""
    made = lab.writers(decoding.base(kind), surgery, MODES)
    sizes = {"rank": 7, "bottleneck": 6, "length": 9}
    lab.resize(made.model("b"), **sizes)
    with_small = made.model("b")
    with_small.load_state_dict({name: 0.1 * t for name, t in with_small.state_dict().items()})
    return made.save(folder / "build")


@pytest.fixture(scope="module")
def llama(lab: Lab, decoding: Decoding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(lab, decoding, "llama", LLAMA, tmp_path_factory.mktemp("mixed"))


@pytest.fixture
def session(llama: Path) -> Iterator[surgeon.Session]:
    with surgeon.Session(llama, threads=1) as session:
        yield session


def check(lab: Lab, session: surgeon.Session) -> None:
    """Rows of a batch in any order and number, against a run of each alone."""
    given = lab.prompts((5, 1, 9, 14, 3, 2))
    tasks = ["a", None, "b", "a", "b", None]
    alone = [session.generate([p], t, max_new_tokens=LONG)[0] for p, t in zip(given, tasks, strict=True)]
    assert len({row.tokens for row in alone}) > 3
    for batch in (1, 2, 4, 8):
        assert session.generate(given, tasks, max_new_tokens=LONG, batch=batch) == alone


def test_every_row_has_the_tokens_of_its_task(lab: Lab, session: surgeon.Session) -> None:
    assert session.manifest.generation is not None
    assert session.manifest.generation.shared
    check(lab, session)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", OTHER)
def test_every_row_has_the_tokens_of_its_task_elsewhere(
    lab: Lab, decoding: Decoding, tmp_path: Path, kind: str
) -> None:
    with surgeon.Session(build(lab, decoding, kind, OTHER[kind], tmp_path), threads=1) as session:
        check(lab, session)


def test_rows_end_at_different_times_and_others_take_their_places(lab: Lab, session: surgeon.Session) -> None:
    given = lab.prompts((5, 1, 9, 14, 3, 7, 2, 11))
    tasks = ["a", "b", None, "b", "a", "b", None, "a"]
    limits = [3, 20, 9, 1, 12, 5, 17, 8]
    alone = [session.generate([p], t, max_new_tokens=n)[0] for p, t, n in zip(given, tasks, limits, strict=True)]
    rows = [session.texts.prepare([p], t, max_new_tokens=n)[0] for p, t, n in zip(given, tasks, limits, strict=True)]
    writer, waiting = session.texts.writer(3), list(rows)
    going = True
    while going or waiting:
        if waiting and not writer.full:  # they come one by one, while others go on
            writer.take(waiting.pop(0))
        going = writer.step()
    assert [row.written for row in rows] == alone


def test_few_places_serve_many_tasks(lab: Lab, llama: Path) -> None:
    given, tasks = lab.prompts((5, 1, 9)), ["a", "b", None]
    with surgeon.Session(llama, threads=1, mixed=True, resident=1) as session:
        with pytest.raises(SpecError, match="names 2 tasks, and 1 can be at hand"):
            session.generate(given, tasks, max_new_tokens=4)
        found = session.generate(given, tasks, max_new_tokens=4, batch=1)
    with surgeon.Session(llama, threads=1) as session:
        assert found == [session.generate([p], t, max_new_tokens=4)[0] for p, t in zip(given, tasks, strict=True)]


def test_the_graph_of_several_tasks_alone_writes_and_scores_as_well(lab: Lab, llama: Path) -> None:
    given = lab.prompts((5, 9))
    ids = np.array([[0] * 4 + given[0], given[1]])
    fed = {"input_ids": ids, "attention_mask": np.array([[0] * 4 + [1] * 5, [1] * 9])}
    with surgeon.Session(llama, threads=1) as session, surgeon.Session(llama, threads=1, mixed=True) as alone:
        for task in ("a", None, "b"):
            options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
            assert session.generate(given, task, **options) == alone.generate(given, task, **options)
            assert np.allclose(session.run(fed, task)["logits"], alone.run(fed, task)["logits"], atol=1e-5)
        found = session.run(fed, [["a", "b"], [None]])
        right = [session.run(fed, task)["logits"][at] for at, task in ((0, "a"), (0, "b"), (1, None))]
        for row, logits in zip(found, right, strict=True):
            assert np.allclose(row["logits"], logits, atol=1e-5)


def test_a_row_that_fails_disturbs_no_other(lab: Lab, session: surgeon.Session) -> None:
    given = lab.prompts((5, 9))
    alone = session.generate(given[:1], "a", max_new_tokens=9)[0]
    failed: list[tuple[Row, Exception]] = []
    rows = session.texts.prepare([given[0], [3, 10**6]], ["a", "b"], max_new_tokens=9)
    writer = session.texts.writer(4, lambda row, error: failed.append((row, error)))
    for row in rows:
        writer.take(row)
    while writer.step():
        pass
    assert rows[0].written == alone
    assert [(row, row.reason) for row, _ in failed] == [(rows[1], "gone")]
    assert isinstance(failed[0][1], DataError)


def test_what_does_not_fit_is_said(lab: Lab, session: surgeon.Session) -> None:
    with pytest.raises(DataError, match="there are 1 tasks for 2 prompts"):
        session.generate(lab.prompts((2, 3)), ["a"])
    with pytest.raises(SpecError, match="there is no task 'c'"):
        session.generate(lab.prompts((2,)), ["c"])
    with pytest.raises(DataError, match="prompts are a list"):
        session.generate("w1", ["a"])
