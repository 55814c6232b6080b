"""PEFT's folder of what is inserted whole: virtual tokens, prefixes, and VeRA's vectors with their matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.errors import DeltaError
from surgeon.foreign.meaning import steps
from surgeon.foreign.sites import width_of
from surgeon.passes.columns import biased

if TYPE_CHECKING:
    from surgeon.foreign.peft_writer import Writer

Written = tuple[dict[str, Any], dict[str, Tensor]]
"""Configuration and tensors."""


def prefix(task: Writer, technique: str) -> Written:
    """The deployed keys and values, of all layers in one row a token."""
    program = task.compiled.program
    anatomy = program.anatomy
    if len(anatomy.layers) != 1 or task.compiled.base.head not in ("causal-lm", "feature-extraction"):
        raise DeltaError("PEFT runs a prefix under decoders and bare encoders only", there_is=[*anatomy.layers])
    if not all(step.shift for step in steps(task.compiled, technique)):
        raise DeltaError("PEFT moves the text's positions up by the prefix, and this build does not")
    counted = all(step.distances == "before" for step in steps(task.compiled, technique))
    if not counted and biased(program, anatomy.attentions):
        raise DeltaError("the base adds a bias by distance to its scores, and under PEFT the prefix has one as well")
    (layers,) = anatomy.layers.values()
    slots = []
    for layer in range(layers):
        for part in (f"{technique}.key", f"{technique}.value"):
            own = [d for d in task.ledger.deltas.values() if d.part == part and d.layer == layer]
            if not own:
                raise DeltaError(f"PEFT has a prefix in every layer, and layer {layer} has none here")
            slots.append(task.deployed[own[0].name])
    if len({slot.shape for slot in slots}) > 1:
        raise DeltaError("PEFT's prefix has keys and values of one size in all layers")
    heads, length, width = slots[0].shape
    rows = torch.stack(slots).permute(2, 0, 1, 3).reshape(length, -1)
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 1,
    }, {"prompt_embeddings": rows}


def prompt(task: Writer) -> Written:
    """The rows in front of the text."""
    rows = _rows(task, "prompt", "prompt")
    if rows.dim() != 2:
        raise DeltaError("PEFT has one prompt a task, and this build's are ensembles")
    return {"peft_type": "PROMPT_TUNING", **_tokens(task, rows)}, {"prompt_embeddings": rows}


def p_tuning(task: Writer) -> Written:
    """The rows that the encoder gives, with those of the template's words, where all stand before the text."""
    rows = _rows(task, "p_tuning", "front")
    back = [d for d in task.ledger.deltas.values() if d.technique == "p_tuning" and d.part.endswith("back")]
    if any(not task.is_default(delta) for delta in back):
        raise DeltaError("PEFT's virtual tokens stand before the text, and this template has some behind it")
    (step,) = steps(task.compiled, "p_tuning")
    encoder = {
        "encoder_reparameterization_type": "MLP" if step.encoder == "mlp" else "LSTM",
        "encoder_hidden_size": step.hidden or rows.shape[1],
    }
    return {"peft_type": "P_TUNING", **encoder, **_tokens(task, rows)}, {"prompt_embeddings": rows}


def _rows(task: Writer, technique: str, part: str) -> Tensor:
    if any(step.place != "front" for step in steps(task.compiled, technique)):
        raise DeltaError("PEFT's virtual tokens stand before the text, and this build's after its first token")
    own = [d for d in task.ledger.deltas.values() if d.technique == technique and d.part.rpartition(".")[2] == part]
    return task.deployed[own[0].name]


def _tokens(task: Writer, rows: Tensor) -> dict[str, Any]:
    layers = sum(task.compiled.program.anatomy.layers.values())
    size = {"num_virtual_tokens": len(rows), "token_dim": rows.shape[1]}
    return {**size, "num_layers": layers, "num_attention_heads": 1, "num_transformer_submodules": 1}


def vera(task: Writer) -> Written:
    """Every module with vectors, used or not: the largest of them decides how large the shared matrices are."""
    made = steps(task.compiled, "vera")
    if len(made) > 1:
        raise DeltaError("PEFT's VeRA has one pair of matrices, and this build has one for each `vera` item")
    a, b = made[0].matrices(task.compiled.program)
    tensors = {"base_model.vera_A": a.T, "base_model.vera_B": b.T}
    for path, found in task.by_path("vera_lambda_b", every=True).items():
        pairs = [(site, task.trained[f"{d.name[:-1]}d"], task.trained[d.name]) for site, d in found]
        used = [pair for pair in pairs if pair[2].any()] or pairs
        first, between, behind = used[0]
        if any(not other.equal(between) for _, other, _ in used):
            raise DeltaError(
                f"PEFT's VeRA has one vector between the matrices for all of {path}, and this task several"
            )
        if first.features is not None:
            whole = torch.zeros(width_of(task.model, first), dtype=behind.dtype)
            for site, _, out in pairs:
                whole[list(site.features or ())] = out
            behind = whole
        tensors |= {f"{path}.vera_lambda_d": between, f"{path}.vera_lambda_b": behind}
    paths = sorted(key.removesuffix(".vera_lambda_b") for key in tensors if key.endswith(".vera_lambda_b"))
    return {
        "peft_type": "VERA",
        "r": made[0].rank,
        "projection_prng_key": made[0].projection_key,
        "save_projection": True,
        "d_initial": made[0].d_initial,
        "target_modules": paths,
        "fan_in_fan_out": any(type(task.model.get_submodule(path)).__name__ == "Conv1D" for path in paths),
    }, tensors
