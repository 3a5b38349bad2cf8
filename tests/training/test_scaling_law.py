"""Known laws are found again, the published figures come out, and what is weakly identified is seen to be."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from qlearn.training import scaling_law
from qlearn.training.scaling_law import (
    PARAMETERS,
    SCHEMES,
    Efficiency,
    Law,
    bootstrap,
    errors,
    fit,
    fit_efficiency,
    fit_together,
    huber,
    interval,
    profile,
    published,
    select,
)

KNOWN = Law(A=2e5, alpha=0.6, B=3e5, beta=0.52, E=1.5, gamma=0.3)
NOTHING_LOST = Efficiency()
SIZES, RATIOS = (3e7, 1e8, 3e8, 1e9), (25, 100, 400, 1600)


def rows_of(law, scheme="bf16", efficiency=NOTHING_LOST, sizes=SIZES, ratios=RATIOS):
    return [
        {"scheme": scheme, "params": N, "tokens": r * N, "loss": float(law.loss(N, r * N, efficiency.N, efficiency.D))}
        for N, r in itertools.product(sizes, ratios)
    ]


@pytest.fixture(scope="module")
def law():
    return fit(published("bf16"))


@pytest.fixture(scope="module")
def samples():
    return bootstrap(published(), resamples=100)


# --- a law that is known


@pytest.mark.parametrize(
    "known",
    [KNOWN, Law(4e2, 0.34, 4e2, 0.28, 1.7, 1.0), Law(1e6, 0.7, 1e4, 0.4, 0.9, 0.35), Law(5e4, 0.5, 5e4, 0.5, 2.0, 0.5)],
    ids=["like Quartet's", "Chinchilla's", "unequal terms", "equal exponents"],
)
def test_a_law_is_found_from_points_that_lie_on_it(known):
    found = fit(rows_of(known))
    assert errors(found, rows_of(known)) == pytest.approx(0, abs=1e-6)
    for name in ("alpha", "beta", "E", "gamma"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=0.01), name


@pytest.mark.parametrize(
    ("efficiency", "which"),
    [
        (Efficiency(0.5, 1.0), ("N",)),
        (Efficiency(1.0, 0.7), ("D",)),
        (Efficiency(0.6, 0.9), ("N", "D")),
        (Efficiency(1.2, 1.0), ("N",)),
        (Efficiency(0.02, 1.0), ("N",)),
    ],
    ids=["N", "D", "both", "better than nothing", "hardly any"],
)
def test_an_efficiency_is_found_from_points_that_lie_on_it(efficiency, which):
    found = fit_efficiency(KNOWN, rows_of(KNOWN, "x", efficiency), which)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(efficiency), rel=1e-6)
    assert errors(KNOWN, rows_of(KNOWN, "x", efficiency), found) == pytest.approx(0, abs=1e-8)


def test_what_is_left_out_stays_one():
    found = fit_efficiency(KNOWN, rows_of(KNOWN, "x", Efficiency(0.6, 0.9)), ("D",))
    assert found.N == 1 and found.D < 0.9


def test_one_run_that_went_badly_pulls_little():
    rows = rows_of(KNOWN)
    rows[5]["loss"] *= 1.2
    found = fit(rows)
    assert np.sort(np.abs(errors(found, rows)))[:-1] == pytest.approx(0, abs=1e-3)
    rows = rows_of(KNOWN, "x", Efficiency(0.5))
    rows[3]["loss"] *= 1.2
    found = fit_efficiency(KNOWN, rows)
    assert abs(found.N - 0.5) < 5e-4


def test_everything_together_finds_law_and_efficiencies():
    efficiencies = {"forward": Efficiency(0.5, 1.0), "both": Efficiency(0.6, 0.8)}
    rows = rows_of(KNOWN) + [row for name, each in efficiencies.items() for row in rows_of(KNOWN, name, each)]
    found, shares = fit_together(rows, {"forward": ("N",), "both": ("N", "D")})
    assert errors(found, rows_of(KNOWN)) == pytest.approx(0, abs=1e-6)
    assert dataclasses.astuple(shares["forward"]) == pytest.approx((0.5, 1.0), rel=1e-4)
    assert dataclasses.astuple(shares["both"]) == pytest.approx((0.6, 0.8), rel=1e-4)


def test_what_is_fixed_stays_and_the_rest_is_fitted():
    found = fit(rows_of(KNOWN), fixed={"E": 1.5, "gamma": 0.3})
    assert found.gamma == 0.3
    assert (found.E, found.alpha, found.beta) == pytest.approx((1.5, 0.6, 0.52), rel=1e-3)
    assert fit(rows_of(KNOWN), fixed={"alpha": 0.5}).alpha == 0.5


def test_a_loss_broadcasts_and_an_efficiency_multiplies():
    N, D = np.array(SIZES)[:, None], np.array([1e9, 1e10])
    losses = KNOWN.loss(N, D, eff_N=0.5, eff_D=0.25)
    assert losses.shape == (4, 2) and losses.dtype == np.float64
    assert np.array_equal(losses, KNOWN.loss(N / 2, D / 4))
    assert KNOWN.loss(1e9, 1e10) == pytest.approx((2e5 / 1e9**0.6 + 3e5 / 1e10**0.52) ** 0.3 + 1.5, rel=1e-14)
    assert KNOWN.loss(1e30, 1e30) == pytest.approx(1.5, abs=2e-3)


# --- the published runs


def test_the_published_law_is_that_of_the_authors_notebook(law):
    expected = (1.274e5, 0.5785, 4.658e5, 0.5389, 1.3408, 0.2764)
    assert dataclasses.astuple(law) == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("forward_quest", (0.645, 1)),
        ("backward_sr", (1, 0.893)),
        ("backward_rtn_v1", (1, 0.928)),
        ("quest_forward_sr_backward", (0.658, 0.822)),
    ],
)
def test_the_published_efficiencies(law, scheme, expected):
    found = fit_efficiency(law, published(scheme), SCHEMES[scheme])
    assert dataclasses.astuple(found) == pytest.approx(expected, abs=6e-4)


def test_without_the_largest_runs_the_parameters_move_and_the_efficiencies_do_not():
    grid = [row for row in published("bf16") if row["params"] < 3e8 and row["tokens"] < 1000 * row["params"]]
    assert len(grid) == 21
    law = fit(grid)
    assert (law.alpha, law.E) == pytest.approx((0.662, 1.663), abs=1e-3)
    assert abs(fit_efficiency(law, published("forward_quest")).N - 0.652) < 1e-3
    assert abs(fit_efficiency(law, published("backward_sr"), ("D",)).D - 0.891) < 1e-3


def test_in_one_fit_the_efficiencies_are_about_the_same(law):
    together, shares = fit_together(published())
    assert abs(together.E - law.E) > 0.05
    for scheme, which in SCHEMES.items():
        staged = fit_efficiency(law, published(scheme), which)
        assert dataclasses.astuple(shares[scheme]) == pytest.approx(dataclasses.astuple(staged), abs=0.02)


def test_no_law_nearby_fits_better(law):
    least = huber(errors(law, published("bf16")))
    for name in PARAMETERS:
        for factor in (0.999, 1.001):
            moved = dataclasses.replace(law, **{name: getattr(law, name) * factor})
            assert huber(errors(moved, published("bf16"))) > least


def test_whose_loss_it_is_the_runs_tell_forward_and_hardly_backward(law):
    def misfit(scheme, which):
        points = published(scheme)
        return huber(errors(law, points, fit_efficiency(law, points, which)))

    assert misfit("forward_quest", ("D",)) > 4 * misfit("forward_quest", ("N",))
    assert misfit("backward_sr", ("N",)) < 1.2 * misfit("backward_sr", ("D",))
    assert misfit("backward_rtn_v1", ("N",)) < 0.6 * misfit("backward_rtn_v1", ("D",))


def test_the_published_rows():
    counts = {scheme: len(published(scheme)) for scheme in ("bf16", *SCHEMES)}
    assert counts == {
        "bf16": 24, "forward_quest": 21, "backward_sr": 21, "backward_rtn_v1": 17, "quest_forward_sr_backward": 21,
    }  # fmt: skip
    assert sum(counts.values()) == len(published())
    block = 640 * (4 * 640 + 3 * 1792) + 2 * 640  # attention, a gated MLP, two norms
    assert {row["params"] for row in published() if row["params"] < 4e7} == {6 * block + 640}
    assert all(row["tokens"] % 512**2 == 0 and 2 < row["loss"] < 4 for row in published())


# --- bootstrap and profile


def test_the_parameters_are_weakly_identified_and_the_efficiencies_are_not(law, samples):
    ratio = {name: math.log(high / low) for name, (low, high) in ((n, interval(s)) for n, s in samples.items())}
    for efficiency in (("forward_quest", "N"), ("backward_sr", "D"), ("backward_rtn_v1", "D")):
        assert ratio[efficiency] < 0.1
        assert all(ratio[name] > 2.5 * ratio[efficiency] for name in PARAMETERS)
    assert ratio["A"] > math.log(10) and ratio["B"] > math.log(10)


def test_the_intervals_hold_the_fits(law, samples):
    for name in PARAMETERS:
        low, high = interval(samples[name])
        assert low < getattr(law, name) < high
    low, high = interval(samples["forward_quest", "N"])
    assert low < 0.645 < high


def test_a_bootstrap_draws_points_and_fits_them_as_fit_does(law):
    """The draws are made again here, and each is fitted from eight starts."""
    rows, schemes = published(), {"forward_quest": ("N",)}
    found = bootstrap(rows, schemes, resamples=2, seed=3)
    points = [(row["params"], row["tokens"]) for row in select(rows, "bf16")]
    generator = np.random.default_rng(3)
    for i in range(2):
        draw = [points[j] for j in generator.integers(len(points), size=len(points))]
        base, own = (
            [row for p in draw for row in select(rows, scheme) if (row["params"], row["tokens"]) == p]
            for scheme in ("bf16", "forward_quest")
        )
        drawn = fit(base)
        ours = Law(**{name: found[name][i] for name in PARAMETERS})
        assert huber(errors(ours, base)) <= huber(errors(drawn, base)) * 1.01
        assert found["forward_quest", "N"][i] == pytest.approx(fit_efficiency(ours, own).N, rel=1e-3)


def test_a_seed_gives_the_same_samples_and_another_gives_others():
    rows, schemes = published(), {"backward_sr": ("D",)}
    first, again, other = (bootstrap(rows, schemes, resamples=5, seed=seed) for seed in (0, 0, 1))
    assert list(first) == [*PARAMETERS, ("backward_sr", "D")]
    assert all(samples.shape == (5,) and np.array_equal(samples, again[name]) for name, samples in first.items())
    assert not np.array_equal(first["E"], other["E"])


def test_without_noise_a_bootstrap_does_not_move():
    rows = rows_of(KNOWN) + rows_of(KNOWN, "x", Efficiency(0.5))
    found = bootstrap(rows, {"x": ("N",)}, resamples=10)
    assert found["x", "N"] == pytest.approx(0.5, rel=1e-3)
    assert bootstrap(rows, {}, resamples=2).keys() == set(PARAMETERS)


def test_a_profile_is_flat_along_E_and_the_efficiency_hardly_moves(law):
    points, values = published("bf16"), (1.0, 1.2, law.E, 1.5)
    found = profile(points, "E", values, law)
    assert [each.E for each, _ in found] == pytest.approx(values)
    costs = [cost for _, cost in found]
    assert min(costs) == costs[2] == pytest.approx(huber(errors(law, points))) and max(costs) < 1.4 * costs[2]
    shares = [fit_efficiency(each, published("forward_quest")).N for each, _ in found]
    assert np.ptp(shares) < 0.012
    from_nothing = fit(points, fixed={"E": 1.0})
    assert huber(errors(from_nothing, points)) == pytest.approx(costs[0], rel=1e-3)


def test_an_interval_is_of_quantiles():
    assert interval(np.arange(1001), level=0.9) == pytest.approx((50, 950))


# --- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 0.0}, "row 3 has loss=0.0"),
        ({"loss": -1.0}, "row 3 has loss=-1.0"),
        ({"loss": float("nan")}, "row 3 has loss=nan"),
        ({"loss": float("inf")}, "row 3 has loss=inf"),
        ({"params": 0}, "row 3 has params=0"),
        ({"tokens": -5}, "row 3 has tokens=-5"),
        ({"loss": "diverged"}, "row 3 has no number 'loss'"),
        ({"tokens": None}, "row 3 has no number 'tokens'"),
    ],
    ids=["zero loss", "negative", "NaN", "infinite", "no parameters", "negative tokens", "words", "nothing"],
)
def test_a_bad_row_is_named(change, message):
    rows = rows_of(KNOWN)
    rows[3] |= change
    for function in (fit, lambda rows: fit_efficiency(KNOWN, rows), lambda rows: bootstrap(rows, {}, resamples=1)):
        with pytest.raises(ValueError, match=message):
            function(rows)


def test_a_row_without_a_loss_is_named():
    rows = rows_of(KNOWN)
    del rows[0]["loss"]
    with pytest.raises(ValueError, match="row 0 has no number 'loss'"):
        fit(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 different points"),
        (rows_of(KNOWN)[:5], "5 different points.*6 unknowns"),
        (rows_of(KNOWN)[:3] * 3, "3 different points"),
        (rows_of(KNOWN, sizes=(1e8,), ratios=range(10, 90, 10)), "8 different points, of 1 sizes"),
        (
            [row | {"tokens": 1e10} for row in rows_of(KNOWN, sizes=np.geomspace(1e7, 1e9, 9), ratios=(1,))],
            "1 numbers of",
        ),
    ],
    ids=["none", "fewer than parameters", "the same again", "one size", "one length"],
)
def test_too_few_points_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        fit(rows)


def test_fewer_parameters_need_fewer_points():
    assert fit(rows_of(KNOWN)[:5] + rows_of(KNOWN)[-1:], fixed={"gamma": 0.3}).gamma == 0.3
    with pytest.raises(ValueError, match=r"1 different points.*2 unknowns"):
        fit_efficiency(KNOWN, rows_of(KNOWN)[:1], ("N", "D"))


@pytest.mark.parametrize("which", [(), ("X",), ("N", "N"), ("D", "N"), "gamma"], ids=str)
def test_an_unknown_efficiency_is_refused(which):
    with pytest.raises(ValueError, match="names no efficiencies"):
        fit_efficiency(KNOWN, rows_of(KNOWN), which)


@pytest.mark.parametrize("loss", [1.2, 1e3], ids=["below E", "beyond all"])
def test_losses_that_no_efficiency_explains_are_refused(loss):
    rows = [row | {"loss": loss} for row in rows_of(KNOWN)]
    with pytest.raises(ValueError, match=r"no efficiency explains these losses with E=1\.5"):
        fit_efficiency(KNOWN, rows)


@pytest.mark.parametrize(
    "function", [published, lambda scheme: select(published(), scheme)], ids=["published", "select"]
)
def test_an_unknown_scheme_is_refused(function):
    with pytest.raises(ValueError, match="no runs of the scheme 'fp3'; there are: backward_rtn_v1, backward_sr, bf16"):
        function("fp3")


def test_schemes_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="'forward_quest'; there are: bf16"):
        bootstrap(published("bf16"), resamples=1)
    with pytest.raises(ValueError, match="'bf16'; there are: backward_sr"):
        fit_together(published("backward_sr"))
    with pytest.raises(ValueError, match="there are: none"):
        select([], "bf16")


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"A": 1e5}, "'A' cannot be fixed"),
        ({"delta": 1}, "'delta' cannot"),
        ({"E": 0}, "E=0"),
        ({"gamma": math.nan}, "nan"),
    ],
    ids=["A", "unknown", "zero", "NaN"],
)
def test_what_cannot_be_fixed_is_refused(fixed, message):
    with pytest.raises(ValueError, match=message):
        fit(rows_of(KNOWN), fixed=fixed)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_a_law_has_positive_parameters(value):
    with pytest.raises(ValueError, match=f"beta={value} makes no scaling law"):
        dataclasses.replace(KNOWN, beta=value)


def test_a_bootstrap_of_nothing_or_of_too_little_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap(published(), resamples=0)
    monkeypatch.setattr(scaling_law, "_DRAWS", 5)
    rows = rows_of(KNOWN, sizes=(1e8, 1e9), ratios=(25, 100, 400))
    with pytest.raises(ValueError, match=r"draws from 6 points can be fitted"):
        bootstrap(rows, {}, resamples=20)
