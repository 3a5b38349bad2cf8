"""The settling explorer, swept over all its states, and its walk checked against arithmetic done by hand."""

import itertools

import numpy as np
import pytest

from qlearn.course import widgets
from qlearn.course.live import positions_of
from qlearn.course.widgets import settling
from tests.course.explorers import check_sweep


@pytest.fixture(scope="module")
def explorer():
    return widgets.settling_explorer()


def test_every_combination_has_something_to_show(explorer):
    before = repr(explorer)
    options = {name: positions_of(control)[1] for name, control in explorer.controls.items()}
    options["target"] = options["target"][::4]
    seen = set()
    for values in itertools.product(*options.values()):
        summary = explorer._update(**dict(zip(options, values, strict=True)))
        assert "nan" not in summary and "after 0 steps" not in summary
        seen.add(summary)
    assert len(seen) == np.prod([len(values) for values in options.values()])
    explorer.draw()
    assert repr(explorer) == before


def test_a_sweep_ends_where_it_began(explorer):
    check_sweep(explorer, 21)


def test_what_a_notebook_stores(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) and repr(explorer).startswith("SettlingExplorer: target 0.30, ")
    assert len(metadata["image/png"]["alt"]) > 40
    assert all(control.description for control in explorer.controls.values())


def test_the_walk_is_gradient_descent_on_the_rounded_weight():
    latent, rounded = settling.walk(0.3, [0.1, 0.5], steps=50)
    assert latent.shape == rounded.shape == (50, 2) and set(np.unique(rounded)) == {0.0, 1.0}
    for rate, walked, seen in zip((0.1, 0.5), latent.T, rounded.T, strict=True):
        weight = 0.3
        for value, q in zip(walked, seen, strict=True):
            assert value == pytest.approx(weight, abs=1e-5) and q == np.round(value)
            weight = value - rate * (q - 0.3)


@pytest.mark.parametrize("target", [0.2, 0.3, 0.55, 0.8])
def test_the_rounded_weight_is_the_target_on_average_and_the_swing_is_the_rate(target):
    latent, rounded = settling.walk(target, settling.RATES, settling.STEPS)
    swing = np.ptp(latent[-settling.WINDOW :], axis=0)
    assert (np.abs(rounded[-settling.WINDOW :].mean(0) - target) < 0.03).all()
    assert (swing <= settling.RATES * 1.001).all() and (swing > 0.4 * settling.RATES).all()  # one step up or down
    jumps = np.abs(np.diff(rounded[-settling.WINDOW :], axis=0)).mean(0)
    assert np.ptp(jumps) < 0.05  # as often at every rate


@pytest.mark.parametrize("target", [0.2, 0.3, 0.7])
def test_a_falling_rate_ends_at_the_edge_mostly_on_the_nearer_side(target):
    latent, rounded = settling.walk(target, settling.RATES, settling.STEPS, falling=True)
    assert (rounded[-1] == round(target)).sum() in (7, 8)
    assert (np.abs(latent[-5:] - 0.5) < 0.02).all()
