"""What the papers print, and what to count for it.

A number without a `reason` must come out as printed; one with a reason must not, and the reason says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Surgery = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


@dataclass(frozen=True)
class Count:
    """Trained numbers of a task by technique and part, and the base's own."""

    parts: Mapping[tuple[str, str], int]
    base: int

    @property
    def trained(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Case:
    """A printed number. `sizes` gives free sizes by a glob over their symbols; `of` picks what is counted."""

    paper: str
    base: str
    configuration: str
    surgery: Surgery
    printed: str
    reason: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    of: Callable[[Count], int] = lambda count: count.trained

    @property
    def techniques(self) -> tuple[str, ...]:
        """What it is about."""
        return tuple(name for name, _ in self.surgery)


def _one(technique: str, **options: Any) -> Surgery:
    return ((technique, tuple(options.items())),)


def _adapters(count: Count) -> int:
    return sum(n for (_, part), n in count.parts.items() if part.startswith(("down.", "up.")))


def _norms(count: Count) -> int:
    return count.trained - _adapters(count)


def _rank(rank: int) -> tuple[tuple[str, int], ...]:
    return (("*.rank", rank),)


def _prefix(length: int) -> tuple[tuple[str, int], ...]:
    return (("*.length.*", length),)


def _length(length: int) -> tuple[tuple[str, int], ...]:
    return (("prompt.length", length),)


LORA, HOULSBY = "LoRA (2106.09685)", "Houlsby et al. (1902.00751)"
BITFIT, PREFIX, HE = "BitFit (2106.10199)", "Prefix-Tuning (2101.00190)", "He et al. (2110.04366)"
PROMPT, ADALORA, IA3 = "Prompt Tuning (2104.08691)", "AdaLoRA (2303.10512)", "IA3 (2205.05638)"
COMPACTER, DORA, VERA = "Compacter (2106.04647)", "DoRA (2402.09353)", "VeRA (2310.11454)"
DEEP = "P-Tuning v2 (2110.07602)"
HUB, PEFT = "AdapterHub 1.3.0, as it builds them", "PEFT 0.21.2, as it builds them"
SIX = ("attention", "ffn")
FFN = ("residual.ffn",)
CHECKPOINT = "the authors' own checkpoint of {} MB is that of the number counted, four bytes each"
QV = _one("lora")


def _lora() -> Iterator[Case]:
    """Of queries and values, but where it says more."""
    known = "queries and values, rank {}"
    for table, base, rank, printed, reason in (
        ("table 2", "RoBERTa-base", 8, "0.3M", ""),
        ("table 2", "RoBERTa-large", 8, "0.8M", ""),
        ("table 2", "DeBERTa-XXL", 16, "4.7M", ""),
        ("table 2", "DeBERTa-XXL", 8, "4.7M", "the authors' script for it has rank 16"),
        ("their README", "RoBERTa-base", 8, "0.8M", "with the head (592,130 more) it is 887,042; their paper has 0.3M"),
        ("table 3", "GPT-2 medium", 4, "0.35M", CHECKPOINT.format("1.5")),
        ("table 3", "GPT-2 large", 4, "0.77M", "737,280 by the paper's own formula, 2·r·(d + d)·layers"),
        ("table 4", "GPT-3's shape", 1, "4.7M", ""),
        ("table 4", "GPT-3's shape", 8, "37.7M", ""),
        ("table 15", "GPT-3's shape", 2, "9.4M", ""),
        ("table 15", "GPT-3's shape", 4, "18.9M", ""),
        ("table 15", "GPT-3's shape", 64, "301.9M", ""),
    ):
        yield Case(f"{LORA}, {table}", base, known.format(rank), QV, printed, reason, _rank(rank))
    four = _one("lora", where=("attention",))
    yield Case(f"{LORA}, table 4", "GPT-3's shape", "all four of attention, rank 4", four, "37.7M", "", _rank(4))
    for what, where, rank in (
        ("queries", "attention.query", 8),
        ("queries and keys", ("attention.query", "attention.key"), 4),
        ("all four of attention", "attention", 2),
    ):
        chosen = _one("lora", where=where)
        yield Case(f"{LORA}, table 5", "GPT-3's shape", f"{what}, rank {rank}", chosen, "18M", "", _rank(rank))


def _lora_kin() -> Iterator[Case]:
    """AdaLoRA, DoRA, VeRA and QLoRA, and the LoRA that their papers compare with."""
    six = "all six matrices of a layer, rank {}"
    for rank, printed in ((8, "1.33M"), (2, "0.33M")):
        plain = _one("lora", where=SIX)
        yield Case(f"{ADALORA}, table 1, its LoRA", "DeBERTaV3-base", six.format(rank), plain, printed, "", _rank(rank))
    for rank, printed, low, high in ((8, "1.27M", "0.88M", "1.55M"), (2, "0.32M", "0.22M", "0.39M")):
        reason = (
            f"the paper counts what survived of {72 * rank} triplets, of 1,536 numbers in attention's and 3,840 in the "
            f"others: {low} to {high}; here every matrix keeps {rank}"
        )
        what, even = f"{six.format(rank)} on the average", _one("adalora", rank=rank, target_rank=rank)
        yield Case(f"{ADALORA}, table 1", "DeBERTaV3-base", what, even, printed, reason)
    yield Case(PEFT, "DeBERTaV3-base", f"AdaLoRA of {six.format(12)}", _one("adalora"), "1,991,520")

    five = {"where": ("attention.query", "attention.key", "attention.value", "ffn.up", "ffn.down")}
    what = "queries, keys, values, up and down, rank {}"
    options: dict[str, Any]
    for base, lora, dora in (("LLaMA-7B", "0.83 %", "0.84 %"), ("LLaMA-13B", "0.67 %", "0.68 %")):
        for name, options, printed in ((", its LoRA", {}, lora), ("", {"dora": True}, dora)):
            surgery = _one("lora", **five, **options)
            yield Case(f"{DORA}, table 1{name}", base, what.format(32), surgery, printed, "", _rank(32))
    half = _one("lora", **five, dora=True)
    yield Case(f"{DORA}, table 1", "LLaMA-7B", what.format(16), half, "0.43 %", "", _rank(16))

    for table, base, rank, printed in (
        ("table 2", "RoBERTa-base", 1024, "0.043M"),
        ("table 2", "RoBERTa-large", 256, "0.061M"),
        ("table 3", "GPT-2 medium", 1024, "0.098M"),
        ("table 3", "GPT-2 large", 1024, "0.17M"),
    ):
        yield Case(f"{VERA}, {table}", base, f"queries and values, rank {rank}", _one("vera", rank=rank), printed)
    for rank, printed, more, both in (
        (1, "2.4M", 0, 0),
        (16, "2.8M", 393216, 2755584),
        (256, "8.7M", 6291456, 8699904),
    ):
        reason = f"{both:,} with the shared matrices, {more:,} numbers that nobody trains" if both else ""
        surgery = _one("vera", rank=rank, where=("attention.query", "attention.key"))
        yield Case(f"{VERA}, table 1", "GPT-3's shape", f"queries and keys, rank {rank}", surgery, printed, reason)
    seven = "all seven linears of a layer, rank {}"
    all_vera = {rank: _one("vera", rank=rank, where=SIX) for rank in (256, 1024)}
    yield Case(f"{VERA}, version 1, abstract", "LLaMA-7B", seven.format(256), all_vera[256], "1.4M")
    for base, lora, vera in (("LLaMA-7B", "159.9M", "1.6M"), ("LLaMA-13B", "250.3M", "2.4M")):
        yield Case(f"{VERA}, table 4", base, seven.format(1024), all_vera[1024], vera)
        source = f"{VERA}, table 4, the LoRA of QLoRA (2305.14314)"
        yield Case(source, base, seven.format(64), _one("qlora"), lora, "", _rank(64))


def _adapter() -> Iterator[Case]:
    houlsby, sizes = _one("adapter"), (("*.bottleneck", 64),)
    yield Case(
        f"{HOULSBY}, table 1",
        "BERT-large",
        "two adapters a layer, m 64, and every layer norm",
        houlsby,
        "2.1 %",
        "2.13 % of the 24 layers alone (302,309,376); with embeddings and pooler it is 1.93 %",
        sizes,
    )
    reason = "38,400 with the embeddings' norm, 36,864 without: rounded up"
    section = f"{HOULSBY}, section 3.4"
    yield Case(section, "BERT-base", "the layer norms among them", houlsby, "40k", reason, sizes, _norms)
    yield Case(section, "BERT-base", "two adapters a layer, m 64", houlsby, "2M", "", sizes, _adapters)
    parallel = _one("adapter", placement="parallel")
    yield Case(
        f"{HE}, table 3",
        "BART-large",
        "parallel adapter at the feed-forward, m 200",
        parallel,
        "2.4 %",
        sizes=(("*.bottleneck", 200),),
    )
    yield Case(
        f"{HE}, table 3, MAM",
        "BART-large",
        "prefix of length 30 and parallel adapter, m 512",
        _one("prefix") + parallel,
        "6.7 %",
        sizes=(*_prefix(30), ("*.bottleneck", 512)),
    )
    pfeiffer, both = _one("adapter", placement="pfeiffer"), _one("adapter", norms=False)
    for what, surgery, base, width, printed in (
        ("`seq_bn`, r 16", pfeiffer, "BERT-base", 48, "894,528"),
        ("`seq_bn`, r 16", pfeiffer, "BERT-large", 64, "3,171,840"),
        ("`double_seq_bn`, r 16", both, "BERT-base", 48, "1,789,056"),
        ("`double_seq_bn`, r 16", both, "BERT-large", 64, "6,343,680"),
        ("`par_bn`, r 2", parallel, "BERT-base", 384, "7,091,712"),
        ("`par_bn`, r 2", parallel, "BERT-large", 512, "25,202,688"),
    ):
        yield Case(HUB, base, what, surgery, printed, sizes=(("*.bottleneck", width),))
    mam = _one("prefix", length=30, hidden=800) + parallel
    yield Case(HUB, "BERT-large", "`mam`, in training", mam, "65,424,160", sizes=(("*.bottleneck", 512),))


def _fusion() -> Iterator[Case]:
    """Of any number of adapters: Q, K and V alone are trained."""
    for base, once, twice in (("BERT-base", "21,252,096", "42,504,192"), ("BERT-large", "75,546,624", "")):
        yield Case(HUB, base, "`AdapterFusion` of `seq_bn`", _one("fusion"), once)
        if twice:
            both = _one("fusion", where="residual")
            yield Case(HUB, base, "`AdapterFusion` of `double_seq_bn`", both, twice)


def _compacter() -> Iterator[Case]:
    plusplus = _one("compacter", bottleneck=24, where=FFN)
    abstract = f"{COMPACTER}, abstract"
    yield Case(abstract, "T5-base", "Compacter++, m 24, with the layer norms", plusplus, "0.047 %")
    with_norms = "m 24, with the layer norms"
    yield Case(f"{COMPACTER}, table 1", "T5-base", with_norms, _one("compacter", bottleneck=24), "0.073 %")
    both = ("residual.attention", "residual.ffn")
    for what, where, printed in (("two adapters a layer", both, "0.832 %"), ("one", FFN, "0.427 %")):
        adapter, sizes = _one("adapter", where=where), (("*.bottleneck", 24),)
        yield Case(f"{COMPACTER}, table 1", "T5-base", f"{what}, {with_norms}", adapter, printed, "", sizes)
    yield Case(f"{COMPACTER}, table 1", "T5-base", "prompt of length 100", _one("prompt"), "0.034 %", "", _length(100))
    for base, width, twice, once in (("BERT-base", 24, "57,088", "28,576"), ("BERT-large", 32, "152,128", "76,096")):
        alone: dict[str, Any] = {"bottleneck": width, "norms": False}
        yield Case(HUB, base, "`compacter`, r 32", _one("compacter", **alone), twice)
        yield Case(HUB, base, "`compacter++`, r 32", _one("compacter", **alone, where=FFN), once)


def _biases_and_scales() -> Iterator[Case]:
    yield Case(BITFIT, "BERT-base", "every bias but the classifier's", _one("bitfit"), "0.09 %")
    yield Case(BITFIT, "BERT-large", "every bias but the classifier's", _one("bitfit"), "0.08 %")
    small = _one("bitfit", where=("attention.query", "ffn.up"))
    yield Case(BITFIT, "BERT-base", "biases of queries and intermediate layers", small, "0.04 %")
    what = "keys, values, inner activations"
    yield Case(f"{IA3}, section 3.5", "T0-3B", what, _one("ia3"), "540K")
    reason = "4.3 MB: 1,081,344 numbers of four bytes"
    yield Case(f"{IA3}, table 1", "T0-11B", what, _one("ia3"), "4.2 MB", reason, of=lambda count: 4 * count.trained)
    yield Case(HUB, "BERT-base", "`ia3`", _one("ia3"), "55,296")
    yield Case(HUB, "BERT-large", "`ia3`", _one("ia3"), "147,456")


def _prefixes() -> Iterator[Case]:
    prefix, three = _one("prefix"), "length 200, encoder, decoder and cross-attention"
    yield Case(f"{PREFIX}, section 6", "GPT-2 medium", "length 5", prefix, "250K", "", _prefix(5))
    for base in ("GPT-2 medium", "GPT-2 large"):
        for length in (5, 10):
            yield Case(f"{PREFIX}, table 1", base, f"length {length}", prefix, "0.1 %", "", _prefix(length))
    reason = "3.6 %, as He et al. print for it; two of the three sites are 2.4 %"
    yield Case(f"{PREFIX}, table 2", "BART-large", three, prefix, "2 %", reason, _prefix(200))
    yield Case(f"{HE}, table 3", "BART-large", f"prefix of {three}", prefix, "3.6 %", "", _prefix(200))
    reason = "0.54 %, by the 3.6 % of table 3 at length 200 as well"
    yield Case(f"{HE}, table 4", "BART-large", "prefix of length 30", prefix, "0.1 %", reason, _prefix(30))
    for length in (20, 100, 128):
        deep = _one("p_tuning_v2")
        yield Case(f"{DEEP}, section 1", "RoBERTa-large", f"length {length}", deep, "0.1 % to 3 %", "", _prefix(length))
    deep = _one("p_tuning_v2", length=5, hidden=512) + _one("head", labels=9)
    what = "length 5, with its MLP of 512, and a head of 9 labels"
    yield Case(f"{DEEP}, their code", "BERT-base", what, deep, "9,860,105")
    for base, flat, mlp in (("BERT-base", "552,960", "9,872,384"), ("BERT-large", "1,474,560", "25,770,496")):
        yield Case(HUB, base, "`prefix_tuning[flat]`, length 30", prefix, flat, "", _prefix(30))
        reparametrised = _one("prefix", length=30, hidden=512)
        yield Case(HUB, base, "`prefix_tuning`, length 30, in training", reparametrised, mlp)


def _prompts() -> Iterator[Case]:
    widths = {"small": 512, "base": 768, "large": 1024, "XL": 2048, "XXL": 4096}
    misprints = {("small", 20): ("10,420", "two digits are swapped: 20·512 is 10,240")}
    for size, width in widths.items():
        for length in (1, 5, 20, 50, 100, 150):
            printed, reason = misprints.get((size, length), (f"{width * length:,}", ""))
            yield _prompt(size, length, printed, reason)
    embedded = "256 tokens before the text and 8 within it"
    yield Case(f"{LORA}, table 4, its PreEmbed", "GPT-3's shape", embedded, _one("prompt"), "3.2M", "", _length(264))
    for encoder, printed in (("lstm", "8,278,272"), ("mlp", "1,778,688")):
        what = f"P-Tuning, 9 tokens, {encoder.upper()} of the width of the embeddings, in training"
        yield Case(PEFT, "BERT-base", what, _one("p_tuning", template="[P]*9 {text}", encoder=encoder), printed)
    tied = "32,128·d fewer here, where T5's two embeddings are one"
    reason = f"a misprint of 0.01307 %, of a base of 783,150,080; {tied}"
    yield _prompt("large", 100, "0.01907 %", reason, ", as a share")
    reason = f"a misprint of 11,135,537,152; {tied}"
    yield _prompt("XXL", 50, "11,137,380,352", reason, " and the base", of=lambda count: count.trained + count.base)


def _prompt(size: str, length: int, printed: str, reason: str, more: str = "", **other: Any) -> Case:
    sizes, what = _length(length), f"length {length}{more}"
    return Case(f"{PROMPT}, table 4", f"T5.1.1-{size}", what, _one("prompt"), printed, reason, sizes, **other)


CASES = (
    *_lora(),
    *_lora_kin(),
    *_adapter(),
    *_fusion(),
    *_compacter(),
    *_biases_and_scales(),
    *_prefixes(),
    *_prompts(),
)
