"""Reads a folder that PEFT's `save_pretrained` wrote: `adapter_config.json` beside `adapter_model.safetensors`.

The keys are PEFT 0.21's (`base_model.model.<module path>.lora_A.weight`). What PEFT does in silence is an error here:
a key that the configuration does not call for, a tensor that it does, a scale that cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.errors import DeltaError, shorten
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.peft_products import adalora, ia3, lora, vera
from surgeon.foreign.peft_prompts import prefix, prompt
from surgeon.foreign.peft_saved import saved_whole
from surgeon.foreign.pieces import Checkpoint, Piece
from surgeon.spec import HeadName

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
HEADS: dict[str, HeadName] = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "FEATURE_EXTRACTION": "feature-extraction",
}

Tensors = dict[str, Tensor]
READERS: Mapping[str, Callable[[Options, Tensors, str], tuple[list[Piece], Any]]] = {
    "LORA": lora,
    "ADALORA": adalora,
    "IA3": ia3,
    "VERA": vera,
    "PREFIX_TUNING": prefix,
    "PROMPT_TUNING": prompt,
    "P_TUNING": prompt,
}
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def reads(folder: Path) -> bool:
    """Whether this is a PEFT folder."""
    path = folder / CONFIG
    return path.is_file() and "model_class" not in read_config(path)


def read(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in `folder`. Raises DeltaError unless all of it is understood."""
    where = str(folder)
    options = Options(read_config(folder / CONFIG), str(folder / CONFIG))
    method = options.need("peft_type", str)
    if method not in READERS:
        raise DeltaError(
            f"'{method}' is a method that cannot be read",
            where=options.where,
            there_is=READERS,
            try_="where PEFT can merge it: `merge_and_unload()` and `save_pretrained` make a base that needs no task",
        )
    tensors, fingerprint = read_tensors(folder, WEIGHTS, allow_pickle=allow_pickle)
    options.ignore("peft_version", "inference_mode", "runtime_config")
    mapping = Options(options.get("auto_mapping", dict, {}), options.where)
    task = options.get("task_type", str)
    revision, base = options.get("revision", str), options.get("base_model_name_or_path", str)
    left = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items()}
    if method not in PROMPTS:
        left = {key.removeprefix("model."): tensor for key, tensor in left.items()}
    if len(left) < len(tensors):
        raise DeltaError("two tensors have one name once PEFT's prefix is gone", where=where)
    pieces, targets = READERS[method](options, left, where)
    pieces += saved_whole(options, left, targets, task, where)
    options.finish(method)
    if left:
        raise DeltaError(
            f"{len(left)} of {len(tensors)} tensors are none that the configuration calls for: {shorten(left)}",
            where=where,
            there_is=f"peft_type {method}",
            try_="the adapter_config.json that was saved with these weights",
        )
    return Checkpoint(
        where=where,
        method=method,
        pieces=tuple(pieces),
        base=base or None,
        revision=revision,
        fingerprint=fingerprint,
        architecture=mapping.get("base_model_class", str),
        head=HEADS.get(task or ""),
        targets=targets,
    )
