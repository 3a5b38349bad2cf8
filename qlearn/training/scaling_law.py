"""A scaling law that knows about quantization: what training in FP4 costs, counted in parameters and in tokens.

A **scaling law** says which loss a model of N parameters reaches after D tokens. Quartet's is

    L(N, D, P) = (A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E

E is the loss of a model without limits: what no model can know about the next token. A / N^alpha is what too few
parameters add, B / D^beta what too little text adds; both shrink as powers. The last two symbols are about a precision
P. Rounding in the **forward** pass makes a model act like a smaller one, of N eff_N parameters. Rounding in the
**backward** pass makes text teach less, as if there were only D eff_D tokens of it. Without rounding both are 1. So an
eff_N of 0.65 says: in this precision 100 million parameters are worth 65 million.

It is fitted in two stages. First A, alpha, B, beta, E and gamma on runs without rounding (`fit`). Then the law is held
fixed, and a scheme's own runs tell its eff_N, or its eff_D, or both (`fit_efficiency`).

What is made small is the sum over the runs of Huber's function of log L(N, D) - log loss, the error as a share of the
loss. With delta = 1e-4 it counts errors above a hundredth of a percent by their size and not by their square, so a
single run that went badly pulls little. How that is done is in `law_fitting.py`.

The six parameters are **weakly identified**: quite different laws fit the same runs about equally well, because a
smaller E can be made up for by a smaller gamma and exponents to match. `bootstrap` shows it by fitting again and again
on runs drawn with replacement, and `profile` by holding one parameter at a value and fitting the others. What moves
far less in both is eff_N and eff_D. They compare two sets of runs with the same sizes and the same amounts of text,
and any law that goes through the one set tells how far it must be shifted to go through the other.

That rounding forward costs parameters, and rounding backward tokens, is put into the law and need not come out of the
runs. For the forward pass it does. For the backward pass it does not: eff_N alone explains the runs with stochastic
rounding about as well as eff_D alone, and those with the withdrawn rounding to nearest better. (Fit either one and
compare `huber(errors(...))`.)

The losses that Quartet's authors published ship with the package (`published`). Source: Castro et al., Quartet, arXiv
2505.14669; the Huber loss on log L from Hoffmann et al., arXiv 2203.15556, whose law has gamma = 1.
"""

import itertools
import math
from dataclasses import asdict, astuple, dataclass

import numpy as np

from qlearn.training.law_fitting import LAW, Problem, huber, minimize, minimize_from, minimize_many
from qlearn.training.scaling_runs import BASE, SCHEMES, check_enough, enough, logs, point_of, select
from qlearn.training.scaling_runs import published as published

PARAMETERS = ("A", "alpha", "B", "beta", "E", "gamma")
_FAR = 1e3  # what is further from 1 than this factor is no efficiency any more
_STARTS = tuple(itertools.product((0.3, 0.6), (0.2, 0.5), (0.3, 0.6)))  # alpha and beta, gamma, E / smallest loss
_DRAWS = 1000


@dataclass(frozen=True)
class Law:
    """The six parameters of a scaling law; the units of A and B are those that make N in parameters, D in tokens.

    >>> law = Law(A=100.0, alpha=0.5, B=400.0, beta=0.5, E=1.0, gamma=1.0)
    >>> float(law.loss(1e6, 4e6)), float(law.loss(1e6, 4e6, eff_N=0.25))
    (1.3, 1.4)
    """

    A: float
    alpha: float
    B: float
    beta: float
    E: float
    gamma: float

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} makes no scaling law; all six parameters are above 0")

    def loss(self, N, D, eff_N=1.0, eff_D=1.0):
        """Nats per token of N parameters after D tokens; numbers or arrays that broadcast, float64 out."""
        N, D = np.asarray(N, np.float64) * eff_N, np.asarray(D, np.float64) * eff_D
        return (self.A / N**self.alpha + self.B / D**self.beta) ** self.gamma + self.E


@dataclass(frozen=True)
class Efficiency:
    """What share of the parameters (N) and of the tokens (D) is left under a rounding, in the eyes of the law."""

    N: float = 1.0
    D: float = 1.0


def fit(points, *, fixed=None, start=None):
    """The law through runs without rounding.

    points: rows with "params", "tokens" and "loss"; other keys are ignored.
    fixed: {name: value} of alpha, beta, E or gamma that are not to be fitted; {"gamma": 1.0} gives Chinchilla's law.
    start: a Law to start from; without one, eight starts are tried and the best end is taken.
    Returns a Law. Raises ValueError for a bad row; for fewer different points than parameters to fit; when all points
    have one size, or one number of tokens; for a parameter that cannot be fixed; and when the best law loses a term.

    >>> law = fit(published("bf16"))
    >>> print(f"A={law.A:.4g} alpha={law.alpha:.4f} B={law.B:.4g} beta={law.beta:.4f}")
    A=1.274e+05 alpha=0.5785 B=4.658e+05 beta=0.5389
    >>> print(f"E={law.E:.4f} gamma={law.gamma:.4f}")
    E=1.3408 gamma=0.2764
    """
    fixed = _checked_fixed(fixed)
    runs = logs(points)
    check_enough(points, LAW - len(fixed))
    problem, free = Problem([runs]), [i for i, name in enumerate(PARAMETERS) if name not in fixed]
    starts = np.array([_unknowns(start, problem)] if start else list(_starts(runs[2])))
    for name, value in fixed.items():
        starts[:, PARAMETERS.index(name)] = math.log(value) if name == "E" else value
    return _law(minimize_from(starts, problem, free)[0], problem)


def fit_efficiency(law, points, which=("N",)):
    """How many of its parameters, or of its tokens, a scheme is worth, with the law held fixed.

    points: the scheme's own rows.  which: ("N",), ("D",) or ("N", "D"); an efficiency that is left out is 1.
    Returns an Efficiency. Raises ValueError for a bad row, fewer different points than efficiencies, an unknown
    efficiency, and losses that none explains, such as those below the law's E.

    >>> law = fit(published("bf16"))
    >>> fit_efficiency(law, published("forward_quest"), which=("N",))
    Efficiency(N=0.645..., D=1.0)
    """
    free = _places(which)
    problem = Problem([logs(points)])
    check_enough(points, len(free), kinds=0)
    starts = np.tile(_unknowns(law, problem), (2, 1))
    starts[:, free] = np.log([[0.1], [0.9]])
    return _efficiency(minimize_from(starts, problem, free)[0][LAW:], law)


def fit_together(rows, schemes=SCHEMES, base=BASE):
    """Law and efficiencies in one fit of all runs, where `fit` and `fit_efficiency` take two stages.

    rows: with "scheme".  schemes: {scheme: efficiencies it can have}.  base: the scheme without rounding.
    Returns (Law, {scheme: Efficiency}). Raises ValueError as those two do.
    """
    law, found = _staged(rows, schemes, base)
    problem = Problem([logs(select(rows, scheme)) for scheme in (base, *schemes)])
    x = _unknowns(law, problem, (Efficiency(), *found.values()))
    x, _ = minimize(problem, x, [*range(LAW), *_all_places(schemes)])
    law, shifts = _law(x, problem), x[LAW:].reshape(-1, 2)[1:]
    return law, {scheme: _efficiency(shift, law) for scheme, shift in zip(schemes, shifts, strict=True)}


def errors(law, points, efficiency=None):
    """log L(N, D) - log loss of each row, float64: 0.01 says that the law is one percent too high there."""
    efficiency = efficiency or Efficiency()
    n, d, log_loss = np.exp(logs(points))
    return np.log(law.loss(n, d, efficiency.N, efficiency.D) / log_loss)


def profile(points, name, values, law=None):
    """The best laws with one parameter held at each of some values: their misfit tells what the points say of it.

    name: alpha, beta, E or gamma.  values: floats.  law: the fit to start from, or None to make it.
    Returns [(Law, huber(errors))], one for each value. Raises ValueError as `fit` does.
    """
    law = law or fit(points)
    laws = [fit(points, fixed={name: float(value)}, start=law) for value in values]
    return [(each, float(huber(errors(each, points)))) for each in laws]


def bootstrap(rows, schemes=SCHEMES, base=BASE, *, resamples=100, seed=0):
    """How much the fits move when the runs are drawn anew: both stages, on `resamples` sets of runs.

    Points (N, D) are drawn with replacement, as many as there are, and each brings its runs of all schemes along. They
    belong together: runs of one size and one text have errors in common.

    rows: with "scheme".  schemes: {scheme: efficiencies it can have}.  base: the scheme without rounding.
    Returns {name: float64 (resamples,)}, names being those of the six parameters, and (scheme, "N") or (scheme, "D");
    take intervals with `interval`. Raises ValueError as `fit` and `fit_efficiency` do, for fewer than one resample,
    and when the points are so few that hardly any draw can be fitted.

    >>> found = bootstrap(published(), {"forward_quest": ("N",)}, resamples=20)
    >>> low, high = interval(found["forward_quest", "N"])
    >>> print(f"{low:.2f} {high:.2f}")
    0.63 0.65
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples} draws nothing; ask for at least 1")
    law, found = _staged(rows, schemes, base)
    counts = _draw(rows, schemes, base, resamples, np.random.default_rng(seed))
    problem = Problem([logs(select(rows, base))])
    x = np.tile(_unknowns(law, problem), (resamples, 1))
    x = minimize_many(problem, x, range(LAW), counts[base])
    samples = dict(zip(PARAMETERS, _parameters(x, problem), strict=True))
    for scheme, which in schemes.items():
        x[:, LAW:] = np.log(astuple(found[scheme]))
        own = Problem([logs(select(rows, scheme))], problem.center)
        shares = np.exp(minimize_many(own, x, _places(which), counts[scheme])[:, LAW:])
        samples |= {(scheme, name): shares[:, "ND".index(name)] for name in which}
    return samples


def interval(samples, level=0.9):
    """(low, high) between which the middle share `level` of the samples lies.

    >>> interval(range(101), level=0.5)
    (25.0, 75.0)
    """
    low, high = np.quantile(np.asarray(samples, np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _staged(rows, schemes, base):
    law = fit(select(rows, base))
    return law, {scheme: fit_efficiency(law, select(rows, scheme), which) for scheme, which in schemes.items()}


def _draw(rows, schemes, base, resamples, generator):
    """How often each run is drawn, {scheme: int (resamples, runs)}; a draw too poor to be fitted is drawn again."""
    sets = {scheme: [point_of(row) for row in select(rows, scheme)] for scheme in (base, *schemes)}
    points = list(dict.fromkeys(itertools.chain.from_iterable(sets.values())))
    kept = []
    for _ in range(_DRAWS + resamples):
        draw = generator.integers(len(points), size=len(points))
        times = dict(zip(points, np.bincount(draw, minlength=len(points)).tolist(), strict=True))
        drawn = {scheme: [point for point in own if times[point]] for scheme, own in sets.items()}
        if enough(drawn[base], LAW) and all(enough(drawn[s], len(which), 0) for s, which in schemes.items()):
            kept.append([times[point] for own in sets.values() for point in own])
        if len(kept) == resamples:
            ends = np.cumsum([len(own) for own in sets.values()])
            return dict(zip(sets, np.split(np.array(kept), ends[:-1], axis=1), strict=True))
    raise ValueError(
        f"only {len(kept)} of {_DRAWS + resamples} draws from {len(points)} points can be fitted; give more runs"
    )


def _starts(log_loss):
    """Where to begin, in centred logs: both terms equally large, and the law through the median loss."""
    for exponent, gamma, share in _STARTS:
        e = math.log(share) + log_loss.min()
        term = math.log(math.exp(np.median(log_loss)) - math.exp(e)) / gamma - math.log(2)
        yield np.array([term, exponent, term, exponent, e, gamma, 0.0, 0.0])


def _unknowns(law, problem, efficiencies=(Efficiency(),)):
    """The vector that a Problem speaks of."""
    A, alpha, B, beta, E, gamma = astuple(law)
    n, d = problem.center
    theta = [math.log(A) - alpha * n, alpha, math.log(B) - beta * d, beta, math.log(E), gamma]
    return np.array([*theta, *np.log([astuple(each) for each in efficiencies]).flat])


def _parameters(x, problem):
    """The six parameters of one such vector or of many: an array (6, ...)."""
    a, alpha, b, beta, e, gamma = np.moveaxis(x, -1, 0)[:LAW]
    with np.errstate(over="ignore"):
        return np.stack(
            [np.exp(a + alpha * problem.center[0]), alpha, np.exp(b + beta * problem.center[1]), beta, np.exp(e), gamma]
        )


def _law(x, problem):
    try:
        return Law(*_parameters(x, problem).tolist())
    except ValueError as error:
        raise ValueError(f"these points fit no scaling law ({error}); give runs of more sizes and lengths") from error


def _efficiency(shift, law):
    N, D = np.exp(shift).tolist()
    if not all(1 / _FAR < share < _FAR for share in (N, D)):
        raise ValueError(f"no efficiency explains these losses with E={law.E:.4g}; do law and rows belong together?")
    return Efficiency(N, D)


def _checked_fixed(fixed):
    fixed = dict(fixed or {})
    for name, value in fixed.items():
        if name not in ("alpha", "beta", "E", "gamma"):
            raise ValueError(f"{name!r} cannot be fixed; choose from alpha, beta, E and gamma")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} makes no scaling law; fix it at a value above 0")
    return fixed


def _places(which, first=LAW):
    """Where the efficiencies of a set stand among the unknowns."""
    which = tuple(which)
    if which not in (("N",), ("D",), ("N", "D")):
        raise ValueError(f"which={which} names no efficiencies; choose ('N',), ('D',) or ('N', 'D')")
    return [first + "ND".index(name) for name in which]


def _all_places(schemes):
    """The same for all schemes, after a first set, the base, which has none."""
    return [place for i, which in enumerate(schemes.values(), 1) for place in _places(which, LAW + 2 * i)]
