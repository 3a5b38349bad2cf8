"""HQQ: its turns written out in NumPy, the least squares in them, its bound, and every known edge."""

import numpy as np
import pytest
import torch

from qlearn import QuantizedTensor, quantize
from qlearn.methods import hqq, zero_point
from qlearn.methods.hqq import shrink, solve, starting_grid, turns
from tests.methods.edges import EDGES

BITS = range(1, 9)


def normal(rows=24, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def written_out(weight, bits, group_size, kappa=None, p=0.7, beta=10.0):
    """(weights that are read back, scales, zeros) in float64, a group and a step at a time, from the formulas."""
    groups, qmax = weight.double().numpy().reshape(-1, group_size), 2**bits - 1
    low, high = groups.min(1), groups.max(1)
    s = np.minimum(qmax / (high - low), 2e4)
    z = -low * s
    z = np.round(z) if bits == 4 else z
    tried, errors = [], []
    for _ in range(20):
        codes = np.clip(np.round(groups * s[:, None] + z[:, None]), 0, qmax)
        rest = groups - (codes - z[:, None]) / s[:, None]
        with np.errstate(divide="ignore"):
            outliers = np.sign(rest) * np.maximum(np.abs(rest) - np.abs(rest) ** (p - 1) / beta, 0)
        tried.append(z)
        errors.append(np.abs(rest).mean())
        z = (codes - (groups - outliers) * s[:, None]).mean(1)
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            z = z if kappa is None else tried[-2]
            break
        beta *= kappa or 1
    codes = np.clip(np.round(groups * s[:, None] + z[:, None]), 0, qmax)
    return ((codes - z[:, None]) / s[:, None]).reshape(weight.shape), 1 / s, z


@pytest.mark.parametrize("size", [0.05, 3.0], ids=["no outliers", "outliers"])
@pytest.mark.parametrize("kappa", [None, 1.01])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_formulas(bits, kappa, size):
    weight = normal(seed=bits) * size
    exact = {"scale_dtype": torch.float32, "zero_dtype": torch.float32}
    qt = hqq(weight, bits, 16, kappa=kappa, **exact)
    read, scales, zeros = written_out(weight, bits, 16, kappa)
    np.testing.assert_allclose(qt.scales.flatten(), scales, rtol=2**-21)
    np.testing.assert_allclose(qt.zero_points().flatten(), zeros, atol=2**-16)
    np.testing.assert_allclose(qt.dequantize(), read, atol=2**-18 * size)


def test_shrink_is_soft_thresholding_at_p_1():
    x = normal()
    assert torch.equal(shrink(x, beta=4.0, p=1.0), torch.nn.functional.softshrink(x, 0.25))


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_shrink_is_odd_and_never_grows_or_turns_a_sign(p):
    x = torch.cat([normal().flatten(), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30])])
    y = shrink(x, p=p)
    assert torch.equal(shrink(-x, p=p), -y) and (y.abs() <= x.abs()).all() and (y * x >= 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_for_small_weights_each_next_zero_is_the_least_squares_one(bits):
    """Moving it either way makes the squared error with the same codes larger."""
    groups = (normal() * 0.05).view(-1, 16)
    s, zero = starting_grid(groups, 2**bits - 1)
    for turn in turns(groups, s, zero, 2**bits - 1, iters=3):
        assert not shrink(groups - (turn.codes - turn.zero) / s).any()

        def error(zero, codes=turn.codes):
            return ((groups - (codes - zero) / s).double() ** 2).sum(-1, keepdim=True)

        least = error(turn.next_zero)
        assert (least <= error(turn.next_zero + 0.01)).all() and (least <= error(turn.next_zero - 0.01)).all()


@pytest.mark.parametrize("bits", BITS)
def test_errors_fall_until_the_last_turn(bits):
    groups = (normal(64, 64) * 0.05).view(-1, 16)
    start = starting_grid(groups, 2**bits - 1)
    found = solve(groups, *start, 2**bits - 1)
    falling = found.errors[:-1] if len(found.errors) < 20 else found.errors
    assert falling == sorted(falling, reverse=True) and len(found.errors) == len(found.zeros)
    assert torch.equal(found.zeros[0], start[1]) and found.errors[0] > min(found.errors)


def test_the_published_solver_ends_one_past_the_best_and_the_described_one_on_it():
    """Here the second turn is worse than the first, and the zeros of all three are different."""
    groups = torch.tensor([[0.0, 0.35, 0.7, 1.4]])
    start = starting_grid(groups, 3)
    published, described = (solve(groups, *start, 3, kappa=kappa) for kappa in (None, 1.01))
    first, second = turns(groups, *start, 3, iters=2)
    assert published.errors == described.errors and published.errors[1] > published.errors[0]
    assert torch.equal(published.zero, second.next_zero) and torch.equal(described.zero, first.zero)
    assert len({published.zero.item(), first.zero.item(), second.zero.item()}) == 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_it_beats_the_grid_it_starts_from(bits):
    weight = normal(64, 256) * 0.05
    errors = [(weight - hqq(weight, bits, 64, iters=n).dequantize()).square().mean() for n in (0, 20)]
    plain = (weight - zero_point(weight, bits, 64).dequantize()).square().mean()
    assert errors[1] < errors[0] and errors[1] < plain


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("weight", EDGES.values(), ids=EDGES)
def test_edges_keep_the_bound(weight, bits):
    """Half a step, and as far as the zero was moved; then the roundings of scale and zero to float16."""
    qt, s = hqq(weight, bits, 16), starting_grid(weight.view(4 if len(weight) > 1 else 1, -1, 16), 2**bits - 1)
    step, moved = 1 / s[0][..., 0], (qt.zero_points() - s[1][..., 0]).abs()
    rounding = 2**-11 * (2**bits + 2 * qt.zero_points().abs()) + 2**-24
    bound = ((0.5 + moved + rounding) * step).repeat_interleave(16, 1) + weight.abs() * 2**-21
    assert ((qt.dequantize() - weight).abs() <= bound).all()


def test_columns_are_the_rows_of_the_transposed():
    weight = normal() * 0.05
    by_column, by_row = hqq(weight, 3, 8, axis=0), hqq(weight.T, 3, 8)
    assert torch.equal(by_column.dequantize(), by_row.dequantize().T) and by_column.block == (8, 1)
    assert hqq(weight, 3, axis=0).scales.shape == (1, 48)


def test_what_is_stored(tmp_path):
    qt = quantize(normal(64, 256), "hqq", bits=3, group_size=64)
    assert qt.bits_per_weight == 3 + 32 / 64 and qt.zeros.dtype == torch.float16
    qt.save(tmp_path / "q.safetensors")
    assert torch.equal(QuantizedTensor.load(tmp_path / "q.safetensors").dequantize(), qt.dequantize())


def test_the_first_zero_is_rounded_at_4_bits_unless_told_otherwise():
    weight = normal() * 0.05
    zeros = {
        rounded: hqq(weight, 4, 16, iters=0, round_zero=rounded, zero_dtype=torch.float32).zero_points()
        for rounded in (None, True, False)
    }
    assert torch.equal(zeros[None], zeros[True]) and torch.equal(zeros[True], zeros[True].round())
    assert not torch.equal(zeros[False], zeros[False].round())
    zero = hqq(weight, 3, 16, iters=0, zero_dtype=torch.float32).zero_points()
    assert not torch.equal(zero, zero.round())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits=0 is out of range"),
        ({"bits": 9}, "bits=9 is out of range"),
        ({"group_size": 5}, "group_size=5 does not divide the 48 columns"),
        ({"group_size": 5, "axis": 0}, "group_size=5 does not divide the 24 columns"),
        ({"axis": 2}, "axis=2 is unknown"),
        ({"kappa": 1.0}, "kappa=1.0"),
        ({"iters": -1}, "iters=-1"),
        ({"weight": normal() * 1e9}, "a scale of .* does not fit torch.float16; pass scale_dtype"),
        ({"weight": normal() * 1e-3 + 60}, "a zero of .* does not fit torch.float16; pass zero_dtype"),
        ({"weight": torch.tensor([[1.0, torch.nan]]), "group_size": None}, "1 of 2 weights are not finite"),
        ({"weight": torch.ones(3)}, "is no matrix"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(change, message):
    arguments = {"weight": normal(), "bits": 4, "group_size": 16} | change
    with pytest.raises(ValueError, match=message):
        hqq(**arguments)
