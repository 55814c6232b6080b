"""Labels of words, and answers that stand in a text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import surgeon
from surgeon.errors import DataError
from surgeon.train import Question, TrainOptions, Words, evaluate, kind_of, load_tokenizer, train_task
from surgeon.train.batches import encode
from surgeon.train.kinds import kind

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NAMES = ("other", "person")
OPTIONS = TrainOptions(epochs=60, learning_rate=1e-2, batch_size=2, seed=1, threads=1)


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    """Words of more letters than it knows are one unknown token each; a hyphen parts a word in three."""
    return load_tokenizer(base_folder, 64)


@pytest.fixture(scope="module")
def labeller(tiny):
    """Deep prompts and a head, as in the paper."""
    spec = {"surgery": [{"p_tuning_v2": {"length": 3, "dropout": 0.0}}], "tasks": {"a": {"labels": list(NAMES)}}}
    return surgeon.compile(spec, base=tiny("bert", head="token-classification", initializer_range=0.3, **NO_DROPOUT))


@pytest.fixture(scope="module")
def reader(tiny):
    spec = {"surgery": [{"lora": {"where": ["attention", "ffn"]}}, {"head": {}}], "tasks": {"a": {}}}
    return surgeon.compile(spec, base=tiny("bert", head="question-answering", initializer_range=0.3, **NO_DROPOUT))


def test_a_words_label_is_that_of_its_first_token(labeller, tokenizer):
    row = Words(("the", "good-bad", "film"), (0, 1, 0))
    (example,) = encode(labeller.model("a"), tokenizer, [row], 64)
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == [
        "[CLS]", "the", "good", "[UNK]", "bad", "film", "[SEP]"
    ]  # fmt: skip
    assert example.labels == [-100, 0, 1, -100, -100, 0, -100]
    (cut,) = encode(labeller.model("a"), tokenizer, [row], 4)
    assert (cut.labels, cut.cut) == ([-100, 0, 1, -100], True)


def test_words_are_labelled_and_so_they_are_in_onnx_runtime(labeller, tokenizer, tmp_path):
    words = ("good", "bad", "film", "dull", "the", "was")
    rows = [Words(tuple(words[:i] + words[i + 2 :]), tuple(int(w in ("film", "dull")) for w in
            (words[:i] + words[i + 2 :]))) for i in range(6)]  # fmt: skip
    model = labeller.model("a")
    before = evaluate(model, tokenizer, rows)
    result = train_task(model, tokenizer, rows, rows, OPTIONS)
    assert before.accuracy < 0.8
    assert evaluate(model, tokenizer, rows).accuracy == result.best_accuracy > 0.9
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    batch = kind_of(model).batch(encode(model, tokenizer, rows[:3], 64), 0, torch.device("cpu"))
    with surgeon.Session(labeller.save(tmp_path / "build"), threads=1) as session, torch.no_grad():
        found = session.run({n: t.numpy() for n, t in batch.items() if n != "labels"}, "a")["logits"]
        np.testing.assert_allclose(found, model(**batch).logits.numpy(), atol=1e-4)


def test_answers_are_found_in_their_contexts(reader, tokenizer):
    context = "the film was great the a was good"
    rows = [Question("was film good", context, "great", 13), Question("was a good", context, "was good", 25)]
    model = reader.model("a")
    (first, second) = encode(model, tokenizer, rows, 64)
    for example, row in ((first, rows[0]), (second, rows[1])):
        start, end = example.labels
        said = tokenizer.convert_ids_to_tokens(example.input_ids[start : end + 1])
        assert " ".join(said) == row.answer
    before = evaluate(model, tokenizer, rows)
    result = train_task(model, tokenizer, rows, rows, OPTIONS.model_copy(update={"best_by": "loss"}))
    after = evaluate(model, tokenizer, rows)
    assert after.loss == pytest.approx(result.best_loss)
    assert after.loss < 0.5 * before.loss
    assert (after.accuracy, after.exact_match) == (1, 1)


def test_a_context_is_cut_but_never_its_answer(reader, tokenizer):
    model, context = reader.model("a"), "the good film was " + "dull " * 20
    (example,) = encode(model, tokenizer, [Question("a film", context, "good", 4)], 10)
    assert (len(example.input_ids), example.cut) == (10, True)
    with pytest.raises(DataError, match="row 1: the answer is not among the first 10 tokens"):
        encode(model, tokenizer, [Question("a film", context, "dull", 98)], 10)
    with pytest.raises(DataError, match="row 1: the question has 20 tokens, which leaves no room of 10"):
        encode(model, tokenizer, [Question("film " * 20, context, "good", 4)], 10)


BAD_WORDS = {
    "fewer labels": ({"tokens": ["a", "b"], "labels": ["person"]}, "2 words and 1 labels"),
    "an unknown label": ({"tokens": ["a"], "labels": ["persn"]}, "unknown label 'persn'"),
    "no list": ({"tokens": 3, "labels": ["person"]}, "column 'tokens' holds no list"),
    "no words": ({"tokens": [], "labels": []}, "column 'tokens' holds no list"),
    "a word that is none": ({"tokens": [1], "labels": ["person"]}, "holds something that is no word"),
}
BAD_QUESTIONS = {
    "an answer that is not there": ({"question": "q", "context": "a b", "answer": "c"}, "the answer does not stand in"),
    "a wrong place": ({"question": "q", "context": "a b", "answer": "b", "start": 1}, "at character 1 of the context"),
    "two places": ({"question": "q", "context": "b b", "answer": "b"}, "stands in the context more than once"),
    "no number": ({"question": "q", "context": "a b", "answer": "b", "start": "x"}, "holds no number of a character"),
    "no question": ({"question": "", "context": "a b", "answer": "b"}, "column 'question' holds no text"),
}


@pytest.mark.parametrize(
    ("head", "record", "words"),
    [("token-classification", *case) for case in BAD_WORDS.values()]
    + [("question-answering", *case) for case in BAD_QUESTIONS.values()],
    ids=[*BAD_WORDS, *BAD_QUESTIONS],
)
def test_rows_that_do_not_fit_are_told_with_their_line(tmp_path, head, record, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(record))
    with pytest.raises(DataError) as caught:
        kind(head, NAMES).read(path, {})
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_in_a_table_words_and_labels_are_written_with_spaces(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("tokens,labels\nthe film,other person\n")
    (row,) = kind("token-classification", NAMES).read(path, {})
    assert row[:2] == (("the", "film"), (0, 1))
    path.write_text("question,context,answer,start\nq,b b,b,2\n")
    assert kind("question-answering", 0).read(path, {})[0].start == 2
