"""The demo's data: the same bytes every time, no text in two splits, nothing of the download executed."""

import csv
import hashlib
import importlib.util
import io
import random
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from surgeon.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CACHED = (ROOT / ".cache" / "vaderSentiment-3.3.2.tar.gz").is_file()
EVERY_CSV = "d62f0066ea7e48f67088cb41ff386dbc1227d24ca357d6ce4f7ffbd525847e58"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "demo" / "data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_data"] = module
    spec.loader.exec_module(module)
    return module


def sentences(data, texts):
    return [data.Sentence("movie", 1.0, text) for text in texts]


def test_an_equal_text_in_other_letters_and_marks_is_dropped(data):
    kept = list(data.distinct(sentences(data, ["A fine, fine film!", "a FINE fine film...", "A fine film."])))
    assert [s.text for s in kept] == ["A fine, fine film!", "A fine film."]


def test_eight_words_in_a_row_make_two_texts_near_duplicates(data):
    said = "one two three four five six seven eight"
    assert len(list(data.distinct(sentences(data, [f"first {said}", f"{said} last", "nine ten eleven"])))) == 2
    assert len(list(data.distinct(sentences(data, [f"first {said}", said.replace("four", "for")])))) == 2


def test_escapes_are_undone_even_when_doubled(data):
    assert data.clean(" Lord &amp;amp;  Taylor &amp; sons ") == "Lord & Taylor & sons"


def test_splits_share_their_labels_as_evenly_as_the_rows_allow(data):
    rows = [data.Row(f"text {i}", "many" if i > 600 else "few") for i in range(4000)]
    splits = data.split_rows(rows)
    assert {name: len(part) for name, part in splits.items()} == data.SPLITS
    assert len({row.text for part in splits.values() for row in part}) == sum(data.SPLITS.values())
    shares = [Counter(row.label for row in part)["few"] / len(part) for part in splits.values()]
    assert all(abs(a - b) < 0.005 for a, b in pairwise(shares))


def test_splits_do_not_depend_on_the_state_of_random(data):
    rows = [data.Row(f"text {i}", "ab"[i % 2]) for i in range(3300)]
    random.seed(1)
    first = data.split_rows(list(rows))
    random.seed(2)
    assert data.split_rows(list(rows)) == first


def test_too_few_rows_are_an_error_with_their_count(data):
    with pytest.raises(DataError, match="10 rows are too few"):
        data.split_rows([data.Row(f"text {i}", "ab"[i % 2]) for i in range(10)])


def test_nothing_of_the_download_is_executed(data, tmp_path, monkeypatch):
    """A source distribution of that name whose setup.py leaves a mark when run."""
    mark, shelf, cache = tmp_path / "was-run", tmp_path / "shelf", tmp_path / "cache"
    shelf.mkdir()
    files = {
        "setup.py": f"open({str(mark)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n",
    }
    with tarfile.open(shelf / data.SDIST, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"vaderSentiment-3.3.2/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(DataError, match="not the one that was published"):
        data.download(cache)
    assert (cache / data.SDIST).is_file()
    assert not mark.exists()


@pytest.mark.skipif(not CACHED, reason="the source distribution is not in .cache: run `make demo` once")
def test_the_real_splits_are_the_same_bytes_and_share_no_text(data, tmp_path):
    files = data.prepare(tmp_path)
    every = b"".join(files[task][split].read_bytes() for task in sorted(files) for split in sorted(files[task]))
    assert hashlib.sha256(every).hexdigest() == EVERY_CSV
    for splits in files.values():
        texts: dict[str, set[str]] = {}
        for split, path in splits.items():
            with path.open(encoding="utf-8", newline="") as file:
                texts[split] = {"".join(data.words(row["text"])) for row in csv.DictReader(file)}
            assert len(texts[split]) == data.SPLITS[split]
        assert not (texts["train"] & texts["test"])
        assert not (texts["train"] & texts["validation"])
        assert not texts["test"] & texts["validation"]
