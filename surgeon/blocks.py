"""Matrices in blocks of few bits, as GGUF files hold them: which they are, and the numbers that they stand for.

A block is 32 consecutive numbers of one output feature. With code c a number is `scale · c + least` where a block has a
least number (Q4_1), else `scale · (c - half)`, half being 8 or 128 (Q4_0, Q8_0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 32
EXACT: dict[str, tuple[int, bool]] = {"Q4_0": (4, False), "Q4_1": (4, True), "Q8_0": (8, False)}
"""Forms that a product on ONNX Runtime reads as they are: bits of a code, and whether a block has a least number."""
FORMS = "forms"


@dataclass(frozen=True)
class Blocks:
    """A matrix `[out, in]`: packed codes uint8 `[out, blocks, 4 · bits]`, low half first, and fp32 `[out, blocks]`.

    `turned` says that the model has it as `[in, out]`.
    """

    form: str
    codes: Tensor
    scales: Tensor
    least: Tensor | None = None
    turned: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return EXACT[self.form][0]

    @property
    def nbytes(self) -> int:
        """Bytes of it as ONNX Runtime reads it."""
        return sum(t.numel() * t.itemsize for t in (self.codes, self.scales, self.least) if t is not None)

    def numbers(self) -> Tensor:
        """The matrix `[out, in]` in fp32: what the file's own reader makes of it, bit for bit."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        scales = self.scales.unsqueeze(-1)
        if self.least is None:
            half = float(2 ** (self.bits - 1))
            return (scales * (codes - half)).flatten(1)
        return (scales * codes + self.least.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Quantised:
    """What a base's file holds in fewer bits: the form of each matrix by its name, and those of exact forms."""

    forms: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, Blocks] = field(default_factory=dict)


def read_blocks(form: str, data: NDArray[np.uint8]) -> Blocks:
    """A matrix from a file's bytes `[out, bytes]`: per block the scale and the least number in fp16, then its codes.

    Of 4-bit codes the file packs the first half of a block into the low halves of its bytes.
    """
    bits, has_least = EXACT[form]
    ahead = 4 if has_least else 2
    raw = data.reshape(data.shape[0], -1, ahead + BLOCK * bits // 8)
    numbers = np.ascontiguousarray(raw[..., :ahead]).view(np.float16).astype(np.float32)
    codes: NDArray[np.uint8] = raw[..., ahead:]
    if bits == 4:
        every = np.concatenate([codes & 15, codes >> 4], -1)
        codes = np.bitwise_or(every[..., 0::2], every[..., 1::2] << 4, dtype=np.uint8)
    else:
        codes = np.bitwise_xor(codes, 128, dtype=np.uint8)  # a signed byte, counted from -128
    packed, scales, *least = (torch.from_numpy(np.ascontiguousarray(p)) for p in (codes, *np.moveaxis(numbers, -1, 0)))
    return Blocks(form, packed, scales, least[0] if least else None)


def write_quantised(quantised: Quantised, path: Path) -> None:
    """Write it as safetensors; the forms are in its metadata."""
    tensors = {}
    for name, blocks in quantised.exact.items():
        parts = {"codes": blocks.codes, "scales": blocks.scales, "least": blocks.least}
        tensors.update({f"{name}.{part}": t for part, t in parts.items() if t is not None})
    forms = {n: [form, n in quantised.exact and quantised.exact[n].turned] for n, form in quantised.forms.items()}
    save_file(tensors, path, metadata={FORMS: json.dumps(forms)})


def read_quantised(path: Path) -> Quantised:
    """Read what `write_quantised` wrote."""
    with safe_open(path, framework="pt") as file:
        forms = json.loads(file.metadata()[FORMS])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    exact = {
        name: Blocks(form, held[f"{name}.codes"], held[f"{name}.scales"], held.get(f"{name}.least"), turned)
        for name, (form, turned) in forms.items()
        if f"{name}.codes" in held
    }
    return Quantised({name: form for name, (form, _) in forms.items()}, exact)
