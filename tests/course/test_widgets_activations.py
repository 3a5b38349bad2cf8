"""The activation explorer: what it shows is the package's W8A8, and what the lesson says of it is so."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import qlearn
from qlearn.course.widgets import activations
from qlearn.course.widgets.activations import KINDS, METHODS, activation_explorer
from qlearn.models.int8 import Int8Linear
from tests.course.explorers import check_sweep


@pytest.fixture(scope="module")
def explorer():
    return activation_explorer()


def errors(explorer, grows, observer="minmax"):
    """dict method -> errors in %, over the sizes."""
    return dict(zip(METHODS, explorer._curves(grows, observer), strict=True))


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 17)


def test_what_a_notebook_stores(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) == f"ActivationExplorer: {explorer.summary}"
    assert len(metadata["image/png"]["alt"]) > 40
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert all(control.description for control in explorer.controls.values())


def test_the_same_widget_made_again_says_and_shows_the_same(explorer):
    again = activation_explorer()
    assert repr(again) == repr(explorer) and again.png() == explorer.png()


def test_the_picture_follows_what_grows(explorer):
    pictures = []
    for grows in KINDS:
        explorer.controls["grows"].value, explorer.controls["size"].value = grows, 64
        pictures.append(explorer.png())
    explorer.controls["grows"].value, explorer.controls["size"].value = KINDS[0], 1
    assert len({*pictures, explorer.png()}) == 3


def test_one_number_spoils_the_static_grid_and_not_that_of_each_token(explorer):
    found = errors(explorer, "one number")
    assert found["static"][-1] > 40 * found["static"][0] and found["per token"].max() < 1.1 * found["per token"].min()
    assert found["static, smoothed"][-1] < found["static"][-1] / 5


def test_a_channel_spoils_both_and_smoothing_takes_it_back_whatever_its_size(explorer):
    found = errors(explorer, "a channel")
    assert found["static"][-1] > 40 * found["static"][0] and found["per token"][-1] > 40 * found["per token"][0]
    for method in METHODS[2:]:
        np.testing.assert_allclose(found[method], found[method][0], rtol=0.02)


def test_a_percentile_saves_the_static_grid_from_one_number_where_there_are_enough_others():
    random = np.random.default_rng(1)
    explorer = activation_explorer(random.standard_normal((64, 256)), random.standard_normal((32, 256)))
    minmax, percentile = (
        errors(explorer, "one number", observer)["static"][-1] for observer in ("minmax", "percentile")
    )
    assert percentile < 4 < 40 < minmax


def test_a_channel_that_grows_leaves_the_layer_what_it_is(explorer):
    inputs, weight = explorer._with_outlier("a channel", 128.0)
    torch.testing.assert_close(inputs @ weight.T, explorer._inputs @ explorer._weight.T, rtol=1e-4, atol=1e-4)
    assert inputs[:, explorer._channel].square().mean().sqrt().item() == pytest.approx(128, rel=1e-4)


def test_per_token_is_the_packages_layer(explorer):
    inputs, weight = explorer._with_outlier("one number", 16.0)
    exact = inputs @ weight.T
    y = Int8Linear(qlearn.quantize(weight, "absmax", bits=8))(inputs)
    expected = 100 * ((y - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
    assert errors(explorer, "one number")["per token"][8] == pytest.approx(expected, rel=1e-5)
    assert 2.0 ** activations.POWERS[8] == 16


@pytest.mark.parametrize(
    ("inputs", "weight", "message"),
    [
        (np.ones((4, 6)), np.ones((3, 5)), "do not fit a weight"),
        (np.ones(6), np.ones((3, 6)), "two tokens or more"),
        (np.zeros((4, 6)), np.ones((3, 6)), "nothing but zeros"),
        (np.full((4, 6), np.nan), np.ones((3, 6)), "NaN"),
    ],
)
def test_what_does_not_fit_is_said(inputs, weight, message):
    with pytest.raises(ValueError, match=message):
        activation_explorer(inputs, weight)
