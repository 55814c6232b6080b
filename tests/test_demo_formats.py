"""The generation demo's tasks: what is to be written, and that nothing else counts as success."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def formats() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_formats", ROOT / "demo" / "formats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_formats"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_are_short_sentences_with_their_answers(formats: ModuleType, tmp_path: Path) -> None:
    texts = [("The zoom isn't good at all.", "negative"), ("Two words", "positive"), ("too " * 30, "neutral")]
    data = {}
    for source in formats.SOURCES.values():
        data[source] = dict.fromkeys(formats.SIZES, tmp_path / f"{source}.csv")
        with (tmp_path / f"{source}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *texts])
    paths = formats.prepare(data, tmp_path / "out")
    rows = {
        task: [json.loads(line) for line in files["test"].read_text().splitlines()] for task, files in paths.items()
    }
    assert [row["completion"] for row in rows["ends"]] == [" first: the | last: all"]
    assert [json.loads(row["completion"]) for row in rows["verdict"]] == [{"verdict": "negative"}]
    assert rows["ends"][0]["prompt"] == "Sentence: The zoom isn't good at all.\nFirst and last word:"


def test_success_is_to_the_letter(formats: ModuleType) -> None:
    row = formats.Row("x", ' {"verdict": "positive"}')
    tried = ['{"verdict": "positive"}', ' {"verdict": "positive"} ', '{"verdict":"positive"}', "positive", ""]
    assert formats.successes([row] * 5, tried) == 2
