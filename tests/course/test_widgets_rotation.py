"""The rotation explorer, swept over its whole range without a browser, and checked against the package."""

import pytest
import torch

from qlearn.course import widgets
from qlearn.course.widgets.rotation import PLACE, QUANTIZERS, SIZE
from qlearn.rotation import hadamard
from qlearn.training.low_precision import MXFP4, QuEST
from tests.course.explorers import check_sweep

MX, QUEST = QUANTIZERS


@pytest.fixture(scope="module")
def explorer():
    return widgets.rotation_explorer()


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 61)


def test_what_a_notebook_stores(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) and repr(explorer).startswith("RotationExplorer: outlier 8, MXFP4: ")
    assert len(metadata["image/png"]["alt"]) > 40


@pytest.mark.parametrize(("scale", "quantizer"), [(MX, MXFP4()), (QUEST, QuEST())], ids=["MXFP4", "QuEST"])
@pytest.mark.parametrize("outlier", [1, 16, 64])
def test_the_errors_are_those_of_the_packages_quantizers(explorer, scale, quantizer, outlier):
    x = explorer.groups(outlier)
    assert (x[:, PLACE] == outlier).all()
    errors = explorer.errors(outlier, scale)
    others = [i for i in range(SIZE) if i != PLACE]
    for name, back in (
        ("plain", quantizer(x).values),
        ("rotated", hadamard(quantizer(hadamard(x, SIZE)).values, SIZE)),
    ):
        off = (back - x).square()
        assert errors[name][0] == pytest.approx(100 * (off[:, others].sum() / x[:, others].square().sum()).item())
        assert errors[name][1] == pytest.approx(100 * (off.sum() / x.square().sum()).item())


def test_without_an_outlier_both_have_the_error_of_a_bell_curve(explorer):
    for name in ("plain", "rotated"):
        assert explorer.errors(1, MX)[name][1] == pytest.approx(1.34, abs=0.1)


def test_what_the_lesson_says(explorer):
    others = {size: [errors[0] for errors in explorer.errors(size, MX).values()] for size in (8, 15, 16, 56)}
    assert others[8][0] == others[15][0] < others[16][0] / 3  # a stair of the scale
    assert abs(others[15][1] / others[15][0] - 1) < 0.1 and others[16][1] < others[16][0] / 3
    assert others[56][1] > 1.5 * others[56][0]
    assert all(explorer.errors(size, MX)["rotated"][1] < 2.5 for size in range(1, 65))
    plain, rotated = (explorer.errors(32, QUEST)[name][1] for name in ("plain", "rotated"))
    assert plain > 10 * rotated


def test_the_summary_says_what_is_drawn(explorer):
    explorer.controls["outlier"].value = 64
    errors = explorer.errors(64, MX)
    assert explorer.summary == (
        f"outlier 64, MXFP4: 31 of 32 become 0; squared error of the others {errors['plain'][0]:.1f} % plain, "
        f"{errors['rotated'][0]:.1f} % rotated; of the whole group {errors['plain'][1]:.1f} % and "
        f"{errors['rotated'][1]:.1f} %"
    )
    explorer.controls["outlier"].value = 8


def test_the_drawn_numbers_come_back_on_the_grid(explorer):
    for scale in QUANTIZERS:
        explorer.controls["scale"].value = scale
        for outlier in (1, 33, 64):
            explorer.controls["outlier"].value = outlier
            for codes in explorer._dots[1::2]:
                heights = torch.tensor(codes.get_ydata(), dtype=torch.float64)
                assert torch.isin(heights.abs(), torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()).all()
    explorer.controls["scale"].value, explorer.controls["outlier"].value = MX, 8
