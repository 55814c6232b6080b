"""NF4, the 4-bit numbers of QLoRA: written by bitsandbytes alone, read and multiplied with here in plain torch.

Dettmers et al., "QLoRA", NeurIPS 2023 (arXiv:2305.14314), section 3 and appendix E. A weight `[out, in]` is cut into
blocks of consecutive numbers, row after row. A number is one of 16 levels times its block's largest size (`absmax`);
two levels make a byte, the first in the high half. Double quantisation keeps `absmax` less its mean (`offset`) in 8
bits, in blocks of 256 with a scale each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import BaseError

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
OUTER = 256
"""Block of the second quantisation."""


@torch.library.custom_op("surgeon::matmul_nf4", mutates_args=())
def matmul_nf4(  # noqa: PLR0917 - the signature of an operator
    x: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, block: int
) -> Tensor:
    """`x @ W.T` with `x [..., columns]` and W `[rows, columns]` as NF4: packed uint8 and fp32 `absmax [blocks]`.

    W is expanded at every call and forgotten; the gradient goes to `x` alone.
    """
    return torch.nn.functional.linear(x, dequantise(packed, absmax, (rows, columns), block).to(x.dtype))


@matmul_nf4.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, rows: int, *_: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], rows])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, *ctx.sizes = inputs
    ctx.save_for_backward(packed, absmax)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (packed, absmax), (rows, columns, block) = ctx.saved_tensors, ctx.sizes
    weight = dequantise(packed, absmax, (rows, columns), block)
    return gradient @ weight.to(gradient.dtype), None, None, None, None, None


matmul_nf4.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("surgeon::nf4_absmax", mutates_args=())
def nf4_absmax(codes: Tensor, scales: Tensor, offset: Tensor, code: Tensor) -> Tensor:
    """Undo the second quantisation: uint8 codes `[blocks]` to fp32 `absmax [blocks]`."""
    return code[codes.int()] * scales.repeat_interleave(OUTER)[: codes.shape[0]] + offset


@nf4_absmax.register_fake
def _(codes: Tensor, scales: Tensor, offset: Tensor, code: Tensor) -> Tensor:
    return scales.new_empty(codes.shape)


def dequantise(packed: Tensor, absmax: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """The fp32 numbers that NF4 bytes stand for; bitsandbytes' own, bit for bit."""
    levels = torch.tensor(LEVELS, device=packed.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)  # of every byte
    numbers, count = pairs[packed.flatten().int()].flatten(), shape[0] * shape[1]
    numbers = torch.nn.functional.pad(numbers[:count], (0, -count % block))
    return (numbers.view(-1, block) * absmax[:, None]).flatten()[:count].view(shape)


def onnx_matmul(  # noqa: PLR0917 - that of the same operator
    x: Tensor, packed: Tensor, absmax: Tensor, rows: int, columns: int, block: int
) -> Tensor:
    """The product as ONNX Runtime's own operator, which reads the same bytes. `quant_type` 1 is NF4."""
    attributes: dict[str, Any] = {"K": columns, "N": rows, "block_size": block, "quant_type": 1}
    shape = [*x.shape[:-1], rows]
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulBnb4", (x, packed, absmax), attributes, dtype=x.dtype, shape=shape, version=1
    )


@dataclass(frozen=True)
class NF4:
    """A weight `[out, in]` in NF4, and what bitsandbytes itself reads from it (None where there are no weights)."""

    shape: tuple[int, int]
    block: int
    packed: Tensor
    absmax: Tensor
    """fp32 `[blocks]`, or uint8 after a second quantisation."""
    scales: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    wanted: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What there is to keep, by a short name; without the 256 numbers of `code`, the same for every weight."""
        named = {"nf4": self.packed, "absmax": self.absmax, "absmax_scales": self.scales, "absmax_offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def quantise(weight: Tensor, block: int, *, double: bool) -> NF4:
    """Quantise `weight [out, in]` by bitsandbytes. On the meta device only sizes come out.

    Raises BaseError where bitsandbytes cannot, or where a number is not finite.
    """
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    if weight.is_meta:
        return _without_weights(weight, shape, block, double=double)
    if not torch.isfinite(weight).all():
        raise BaseError("a weight holds NaN or infinity and cannot be quantised")
    with _quiet():
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        # As one row: with AVX-512, 0.50.2 takes wrong scales where a block is no part of one row (pull request 2072).
        state.shape = torch.Size((1, weight.numel()))
        wanted = bnb.dequantize_4bit(packed, state).view(shape)
    scales, offset, code = (state.state2.absmax, state.offset, state.state2.code) if double else (None, None, None)
    return NF4(shape, block, packed.flatten(), state.absmax, scales, offset, code, wanted)


def _without_weights(weight: Tensor, shape: tuple[int, int], block: int, *, double: bool) -> NF4:
    empty = partial(torch.empty, device="meta")
    blocks = -(-weight.numel() // block)
    scales, offset, code = (empty(-(-blocks // OUTER)), empty(()), empty(256)) if double else (None, None, None)
    packed = empty(-(-weight.numel() // 2), dtype=torch.uint8)
    absmax = empty(blocks, dtype=torch.uint8 if double else torch.float32)
    return NF4(shape, block, packed, absmax, scales, offset, code, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what bitsandbytes says of optional kernels that are not used here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
