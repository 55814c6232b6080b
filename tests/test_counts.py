"""The papers' own numbers: what agrees does, rounded as printed; what does not says why."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from surgeon.counts import CASES, count_rows
from surgeon.counts.bases import BASES
from surgeon.counts.counting import agreement, counted, row

EXACT = {
    "RoBERTa-base, queries and values, rank 8": 294_912,
    "RoBERTa-large, queries and values, rank 8": 786_432,
    "GPT-2 medium, queries and values, rank 4": 393_216,
    "GPT-3's shape, queries and values, rank 8": 37_748_736,
    "DeBERTaV3-base, all six matrices of a layer, rank 8": 1_327_104,
    "BERT-large, two adapters a layer, m 64, and every layer norm": 6_444_032,  # 2,048 of them the embeddings' norm
    "BERT-base, two adapters a layer, m 64": 2_379_264,
    "BERT-base, the layer norms among them": 38_400,
    "BERT-base, every bias but the classifier's": 102_912,
    "BERT-large, every bias but the classifier's": 272_384,
    "BERT-base, biases of queries and intermediate layers": 46_080,
    "BERT-base, `AdapterFusion` of `seq_bn`": 21_252_096,
    "BERT-base, length 5, with its MLP of 512, and a head of 9 labels": 9_860_105,
    "GPT-2 medium, length 5": 245_760,
    "BART-large, prefix of length 200, encoder, decoder and cross-attention": 14_745_600,
    "BART-large, parallel adapter at the feed-forward, m 200": 9_859_776,
    "BART-large, prefix of length 30 and parallel adapter, m 512": 27_414_528,
    "RoBERTa-large, length 20": 983_040,
    "T0-3B, keys, values, inner activations": 540_672,
    "T5-base, m 24, with the layer norms": 161_728,
    "T5.1.1-small, length 20": 10_240,
}


def test_a_number_agrees_rounded_or_cut_in_the_papers_unit() -> None:
    for printed, count in (("0.3M", 294_912), ("250K", 245_760), ("40k", 40_400), ("4.2 MB", 4_200_000), ("512", 512)):
        assert agreement(printed, count, 0.0), printed
    assert agreement("0.1 % to 3 %", 1, 0.028)
    assert agreement("2.1 %", 1, 0.0213)
    for printed, count in (("0.35M", 393_216), ("40k", 38_400), ("4.2 MB", 4_325_376), ("10,420", 10_240)):
        assert not agreement(printed, count, 0.0), printed
    assert not agreement("2.1 %", 1, 0.0193)


def test_numbers_of_a_small_base_are_its_papers() -> None:
    wanted = {name: number for name, number in EXACT.items() if name.startswith("BERT-base")}
    cases = [case for case in CASES if f"{case.base}, {case.configuration}" in wanted]
    rows = [row(case) for case in cases]
    assert [found for found in rows if not found.reproduces] == []
    assert {found.configuration: found.counted for found in rows} == wanted


def test_a_base_counted_on_two_layers_is_the_whole_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "BERT-base", replace(BASES["BERT-base"], depth=3))
    case = next(case for case in CASES if case.base == "BERT-base" and case.techniques == ("adapter",))
    whole, extended = counted(case, whole=True), counted(case)
    assert (whole.trained, whole.base) == (extended.trained, extended.base)


def test_every_case_names_a_base_and_its_own_place() -> None:
    assert {case.base for case in CASES} == set(BASES)
    places = [(case.paper, case.base, case.configuration) for case in CASES]
    assert len(places) == len(set(places))


@pytest.mark.sweep
def test_every_configuration_counts_as_its_paper_prints() -> None:
    rows = list(count_rows())
    assert [found for found in rows if not found.reproduces] == []
    numbers = {found.configuration: found.counted for found in rows}
    assert {name: numbers[name] for name in EXACT} == EXACT


@pytest.mark.sweep
@pytest.mark.parametrize("base", [base for base in BASES if "T5" not in base and "T0" not in base])
def test_all_layers_of_a_model_count_as_their_second(base: str) -> None:
    """A case for each technique that is counted on the base."""
    for case in {case.techniques: case for case in CASES if case.base == base}.values():
        whole, extended = counted(case, whole=True), counted(case)
        assert (whole.trained, whole.base) == (extended.trained, extended.base), case


def test_peft_builds_as_many() -> None:
    """The numbers of the rows that name PEFT."""
    from peft import AdaLoraConfig, PromptEncoder, PromptEncoderConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    found = []
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of what transformers will drop
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(**BASES["DeBERTaV3-base"].spec(12)["config"])
        )
        layers = r"deberta\.encoder\.layer\.\d+\..*(query_proj|key_proj|value_proj|dense)"
        pruned = get_peft_model(model, AdaLoraConfig(init_r=12, target_modules=layers, total_step=100))
        found.append(sum(p.numel() for p in pruned.parameters() if p.requires_grad))
        sizes = {"num_virtual_tokens": 9, "token_dim": 768, "num_transformer_submodules": 1}
        for kind, width in (("LSTM", 384), ("MLP", 768)):
            config = PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=width, **sizes)
            found.append(sum(p.numel() for p in PromptEncoder(config).parameters()))
    assert [f"{number:,}" for number in found] == [case.printed for case in CASES if case.paper.startswith("PEFT")]
