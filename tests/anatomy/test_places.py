"""Norms, heads, tables, joins and layers stand where the architecture puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.anatomy.report import spans

PLACES = {
    ("bert", "classes"): {"embedding": 1, "post": 4},
    ("bert", "masked"): {"embedding": 1, "post": 4, "head": 1},
    ("albert", "classes"): {"embedding": 1, "post": 4},
    ("deberta-v2", "classes"): {"embedding": 2, "post": 4},
    ("modernbert", "classes"): {"embedding": 1, "pre": 3, "final": 1, "head": 1},
    ("gpt2", "causal"): {"pre": 4, "final": 1},
    ("gptj", "causal"): {"pre": 2, "final": 1},
    ("gpt_neox", "causal"): {"pre": 4, "final": 1},
    ("opt", "causal"): {"pre": 4, "final": 1},
    ("llama", "causal"): {"pre": 4, "final": 1},
    ("qwen3", "causal"): {"pre": 4, "qk": 4, "final": 1},
    ("gemma2", "causal"): {"pre": 4, "branch-end": 4, "final": 1},
    ("t5", "seq2seq"): {"pre": 7, "final": 2},
    ("bart", "seq2seq"): {"embedding": 2, "post": 7},
}


@pytest.mark.parametrize(("kind", "head"), PLACES, ids=["-".join(case) for case in PLACES])
def test_norms_stand_where_the_architecture_puts_them(kind: str, head: str, read: Any) -> None:
    reading = read(kind, head)
    norms = reading.anatomy.norms
    places = [n.place for n in norms]
    assert {place: places.count(place) for place in places} == PLACES[kind, head]
    assert all(n.role == f"norm.{n.place}" and n.weight is not None for n in norms)
    named = {name for name, _ in reading.model.named_parameters() if "norm" in name.lower() or ".ln_" in name}
    assert {p for n in norms for p in (n.weight, n.bias) if p} == named
    posts = {j.post_norm for j in reading.anatomy.joins} - {None}
    assert posts == {n for n in norms if n.place == "post"}


@pytest.mark.parametrize(
    ("kind", "head", "wanted"),
    [
        ("bert", "classes", {"head.dense": "bert.pooler.dense", "head.out": "classifier"}),
        ("bert", "tokens", {"head.out": "classifier"}),
        ("bert", "none", {"head.dense": "pooler.dense"}),
        (
            "bert",
            "masked",
            {"head.dense": "cls.predictions.transform.dense", "head.out": "bert.embeddings.word_embeddings"},
        ),
        ("distilbert", "classes", {"head.dense": "pre_classifier", "head.out": "classifier"}),
        ("llama", "classes", {"head.out": "score"}),
        ("llama", "causal", {"head.out": "lm_head"}),
        ("gpt2", "causal", {"head.out": "transformer.wte"}),
        ("electra", "classes", {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}),
    ],
)
def test_the_head_is_found(kind: str, head: str, wanted: dict[str, str], read: Any) -> None:
    anatomy = read(kind, head).anatomy
    assert {p.role: p.path for p in anatomy.projections if p.role.startswith("head")} == wanted


@pytest.mark.parametrize(
    ("kind", "head", "wanted"),
    [
        ("bert", "classes", ["token", "type", "position"]),
        ("roberta", "classes", ["token", "type", "position"]),
        ("gpt2", "causal", ["token", "position"]),
        ("opt", "causal", ["token", "position"]),
        ("llama", "causal", ["token"]),
        ("mpnet", "classes", ["token", "position", "relative"]),
        ("t5", "seq2seq", ["token", "relative", "token", "relative"]),
        ("bart", "seq2seq", ["token", "position", "token", "position"]),
    ],
)
def test_tables_are_told_apart_by_what_indexes_them(kind: str, head: str, wanted: list[str], read: Any) -> None:
    embeddings = read(kind, head).anatomy.embeddings
    assert [e.role for e in embeddings] == [f"embedding.{role}" for role in wanted]
    half = len(embeddings) // 2
    stacks = ["encoder"] * half + ["decoder"] * half
    assert [e.stack for e in embeddings] == (stacks if kind in {"t5", "bart"} else [embeddings[0].stack] * len(wanted))


def test_a_sublayer_starts_at_its_norm_or_at_the_stream(read: Any) -> None:
    pre = read("llama", "causal").anatomy
    assert [j.entry for j in pre.joins] == [n.output for n in pre.norms if n.place == "pre"]
    post = read("bert", "classes").anatomy
    assert all(j.entry is j.skip for j in post.joins)


def test_a_parallel_block_joins_its_branches_to_one_skip(read: Any) -> None:
    for kind in ("gptj", "gpt_neox", "falcon"):
        first = [j for j in read(kind, "causal").anatomy.joins if j.layer == 0]
        assert len({j.skip for j in first}) == 1
        assert len({j.branch for j in first}) == 2


def test_relative_positions_are_projected_by_the_same_weights_as_data(read: Any) -> None:
    anatomy = read("deberta-v2", "classes").anatomy
    for side in ("query", "key"):
        on_data = [p.weight for p in anatomy.projections if p.role == f"attention.{side}"]
        on_positions = [p.weight for p in anatomy.projections if p.role == f"attention.{side}.position"]
        assert on_data == on_positions


def test_layers_that_share_weights_are_numbered_by_their_calls(read: Any) -> None:
    anatomy = read("albert", "classes", num_hidden_layers=4, num_hidden_groups=2).anatomy
    assert anatomy.layers == {"encoder": 4}
    queries = [p for p in anatomy.projections if p.role == "attention.query"]
    assert [p.layer for p in queries] == [0, 1, 2, 3]
    assert [p.weight for p in queries][::2] == sorted({p.weight for p in queries})


def test_low_rank_attention_and_shared_experts_are_read(read: Any) -> None:
    anatomy = read("deepseek_v3", "causal").anatomy
    found = {
        (p.role, p.path.rpartition(".")[2]): p.features and spans(p.features)
        for p in anatomy.projections
        if p.layer == 1
    }
    assert found["attention.key", "kv_a_proj_with_mqa"] == "20:24"
    assert found["attention.key", "kv_b_proj"] == "0:8, 16:24, … (4 runs)"
    assert found["attention.value", "kv_b_proj"] == "8:16, 24:32, … (4 runs)"
    assert ("moe.down", "experts") in found
    assert ("ffn.down", "down_proj") in found
    assert [j.role for j in anatomy.joins if j.layer == 1] == ["residual.attention", "residual.ffn"]


def test_a_base_without_numbers_is_read_the_same(read: Any) -> None:
    with torch.device("meta"):
        bare = read("roberta", "classes", num_hidden_layers=1).anatomy
    full = read("roberta", "classes").anatomy
    once = {(s.role, s.path) for s in full.sites() if s.layer != 1}
    assert {(s.role, s.path) for s in bare.sites()} == once
