"""Parameter counts on the papers' own configurations, beside what the papers print; needs no weights.

Every configuration is compiled on the meta device and counted from its plan, so it is the real passes that are counted.
`make counts` writes `docs/counts.md` from `rows()`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from surgeon.plan import Plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "counts.md"
Surgery = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


@dataclass(frozen=True)
class Row:
    """One printed number: agrees where it is what we count, rounded as the paper rounds."""

    paper: str
    configuration: str
    printed: str
    counted: int
    share: float
    agrees: bool
    reason: str


@dataclass(frozen=True)
class Case:
    """A row before it is counted. `of` picks what is counted; by default everything that is trained."""

    paper: str
    base: str
    configuration: str
    surgery: Surgery
    printed: str
    agrees: bool = True
    reason: str = ""
    of: Callable[[Plan], int] = lambda plan: plan.parameters


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_GPT3 = {"hidden_size": 12288, "word_embed_proj_dim": 12288, "ffn_dim": 49152}

BASES: dict[str, dict[str, Any]] = {
    "BERT-base": {"config": {"model_type": "bert", "vocab_size": 28996}},
    "BERT-large": {"config": {"model_type": "bert", "vocab_size": 28996, **_LARGE}},
    "RoBERTa-base": {"config": _ROBERTA},
    "RoBERTa-large": {"config": _ROBERTA | _LARGE},
    "GPT-2 medium": {
        "config": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
        "head": "causal-lm",
    },
    "BART-large": {"config": {"model_type": "bart"}, "head": "seq2seq-lm"},
    # Without its disentangled attention, which uses the same matrices again (`share_att_key`).
    "DeBERTaV3-base": {"config": {"model_type": "deberta-v2", "vocab_size": 128100, **_BASE}},
    "GPT-3's shape": {
        "config": {"model_type": "opt", "num_hidden_layers": 96, "num_attention_heads": 96, **_GPT3},
        "head": "causal-lm",
    },
}


def _one(technique: str, **options: Any) -> Surgery:
    return ((technique, tuple(options.items())),)


def _adapters(plan: Plan) -> int:
    return sum(row.parameters for row in plan.rows if row.part.startswith(("down.", "up.")))


def _norms(plan: Plan) -> int:
    return plan.parameters - _adapters(plan)


LORA, HOULSBY = "LoRA (2106.09685)", "Houlsby et al. (1902.00751)"
BITFIT, PREFIX, HE = "BitFit (2106.10199)", "Prefix-Tuning (2101.00190)", "He et al. (2110.04366)"
SIX = ("attention", "ffn")

CASES = (
    Case(LORA + ", table 2", "RoBERTa-base", "queries and values, rank 8", _one("lora", rank=8), "0.3M"),
    Case(LORA + ", table 2", "RoBERTa-large", "queries and values, rank 8", _one("lora", rank=8), "0.8M"),
    Case(
        LORA + ", table 3",
        "GPT-2 medium",
        "queries and values, rank 4",
        _one("lora", rank=4),
        "0.35M",
        agrees=False,
        reason="the authors' own checkpoint of 1.5 MB holds 393,216 numbers of four bytes",
    ),
    Case(LORA + ", table 4", "GPT-3's shape", "queries and values, rank 8", _one("lora", rank=8), "37.7M"),
    Case(
        "AdaLoRA (2303.10512), table 1, its LoRA",
        "DeBERTaV3-base",
        "all six matrices of a layer, rank 8",
        _one("lora", rank=8, where=SIX),
        "1.33M",
    ),
    Case(
        HOULSBY + ", table 1",
        "BERT-large",
        "two adapters a layer, m 64, and every layer norm",
        _one("adapter", bottleneck=64),
        "2.1 %",
        agrees=False,
        reason="2.13 % of the 24 layers alone (302,309,376); with embeddings and pooler it is 1.93 %",
    ),
    Case(
        HOULSBY + ", section 3.4",
        "BERT-base",
        "the layer norms among them",
        _one("adapter", bottleneck=64),
        "40k",
        agrees=False,
        reason="38,400 with the embeddings' norm, 36,864 without: rounded up",
        of=_norms,
    ),
    Case(
        HOULSBY + ", section 3.4",
        "BERT-base",
        "two adapters a layer, m 64",
        _one("adapter", bottleneck=64),
        "2M",
        of=_adapters,
    ),
    Case(BITFIT, "BERT-base", "every bias but the classifier's", _one("bitfit"), "0.09 %"),
    Case(BITFIT, "BERT-large", "every bias but the classifier's", _one("bitfit"), "0.08 %"),
    Case(
        BITFIT,
        "BERT-base",
        "biases of queries and intermediate layers",
        _one("bitfit", where=("attention.query", "ffn.up")),
        "0.04 %",
    ),
    Case(PREFIX + ", section 6", "GPT-2 medium", "length 5", _one("prefix", length=5), "250K"),
    Case(
        PREFIX + ", table 2",
        "BART-large",
        "length 200, encoder, decoder and cross-attention",
        _one("prefix", length=200),
        "2 %",
        agrees=False,
        reason="3.6 %, as He et al. print for it; two of the three sites are 2.4 %",
    ),
    Case(
        HE + ", table 3",
        "BART-large",
        "prefix of length 200, encoder, decoder and cross-attention",
        _one("prefix", length=200),
        "3.6 %",
    ),
    Case(
        HE + ", table 3",
        "BART-large",
        "parallel adapter at the feed-forward, m 200",
        _one("adapter", placement="parallel", bottleneck=200),
        "2.4 %",
    ),
    Case(
        HE + ", table 3, MAM",
        "BART-large",
        "prefix of length 30 and parallel adapter, m 512",
        _one("prefix", length=30) + _one("adapter", placement="parallel", bottleneck=512),
        "6.7 %",
    ),
    Case(
        "P-Tuning v2 (2110.07602), section 1",
        "RoBERTa-large",
        "length 20",
        _one("p_tuning_v2", length=20),
        "0.1 % to 3 %",
    ),
)


@cache
def _plan(base: str, surgery: Surgery) -> Plan:
    import surgeon

    spec = {"base": BASES[base], "surgery": [{name: dict(options)} for name, options in surgery], "tasks": {"a": {}}}
    return surgeon.compile(spec, weights=False).plan


def rows(bases: Collection[str] = tuple(BASES)) -> list[Row]:
    """Count every case of these bases; some seconds a configuration."""
    counted = []
    for case in CASES:
        if case.base in bases:
            plan = _plan(case.base, case.surgery)
            number = case.of(plan)
            share = number / plan.base_parameters
            configuration = f"{case.base}, {case.configuration}"
            counted.append(Row(case.paper, configuration, case.printed, number, share, case.agrees, case.reason))
    return counted


def page() -> str:
    """`docs/counts.md`."""
    head = (
        "# Parameter counts\n\nWritten by `make counts`: the papers' own configurations, compiled on the meta device "
        "without weights and counted from the plan, beside what the papers print.\n\n"
    )
    return head + table(rows())


def table(found: Collection[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| paper | configuration | printed | counted | of the base | agrees |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {r.paper} | {r.configuration} | {r.printed} | {r.counted:,} | {r.share:.3%} | "
        f"{'yes' if r.agrees else f'**no**: {r.reason}'} |"
        for r in found
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
