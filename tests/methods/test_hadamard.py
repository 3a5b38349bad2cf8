"""Rounding after a rotation: scipy's matrix as the other implementation, the error that rotations keep, the edges."""

import pytest
import scipy.linalg
import torch

from qlearn import QuantizedTensor, quantize
from qlearn.methods import absmax, hadamard, zero_point


def normal(rows=24, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_outliers():
    """One weight in 64 is ten times larger."""
    weight = normal(64, 256)
    at = torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) < 1 / 64
    return torch.where(at, 10 * weight, weight)


@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("sym", [False, True])
def test_it_rounds_the_product_with_the_matrix_and_turns_back(size, sym):
    weight = normal()
    matrix = torch.from_numpy(scipy.linalg.hadamard(size) / size**0.5)
    rotated = (weight.double().view(24, -1, size) @ matrix).reshape(24, 96)
    qt = hadamard(weight, 4, 16, size=size, sym=sym)
    plain = (absmax if sym else zero_point)(rotated.float(), 4, 16)
    assert (qt.codes() != plain.codes()).float().mean() < 0.002  # float32 and float64 fall on two sides of a tie
    same = (qt.codes() == plain.codes()).view(24, -1, 32).all(-1, keepdim=True).expand(-1, -1, 32).reshape(24, 96)
    back = (plain.dequantize().double().view(24, -1, size) @ matrix).reshape(24, 96)
    assert (qt.dequantize() - back).abs()[same].max() < 1e-2 and same.float().mean() > 0.8
    assert qt.hadamard == size and qt.bits_per_weight == plain.bits_per_weight


@pytest.mark.parametrize("bits", range(2, 9))
def test_errors_are_as_large_as_those_of_the_rotated_rows(bits):
    from qlearn.rotation import hadamard as rotate

    weight = normal()
    error = (hadamard(weight, bits, 16).dequantize() - weight).norm()
    rounded = rotate(weight, 32)
    assert error.item() == pytest.approx((zero_point(rounded, bits, 16).dequantize() - rounded).norm().item(), rel=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_cost_less(bits):
    weight = with_outliers()
    plain, turned = ((weight - m(weight, bits, 64).dequantize()).norm() for m in (zero_point, hadamard))
    assert turned < 0.7 * plain


@pytest.mark.parametrize(("columns", "size"), [(96, 32), (256, 256), (7, 1)])
def test_the_largest_size_is_the_default(columns, size):
    assert hadamard(normal(columns=columns)).hadamard == size


def test_odd_columns_are_not_turned_at_all():
    assert torch.equal(hadamard(normal(columns=7)).dequantize(), zero_point(normal(columns=7), 4).dequantize())


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 32), torch.ones(4, 32), -torch.ones(4, 32) * 1e-9, torch.eye(4, 32) * 1e4],
    ids=["zeros", "ones", "tiny", "lone outliers"],
)
def test_edges_stay_within_the_rotated_step(weight):
    qt = hadamard(weight, 4, 16)
    step = qt.scales.float().max()
    assert (qt.dequantize() - weight).norm(dim=1).max() <= 0.5 * step * 32**0.5 * (1 + 1e-3)


def test_save_and_load(tmp_path):
    qt = quantize(with_outliers(), "hadamard", bits=3, group_size=64)
    qt.save(tmp_path / "q.safetensors")
    back = QuantizedTensor.load(tmp_path / "q.safetensors")
    assert back.hadamard == 256 and torch.equal(back.dequantize(), qt.dequantize())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 24}, "size=24 is no power of two"),
        ({"size": 64}, "size=64 does not divide the 96 numbers of an axis; 32 does"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 7}, "group_size=7 does not divide"),
        ({"weight": torch.full((2, 4), torch.inf)}, "8 of 8 weights are not finite"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        hadamard(**{"weight": normal(), "bits": 4, "group_size": 16} | options)
