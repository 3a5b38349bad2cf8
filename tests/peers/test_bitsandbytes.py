"""bitsandbytes on a CPU: NF4 to the last bit, double quantization up to a table that it looks scales up in."""

import pytest
import torch

from qlearn.formats.codebooks import DYNAMIC8, NF4, dynamic_map
from qlearn.methods import nf4
from tests.peers.weights import weights

functional = pytest.importorskip("bitsandbytes.functional", reason="make test-peers installs it")
pytestmark = pytest.mark.peers
WEIGHTS = weights() | {
    "zeros": torch.zeros(4, 64),
    "a constant": torch.full((4, 64), 0.3),
    "tiny": torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-30,
    "one row": torch.randn(1, 128, generator=torch.Generator().manual_seed(0)),
}


def codes_of(packed, shape):
    """Their codes: two in a byte, the first in its high half."""
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", WEIGHTS)
def test_nf4_is_equal_to_the_last_bit(name, group_size, dtype):
    weight = WEIGHTS[name].to(dtype)
    if weight.shape[1] % group_size:
        pytest.skip("their blocks would cross rows")
    packed, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    qt = nf4(weight, group_size=group_size)
    assert torch.equal(qt.codes(), codes_of(packed, weight.shape))
    assert torch.equal(qt.scales.flatten(), state.absmax)
    if dtype == torch.float32:
        assert torch.equal(qt.dequantize(), functional.dequantize_4bit(packed, state))


def test_every_float_beside_a_midpoint():
    """For each pair of values, the thousand float32 around their middle, in blocks whose largest weight is 1."""
    values = torch.tensor(NF4.values)
    middles = (values[:-1] + values[1:]) / 2
    near = (middles.view(torch.int32)[:, None] + torch.arange(-500, 500)).to(torch.int32).view(torch.float32)
    weight = torch.cat([torch.ones(15, 1000, 1), near[..., None].expand(-1, -1, 63)], 2).reshape(15, 64000)
    packed, _ = functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(nf4(weight).codes(), codes_of(packed, weight.shape))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_map_is_theirs(bits):
    theirs = functional.create_dynamic_map(signed=True, max_exponent_bits=bits - 1, total_bits=bits)
    ours = torch.from_numpy(dynamic_map(bits))
    assert torch.equal(theirs[theirs != 0], ours[ours != 0])  # theirs is filled up with zeros


@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantization(name):
    """The same mean, the same steps, and codes of the same numbers: but theirs are rounded to 16 bits before.

    Their CPU version looks codes up in a table of 65,536 entries from -1 to 1, so a number close to a midpoint may get
    the neighbour of the nearest code. Rounded in that way, ours are equal, and without it all but a few.
    """
    weight = WEIGHTS[name]
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    qt = nf4(weight, double_quant=True)
    assert torch.equal(qt.codes(), codes_of(packed, weight.shape))
    steps = state.state2.absmax
    assert torch.equal(qt.scales.offsets.flatten(), state.offset.view(1))
    assert torch.equal(qt.scales.steps.flatten(), steps)
    equal = qt.scales.codes().flatten() == state.absmax
    if steps.min() > 0:
        absmax = functional.quantize_4bit(weight, quant_type="nf4")[1].absmax - state.offset
        x = absmax / steps.repeat_interleave(256)[: len(absmax)]
        sixteen = ((x + 1) * (65535 / 2) + 0.5).floor() / (65535 / 2) - 1
        assert torch.equal(DYNAMIC8.encode(sixteen), state.absmax)
        assert equal.float().mean() > (0.99 if "." in name else 0.97)  # of a layer, and of anything
    back, ours = functional.dequantize_4bit(packed, state).view(-1, 64), qt.dequantize().view(-1, 64)
    assert torch.equal(back[equal], ours[equal])
