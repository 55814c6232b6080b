"""First step of the demo: sentences rated by people, cut into three tasks of different label counts.

The sentences are those of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014, as the source distribution of vaderSentiment 3.3.2 (MIT) carries them: movie reviews, product
reviews, newspaper editorials and tweets, each with its mean rating from -4 to 4.

    movie     negative · positive                   mean rating at least 0.5 away from 0
    product   negative · neutral · positive         neutral is within 0.5 of 0
    kind      movie · product · editorial · tweet   which of the four sources

Run as `python demo/data.py [OUT]`; the same bytes come out every time.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from surgeon.errors import DataError

HERE = Path(__file__).resolve().parent
SOURCE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
KINDS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "tweet": "tweets",
}
SPLITS = {"train": 2400, "validation": 300, "test": 600}
SEED = 20140601
SHORTEST = 3
SHINGLE = 8

# pip asks a source distribution's build backend for its metadata before it saves the file, and that runs setup.py.
# This backend stands in the place of setuptools and answers from a constant: nothing of the download is executed.
INERT_BACKEND = """
from pathlib import Path

class Inert:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = Path(metadata_directory) / "vaderSentiment-3.3.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n")
        return folder.name

__legacy__ = Inert()
"""


class Sentence(NamedTuple):
    kind: str
    rating: float
    text: str


class Row(NamedTuple):
    text: str
    label: str


def prepare(out: Path, cache: Path = HERE.parent / ".cache") -> dict[str, dict[str, Path]]:
    """Write `out/{task}-{split}.csv` for three tasks and three splits; return the paths by task and split."""
    sentences = list(distinct(read_sentences(download(cache))))
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = {}
    for task, label_of in TASKS.items():
        rows = [Row(s.text, label) for s in sentences if (label := label_of(s)) is not None]
        paths[task] = {}
        for split, part in split_rows(rows).items():
            paths[task][split] = out / f"{task}-{split}.csv"
            write_csv(paths[task][split], part)
    return paths


def movie_label(sentence: Sentence) -> str | None:
    if sentence.kind != "movie" or abs(sentence.rating) < 0.5:
        return None
    return "positive" if sentence.rating > 0 else "negative"


def product_label(sentence: Sentence) -> str | None:
    if sentence.kind != "product":
        return None
    if abs(sentence.rating) <= 0.5:
        return "neutral"
    return "positive" if sentence.rating > 0 else "negative"


def kind_label(sentence: Sentence) -> str | None:
    return sentence.kind


TASKS: dict[str, Callable[[Sentence], str | None]] = {
    "movie": movie_label,
    "product": product_label,
    "kind": kind_label,
}


def download(cache: Path) -> bytes:
    """Return the source distribution's bytes, from `cache` or else through pip; nothing of it is executed."""
    path = cache / SDIST
    if not path.is_file() or not is_published(path.read_bytes()):
        path.unlink(missing_ok=True)
        pip_download(SOURCE, cache)
    if not path.is_file():
        raise DataError(f"pip could not download {SOURCE}", try_=f"put {SDIST} into {cache} by hand")
    if not is_published(data := path.read_bytes()):
        raise DataError("the file is not the one that was published", where=str(path), try_="delete it and run again")
    return data


def is_published(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHA256


def pip_download(requirement: str, folder: Path) -> None:
    """Let pip put a source distribution into `folder`, with the inert backend in the place of setuptools."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as inert:
        package = Path(inert) / "setuptools"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_meta.py").write_text(INERT_BACKEND, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517", "-d", str(folder), requirement]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": inert}, check=False)


def read_sentences(sdist: bytes) -> Iterable[Sentence]:
    """Yield every rated sentence; the archive inside the archive is read in memory, by member names."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer, tarfile.open(fileobj=outer.extractfile(ARCHIVE)) as inner:
        for kind, name in KINDS.items():
            member = inner.extractfile(MEMBER.format(name))
            if member is None:
                raise DataError(f"{MEMBER.format(name)} is no regular file", where=ARCHIVE)
            for line in member.read().decode("utf-8-sig").splitlines():
                _, rating, text = line.split("\t")
                yield Sentence(kind, float(rating), clean(text))


def clean(text: str) -> str:
    """Undo HTML escapes, of which some are doubled, and collapse white space."""
    return " ".join(html.unescape(html.unescape(text)).split())


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def distinct(sentences: Iterable[Sentence]) -> Iterable[Sentence]:
    """Drop sentences of under 3 words, and those equal to an earlier one or sharing 8 words in a row with it."""
    seen: set[tuple[str, ...]] = set()
    for sentence in sentences:
        said = words(sentence.text)
        shingles = {tuple(said[i : i + SHINGLE]) for i in range(len(said) - SHINGLE + 1)} | {("".join(said),)}
        if len(said) >= SHORTEST and seen.isdisjoint(shingles):
            seen |= shingles
            yield sentence


def split_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """Draw the splits, as balanced as the rows allow, with the same shares of labels in each."""
    draw = random.Random(SEED)
    by_label = {label: list(group) for label, group in groupby(sorted(rows, key=lambda r: r.label), lambda r: r.label)}
    left = sum(SPLITS.values())
    placed: list[tuple[float, Row]] = []
    for i, (_, group) in enumerate(sorted(by_label.items(), key=lambda item: len(item[1]))):
        draw.shuffle(group)
        chosen = group[: left // (len(by_label) - i)]
        left -= len(chosen)
        placed += [((j + 0.5) / len(chosen), row) for j, row in enumerate(chosen)]
    if left:
        raise DataError(f"{sum(SPLITS.values()) - left} rows are too few for splits of {SPLITS}")
    ordered = iter([row for _, row in sorted(placed)])
    splits = {name: [next(ordered) for _ in range(size)] for name, size in SPLITS.items()}
    for part in splits.values():
        draw.shuffle(part)
    return splits


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write `text,label` under a temporary name, then rename: a file that is there is whole."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    partial.replace(path)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "out" / "data"
    for task, files in prepare(target).items():
        print(task, *(str(path) for path in files.values()), sep="\n  ")
