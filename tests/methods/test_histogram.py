"""The streaming histogram: exactly what one pass over everything, with the final range, would have counted."""

import math

import numpy as np
import pytest
import torch

from qlearn.methods.histogram import Histogram


def normal(count=10_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def counted_by_numpy(values, bins):
    """NumPy's own histogram, told the range in advance."""
    magnitudes = values.double().abs().numpy()
    top = 2.0 ** (math.floor(math.log2(magnitudes.max())) + 1)
    return np.histogram(magnitudes[magnitudes > 0], bins=bins, range=(0, top))[0]


@pytest.mark.parametrize("bins", [2, 64, 2048])
def test_batches_in_any_order_give_what_one_pass_gives(bins):
    values = torch.cat([normal() * 10.0**e for e in (-3, -1, 0, 2)] + [torch.zeros(100)])
    for seed in range(3):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        shuffled = values[order] if seed else values  # seed 0: the batches grow, so the range widens again and again
        histogram = Histogram(bins)
        for batch in shuffled.split(3_000):
            histogram.add(batch)
        assert histogram.counts.tolist() == counted_by_numpy(values, bins).tolist()
        assert histogram.zeros == 100
        assert histogram.total == len(values)
        assert histogram.peak == values.abs().max().item()


def test_values_on_the_borders_belong_to_the_bin_above():
    histogram = Histogram(8)
    histogram.add(torch.arange(8.0) / 8 + 0.0)
    assert histogram.counts.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    histogram.add(torch.tensor([1.0]))  # exactly the end of the range, which is beyond the last bin
    assert histogram.width == 2 / 8
    assert histogram.counts.tolist() == [1, 2, 2, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    histogram = Histogram(4)
    histogram.add(torch.tensor([[0.5, -1.5], [3.0, 0.0]], dtype=dtype))
    assert (histogram.counts.tolist(), histogram.zeros, histogram.peak) == ([1, 1, 0, 1], 1, 3.0)


def test_a_giant_pushes_everything_into_the_first_bin_and_loses_no_count():
    histogram = Histogram(16)
    histogram.add(normal(1000))
    histogram.add(torch.tensor([1e30]))
    assert histogram.counts[0] == 1000 and histogram.counts.sum() == 1001
    assert histogram.occupied > 8


def test_extreme_magnitudes():
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    histogram = Histogram(2048)
    histogram.add(torch.tensor([smallest]))
    assert histogram.occupied == 1025 and histogram.peak == smallest
    histogram.add(torch.tensor([largest]))
    assert histogram.counts[0] == 1 and histogram.counts[-1] == 1


def test_nothing_and_only_zeros():
    histogram = Histogram()
    histogram.add(torch.empty(0, 4))
    histogram.add(torch.zeros(5))
    assert (histogram.total, histogram.zeros, histogram.occupied, histogram.peak) == (5, 5, 0, 0.0)
    assert histogram.width is None


@pytest.mark.parametrize("bins", [0, 1, 100])
def test_bins_that_cannot_be_merged_in_pairs(bins):
    with pytest.raises(ValueError, match=f"bins={bins} is no power of two"):
        Histogram(bins)
