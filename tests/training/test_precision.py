"""What a precision reaches in a given time: against sums by hand, a search over sizes, and the published figures."""

import dataclasses
import math

import numpy as np
import pytest

from qlearn.training.precision import (
    SPEEDS,
    SPENDS,
    Speed,
    loss_in_time,
    measured,
    optimal_precision,
    split,
    worth,
)
from qlearn.training.scaling_law import Efficiency, Law, fit, published

KNOWN = Law(A=2e5, alpha=0.6, B=3e5, beta=0.52, E=1.5, gamma=0.3)
PLAIN, HALF = Efficiency(), Efficiency(0.5, 0.8)
N, D = np.geomspace(3e7, 1e11, 7)[:, None], np.geomspace(1e9, 1e13, 9)


@pytest.fixture(scope="module")
def law():
    return fit(published("bf16"))


# --- speeds


def test_a_step_is_one_part_forward_and_two_backward():
    for speed in (Speed(2, 1), Speed(1, 2), Speed(4, 2.5), Speed(0.5, 0.5)):
        assert 1 / speed.training == pytest.approx((1 / speed.forward + 2 / speed.backward) / 3, rel=1e-14)
        again = Speed.from_training(speed.forward, speed.training)
        assert again.backward == pytest.approx(speed.backward, rel=1e-12)


def test_the_speeds_are_those_reported_for_one_gpu():
    fp4, bf16 = SPEEDS["FP4"], SPEEDS["BF16"]
    assert (fp4.forward, fp4.training) == pytest.approx((2.0, 1.6), rel=1e-12) and SPEEDS["FP8"] == Speed(1, 1)
    assert (fp4.forward / bf16.forward, fp4.training / bf16.training) == pytest.approx((4.0, 2.9), rel=1e-12)
    assert SPEEDS["FP4 forward"] == Speed(fp4.forward, 1) and SPEEDS["FP4 backward"] == Speed(1, fp4.backward)
    assert (fp4.backward, fp4.backward / bf16.backward) == pytest.approx((1.4545, 2.5), abs=1e-3)


@pytest.mark.parametrize(("forward", "backward"), [(0, 1), (1, -1), (math.nan, 1), (1, math.inf)], ids=str)
def test_a_speed_is_above_zero(forward, backward):
    with pytest.raises(ValueError, match="give numbers above 0"):
        Speed(forward, backward)


@pytest.mark.parametrize("training", [6.0, 7.0], ids=["at the limit", "beyond"])
def test_a_step_cannot_be_three_times_as_fast_as_its_forward_pass(training):
    with pytest.raises(ValueError, match=f"training cannot be {training} times as fast"):
        Speed.from_training(2.0, training)


# --- the loss in a given time


@pytest.mark.parametrize("spend", ["size", "tokens"])
def test_the_baseline_is_the_law_itself(spend):
    assert loss_in_time(KNOWN, PLAIN, Speed(), 1e9, 2e10, spend) == KNOWN.loss(1e9, 2e10)


def test_the_time_is_spent_as_said():
    speed = Speed(forward=2.0, backward=1.5)
    t = speed.training
    assert loss_in_time(KNOWN, HALF, speed, 1e9, 2e10, "size") == pytest.approx(
        KNOWN.loss(2e9 * 0.5, 2e10 * t / 2 * 0.8), rel=1e-14
    )
    assert loss_in_time(KNOWN, HALF, speed, 1e9, 2e10, "tokens") == pytest.approx(
        KNOWN.loss(1e9 * 0.5, 2e10 * t * 0.8), rel=1e-14
    )


def test_the_best_split_is_that_of_a_search():
    best, tokens = split(KNOWN, 1e20)
    assert best * tokens == pytest.approx(1e20, rel=1e-12)
    sizes = np.geomspace(best / 100, best * 100, 4001)
    losses = KNOWN.loss(sizes, 1e20 / sizes)
    assert sizes[np.argmin(losses)] == pytest.approx(best, rel=0.003)
    assert KNOWN.loss(best, tokens) <= losses.min() + 1e-15


@pytest.mark.parametrize(
    ("efficiency", "speed"),
    [(PLAIN, Speed()), (HALF, Speed(2, 1.5)), (Efficiency(0.9, 1.0), Speed(1, 2))],
    ids=["baseline", "worse and faster", "backward"],
)
def test_with_both_free_it_is_the_best_of_all_sizes_that_take_as_long(efficiency, speed):
    size, tokens = 1e9, 2e10
    sizes = np.geomspace(1e7, 1e11, 8001)
    searched = KNOWN.loss(sizes, size * tokens * speed.training / sizes, efficiency.N, efficiency.D).min()
    found = loss_in_time(KNOWN, efficiency, speed, size, tokens, "both")
    assert found <= searched + 1e-12 and found == pytest.approx(searched, abs=1e-7)
    assert found <= loss_in_time(KNOWN, efficiency, speed, size, tokens, "size")
    assert found <= loss_in_time(KNOWN, efficiency, speed, size, tokens, "tokens")


@pytest.mark.parametrize("spend", SPENDS)
def test_being_faster_or_losing_less_never_hurts(spend):
    """More speed forward makes a larger model on fewer tokens under "size", which can hurt; it is left out there."""
    before = loss_in_time(KNOWN, HALF, Speed(2, 1.5), N, D, spend)
    for efficiency, speed in (
        (HALF, Speed(2, 1.6)), (Efficiency(0.6, 0.8), Speed(2, 1.5)), (Efficiency(0.5, 0.9), Speed(2, 1.5)),
    ):  # fmt: skip
        assert (loss_in_time(KNOWN, efficiency, speed, N, D, spend) < before).all()
    if spend != "size":
        assert (loss_in_time(KNOWN, HALF, Speed(2.1, 1.5), N, D, spend) < before).all()


# --- the choice


def test_with_both_free_the_choice_is_by_worth_alone(law):
    efficiencies = measured(law)
    best, _ = optimal_precision(law, efficiencies, SPEEDS, N, D, "both")
    worths = {name: worth(each, SPEEDS[name]) for name, each in efficiencies.items()}
    assert set(best.flat) == {max(worths, key=worths.get)} == {"FP4 backward"}
    assert worths["FP4"] == pytest.approx(1.6 * 0.658 * 0.822, rel=1e-3) and worths["FP4"] < worths["FP8"] == 1
    assert worths["BF16"] == pytest.approx(1.6 / 2.9, rel=1e-12)


def test_fp4_wins_where_tokens_are_plenty_if_the_model_grows_and_where_they_are_few_if_not(law):
    efficiencies = {name: each for name, each in measured(law).items() if name in ("FP8", "FP4")}
    ratios = np.geomspace(5, 5000, 40)
    larger, _ = optimal_precision(law, efficiencies, SPEEDS, 1e9, 1e9 * ratios, "size")
    longer, _ = optimal_precision(law, efficiencies, SPEEDS, 1e9, 1e9 * ratios, "tokens")
    for best, first, last in ((larger, "FP8", "FP4"), (longer, "FP4", "FP8")):
        assert (best[0], best[-1]) == (first, last) and (best[1:] != best[:-1]).sum() == 1
    assert 120 < ratios[np.argmax(larger == "FP4")] < 250


def test_bf16_is_never_the_choice_when_fp8_loses_nothing(law):
    for spend in SPENDS:
        best, _ = optimal_precision(law, measured(law), SPEEDS, N, D, spend)
        assert "BF16" not in best


def test_the_choice_is_the_least_loss_and_the_first_among_equals():
    efficiencies = {"a": PLAIN, "b": HALF, "c": PLAIN}
    speeds = {"a": Speed(), "b": Speed(3, 3), "c": Speed(), "unused": Speed(9, 9)}
    best, losses = optimal_precision(KNOWN, efficiencies, speeds, N, D)
    assert best.shape == (7, 9) and list(losses) == ["a", "b", "c"] and {"a", "b"} == set(best.flat)
    for place in np.ndindex(best.shape):
        assert losses[best[place]][place] == min(each[place] for each in losses.values())
    one, _ = optimal_precision(KNOWN, {"a": PLAIN}, speeds, 1e9, 1e10)
    assert one.shape == () and one == "a"


def test_what_is_measured_is_what_the_fits_say(law):
    found = {name: dataclasses.astuple(each) for name, each in measured(law).items()}
    assert list(found) == list(SPEEDS) and found["BF16"] == found["FP8"] == (1, 1)
    assert found["FP4"] == pytest.approx((0.658, 0.822), abs=6e-4)
    assert found["FP4 forward"] == pytest.approx((0.645, 1), abs=6e-4)
    assert found["FP4 backward"] == pytest.approx((1, 0.893), abs=6e-4)


# --- what does not fit


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_sizes_and_tokens_are_above_zero(bad):
    with pytest.raises(ValueError, match="N has an entry that is not above 0"):
        loss_in_time(KNOWN, PLAIN, Speed(), [1e9, bad], 1e10)
    with pytest.raises(ValueError, match="D has an entry that is not above 0"):
        optimal_precision(KNOWN, {"a": PLAIN}, {"a": Speed()}, 1e9, bad)
    with pytest.raises(ValueError, match="product has an entry"):
        split(KNOWN, bad)


@pytest.mark.parametrize(
    ("efficiencies", "spend", "message"),
    [
        ({}, "size", "no precision to choose from"),
        ({"FP8": PLAIN, "FP3": HALF}, "size", "no speed for FP3"),
        ({"FP8": PLAIN}, "money", "spend='money' is unknown; choose from size, tokens, both"),
    ],
    ids=["none", "no speed", "spend"],
)
def test_what_cannot_be_chosen_is_refused(efficiencies, spend, message):
    with pytest.raises(ValueError, match=message):
        optimal_precision(KNOWN, efficiencies, SPEEDS, 1e9, 1e10, spend)
