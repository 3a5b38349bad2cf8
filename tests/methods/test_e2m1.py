"""Rounding to FP4 on tensors: equal to the format's own for every bfloat16, and stochastic rounding without bias."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from qlearn.methods.e2m1 import power_of_two, round_e2m1, round_e2m1_stochastically, step_of

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def every_bfloat16():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).float()
    return x[torch.isfinite(x)]


def test_ties_to_even_is_the_cast_of_ml_dtypes_for_every_bfloat16():
    x = every_bfloat16()
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(round_e2m1(x).numpy(), expected)
    assert np.array_equal(np.signbit(round_e2m1(x).numpy()), np.signbit(expected))


def test_ties_down_differs_from_ties_to_even_in_the_ties_alone():
    x = every_bfloat16().abs().clamp(max=6)
    nearest, down = round_e2m1(x), round_e2m1(x, "down")
    distance = (x[:, None] - GRID).abs()
    tie = (distance == distance.amin(1, keepdim=True)).sum(1) == 2
    assert torch.equal(nearest[~tie], down[~tie])
    assert torch.equal(down, GRID[distance.argmin(1)])  # argmin takes the first, the lower one
    assert x[tie].unique().tolist() == [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


@pytest.mark.parametrize("value", [0.1, 0.25, 0.6, 1.9, 2.25, 3.9, 4.5, 5.99, -0.3, -4.1])
def test_stochastic_rounding_goes_to_the_two_neighbours_and_is_right_on_average(value):
    n = 200_000
    random = torch.rand(n, generator=torch.Generator().manual_seed(0))
    rounded = round_e2m1_stochastically(torch.full((n,), value), random)
    low = GRID[abs(value) >= GRID].max().item()
    high = GRID[abs(value) < GRID].min().item()
    assert {abs(v) for v in rounded.unique().tolist()} == {low, high}
    p = (abs(value) - low) / (high - low)
    deviation = (high - low) * math.sqrt(p * (1 - p) / n)
    assert abs(rounded.double().mean().item() - value) < 5 * deviation + 1e-6


def test_stochastic_rounding_leaves_the_grid_alone():
    grid = torch.cat([GRID, -GRID])
    for random in (0.0, 0.5, 1 - 2**-20):
        assert torch.equal(round_e2m1_stochastically(grid, torch.full_like(grid, random)), grid)
    assert round_e2m1_stochastically(torch.tensor([7.0, -100.0])).tolist() == [6.0, -6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    x = torch.tensor([0.3, -5.5], dtype=dtype)
    assert round_e2m1(x).dtype == round_e2m1_stochastically(x).dtype == step_of(x.abs()).dtype == dtype


@pytest.mark.parametrize("rule", ["floor", "nearest", "ceil"])
def test_powers_of_two_follow_the_logarithm(rule):
    x = torch.cat([torch.rand(1000) * 100, 2.0 ** torch.arange(-126, 128)])
    exact = [math.frexp(v) for v in x.tolist()]  # significand in [0.5, 1)
    logarithm = {"floor": lambda m, e: e - 1, "ceil": lambda m, e: e - (m == 0.5)}
    logarithm["nearest"] = lambda m, e: e - (m * m < 0.5)
    expected = [min(logarithm[rule](m, e), 127) for m, e in exact]
    assert [math.frexp(v)[1] - 1 for v in power_of_two(x, rule).tolist()] == expected
    assert power_of_two(torch.tensor([0.0, 1e-45]), "floor").tolist() == [2.0**-126] * 2


def test_unknown_rules_are_told():
    with pytest.raises(ValueError, match="ties='up' is unknown; choose 'even' or 'down'"):
        round_e2m1(torch.ones(1), "up")
    with pytest.raises(ValueError, match="rule='round' is unknown; choose floor, nearest or ceil"):
        power_of_two(torch.ones(1), "round")
