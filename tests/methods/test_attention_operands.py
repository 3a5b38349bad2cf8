"""The operands of quantized attention on their grids."""

import numpy as np
import pytest
import torch

from qlearn.formats.floats import FP8_E4M3FN
from qlearn.formats.microscaling import MXFP4, NVFP4
from qlearn.methods.attention_operands import round_blocks, round_p, round_qk, round_v, smooth, to_fp8
from tests.conformance.families import families


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_smooth_is_a_loop_over_blocks(block):
    x = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest, mean = smooth(x, block)
    for start in range(0, 10, block):
        part = x[:, start : start + block]
        torch.testing.assert_close(mean[:, start : start + block], part.mean(1, keepdim=True).expand_as(part))
    assert torch.equal(rest, x - mean)


@pytest.mark.parametrize("bits, largest", [("int8", 127), ("int4", 7)])
def test_the_largest_number_of_a_block_is_the_largest_code(bits, largest):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    codes, scale = round_qk(x, bits, block=4)
    assert [codes[i : i + 4].abs().max().item() for i in (0, 4, 8)] == [largest] * 3
    assert torch.equal(codes, codes.round()) and len(scale.unique()) == 3
    assert ((codes * scale - x).abs() <= scale / 2 * (1 + 1e-5)).all()


def test_fp8_is_ours():
    """All the numbers of bfloat16 that E4M3 can hold, and the halves between its own."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[torch.isfinite(x)]
    assert np.array_equal(to_fp8(x), FP8_E4M3FN.round(x, overflow="saturate"))


@pytest.mark.parametrize("name, format", [("nvfp4", NVFP4), ("mxfp4", MXFP4)])
class TestBlocks:
    @pytest.mark.parametrize("width", [1, 16, 31, 32, 33, 64])
    def test_a_short_block_is_filled_up_with_zeros(self, name, format, width):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        whole = torch.zeros(3, 64)
        whole[:, :width] = x
        assert torch.equal(round_blocks(x, name), self.ours(format, whole)[:, :width])

    @pytest.mark.parametrize("family", families())
    def test_the_numbers_are_the_formats(self, name, format, family):
        x = torch.from_numpy(families()[family])
        assert torch.equal(round_blocks(x, name), self.ours(format, x))

    @pytest.mark.parametrize("exponent", range(-149, 128, 4))
    def test_all_magnitudes(self, name, format, exponent):
        """The scales of NVFP4 end at 448 and 2**-9, those of MXFP4 at 2**-127; beyond, numbers saturate or vanish."""
        x = torch.rand(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0**exponent
        assert torch.equal(round_blocks(x.float(), name), self.ours(format, x.float()))

    @staticmethod
    def ours(format, x):
        return format.round(x, tensor_scale=1.0 if format.has_tensor_scale else None)


@pytest.mark.parametrize("bits, largest", [("nvfp4", 448 * 6), ("mxfp4", 6)])
def test_two_levels_stretch_each_row(bits, largest):
    p = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1], [0.1], [1e-4], [1e-30], [0]])
    numbers, scale = round_p(p, bits)
    assert torch.equal(numbers.amax(1), torch.tensor([largest] * 4 + [0.0]))
    torch.testing.assert_close((numbers * scale).amax(1), p.amax(1))


def test_what_two_levels_save():
    """Rows of 1e-4 are below what NVFP4 can store by itself; stretched, they keep its relative precision."""
    p = 1e-4 * torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for two_level in (False, True):
        numbers, scale = round_p(p, "nvfp4", two_level)
        errors.append(((numbers * scale - p).norm() / p.norm()).item())
    assert errors[0] == 1 and errors[1] < 0.12


def test_v_has_a_scale_for_each_channel_in_fp8():
    v = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 100, 1e4, 0])
    numbers, scale = round_v(v, "fp8")
    assert scale.shape == (2, 1, 4) and torch.equal(numbers.abs().amax(1), torch.tensor([[448.0] * 3 + [0]] * 2))
    assert ((numbers * scale - v).abs() <= v.abs() / 16 + scale * 2**-10).all()  # half a step: 3 bits, or subnormal


def test_v_in_fp4_is_rounded_along_the_tokens():
    v = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 100, 1e4])
    numbers, _ = round_v(v, "nvfp4")
    for channel in range(3):
        assert torch.equal(numbers[:, channel], NVFP4.round(v[:, channel].contiguous(), tensor_scale=1.0))
