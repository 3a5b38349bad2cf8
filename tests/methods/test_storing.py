"""How scales and zeros are stored: NumPy's own rounding, the published 8-bit scheme written out, and the edges."""

import numpy as np
import pytest
import torch

from qlearn.methods.storing import eight_bit_scales, eight_bit_zeros, integral_zeros, stored


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_stored_is_the_nearest():
    x = uniform(1000) * 100
    np.testing.assert_array_equal(stored(x, torch.float16).numpy(), x.numpy().astype(np.float16))


def test_stored_refuses_what_would_be_infinite():
    with pytest.raises(ValueError, match=r"a zero of 7e\+04 does not fit torch.float16; pass zero_dtype=torch.float32"):
        stored(torch.tensor([1.0, -70000.0]), torch.float16, "zero", "zero_dtype")
    assert stored(torch.tensor([-65504.0]), torch.float16).item() == -65504


@pytest.mark.parametrize(
    ("zeros", "dtype"),
    [
        ([0.0, 15.0], torch.uint8),
        ([-0.0], torch.uint8),
        ([0.0, 16.0], torch.float16),
        ([-1.0, 2048.0], torch.float16),
        ([2049.0], torch.float32),
        ([-1e6], torch.float32),
    ],
    ids=["on the grid", "negative zero", "one above", "exact in 16 bits", "not exact in 16 bits", "beyond 16 bits"],
)
def test_integral_zeros_lose_nothing(zeros, dtype):
    zeros = torch.tensor([zeros])
    kept = integral_zeros(zeros, 15)
    assert kept.dtype == dtype and torch.equal(kept.float(), zeros)


def published(x, rows):
    """SINQ's scheme in NumPy, for a number of scales that fills the table."""
    table = x.numpy().reshape(rows, -1)
    low = table.min(0)
    step = (table.max(0) - low) / np.float32(255)
    return (np.round((table - low) / step) * step + low).reshape(x.shape)


@pytest.mark.parametrize("shape", [(64, 4), (32, 1), (16, 12)], ids=str)
def test_the_published_scheme(shape):
    x = uniform(*shape) * 1e-3 + 1e-4
    np.testing.assert_allclose(eight_bit_scales(x).float(), published(x, 32), rtol=2**-22)
    np.testing.assert_allclose(eight_bit_zeros(x).float(), published(x, x.numel()), rtol=2**-22)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (5, 7), (33, 1), (64, 64)], ids=str)
def test_no_error_exceeds_half_a_step(shape):
    x = uniform(*shape)
    for scales in (eight_bit_scales(x), eight_bit_zeros(x)):
        assert scales.shape == shape
        assert (scales.float() - x).abs().max() <= scales.steps.max() * 0.5 + 2**-23


def test_what_they_cost():
    x = uniform(256, 4)
    assert eight_bit_scales(x).nbytes == 1024 + 2 * 4 * 32 and eight_bit_zeros(x).nbytes == 1024 + 2 * 4


@pytest.mark.parametrize("make", [eight_bit_scales, eight_bit_zeros])
def test_equal_ones_come_back(make):
    x = torch.full((7, 9), 0.3)
    assert torch.equal(make(x).float(), x)
