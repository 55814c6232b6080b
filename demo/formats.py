"""Two tasks of writing on the demo's sentences, in formats that a program checks to the letter.

verdict   a movie review's sentence   {"verdict": "positive"}             as people rated it
ends      a product review's          first: camera | last: pictures      its first and last word
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = {"verdict": "movie", "ends": "product"}
"""The classification task of the demo whose sentences a task takes."""
QUESTIONS = {"verdict": "Verdict as JSON:", "ends": "First and last word:"}
LONGEST = 20
"""Words of a sentence: training steps stay short."""
SIZES = {"train": 200, "validation": 32, "test": 40}


class Row(NamedTuple):
    prompt: str
    completion: str


def prepare(data: dict[str, dict[str, Path]], out: Path) -> dict[str, dict[str, Path]]:
    """Write `out/{task}-{split}.jsonl`; return the paths by task and split."""
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {task: {} for task in SOURCES}
    for task, source in SOURCES.items():
        for split, size in SIZES.items():
            rows = list(read(task, data[source][split]))[:size]
            path = paths[task][split] = out / f"{task}-{split}.jsonl"
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
            partial.replace(path)
    return paths


def read(task: str, path: Path) -> Iterator[Row]:
    """Rows of the sentences in a file of the main demo that are not too long."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            said = words(row["text"])
            if len(said) >= 3 and len(row["text"].split()) <= LONGEST:
                yield Row(f"Sentence: {row['text']}\n{QUESTIONS[task]}", " " + answer(task, row["text"], row["label"]))


def answer(task: str, text: str, label: str) -> str:
    """What is to be written."""
    if task == "verdict":
        return json.dumps({"verdict": label})
    said = words(text)
    return f"first: {said[0]} | last: {said[-1]}"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def successes(rows: list[Row], texts: list[str]) -> int:
    """How many texts are what was to be written, to the letter."""
    return sum(text.strip() == row.completion.strip() for row, text in zip(rows, texts, strict=True))
