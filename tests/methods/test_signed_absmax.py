"""Signed absmax: at 4 bits and 32 weights it is Q4_0, and everywhere it keeps its bound."""

import pytest
import torch

from qlearn import quantize
from qlearn.formats import gguf_blocks
from qlearn.methods.signed_absmax import signed_absmax, signed_absmax_values


@pytest.fixture
def weight():
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) ** 3


def test_it_is_q4_0(weight):
    qt = signed_absmax(weight, bits=4, group_size=32)
    blocks = gguf_blocks.quantize(weight)
    assert torch.equal(qt.dequantize(), gguf_blocks.dequantize(blocks))
    assert qt.bits_per_weight == 4.5 and qt.nbytes == blocks.numel()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [1, 32, None])
def test_unpacked_values_are_the_stored_ones(weight, bits, group_size):
    values, d = signed_absmax_values(weight, bits, group_size)
    qt = quantize(weight, "signed_absmax", bits=bits, group_size=group_size)
    assert torch.equal(values, qt.dequantize()) and torch.equal(d[..., 0], qt.scales)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_weight_comes_back(weight, bits):
    groups = weight.view(16, 4, 32)
    back = signed_absmax(weight, bits).dequantize().view(16, 4, 32)
    at = groups.abs().argmax(-1, keepdim=True)
    ratio = back.gather(-1, at) / groups.gather(-1, at)
    assert (ratio - 1).abs().max() <= 2**-11  # the rounding of the scale to float16


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_bound(weight, bits):
    """Half a step; a whole one beyond the shorter end; and the scale is off by 2**-11 of itself."""
    half = 2 ** (bits - 1)
    groups = weight.view(16, 4, 32)
    step = groups.abs().amax(-1, keepdim=True) / half
    error = (signed_absmax(weight, bits).dequantize().view(16, 4, 32) - groups).abs()
    lost = groups.sign() == -groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).sign()
    beyond = lost & (groups.abs() > step * (half - 0.5))
    slack = half * 2**-11
    assert (error <= step * (torch.where(beyond, 1.0, 0.5) + slack)).all()


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(2, 32), {"bits": 1}, "bits=1 is out of range"),
        (torch.ones(2, 32), {"bits": 9}, "bits=9 is out of range"),
        (torch.ones(2, 33), {}, "group_size=32 does not divide the 33 columns"),
        (torch.full((2, 32), float("nan")), {}, "not finite"),
        (torch.full((2, 32), 1e6), {}, "does not fit float16"),
        (torch.ones(32), {}, "is no matrix"),
    ],
)
def test_bad_input(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        signed_absmax(weight, **arguments)
