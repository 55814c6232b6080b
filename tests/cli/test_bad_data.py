"""Training data that do not fit are told with their line, before the base is read; the build stays as it was."""

from __future__ import annotations

import pytest

DATA = {
    "without the column": (b"txt,label\nfine,good\n", ("there is no column 'text'", "did you mean 'txt'?")),
    "without the label's column": (b"text,lable\nfine,good\n", ("there is no column 'label'", "did you mean 'lable'?")),
    "with an unknown label": (
        b"text,label\nfine,good\nfine,goood\n",
        ("rows.csv:3", "'goood'", "did you mean 'good'?"),
    ),
    "empty": (b"", ("empty",)),
    "of a header alone": (b"text,label\n", ("no rows",)),
    "not UTF-8": (b"text,label\nfin\xe9,good\n", ("not UTF-8", "rows.csv:2")),
    "with a text that is empty": (b"text,label\n  ,good\n", ("rows.csv:2", "no text")),
    "of uneven rows": (b"text,label\nfine, but long,good\n", ("rows.csv:2", "3 values")),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_do_not_fit_are_refused(refused, built, unchanged, tmp_path, case):
    content, words = DATA[case]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with unchanged(built):
        err = refused(1, (str(path), *words), "train", built, "--task", "mood", "--data", path)
    assert "reading the base" not in err


def test_validation_data_are_checked_as_well(refused, built, rows, tmp_path):
    (tmp_path / "validation.jsonl").write_text('{"text": "fine", "label": "fine"}\n')
    words = ("validation.jsonl:1", "unknown label 'fine'")
    refused(1, words, "train", built, "-t", "mood", "--data", rows, "--validation", tmp_path / "validation.jsonl")


def test_data_that_are_not_there_are_told(refused, built, tmp_path):
    refused(1, ("rows.csv",), "train", built, "-t", "mood", "--data", tmp_path / "rows.csv")
    refused(1, ("rows.xlsx", ".jsonl"), "train", built, "-t", "mood", "--data", tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--epochs", 0), ("--epochs", "got 0")),
        (("--lr", -1), ("--learning-rate", "got -1")),
        (("--lr", "nan"), ("--learning-rate", "nan")),
        (("--schedule", "cosin"), ("--schedule", "cosin")),
        (("--hold-out", 1.5), ("--hold-out", "1.5")),
        (("--hold-out", 0.1, "--validation", "some.csv"), ("exclude",)),
    ],
)
def test_options_that_do_not_fit_are_told(refused, built, rows, options, words):
    refused(2, words, "train", built, "-t", "mood", "--data", rows, *options)


def test_a_task_that_there_is_not_is_not_trained(refused, built, rows):
    refused(2, ("no task 'moo'", "did you mean 'mood'?"), "train", built, "-t", "moo", "--data", rows)
