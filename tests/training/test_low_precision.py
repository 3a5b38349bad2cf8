"""The quantizers of FP4 training: equal to the formats, the published errors, no clipping where there must be none."""

import math

import pytest
import torch

from qlearn.formats import microscaling
from qlearn.training import low_precision
from qlearn.training.low_precision import FP8, MXFP4, MXFP8, NVFP4, Int4, LogFP4, QuEST, Unclipped

ALL = [MXFP4(), QuEST(), Unclipped(), Unclipped(False), NVFP4(), NVFP4(True), FP8(), FP8(torch.float8_e5m2), MXFP8()]
ALL += [Int4(), LogFP4()]
UNBIASED = [Unclipped(), NVFP4(True), LogFP4()]


def normal(rows=256, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 3e4], ids=str)
def test_mxfp4_is_the_format(scale):
    x = normal() * scale
    assert torch.equal(MXFP4()(x).values, microscaling.MXFP4.round(x, scale_rule="floor", ties="even"))


def test_nvfp4_is_the_format():
    x = normal(64, 64)
    ours, formats = NVFP4()(x).numbers(), microscaling.NVFP4.round(x)
    assert torch.allclose(ours, formats, rtol=1e-6, atol=0)  # the same codes; the factor is multiplied at another place


def octave_error(quantizer):
    """Mean squared error over the mean square of Gaussian numbers, averaged over an octave of standard deviations."""
    x = normal(2**12, 32)
    errors = []
    for i in range(16):
        scaled = x * 2 ** (i / 16)
        errors.append(float((quantizer(scaled).numbers() - scaled).square().mean() / scaled.square().mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("quantizer", "published"),
    [(QuEST(), 1.32e-2), (Unclipped(False), 1.37e-2), (Unclipped(), 2.77e-2)],
    ids=["QuEST", "nearest", "stochastic"],
)
def test_the_error_on_gaussian_numbers_is_that_of_table_2_of_quartet(quantizer, published):
    torch.manual_seed(0)
    assert abs(octave_error(quantizer) / published - 1) < 0.02


def test_a_scale_that_is_rounded_down_would_not_give_the_published_error():
    assert 2.15e-2 < octave_error(QuEST(exponent="floor")) < 2.25e-2


@pytest.mark.parametrize("quantizer", UNBIASED, ids=repr)
def test_the_mean_of_many_roundings_is_the_number(quantizer):
    torch.manual_seed(0)
    x = normal(4, 64) * torch.logspace(-3, 0, 64)
    n = 4000
    mean = sum(quantizer(x).numbers().double() for _ in range(n)) / n
    # A rounding moves a number by less than a step, at most a third of the largest number of its group (1/2 for LUQ);
    # so the mean of n of them has a standard deviation below step / 2 / sqrt(n).
    groups = x.abs().amax() if isinstance(quantizer, LogFP4) else x.abs().unflatten(-1, (-1, quantizer.group)).amax(-1)
    largest = groups if groups.dim() == 0 else groups.repeat_interleave(quantizer.group, -1)
    assert ((mean - x).abs() < 5 * largest / 2 / math.sqrt(n)).all()
    assert (mean - x).abs().mean() < largest.mean() / 4 / math.sqrt(n)


@pytest.mark.parametrize("quantizer", [Unclipped(), Unclipped(False), NVFP4(True), LogFP4()], ids=repr)
def test_nothing_is_cut_off(quantizer):
    torch.manual_seed(0)
    for seed in range(50):
        x = normal(8, 32, seed) * 10 ** (seed % 7 - 3)
        largest = x.abs() == x.abs().amax()
        rounded = quantizer(x).numbers().abs()[largest] / x.abs().amax()
        assert rounded.min() >= 2 / 3 - 1e-6  # the lower neighbour: 4, where the number lies between 4 and 6


def test_quest_masks_what_it_cuts_off():
    x = torch.ones(1, 32)
    x[0, 5] = 100.0
    values, factor, mask = QuEST()(x)
    assert factor is None and mask.sum() == 31 and not mask[0, 5]
    assert values[0, 5] == 6 * 8  # the deviation is 17.2, and 8 the power of two nearest to 0.487 of it


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_values_are_exact_in_bfloat16(quantizer):
    torch.manual_seed(0)
    for scale in (1e-8, 1.0, 1e4):
        values = quantizer(normal() * scale).values
        assert torch.equal(values, values.bfloat16().float())
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_zeros_stay_zeros(quantizer):
    numbers = quantizer(torch.zeros(4, 32)).numbers()
    assert torch.equal(numbers, torch.zeros(4, 32))


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_the_input_is_left_as_it_was_and_bfloat16_is_taken(quantizer):
    x = normal().bfloat16()
    before = x.clone()
    assert quantizer(x).values.shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.parametrize("quantizer", [MXFP4(), QuEST(), Unclipped(), NVFP4(), MXFP8()], ids=repr)
def test_rows_that_groups_do_not_divide_are_refused(quantizer):
    with pytest.raises(ValueError, match="do not divide the 40 numbers of a row; pad them with zeros"):
        quantizer(torch.ones(2, 40))


def test_log_fp4_has_seven_powers_and_zero():
    torch.manual_seed(0)
    values = LogFP4()(normal(512, 64)).values.abs().unique().tolist()
    assert values == [0.0, *(2.0**k for k in range(7))]


def test_int4_clips_at_the_published_number_of_deviations():
    x = normal(1000, 64)
    factor = Int4()(x).factor.item()
    assert abs(factor * 7 / x.square().mean().sqrt().item() - low_precision.GAUSSIAN_CLIP["int4"]) < 1e-5
