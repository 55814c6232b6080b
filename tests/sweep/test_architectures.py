"""Twenty families, none of them named in Surgeon's code; `make architectures` takes all there are, with all heads.

All of them are read, and four go the whole way into ONNX Runtime; the others do so in `make sweep`.
"""

from __future__ import annotations

from typing import Any

import pytest

from surgeon.spec import HeadName
from sweep.cases import Case
from sweep.chain import chain, read
from sweep.shrinking import LADDER, Sizes

ONE_LAYER = [Sizes(layers=1)]
WHOLE: dict[str, HeadName] = {
    "bloom": "causal-lm",  # a bias by distance in the scores' own product; fused, interleaved by head
    "codegen": "causal-lm",  # parallel; fused, values before keys
    "electra": "sequence-classification",  # embeddings of another width
    "opt": "causal-lm",  # a feed-forward on flattened tokens
}
READ: dict[str, HeadName] = {
    "albert": "sequence-classification",  # one layer's weights for all
    "biogpt": "causal-lm",
    "cohere": "causal-lm",  # parallel, one norm
    "ctrl": "causal-lm",
    "deberta": "sequence-classification",  # relative positions; fused
    "fnet": "sequence-classification",  # no attention
    "gemma3_text": "causal-lm",  # norms on both sides, a sliding window
    "git": "causal-lm",
    "gpt_neo": "causal-lm",
    "layoutlm": "masked-lm",
    "lfm2": "causal-lm",  # convolutions beside attention
    "minicpm3": "causal-lm",  # low-rank keys and values
    "mistral": "causal-lm",
    "mixtral": "causal-lm",  # experts
    "mpt": "causal-lm",  # a bias by distance; fused
    "qwen3": "causal-lm",  # norms of queries and keys
}
assert len(WHOLE | READ) == 20
MENDED: dict[str, HeadName] = {
    "deepseek_v32": "causal-lm",  # an index of the tokens to attend to
    "minimax": "sequence-classification",  # chunks in a loop
    "openai-gpt": "sequence-classification",  # keys laid out as columns
    "t5gemma": "seq2seq-lm",  # a configuration for each side
    "xlnet": "sequence-classification",  # numbers in front of integers
}


@pytest.mark.parametrize(
    "family", [*WHOLE, *(pytest.param(family, marks=pytest.mark.sweep) for family in READ | MENDED)]
)
def test_a_family_goes_the_whole_way(family: str) -> None:
    notes: dict[str, Any] = {}
    chain(Case(family, (WHOLE | READ | MENDED)[family]), notes, LADDER if family in MENDED else ONE_LAYER)
    assert notes.get("cause") is None
    assert set(notes["techniques"].values()) <= {"ok", "none"}
    assert notes["export"] == "ok"


@pytest.mark.parametrize("family", READ)
def test_a_family_is_read_without_fault(family: str) -> None:
    notes: dict[str, Any] = {}
    _, _, anatomy = read(Case(family, READ[family]), notes, ONE_LAYER)
    assert notes["faults"] == []
    assert anatomy.joins
