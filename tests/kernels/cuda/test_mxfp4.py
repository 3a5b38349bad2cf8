"""Rotation and MXFP4 in one walk: the bits of the readable rotation and of the readable format."""

import pytest
import torch

from qlearn.formats.microscaling import MXFP4
from qlearn.kernels.cuda import SIMULATED
from qlearn.kernels.cuda.mxfp4 import SIZES, quantize_mxfp4
from qlearn.rotation import hadamard

DEVICE = "cpu" if SIMULATED else "cuda"


def check_same(x, size):
    packed, scales = quantize_mxfp4(x.to(DEVICE), size)
    rotated = x.float() if size is None else hadamard(x.float(), size)
    codes, expected = MXFP4.quantize(rotated)
    assert torch.equal(scales.cpu().view(torch.uint8), expected)
    assert packed.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert torch.equal(packed.cpu().flatten(), MXFP4.element.pack(codes))


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_numbers(size, dtype):
    check_same(random(3, 256, dtype=dtype), size)


def test_every_magnitude_that_lies_at_or_beside_a_tie():
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.9])
    beside = torch.cat([grid, grid.nextafter(torch.tensor(9.0)), grid.nextafter(torch.tensor(-9.0))])
    x = torch.zeros(len(beside), 32)
    x[:, 0], x[:, 1], x[:, 7], x[:, 31] = 4.5, beside, -beside, beside
    check_same(x, None)


@pytest.mark.parametrize("size", [None, 32, 128])
@pytest.mark.parametrize(
    "factor", [0.0, 1e-45, 1e-40, 2.0**-126, 1e-37, 1e-30, 1e30, 1e36], ids=lambda factor: f"{factor:g}"
)
def test_the_ends_of_the_range(size, factor):
    check_same(random(1, 128, dtype=torch.float32) * factor, size)


@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (37, 128), (0, 128)], ids=str)
def test_shapes(shape):
    check_same(random(*shape), 64) if shape[0] else quantize_mxfp4(random(*shape).to(DEVICE))


@pytest.mark.parametrize("size, spoiled", [(None, [1]), (32, [1]), (64, [0, 1]), (128, [0, 1, 2, 3])])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_makes_its_scale_nan(size, spoiled, number):
    x = random(1, 256)
    x[0, 40] = number
    _, scales = quantize_mxfp4(x.to(DEVICE), size)
    assert scales.isnan().cpu()[0].nonzero().flatten().tolist() == spoiled


@pytest.mark.parametrize(
    "x, size, message",
    [
        (torch.zeros(2, 32), 16, "hadamard=16"),
        (torch.zeros(2, 48), None, "runs of 32"),
        (torch.zeros(2, 96), 64, "runs of 64"),
        (torch.zeros(2, 32, dtype=torch.int32), None, "int32"),
        (torch.zeros(()), None, "shape"),
        (torch.zeros(2, 64)[:, :32], None, "one piece"),
    ],
)
def test_what_is_refused(x, size, message):
    with pytest.raises(ValueError, match=message):
        quantize_mxfp4(x.to(DEVICE), size)
