"""The papers' own numbers: what agrees does, rounded as printed; what does not says why."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

# By its path: the benchmarks are no part of the installed package.
_SPEC = importlib.util.spec_from_file_location("counts", Path(__file__).parents[1] / "benchmarks/counts.py")
counts = importlib.util.module_from_spec(_SPEC)
sys.modules["counts"] = counts
_SPEC.loader.exec_module(counts)

UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "%": 0.01}


def within(printed: str, count: int, share: float) -> bool:
    """Whether a number, in the unit of the printed one, is what was printed: rounded or cut after its last digit."""
    bounds = []
    for text, unit in re.findall(r"([\d.]+)\s*([kKM%])", printed):
        last_digit = 10.0 ** -len(text.partition(".")[2])
        if unit == "K":
            last_digit = 10.0  # 250K, of 245,760: two figures are meant
        value = (share if unit == "%" else count) / UNITS[unit]
        bounds.append((value, float(text), last_digit))
    value, low, last_digit = bounds[0]
    if len(bounds) == 2:
        return low <= value <= bounds[1][1]
    return -last_digit / 2 <= value - low < last_digit


def check(rows: list) -> None:
    assert rows
    for row in rows:
        assert within(row.printed, row.counted, row.share) == row.agrees, row
        assert bool(row.reason) == (not row.agrees), row


def test_small_bases_count_as_their_papers_print():
    """BitFit prints 0.09 % and 0.04 % of BERT-base, Houlsby 2M and 40k; LoRA 0.3M of RoBERTa-base."""
    rows = counts.rows(["BERT-base", "RoBERTa-base"])
    check(rows)
    by_configuration = {row.configuration: row.counted for row in rows}
    assert by_configuration["RoBERTa-base, queries and values, rank 8"] == 294_912
    assert by_configuration["BERT-base, every bias but the classifier's"] == 102_912
    assert by_configuration["BERT-base, biases of queries and intermediate layers"] == 46_080
    assert by_configuration["BERT-base, two adapters a layer, m 64"] == 2_379_264
    assert by_configuration["BERT-base, the layer norms among them"] == 38_400


EXACT = {
    "RoBERTa-large, queries and values, rank 8": 786_432,
    "GPT-2 medium, queries and values, rank 4": 393_216,
    "GPT-3's shape, queries and values, rank 8": 37_748_736,
    "DeBERTaV3-base, all six matrices of a layer, rank 8": 1_327_104,
    "BERT-large, two adapters a layer, m 64, and every layer norm": 6_444_032,  # 2,048 of them the embeddings' norm
    "BERT-large, every bias but the classifier's": 272_384,
    "GPT-2 medium, length 5": 245_760,
    "BART-large, prefix of length 200, encoder, decoder and cross-attention": 14_745_600,
    "BART-large, parallel adapter at the feed-forward, m 200": 9_859_776,
    "BART-large, prefix of length 30 and parallel adapter, m 512": 27_414_528,
    "RoBERTa-large, length 20": 983_040,
}


@pytest.mark.sweep
def test_every_configuration_counts_as_its_paper_prints():
    rows = counts.rows()
    check(rows)
    by_configuration = {row.configuration: row.counted for row in rows}
    assert {name: by_configuration[name] for name in EXACT} == EXACT
