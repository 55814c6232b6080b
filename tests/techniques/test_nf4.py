"""NF4 is bitsandbytes' own: the bytes, the numbers read from them, the sizes and the gradient."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import BaseError
from surgeon.nf4 import dequantise, nf4_absmax, quantise


def absmax_of(made):
    return made.absmax if made.scales is None else nf4_absmax(made.absmax, made.scales, made.offset, made.code)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 40), (7, 9), (32, 32), (33, 64), (256, 320)])
def test_numbers_and_bytes_are_bitsandbytes_own(shape, dtype, block, double, lab):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed, wanted = lab.in_nf4(weight, double, block)
    made = quantise(weight, block, double=double)
    assert torch.equal(made.packed, packed.flatten())
    assert torch.equal(dequantise(made.packed, absmax_of(made), shape, block).to(dtype), wanted)
    assert (wanted.float() - weight.float()).abs().max() <= 0.2 * weight.float().abs().max()


def test_a_number_takes_the_bits_of_the_paper():
    """4 + 8/64 + 32/(64·256) = 4.127 bits, 4.5 without the second quantisation, and 4 bytes of offset a weight."""
    for double, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)):
        made = quantise(torch.randn(512, 1024), 64, double=double)
        held = sum(t.numel() * t.itemsize for t in made.tensors().values())
        assert held == bits * 512 * 1024 / 8 + (4 if double else 0)


def test_the_meta_device_gives_the_same_sizes():
    for shape, double in (((5, 40), True), ((7, 9), False), ((512, 300), True)):
        real, meta = (quantise(torch.ones(shape, device=d), 64, double=double).tensors() for d in ("cpu", "meta"))
        assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in meta.items()}


def test_the_gradient_of_the_product_goes_to_its_input():
    made = quantise(torch.randn(6, 40), 64, double=False)
    arguments = (made.packed, made.absmax, 6, 40, 64)
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.surgeon.matmul_nf4.default, (x, *arguments))
    given = torch.randn(2, 3, 6)
    torch.ops.surgeon.matmul_nf4(x, *arguments).backward(given)
    assert torch.equal(x.grad, given @ made.wanted)


def test_a_weight_that_is_no_number_is_told():
    weight = torch.randn(8, 8)
    weight[2, 3] = float("nan")
    with pytest.raises(BaseError, match="NaN or infinity"):
        quantise(weight, 64, double=True)
