"""What makes a build a folder of onnxruntime-genai as well: its configuration file.

It reads the build's `model.onnx`, cache and tokenizer as they are, and `og.Adapters` the task files. It passes a task's
tensors at every token, so a task that acts where a text begins alone cannot be carried there.
"""

from __future__ import annotations

from typing import Any

from surgeon.cached import PARTS, PAST, PRESENT
from surgeon.exporters.shared import starts
from surgeon.program import Program

GENAI = "genai_config.json"
UNBOUNDED = 2**20
"""Context where the base has no last position: a search's own length limits it then."""


def not_carried(program: Program, ends: list[int]) -> str | None:
    """Why onnxruntime-genai cannot run a decoder, if it cannot."""
    technique = next((d.technique for d in program.ledger.deltas.values() if d.once), None)
    if technique is None and program.shares_cache and (begun := starts(program)):
        technique = program.ledger.deltas[next(iter(begun.values()))].technique  # its cache begins empty
    if technique is not None:
        return f"onnxruntime-genai does not carry '{technique}'"
    return None if ends else "onnxruntime-genai needs a token that ends a text, and this base names none"


def genai_config(program: Program, ends: list[int], vocabulary: int) -> dict[str, Any]:
    """The configuration of a decoder that writes from a cache."""
    past = [i for i in program.inputs if i.cached]
    config: Any = program.config
    context = program.max_length or UNBOUNDED
    heads, width = past[0].axes[1], past[0].axes[3]
    pad = getattr(config, "pad_token_id", None)
    names = {which: {f"{which}_{part}_names": f"{which}_{part}_%d" for part in PARTS} for which in (PAST, PRESENT)}
    decoder = {
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": next(e.width for e in program.anatomy.embeddings if e.role == "embedding.token"),
        "num_attention_heads": program.anatomy.attentions[0].heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": len(past) // len(PARTS),
        "session_options": {"log_id": "surgeon", "provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names[PAST]},
        "outputs": {"logits": "logits", **names[PRESENT]},
    }
    shares = program.shares_cache
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": getattr(config, "bos_token_id", None) or 0,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": ends[0] if pad is None else pad,
            "context_length": context,
            "vocab_size": vocabulary,
            "decoder": decoder,
        },
        "search": {"max_length": context, "past_present_share_buffer": shares, "do_sample": False, "num_beams": 1},
    }
