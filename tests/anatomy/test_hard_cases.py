"""What makes an architecture hard, case by case: the structure itself is looked at."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from surgeon.anatomy import Anatomy, Attention, Projection, find, select
from surgeon.anatomy.report import spans
from surgeon.inputs import text_inputs
from surgeon.trace import trace

FULL = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
FULL |= {"intermediate_size": 48, "max_position_embeddings": 40}
GROUPED = FULL | {"num_key_value_heads": 2, "head_dim": 8}
CODE = {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 48}
CAUSAL, BARE = "AutoModelForCausalLM", "AutoModel"
CLASSES = "AutoModelForSequenceClassification"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": (BARE, FULL | {"embedding_size": 16}),
    "phi": (CAUSAL, FULL),
    "cohere": (CAUSAL, GROUPED),
    "gemma3_text": (CAUSAL, GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_bigcode": (CAUSAL, CODE | {"multi_query": True, "pad_token_id": 0}),
    "codegen": (CAUSAL, CODE | {"n_ctx": 40, "rotary_dim": 4, "n_head": 8, "pad_token_id": 0}),
    "bloom": (CAUSAL, {"vocab_size": 131, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "mpt": (CAUSAL, {"vocab_size": 131, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}),
    "mistral": (CAUSAL, GROUPED | {"sliding_window": 4}),
    "xlnet": (BARE, {"vocab_size": 131, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "esm": (
        BARE,
        FULL
        | {
            "pad_token_id": 1,
            "mask_token_id": 5,
            "token_dropout": True,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "position_embedding_type": "rotary",
        },
    ),
    "granitemoehybrid": (
        CAUSAL,
        GROUPED
        | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 40},
    ),
    "granite_tied": (CAUSAL, GROUPED | {"tie_word_embeddings": True}),
}


@cache
def base(kind: str) -> tuple[Any, fx.GraphModule, Anatomy]:
    """A tiny random model, its trace and its anatomy."""
    auto, sizes = CONFIGS[kind]
    config = transformers.AutoConfig.for_model(kind.partition("_tied")[0], **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config).eval()
    graph_module = trace(model)
    return model, graph_module, find(graph_module)


def anatomy_of(kind: str) -> Anatomy:
    return base(kind)[2]


def of_layer(anatomy: Anatomy, layer: int) -> dict[str, list[str]]:
    """Module names of a layer's projections by role."""
    found: dict[str, list[str]] = {}
    for p in anatomy.projections:
        if p.layer == layer:
            found.setdefault(p.role, []).append(p.path.rpartition(".")[2])
    return found


def places(anatomy: Anatomy, layer: int) -> Counter[str]:
    return Counter(n.place for n in anatomy.norms if n.layer == layer)


def answers(kind: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trace and the model themselves say to a text whose first row ends early."""
    model, graph_module, _ = base(kind)
    ids = torch.randint(6, 131, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    ids[0, length // 2 + 1 :] = model.config.pad_token_id or 0
    fed = {"input_ids": ids, "attention_mask": mask}
    given = {i.name: fed.get(i.name, torch.zeros_like(ids)) for i in text_inputs(model)}
    with torch.no_grad():
        found, wanted = graph_module(**given), model(**given)
    key = "logits" if "logits" in wanted else "last_hidden_state"
    return found[key], wanted[key]


def test_one_weight_serves_every_layer_of_albert() -> None:
    anatomy = anatomy_of("albert")
    assert anatomy.layers == {"encoder": 2}
    for role in ("attention.query", "attention.output", "ffn.up", "ffn.down"):
        sites = select(anatomy, role, Projection)
        assert [s.layer for s in sites] == [0, 1]
        assert len({s.weight for s in sites}) == 1
        assert len({s.node for s in sites}) == 2
        assert select(anatomy, f"{role}@1", Projection) == (sites[1],)


@pytest.mark.parametrize("kind", ["phi", "cohere"])
def test_parallel_blocks_share_skip_norm_and_layer(kind: str) -> None:
    anatomy = anatomy_of(kind)
    for layer in range(2):
        attention, ffn = (j for j in anatomy.joins if j.layer == layer)
        assert (attention.role, ffn.role) == ("residual.attention", "residual.ffn")
        assert attention.skip is ffn.skip
        assert attention.entry is ffn.entry
        assert attention.branch is not ffn.branch
        assert places(anatomy, layer)["pre"] == 1


def test_norms_enclose_the_sublayers_of_gemma_3_and_stand_on_queries_and_keys() -> None:
    anatomy = anatomy_of("gemma3_text")
    for layer in range(2):
        assert places(anatomy, layer) == {"pre": 2, "branch-end": 2, "qk": 2}
        for join in (j for j in anatomy.joins if j.layer == layer):
            assert join.branch in {n.output for n in anatomy.norms if n.place == "branch-end"}
    assert {n.output.meta["val"].shape[-1] for n in anatomy.norms if n.place == "qk"} == {8}


def test_a_fused_projection_may_hold_values_before_keys() -> None:
    """CodeGen: in each of four groups of heads the queries, then the values, then the keys."""
    found = {p.role: spans(p.features or ()) for p in anatomy_of("codegen").projections if p.layer == 0 and p.features}
    assert found["attention.query"].startswith("0:8, 24:32")
    assert found["attention.value"].startswith("8:16, 32:40")
    assert found["attention.key"].startswith("16:24, 40:48")


def test_all_heads_may_share_one_key_and_value() -> None:
    anatomy = anatomy_of("gpt_bigcode")
    assert {(a.heads, a.kv_heads, a.head_dim) for a in anatomy.attentions} == {(4, 1, 8)}
    found = {p.role: spans(p.features or ()) for p in anatomy.projections if p.layer == 0 and p.features}
    assert found == {"attention.query": "0:32", "attention.key": "32:40", "attention.value": "40:48"}


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_a_bias_by_distance_is_no_part_of_the_operands(kind: str) -> None:
    model, _, anatomy = base(kind)
    assert anatomy.layers == {"decoder": 2}
    assert {e.role for e in anatomy.embeddings} == {"embedding.token"}
    for core in anatomy.attentions:
        assert (core.heads, core.head_dim) == (4, 8)
        sides = [
            p for p in anatomy.projections if p.layer == core.layer and p.role in {"attention.query", "attention.key"}
        ]
        assert len({p.node for p in sides}) == 1
        assert {len(p.features or ()) for p in sides} == {model.config.hidden_size}
    found, wanted = answers(kind, 2, 11)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_sliding_window_is_a_mask_and_moves_with_the_text(kind: str) -> None:
    anatomy = anatomy_of(kind)
    assert anatomy.layers == {"decoder": 2}
    assert all(not a.cross and (a.heads, a.kv_heads) == (4, 2) for a in anatomy.attentions)
    for length in (3, 4, 5, 13):  # shorter than the window, and longer
        torch.testing.assert_close(*answers(kind, 2, length))


def test_weights_of_three_axes_are_told_and_are_no_sites() -> None:
    """XLNet: queries, keys, values and outputs are einsums with these; the attention itself is one as any other."""
    anatomy = anatomy_of("xlnet")
    assert [(j.layer, j.role) for j in anatomy.joins] == [
        (layer, role) for layer in range(2) for role in ("residual.attention", "residual.ffn")
    ]
    assert [(a.layer, a.heads, a.kv_heads) for a in anatomy.attentions] == [(0, 4, 4), (1, 4, 4)]
    assert [(p.layer, p.role) for p in anatomy.projections] == [
        (layer, role) for layer in range(2) for role in ("ffn.up", "ffn.down")
    ]
    assert any("weights used by aten.einsum.default are no sites" in note for note in anatomy.notes)


def test_a_mask_and_a_scale_may_be_computed_from_the_words_themselves() -> None:
    """ESM: embeddings are scaled by how many words of a text are masked."""
    model, graph_module, anatomy = base("esm")
    assert anatomy.layers == {"encoder": 2}
    words = next(e for e in anatomy.embeddings if e.role == "embedding.token")
    assert words.index.op == "placeholder"
    ids = torch.randint(6, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 2:4] = 5
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = graph_module(input_ids=ids, attention_mask=mask)["last_hidden_state"]
        torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_of_a_hybrid_only_attention_and_experts_are_touched_and_the_rest_is_listed() -> None:
    anatomy = anatomy_of("granitemoehybrid")
    first, second = of_layer(anatomy, 0), of_layer(anatomy, 1)
    assert {role for role in first if role.startswith("attention")} == set()
    assert first["mixer"] == ["in_proj", "out_proj"]
    assert {"attention.query", "attention.key", "attention.value", "attention.output"} <= set(second)
    assert "mixer" not in second
    assert [a.layer for a in select(anatomy, "attention", Attention)] == [1]
    assert [(j.layer, j.role) for j in anatomy.joins] == [
        (0, "residual.mixer"),
        (0, "residual.ffn"),
        (1, "residual.attention"),
        (1, "residual.ffn"),
    ]
