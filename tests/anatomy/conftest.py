"""Tiny bases in which no two sizes are equal by accident, traced and read once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from surgeon.anatomy import Anatomy, find
from surgeon.trace import trace

FULL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GROUPED = FULL | {"num_key_value_heads": 2}
GPT = {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 48}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
DISENTANGLED |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
DISENTANGLED |= {"type_vocab_size": 0, "max_relative_positions": -1}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": FULL,
    "roberta": FULL | {"pad_token_id": 1},
    "xlm-roberta": FULL | {"pad_token_id": 1},
    "distilbert": {"vocab_size": 131, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "albert": FULL | {"embedding_size": 16},
    "electra": FULL | {"embedding_size": 16},
    "mpnet": FULL | {"pad_token_id": 1},
    "deberta-v2": FULL | DISENTANGLED,
    "modernbert": FULL
    | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"global_attn_every_n_layers": 2, "local_attention": 8},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neox": FULL,
    "opt": {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    | {"max_position_embeddings": 40, "word_embed_proj_dim": 32},
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": GROUPED | {"bos_token_id": 1, "eos_token_id": 2},
    "falcon": {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True, "bias": False, "pad_token_id": 0},
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": FULL
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    | {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 20}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "t5": {"vocab_size": 131, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1}
    | {"num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"vocab_size": 131, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48}
    | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 1}
    | {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    | {"max_position_embeddings": 40},
}
HEADS = {
    "classes": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "none": "AutoModel",
}


@dataclass(frozen=True)
class Reading:
    """A model, its trace and its anatomy."""

    model: transformers.PreTrainedModel
    graph_module: fx.GraphModule
    anatomy: Anatomy


@cache
def _read(kind: str, head: str, changes: tuple[tuple[str, Any], ...]) -> Reading:
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind] | dict(changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, HEADS[head]).from_config(config)
    graph_module = trace(model)
    return Reading(model, graph_module, find(graph_module))


@pytest.fixture(scope="session")
def read() -> Callable[..., Reading]:
    """`read("bert", "masked", num_hidden_layers=3)`: a tiny random base, read."""
    return lambda kind, head, **changes: _read(kind, head, tuple(changes.items()))
