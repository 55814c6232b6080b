"""ONNX Runtime's GroupQueryAttention over buffers that are written in place, as the operator and in torch.

q `[rows, heads, columns, width]`; `new` keys and values `[rows, kv heads, columns, width]`; `past`, the two buffers
`[rows, kv heads, room, width]`; the mask `[rows, tokens so far]`; `start`, a prefix `[heads, n, width]` that the
buffers begin with, or for a task a row what counts its columns, `[rows, n]`. Both forms return the answer and the
buffers after it. Of a `window` of 0 columns all that was before is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Pair = tuple[Tensor, Tensor]


def onnx_attend(
    q: Tensor, new: Pair, past: Pair, mask: Tensor, start: Tensor | None, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, after the rotation. In ONNX Runtime `past` and `present` may be the same memory."""
    rows, heads, columns, _ = q.shape
    flat = [t.transpose(1, 2).reshape(rows, columns, t.shape[1] * t.shape[3]) for t in (q, *new)]
    last, total = mask.sum(1) - 1, torch.ones_like(mask[0]).sum()
    if start is not None:
        own, most = _columns(start, mask.dtype)
        last, total = last + own, total + most
    counts = [aten._to_copy.default(count, dtype=torch.int32) for count in (last, total)]
    groups, width = new[1].shape[1], new[1].shape[3]
    shapes: list[Any] = [(rows, columns, heads * width)]
    shapes += [(rows, groups, old.shape[2] + columns, old.shape[3]) for old in past]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": int(groups), "scale": scale, "do_rotary": 0}
    if window:
        attributes["local_window_size"] = window
    y, keys, values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, *past, *counts),
        attributes,
        dtypes=[q.dtype] * 3,
        shapes=shapes,
        version=1,
    )
    return y.view(rows, columns, heads, width).transpose(1, 2), keys, values


def torch_attend(
    q: Tensor, new: Pair, past: Pair, mask: Tensor, start: Tensor | None, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator computes where the buffers have room: new columns behind each row's own, seen by later ones."""
    lengths = mask.sum(1) + (0 if start is None else _columns(start, mask.dtype)[0])
    at = (lengths - q.shape[2]).unsqueeze(1) + torch.arange(q.shape[2])
    at_heads = at[:, None, :, None]
    keys, values = (old.scatter(2, at_heads.expand_as(t), t) for old, t in zip(past, new, strict=True))
    columns, last = torch.arange(keys.shape[2]), at.unsqueeze(-1)
    seen = (columns <= last) & (columns > last - (window or keys.shape[2]))
    several = {"attn_mask": seen.unsqueeze(1), "scale": scale, "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, **several), keys, values  # type: ignore[arg-type]


def _columns(start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How many columns of a prefix a row has, and how many the longest has."""
    if start.dim() == 2:
        return start.sum(1), torch.ones_like(start[0]).sum()
    more = torch.ones_like(start[0, :, 0], dtype=dtype).sum()
    return more, more
