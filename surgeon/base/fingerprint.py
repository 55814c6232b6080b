"""Identifies a base by its tensors, so that deltas are refused by any other."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the class name and the sorted names, types, shapes and bytes of parameters and persistent buffers.

    Empty for a model without weights (on the meta device).
    """
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return ""
    digest = hashlib.sha256(type(model).__name__.encode())
    owners: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    for name, tensor in sorted(state.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        owner = owners.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
        if owner == name:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:  # tied: the same memory under another name is read once
            digest.update(f"= {owner}".encode())
    return digest.hexdigest()
