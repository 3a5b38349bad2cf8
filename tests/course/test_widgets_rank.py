"""The rank explorer, swept over its whole range without a browser, and checked against the package."""

import pytest
import torch

from qlearn.course import widgets
from qlearn.course.widgets.rank import NOISE
from qlearn.training.loftq import low_rank
from tests.course.explorers import check_sweep

CHANGE = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def explorer():
    return widgets.rank_explorer({"a change": CHANGE, "of rank 2": CHANGE[:, :2] @ CHANGE[:2]})


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 7 + 2, most=7 + 2)


def test_what_a_notebook_stores(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) and repr(explorer).startswith("RankExplorer: a change, 12 x 20, rank ")
    assert len(metadata["image/png"]["alt"]) > 40


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_the_share_is_what_the_packages_best_matrix_of_that_rank_keeps(explorer, rank):
    A, B = low_rank(CHANGE, rank)
    left = (CHANGE - B @ A).square().sum() / CHANGE.square().sum()
    assert explorer.kept("a change", rank) == pytest.approx(1 - left.item(), abs=1e-5)


def test_a_change_of_rank_two_is_kept_whole_by_two(explorer):
    assert explorer.kept("of rank 2", 1) < 0.999 and explorer.kept("of rank 2", 2) == pytest.approx(1, abs=1e-9)


def test_the_numbers_are_those_of_both_thin_matrices(explorer):
    assert explorer.numbers("a change", 4) == (4 * (12 + 20), pytest.approx(4 * 32 / 240))


def test_the_summary_says_what_is_drawn(explorer):
    explorer.controls["change"].value, explorer.controls["rank"].value = "a change", 4
    kept = explorer.kept("a change", 4)
    assert "128 numbers, 512 bytes as float32, 53.3 % of the matrix's" in explorer.summary
    assert f"they keep {100 * kept:.1f} %" in explorer.summary


def test_noise_has_the_size_of_the_first_change(explorer):
    assert explorer.shapes[NOISE] == (12, 20)
    size = CHANGE.double().square().sum().item()
    assert explorer.singular[NOISE].square().sum().item() == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize(("rows", "ranks", "start"), [(12, 7, 12), (5, 4, 4), (1, 1, 1), (40, 10, 16)])
def test_no_rank_beyond_the_matrix_is_offered(rows, ranks, start):
    rank = widgets.rank_explorer({"a change": torch.arange(1.0, 50 * rows + 1).view(rows, 50)}).controls["rank"]
    assert len(rank.options) == ranks and rank.value == start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({}, "there is no change", id="nothing"),
        pytest.param({"zeros": torch.zeros(2, 2)}, "nothing but zeros", id="zeros"),
        pytest.param({"nan": torch.tensor([[1.0, torch.nan]])}, "NaN", id="nan"),
        pytest.param({"cube": torch.ones(2, 2, 2)}, "shape", id="three axes"),
    ],
)
def test_what_is_no_change_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        widgets.rank_explorer(changes)


def test_the_default_is_of_rank_four_under_noise():
    explorer = widgets.rank_explorer()
    (name, _) = explorer.shapes
    assert explorer.kept(name, 4) > 0.8 > 10 * (explorer.kept(name, 5) - explorer.kept(name, 4))
