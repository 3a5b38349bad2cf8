"""The balancing explorer, swept over its whole range without a browser, and checked against the package."""

import numpy as np
import pytest
import torch

from qlearn.course import widgets
from qlearn.course.widgets.balancing import BOTH, COLUMN, OUTLIERS, ROW, WEIGHT
from qlearn.methods import absmax
from qlearn.methods.sinkhorn import sinkhorn
from tests.course.explorers import check_sweep


@pytest.fixture(scope="module")
def explorer():
    return widgets.balancing_explorer()


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 41)


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_the_states_are_those_of_the_package(explorer, outlier):
    matrices, imbalances = explorer.states(20, outlier)
    weights = explorer.with_outlier(20, outlier)
    found = sinkhorn(weights)
    assert torch.equal(matrices[0], weights) and len(matrices) == len(imbalances)
    assert torch.equal(matrices[int(np.argmin(imbalances))], found.balanced)
    assert imbalances == found.history.imbalance.tolist()


def test_what_is_large(explorer):
    plain, (row, column) = explorer.with_outlier(1, BOTH), (5, 5)
    changed = {outlier: explorer.with_outlier(7, outlier) != plain for outlier in OUTLIERS}
    assert changed[WEIGHT].sum() == 1 and changed[WEIGHT][row, column]
    assert changed[ROW][row].all() and changed[ROW].sum() == 16
    assert changed[COLUMN][:, column].all() and changed[COLUMN].sum() == 16
    assert changed[BOTH].sum() == 31


def test_the_summary_says_what_is_drawn(explorer):
    explorer.controls["outlier"].value, explorer.controls["times"].value = COLUMN, 20
    explorer.controls["step"].value = 0
    zeros = (absmax(explorer.with_outlier(20, COLUMN), 3).codes() == 0).float().mean()
    assert explorer.summary == (
        f"a column, 20 times as large, step 0: imbalance {explorer.states(20, COLUMN)[1][0]:.2f}, and at 3 bits, one "
        f"scale a row, {zeros:.0%} of the weights become 0"
    )
    explorer.controls["step"].value = 15
    assert explorer.summary.endswith("; no more steps were made, the best is 10")


def test_a_column_is_mended_and_a_single_weight_hardly(explorer):
    def zeros(outlier, best):
        matrices, imbalances = explorer.states(20, outlier)
        return (absmax(matrices[int(np.argmin(imbalances)) if best else 0], 3).codes() == 0).float().mean()

    assert zeros(COLUMN, False) > 0.7 and zeros(COLUMN, True) < 0.3
    assert zeros(WEIGHT, False) - zeros(WEIGHT, True) < 0.06


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.randn(40, 8), "cannot be shown entry by entry"),
        (torch.randn(1, 8), "cannot be shown entry by entry"),
        (torch.ones(4, 4), "holds the same number everywhere"),
        (torch.zeros(4, 4), "nothing but zeros"),
    ],
    ids=["too large", "one row", "constant", "zeros"],
)
def test_bad_input(weights, message):
    with pytest.raises(ValueError, match=message):
        widgets.balancing_explorer(weights)
