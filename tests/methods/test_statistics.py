"""Input statistics against NumPy in float64, their independence of batching, the spread of the sample, the edges."""

import numpy as np
import pytest
import torch

from qlearn.methods.statistics import InputStatistics


def tokens(n=300, channels=24, seed=0):
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 20
    return x


def test_everything_against_numpy():
    x = tokens()
    statistics = InputStatistics(24, sample=300)
    statistics.add(x[:100].view(4, 25, 24))
    statistics.add(x[100:101])
    statistics.add(x[101:])
    exact = x.double().numpy()
    assert statistics.count == 300
    np.testing.assert_allclose(statistics.mean_abs, np.abs(exact).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics.abs_max, np.abs(exact).max(0).astype(np.float32))
    np.testing.assert_allclose(statistics.hessian, 2 * exact.T @ exact / 300, rtol=1e-5, atol=1e-4)
    assert torch.equal(statistics.sample, x)
    for tensor in (statistics.mean_abs, statistics.abs_max, statistics.hessian, statistics.sample):
        assert tensor.dtype == torch.float32


def test_a_long_run_does_not_drift():
    """The running mean multiplies by n / (n + b) at each of 2,000 steps: float32 must stand that."""
    x = tokens(20_000)
    statistics = InputStatistics(24, sample=0)
    for part in x.split(10):
        statistics.add(part)
    exact = x.double().numpy()
    np.testing.assert_allclose(statistics.hessian.diagonal(), 2 * (exact**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(statistics.mean_abs, np.abs(exact).mean(0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_the_inputs_are(dtype):
    """In float16 the square of 300 already overflows."""
    statistics = InputStatistics.from_inputs(torch.full((10, 2), 300.0, dtype=dtype))
    assert torch.equal(statistics.hessian, torch.full((2, 2), 180_000.0))


def test_the_hessian_is_left_out_when_not_wanted():
    assert InputStatistics.from_inputs(tokens(), hessian=False).hessian is None


class TestSample:
    def test_it_is_the_same_however_the_inputs_are_batched(self):
        x = tokens(3000, 4)
        at_once = InputStatistics.from_inputs(x, sample=64).sample
        in_parts = InputStatistics(4, sample=64)
        for part in x.split(77):
            in_parts.add(part)
        assert at_once.shape == (64, 4)
        assert torch.equal(at_once, in_parts.sample)

    @pytest.mark.parametrize("n", [513, 5000, 16384])
    def test_it_is_spread_evenly(self, n):
        """Multiples of an irrational number leave gaps of at most three sizes, the largest the sum of the others."""
        x = torch.arange(n, dtype=torch.float64)[:, None]
        kept = InputStatistics.from_inputs(x, hessian=False).sample.flatten().long()
        assert len(kept) == 512
        gaps = sorted(set(kept.diff().tolist()))
        assert len(gaps) <= 3 and gaps[0] > 0 and gaps[-1] <= 3 * n / 512

    def test_it_is_in_step_with_no_window(self):
        """Position 0 of windows of 512 tokens is one in 512; every 32nd token would make it one in 16."""
        position = (torch.arange(16384) % 512).double()[:, None]
        kept = InputStatistics.from_inputs(position, hessian=False).sample
        assert (kept == 0).sum() <= 3
        assert kept.unique().numel() > 250

    def test_few_inputs_are_all_kept_in_order(self):
        assert torch.equal(InputStatistics.from_inputs(tokens(5)).sample, tokens(5))

    def test_none_is_kept_when_none_is_wanted(self):
        assert InputStatistics.from_inputs(tokens(), sample=0).sample.shape == (0, 24)


def test_no_inputs_at_all_leave_zeros():
    """An expert of a mixture that no token was sent to."""
    statistics = InputStatistics(24)
    statistics.add(torch.zeros(0, 24))
    assert statistics.count == 0 and statistics.sample.shape == (0, 24)
    for tensor in (statistics.mean_abs, statistics.abs_max, statistics.hessian):
        assert not tensor.any()


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(4, 23), r"shape \(4, 23\) and torch.float32 do not fit a layer of 24 columns"),
        (torch.zeros(24, dtype=torch.int64), "torch.int64 do not fit"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.full((2, 24), float("nan")), "48 of 48 inputs are NaN or infinite"),
        (torch.tensor([[0.0] * 23 + [float("inf")]]), "1 of 24 inputs are NaN or infinite"),
    ],
)
def test_bad_inputs_are_named_and_change_nothing(x, message):
    statistics = InputStatistics.from_inputs(tokens())
    before = statistics.count, statistics.hessian.clone(), statistics.mean_abs.clone(), statistics.sample.clone()
    with pytest.raises(ValueError, match=message):
        statistics.add(x)
    assert statistics.count == before[0]
    for new, old in zip((statistics.hessian, statistics.mean_abs, statistics.sample), before[1:], strict=True):
        assert torch.equal(new, old)


def test_inputs_that_carry_gradients_leave_no_graph():
    statistics = InputStatistics.from_inputs(tokens().requires_grad_())
    assert not statistics.hessian.requires_grad and not statistics.sample.requires_grad
