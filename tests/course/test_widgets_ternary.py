"""The ternary explorer, swept over its whole range without a browser, and checked against the package."""

import math

import numpy as np
import pytest
import torch

from qlearn.course import widgets
from qlearn.course.widgets.ternary import ABSMEAN, BEST, SCALE
from qlearn.methods import binary, ternary
from tests.course.explorers import check_sweep

WEIGHTS = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def explorer():
    return widgets.ternary_explorer(WEIGHTS)


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 61)


def test_what_a_notebook_stores(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) and repr(explorer).startswith("TernaryExplorer: 0 below 100 % ")
    assert len(metadata["image/png"]["alt"]) > 40


def relative_error(qt):
    return 100 * ((qt.dequantize() - WEIGHTS).square().mean() / WEIGHTS.square().mean()).item()


def test_half_the_mean_is_the_packages_absmean(explorer):
    qt = ternary(WEIGHTS, scale_dtype=torch.float32)
    assert explorer.error_at(ABSMEAN, SCALE) == pytest.approx(relative_error(qt), rel=1e-5)
    a, shares = explorer.state(ABSMEAN, SCALE)
    assert a == pytest.approx(qt.scales.item(), rel=1e-6)
    assert shares == pytest.approx([(qt.codes() == trit).float().mean().item() for trit in (-1, 0, 1)])


def test_half_the_largest_is_the_packages_absmax(explorer):
    qt = ternary(WEIGHTS, scale="absmax", scale_dtype=torch.float32)
    percent = 50 * WEIGHTS.abs().max().item() / WEIGHTS.abs().mean().item()
    assert explorer.error_at(percent, SCALE) == pytest.approx(relative_error(qt), rel=1e-4)


def test_nothing_below_zero_is_the_packages_binary_rule_for_weights_without_a_mean():
    weights = torch.cat([WEIGHTS, -WEIGHTS])
    qt = binary(weights, scale_dtype=torch.float32)
    expected = 100 * ((qt.dequantize() - weights).square().mean() / weights.square().mean()).item()
    assert widgets.ternary_explorer(weights).error_at(0, BEST) == pytest.approx(expected, rel=1e-5)


def test_the_mean_of_what_is_not_zero_is_the_best_value(explorer):
    for percent in (0, 30, 50, 95, 200):
        a, _ = explorer.state(percent, BEST)
        kept = WEIGHTS[WEIGHTS.abs() > percent / 100 * WEIGHTS.abs().mean()].abs().double().numpy()
        errors = [np.square(kept - candidate).sum() for candidate in (0.99 * a, a, 1.01 * a)]
        assert min(errors) == errors[1]
        assert explorer.error_at(percent, BEST) <= explorer.error_at(percent, SCALE) + 1e-9


def test_what_is_known_of_normal_weights():
    """Mean magnitude sqrt(2 / pi), error of signs 1 - 2 / pi; the least error of three values is 0.1902 (Max, 1960)."""
    explorer = widgets.ternary_explorer(np.random.default_rng(1).standard_normal(400_000))
    assert explorer.error_at(0, BEST) == pytest.approx(100 * (1 - 2 / math.pi), abs=0.3)
    assert explorer.least(BEST)[1] == pytest.approx(19.02, abs=0.2) and explorer.least(BEST)[0] == 75
    share = math.erf(math.sqrt(2 / math.pi) / 2 / math.sqrt(2))
    assert explorer.state(ABSMEAN, SCALE)[1][1] == pytest.approx(share, abs=0.003)


def test_the_summary_says_what_is_drawn(explorer):
    explorer.controls["threshold"].value, explorer.controls["value"].value = 50, SCALE
    a, (below, zero, above) = explorer.state(50, SCALE)
    best, least = explorer.least(SCALE)
    assert explorer.summary == (
        f"0 below 50 % of the mean magnitude (absmean): {100 * below:.0f} % are -1, {100 * zero:.0f} % are 0, "
        f"{100 * above:.0f} % are 1; a is 1.00 times the mean magnitude, error {explorer.error_at(50, SCALE):.1f} %; "
        f"the least, {least:.1f} %, at {best} %"
    )
    assert a == pytest.approx(WEIGHTS.abs().mean().item())
    explorer.controls["threshold"].value = 100


@pytest.mark.parametrize(
    "weights", [torch.ones(4), torch.tensor([0.0, 0.0, 5.0])], ids=["all the same", "all but one are 0"]
)
def test_weights_that_are_hardly_any_can_be_explored(weights):
    assert not any("nan" in summary for summary in widgets.ternary_explorer(weights).sweep())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3, 3), "nothing but zeros"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.ones(2, 2, 2), "shape"),
        (torch.ones(0), "shape"),
    ],
    ids=["zeros", "NaN", "three axes", "empty"],
)
def test_what_does_not_fit_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        widgets.ternary_explorer(weights)
