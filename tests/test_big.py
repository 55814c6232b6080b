"""Models too large for this machine, on the meta device: planned and counted in a minute, without weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-70b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_interleave": True,
    },
}  # fmt: skip
"""As their publishers give them."""
WHERE = {"llama-3-70b": ["attention.query", "attention.value"], "deepseek-v3": ["attention"]}
RANK = 16
COUNTER = """
import resource, subprocess, sys
command = [sys.executable, "-m", "surgeon", "plan", sys.argv[1], "--json"]
done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr)
sys.stdout.buffer.write(done.stdout)
"""


def plan(folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], int]:
    """The plan of LoRA on a model, and the peak memory of making it, in MiB."""
    spec = {
        "base": {"config": {**CONFIGS[name], **changes}, "head": "causal-lm", "dtype": "bfloat16"},
        "surgery": [{"lora": {"rank": RANK, "where": WHERE[name]}}],
        "tasks": {"a": {}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", COUNTER, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), int(done.stderr.strip().splitlines()[-1])


def llama_ranks(layers: int) -> int:
    """r · (in + out) of q and of v, counted by hand."""
    return layers * RANK * ((8192 + 8192) + (8192 + 1024))


def test_a_slice_of_llama_3_70b_is_planned_without_weights(tmp_path: Path) -> None:
    found, megabytes = plan(tmp_path, "llama-3-70b", num_hidden_layers=2)
    assert found["parameters"] == llama_ranks(2)
    assert found["base_parameters"] > 3.5e9
    assert megabytes < 1024


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "parameters"), [("llama-3-70b", 70_553_706_496), ("deepseek-v3", 671_026_404_352)])
def test_a_model_of_70b_and_more_is_planned_in_2_gib(tmp_path: Path, name: str, parameters: int) -> None:
    began = time.perf_counter()
    found, megabytes = plan(tmp_path, name)
    print(f"{name}: {found['parameters']:,} trained, {found['bytes']:,} bytes a task", end="; ")
    print(f"{time.perf_counter() - began:.0f} s, {megabytes} MiB")
    assert found["base_parameters"] == parameters
    assert found["bytes"] == 2 * found["parameters"]
    assert name != "llama-3-70b" or found["parameters"] == llama_ranks(80)
    assert megabytes < 2048
