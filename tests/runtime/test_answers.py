"""What a session answers: the oracle's numbers, the base exactly without a task, and labels for texts."""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from surgeon.errors import BuildError, DataError, SpecError
from surgeon.runtime import Session
from surgeon.runtime.answers import answers
from surgeon.runtime.manifest import Port
from surgeon.runtime.text import Texts


@pytest.fixture
def session(pristine):
    with Session(pristine, threads=1) as session:
        yield session


def near(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_tasks_answer_as_the_equations_say(session, inputs, deltas, oracle):
    for name, task in (("movies", deltas.movies), ("topics", deltas.topics)):
        assert near(session.run(inputs, task=name)["logits"], oracle(inputs, task))


def test_without_a_task_the_answer_is_the_untouched_base_bit_for_bit(session, inputs, plain_model, deltas, oracle):
    plain = onnxruntime.InferenceSession(plain_model, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    assert np.array_equal(session.run(inputs)["logits"], plain)
    assert near(plain, oracle(inputs, deltas.base))


def test_a_task_of_rank_zero_is_the_base_bit_for_bit(session, inputs, deltas, pack):
    path = pack(deltas.base, "zero")
    session.add_task(path)
    assert np.array_equal(session.run(inputs, task="zero")["logits"], session.run(inputs)["logits"])


def test_sizes_are_the_task_files_choice(session, inputs, deltas, oracle, pack):
    for rank, prefix in itertools.product((0, 1, 4, 16), (0, 1, 30)):
        task = deltas.make(rank + prefix, r_query=rank, r_value=3, prefix=prefix, labels=5)
        info = session.add_task(pack(task), replace=True)
        assert near(session.run(inputs, task="t")["logits"], oracle(inputs, task))
        assert dict(info.sizes) == {"r_query": rank, "r_value": 3, "prefix": prefix, "labels": 5}
        assert info.columns == 5


def test_swapping_tasks_back_and_forth_changes_no_bit(session, inputs):
    first = {task: session.run(inputs, task=task)["logits"] for task in (None, "movies", "topics")}
    for task in ("topics", None, "movies", "topics", "movies", None):
        assert np.array_equal(session.run(inputs, task=task)["logits"], first[task])


def test_a_task_without_labels_keeps_the_head_of_the_base(session, inputs, deltas, oracle, pack):
    headless = {name: array for name, array in deltas.movies.items() if not name.startswith("head")}
    path = pack(headless, "headless")
    assert session.add_task(path).columns is None
    assert near(session.run(inputs, task="headless")["logits"], oracle(inputs, {**deltas.base, **headless}))


def test_padded_rows_equal_rows_alone(session, inputs):
    together = session.run(inputs, task="movies")["logits"]
    alone = session.run({"input_ids": inputs["input_ids"][1:, :4]}, task="movies")["logits"]
    assert np.allclose(together[1:], alone, atol=1e-5)


def test_absent_inputs_are_filled(session, inputs):
    ids = inputs["input_ids"]
    full = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, task="movies")["logits"]
    assert np.array_equal(session.run({"input_ids": ids}, task="movies")["logits"], full)


@pytest.mark.parametrize("convert", [lambda a: a.tolist(), lambda a: a.astype(np.int32), lambda a: a.astype(np.uint8)])
def test_lists_and_smaller_integers_are_converted(session, inputs, convert):
    converted = {name: convert(array) for name, array in inputs.items()}
    assert np.array_equal(session.run(converted, task="movies")["logits"], session.run(inputs, task="movies")["logits"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_idz": [[1]]}, "no input 'input_idz'"),
        ({"input_ids": None}, "NoneType, not a numpy array"),
        ({"input_ids": "words"}, "is a str"),
        ({"input_ids": [2, 3]}, "a batch of one"),
        ({"input_ids": [[2, 3], [4]]}, "different lengths"),
        ({"input_ids": np.ones((2, 6))}, "dtype float64"),
        ({"input_ids": [[2.0]]}, "dtype float64"),
        ({"input_ids": np.ones((2, 6), np.uint64)}, "dtype uint64"),
        ({"input_ids": np.ones((0, 6), np.int64)}, "is empty"),
        ({"input_ids": [[]]}, "is empty"),
        ({"input_ids": [[-1] * 6] * 2}, "negative"),
        ({"input_ids": [[99] * 6] * 2}, "cannot run on these inputs"),
        ({"input_ids": [[2] * 17] * 2, "attention_mask": [[1] * 17] * 2}, "17 tokens, the base takes 16"),
        ({"attention_mask": [[1] * 5] * 2}, "its sequence is 5"),
        ({"attention_mask": [[1] * 6] * 3}, "its batch is 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_there_is(session, inputs, change, says):
    with pytest.raises(DataError, match=says):
        session.run({**inputs, **change}, task="movies")


def test_a_missing_input_and_a_wrong_container_are_refused(session, inputs):
    with pytest.raises(
        DataError, match=r"'input_ids' is missing\n.*attention_mask int64\[batch, sequence\] \(else 1\)"
    ):
        session.run({"attention_mask": inputs["attention_mask"]})
    with pytest.raises(DataError, match="not list"):
        session.run([inputs["input_ids"]])


def test_an_unknown_task_is_refused_with_the_nearest_and_the_list(session, inputs):
    with pytest.raises(SpecError, match=r"no task 'movie'\n.*movies, topics\n.*did you mean 'movies'"):
        session.run(inputs, task="movie")


def test_texts_become_padded_ids_and_labels(session, inputs):
    feed = session.encode(["w2 w3 w4", "w5"])
    assert feed["input_ids"].tolist() == [[2, 3, 4], [5, 0, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    answers = session.classify(["w2 w3 w4", "w5", "w9 w8"], task="topics", batch=2)
    logits = session.run(session.encode(["w2 w3 w4", "w5", "w9 w8"]), task="topics")["logits"]
    names = session.tasks["topics"].labels
    assert [a.label for a in answers] == [names[i] for i in logits.argmax(1)]
    assert all(abs(sum(a.scores.values()) - 1) < 1e-12 and a.score == max(a.scores.values()) for a in answers)


def test_texts_are_cut_to_what_the_base_takes_or_to_less(session):
    assert session.encode(["w2 " * 40])["input_ids"].shape == (1, 16)
    assert session.encode(["w2 " * 40], max_length=5)["input_ids"].shape == (1, 5)
    assert session.encode([("w2 w3", "w4")])["input_ids"].tolist() == [[2, 3, 4]]


def test_an_answer_that_is_not_finite_is_no_label() -> None:
    with pytest.raises(DataError, match="the logits of 1 in 2 rows are not finite, of row 1 first"):
        answers({"logits": np.array([[1.0, 2.0], [np.nan, np.nan]], np.float32)}, ["a", "b"])


def tokenizer_with(special):
    tokenizer = Tokenizer(models.WordLevel({"w2": 0, "w3": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


def test_answers_come_in_the_order_of_the_texts_whatever_their_lengths(session):
    texts = ["w2 w3 w4 w5 w6", "w7", "w2 w9 w4", ("w3", "w5"), "w8"]
    together = session.classify(texts, task="topics", batch=2)
    alone = [session.classify([text], task="topics")[0] for text in texts]
    assert [a.label for a in together] == [a.label for a in alone]
    assert np.allclose([a.score for a in together], [a.score for a in alone], atol=1e-6)


def test_a_tokenizer_without_padding_section_pads_with_its_pad_token():
    ports = [Port("input_ids", "int64", ("batch", "sequence"))]
    texts = Texts(tokenizer_with(["<s>", "<pad>"]), None, "tokenizer.json")
    assert texts.encode(["w2 w3", "w3"], ports)["input_ids"].tolist() == [[0, 1], [1, 4]]


def test_a_tokenizer_that_cannot_pad_takes_texts_of_one_length_only():
    ports = [Port("input_ids", "int64", ("batch", "sequence"))]
    texts = Texts(tokenizer_with(["<s>"]), None, "tokenizer.json")
    assert texts.encode(["w2 w3", "w3 w2"], ports)["input_ids"].tolist() == [[0, 1], [1, 0]]
    with pytest.raises(BuildError, match="need padding"):
        texts.encode(["w2 w3", "w3"], ports)


@pytest.mark.parametrize("texts", ["w2", [b"w2"], [None], [("w2",)], []])
def test_what_is_no_list_of_texts_is_refused(session, texts):
    with pytest.raises(DataError, match="texts"):
        session.encode(texts)


def test_a_build_without_tokenizer_says_that_it_takes_ids(build, reseal, inputs):
    reseal(lambda doc: doc["files"].pop("tokenizer.json"))
    with Session(build, threads=1) as session:
        session.run(inputs)
        with pytest.raises(BuildError, match=r"no tokenizer\.json"):
            session.encode(["w2"])


def test_left_out_fusions_change_no_answer(pristine, inputs, session):
    with Session(pristine, threads=1, fusions=("MatMulAddFusion",)) as other:
        assert np.allclose(other.run(inputs, "movies")["logits"], session.run(inputs, "movies")["logits"], atol=1e-5)


def test_one_fusion_without_a_list_is_refused(pristine):
    with pytest.raises(SpecError, match="a list of names"):
        Session(pristine, fusions="MatMulAddFusion")


def test_a_tuned_session_answers_as_any_other(pristine, inputs, session):
    with Session.tuned(pristine, threads=1, shape=(2, 6), resident=2) as tuned:
        assert tuned.fusions in {"all", ("SkipLayerNormFusion",)}
        assert np.allclose(tuned.run(inputs, "movies")["logits"], session.run(inputs, "movies")["logits"], atol=1e-5)


def test_a_closed_session_says_so(pristine, inputs):
    session = Session(pristine, threads=1)
    session.close()
    session.close()
    with pytest.raises(BuildError, match="closed"):
        session.run(inputs, task="movies")
