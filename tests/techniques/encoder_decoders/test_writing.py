"""How encoder-decoders write: beams, the base's own rules, where a text ends, pieces, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import surgeon
from surgeon.cli import main
from surgeon.errors import DataError, SpecError
from surgeon.runtime.generation import Row, TaskPerRowHalves

if TYPE_CHECKING:
    from techniques.conftest import Lab
    from techniques.encoder_decoders.conftest import Writing


def test_beams_are_transformers(lab: Lab, writing: Writing, tmp_path: Path) -> None:
    """Ends among the beams, other lengths preferred, rows in groups; of the base and of what was trained."""
    made, _, _ = writing.built("t5")
    trained, prompt = writing.merged(made)
    often = writing.by_transformers(made.base.model, lab.prompts()[2], 12, num_beams=3)
    ends = {"eos_token_id": [often[5], often[-1]]}
    lengths: set[int] = set()
    with surgeon.Session(writing.saved(made, tmp_path / "build", **ends), threads=1) as session:
        for task, options in (
            (None, {"beams": 3}),
            (None, {"beams": 4, "length_penalty": 2.0}),
            ("a", {"beams": 3}),
            ("a", {"beams": 3, "length_penalty": -1.5, "early_stopping": True, "repetition_penalty": 1.3}),
        ):
            asked = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
            model, front = (made.base.model, None) if task is None else (trained, prompt)
            wanted = [writing.by_transformers(model, s, 20, prompt=front, **ends, **asked) for s in lab.prompts()]
            for batch in (4, 1):
                rows = session.generate(lab.prompts(), task, max_new_tokens=20, batch=batch, **options)
                assert [list(row.tokens) for row in rows] == wanted
            lengths |= {len(tokens) for tokens in wanted}
    assert len(lengths) > 1


RULES: list[dict[str, Any]] = [
    {"forced_bos_token_id": 7, "forced_eos_token_id": 1},
    {"eos_token_id": 1, "min_length": 9, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [4]], "suppress_tokens": [5, 6], "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("rules", RULES)
def test_the_bases_own_rules_hold(lab: Lab, writing: Writing, tmp_path: Path, rules: dict[str, Any]) -> None:
    made, _, session = writing.built("t5")
    if "eos_token_id" in rules:
        rules = {**rules, "eos_token_id": session.generate(lab.prompts()[:1])[0].tokens[0]}
    with surgeon.Session(writing.saved(made, tmp_path / "build", **rules), threads=1) as ruled:
        for beams in (1, 3):
            wanted = [writing.by_transformers(made.base.model, s, 24, num_beams=beams, **rules) for s in lab.prompts()]
            rows = ruled.generate(lab.prompts(), max_new_tokens=24, beams=beams)
            assert [list(row.tokens) for row in rows] == wanted
    assert wanted != [list(row.tokens) for row in session.generate(lab.prompts(), max_new_tokens=24, beams=3)]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"bad_words_ids": [[3, 4]]}, "bad_words_ids of several tokens"),
        ({"encoder_no_repeat_ngram_size": 3}, "asks for encoder_no_repeat_ngram_size"),
        ({"forced_eos_token_id": [1, 2]}, "names 2 tokens"),
    ],
)
def test_a_rule_that_is_not_done_is_said(writing: Writing, tmp_path: Path, said: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        writing.saved(writing.built("t5").made, tmp_path / "build", **said)
    assert not (tmp_path / "build").exists()


def test_rows_end_at_different_times_and_no_neighbour_matters(lab: Lab, writing: Writing, tmp_path: Path) -> None:
    made, _, session = writing.built("t5")
    chance = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.2}
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 7}
    free = session.generate(lab.prompts(), "a", **options, **chance)
    ends = [free[0].tokens[3], free[2].tokens[8]]
    with surgeon.Session(writing.saved(made, tmp_path / "build", eos_token_id=ends), threads=1) as ending:
        for drawn in ({}, chance):
            together = ending.generate(lab.prompts(), "a", **options, **drawn)
            assert not drawn or len({len(row.tokens) for row in together}) > 1
            assert together == ending.generate(lab.prompts(), "a", batch=2, **options, **drawn)
            for i, source in enumerate(lab.prompts()):
                assert together[i : i + 1] == ending.generate([source], "a", **{**options, "seed": 7 + i}, **drawn)


def test_texts_come_in_pieces_and_stop(writing: Writing, capsys: pytest.CaptureFixture[str]) -> None:
    _, path, session = writing.built("t5")
    said = {0: "", 1: ""}

    def listen(row: int, piece: str) -> None:
        said[row] += piece

    whole = session.generate(["w3 w4 w5", "w9"], "a", max_new_tokens=9, stream=listen)
    assert [row.text for row in whole] == [said[0], said[1]]
    assert whole[0].tokens == session.generate([[3, 4, 5]], "a", max_new_tokens=9)[0].tokens
    word = whole[0].text.split()[-1]
    cut = session.generate(["w3 w4 w5"], "a", max_new_tokens=9, stop=word)[0]
    assert (cut.reason, cut.text) == ("stop", whole[0].text[: whole[0].text.index(word)])
    assert main(["run", str(path), "--task", "a", "--tokens", "9", "w3 w4 w5", "w9"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.text for row in whole]
    assert main(["run", str(path), "--task", "a", "--tokens", "9", "--beams", "3", "w9"]) == 0
    best = session.generate(["w9"], "a", max_new_tokens=9, beams=3)[0]
    assert capsys.readouterr().out.splitlines() == [best.text]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": [[5], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[3] * 62]}, "prompt 0 has 62 tokens, the base takes 61"),
        ({"beams": 0}, "beams is a whole number"),
        ({"beams": 51}, "there are not 51"),
        ({"beams": 2, "stream": print}, "do not go with stream"),
        ({"beams": 2, "temperature": 1.0}, "do not go with a temperature"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 2.0}, "of a beam search"),
        ({"early_stopping": "never", "beams": 2}, "early_stopping"),
    ],
)
def test_what_does_not_fit_is_said(writing: Writing, options: dict[str, Any], says: str) -> None:
    session = writing.built("t5").session
    with pytest.raises((DataError, SpecError), match=says):
        session.generate(**{"prompts": [[5]], "task": "a", **options})
    assert session.generate([[5]], "a", max_new_tokens=1)


def test_a_text_ends_where_the_decoder_has_no_positions_left(writing: Writing) -> None:
    row = writing.built("t5").session.generate([[5]], "a", max_new_tokens=500)[0]
    assert (len(row.tokens), row.reason) == (writing.long, "length")  # the source's tokens take none, nor does the last


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every run of a decoder's graph of several tasks had."""
    runs, write = [], TaskPerRowHalves.write

    def counted(self: TaskPerRowHalves, rows: Any, fed: Any) -> Any:
        runs.append(len(rows))
        return write(self, rows, fed)

    monkeypatch.setattr(TaskPerRowHalves, "write", counted)
    return runs


SEVERAL = ["bart", pytest.param("t5", marks=pytest.mark.sweep)]


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_task_for_each_text_writes_and_reads_as_alone(lab: Lab, writing: Writing, runs: list[int], kind: str) -> None:
    """Tasks of several sizes go on together, a token of all rows a run."""
    path = writing.several(kind)
    tasks, given = ["a", None, "b", "a"], lab.prompts()
    fed = {name: tensor.numpy() for name, tensor in lab.feed(writing.base(kind, small=True), 4, 6).items()}
    with surgeon.Session(path, threads=1) as session, surgeon.Session(path, threads=1, mixed=True) as several:
        for options in ({}, {"beams": 2}):
            alone = [
                session.generate([g], t, max_new_tokens=8, **options)[0] for g, t in zip(given, tasks, strict=True)
            ]
            for opened in (session, several):
                runs.clear()
                assert opened.generate(given, tasks, max_new_tokens=8, **options) == alone
                assert len(runs) == max(len(row.tokens) for row in alone)
            with surgeon.Session(path, threads=1, resident=1) as few:  # one by one, where not all can be at hand
                assert few.generate(given, tasks, max_new_tokens=8, **options) == alone
        assert len({row.tokens for row in alone}) > 1
        rows = several.run(fed, tasks)
        for i, (row, task) in enumerate(zip(rows, tasks, strict=True)):
            wanted = session.run({name: array[i : i + 1] for name, array in fed.items()}, task)["logits"][0]
            np.testing.assert_allclose(row["logits"], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", SEVERAL)
def test_texts_that_come_at_any_time_are_written_as_alone(
    lab: Lab, writing: Writing, runs: list[int], kind: str
) -> None:
    """Those that come between two steps begin together; while two groups go on, the others wait."""
    given, tasks = lab.prompts((5, 1, 9, 14, 3, 7, 2)), ["a", "b", None, "b", "a", None, "b"]
    limits = [3, 20, 9, 1, 12, 5, 17]
    with surgeon.Session(writing.several(kind), threads=1) as session:
        asked = list(zip(given, tasks, limits, strict=True))
        alone = [session.generate([p], t, max_new_tokens=n)[0] for p, t, n in asked]
        rows = [session.texts.prepare([p], t, max_new_tokens=n)[0] for p, t, n in asked]
        writer, waiting, going = session.texts.writer(4), list(rows), True
        while going or waiting:
            for _ in range(2):
                if waiting and not writer.full:
                    writer.take(waiting.pop(0))
            going = writer.step()
        assert [row.written for row in rows] == alone
    assert sum(runs) == sum(limits)
    assert max(runs) == 2, "a group is of the two that came together"


def test_a_text_that_fails_disturbs_no_other(lab: Lab, writing: Writing) -> None:
    given = lab.prompts((5, 9))
    with surgeon.Session(writing.several("bart"), threads=1) as session:
        alone = session.generate(given, ["a", None], max_new_tokens=9)
        failed: list[tuple[Row, Exception]] = []
        rows = session.texts.prepare([given[0], [3, 10**6], given[1]], ["a", "b", None], max_new_tokens=9)
        writer = session.texts.writer(4, lambda row, error: failed.append((row, error)))
        for row in rows:
            writer.take(row)
        while writer.step():
            pass
    assert [row.written for row in (rows[0], rows[2])] == alone
    assert [(row, row.reason) for row, _ in failed] == [(rows[1], "gone")]
    assert isinstance(failed[0][1], DataError)


@pytest.mark.parametrize("kind", SEVERAL)
def test_given_texts_are_followed_by_every_graph(lab: Lab, writing: Writing, kind: str) -> None:
    """The logits of a text that was written are those that it was chosen from."""
    given, tasks = lab.prompts(), ["a", None, "b", "a"]
    with surgeon.Session(writing.several(kind), threads=1) as session:
        texts = [list(row.tokens) for row in session.generate(given, tasks, max_new_tokens=6)]
        found = session.texts.follow(given, texts, tasks)
        assert found.shape[:2] == (4, 7)
        assert found[:, :-1].argmax(-1).tolist() == texts
        for at, task in enumerate(tasks):
            np.testing.assert_allclose(session.texts.follow([given[at]], [texts[at]], task)[0], found[at], atol=1e-4)
        assert session.texts.follow(given, [[]] * 4, tasks).shape[:2] == (4, 1)
        for wrong in (texts[:2], [*texts[:3], [3]]):
            with pytest.raises(DataError, match="texts are equally long, one for every prompt"):
                session.texts.follow(given, wrong, tasks)
        if kind == "bart":  # T5 counts no positions
            with pytest.raises(DataError, match=r"the base has positions for \d+ tokens behind prompt 0"):
                session.texts.follow(given, [[3] * 500] * 4, tasks)
