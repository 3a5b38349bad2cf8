"""How a scaling law is fitted: its errors in logarithms, their slopes, and Huber's function made small.

A law of six parameters runs from 1e-2 to 1e6, and its terms are powers; in logarithms all of that becomes sums of
ordinary size. With n = log N and d = log D, and a, b, e the logs of A, B, E,

    s = log(exp(a - alpha n) + exp(b - beta d))        log L = log(exp(gamma s) + exp(e))

An efficiency multiplies N or D, so its log is added to n or d. n and d are taken from their mean over the runs: there a
and alpha are nearly free of each other, where far from it a small change of alpha would need a large one of a.

The unknowns of a `Problem` are one vector x: the six of the law, then the logs of eff_N and eff_D of each set of runs.
Which of them are free makes the difference between fitting a law, fitting an efficiency, and fitting everything.

What is made small is the sum of Huber's function over the errors r,

    h(r) = r^2 / 2  for |r| <= delta,      delta (|r| - delta / 2)  beyond

`minimize` does it with SciPy, from one start. `minimize_many` goes from many starts, or for many problems that differ
in the **weights** of the runs, all at once in NumPy: Levenberg's and Marquardt's method, in which each error counts
with the weight min(1, delta / |r|). A square with this weight touches Huber's function at r and lies above it
elsewhere, so a step down the squares is a step down Huber's function. `minimize_from` lets it choose among several
starts, and SciPy finish.
"""

import numpy as np
from scipy.optimize import least_squares

DELTA = 1e-4
LAW = 6  # unknowns of the law: a, alpha, b, beta, e, gamma
_STEPS = 400


def huber(errors, weights=1.0, delta=DELTA):
    """The sum of Huber's function over the last axis of an array of errors, each taken `weights` times.

    >>> float(huber([1.0, -3.0], delta=2.0))
    4.5
    """
    size = np.abs(np.asarray(errors, np.float64))
    return (weights * np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))).sum(-1)


class Problem:
    """Runs of one or more schemes, and what a vector of unknowns says of them.

    sets: for each scheme an array (3, runs) of log N, log D and log loss.
    center: (n, d) from which logs are counted, or None for their means.
    Unknown vectors x are (..., 6 + 2 sets) in centred logarithms; leading axes are problems side by side.
    """

    def __init__(self, sets, center=None):
        n, d, self.log_loss = np.concatenate(sets, axis=1)
        self.center = center or (n.mean(), d.mean())
        self._n, self._d = n - self.center[0], d - self.center[1]
        self._owner = np.repeat(np.arange(len(sets)), [each.shape[1] for each in sets])
        self._of = np.eye(len(sets))[self._owner]  # (runs, sets): 1 where the run belongs to the set

    def errors(self, x):
        """log L - log loss of each run: (..., runs)."""
        return self._terms(x)[2] - self.log_loss

    def slopes(self, x):
        """The derivatives of the errors by x: (..., runs, 6 + 2 sets)."""
        gamma, n, d = x[..., 5, None], *self._moved(x)
        log_sum, by_size, log_law = self._terms(x)
        reducible = np.exp(gamma * log_sum - log_law)  # the share of the loss that more of N and D can take away
        by_a, by_b = gamma * reducible * by_size, gamma * reducible * (1 - by_size)
        law = np.stack([by_a, -by_a * n, by_b, -by_b * d, 1 - reducible, reducible * log_sum], axis=-1)
        shift = np.stack([-x[..., 1, None] * by_a, -x[..., 3, None] * by_b], axis=-1)  # by log eff_N and log eff_D
        own = self._of[:, :, None] * shift[..., None, :]
        return np.concatenate([law, own.reshape(*own.shape[:-2], -1)], axis=-1)

    def _moved(self, x):
        shift = x[..., LAW:].reshape(*x.shape[:-1], -1, 2)[..., self._owner, :]
        return self._n + shift[..., 0], self._d + shift[..., 1]

    def _terms(self, x):
        """log of the sum of both terms, the share of A / N^alpha in it, and log L: (..., runs) each."""
        a, alpha, b, beta, e, gamma = (x[..., i, None] for i in range(LAW))
        n, d = self._moved(x)
        log_size = a - alpha * n
        log_sum = np.logaddexp(log_size, b - beta * d)
        return log_sum, np.exp(log_size - log_sum), np.logaddexp(gamma * log_sum, e)


def minimize_from(starts, problem, free):
    """The best of what Huber's function can be made from several starts.

    starts: (starts, unknowns).  free: the entries that may change.
    Returns (x, sum of Huber's function).
    """
    ends = minimize_many(problem, starts, free, np.ones((len(starts), len(problem.log_loss))))
    costs = huber(problem.errors(ends))
    best = int(np.argmin(costs))
    return min((ends[best], float(costs[best])), minimize(problem, ends[best], free), key=lambda end: end[1])


def minimize(problem, x, free):
    """Make Huber's function small from x on, by changing the entries `free`, with SciPy.

    Returns (x, sum of Huber's function).
    """
    x, free = np.array(x, np.float64), list(free)

    def whole(part):
        x[free] = part
        return x

    end = least_squares(
        lambda part: problem.errors(whole(part)), x[free], lambda part: problem.slopes(whole(part))[:, free],
        loss="huber", f_scale=DELTA, x_scale="jac", xtol=1e-10, ftol=1e-12, gtol=1e-14, max_nfev=2000,
    )  # fmt: skip
    return whole(end.x), float(huber(problem.errors(whole(end.x))))


def minimize_many(problem, x, free, weights, steps=_STEPS):
    """The same from many starts, or for many weightings of the runs, side by side.

    x: (problems, unknowns), where each begins.  weights: (problems, runs), how often a run counts.
    Returns x, with the entries `free` changed.
    """
    x, free = np.array(x, np.float64), list(free)
    errors, damping = problem.errors(x), np.full(len(x), 1e-3)
    cost = huber(errors, weights)
    for _ in range(steps):
        slopes = problem.slopes(x)[..., free]
        weighted = slopes * (weights * np.minimum(1, DELTA / np.maximum(np.abs(errors), 1e-30)))[..., None]
        square = weighted.swapaxes(1, 2) @ slopes
        diagonal = np.einsum("pii->pi", square)  # a view: raising it damps the step
        diagonal *= 1 + damping[:, None]
        diagonal += 1e-30
        trial = x.copy()
        trial[:, free] -= np.linalg.solve(square, weighted.swapaxes(1, 2) @ errors[..., None])[..., 0]
        with np.errstate(all="ignore"):  # a step may lead nowhere; then it is not taken
            trial_errors = problem.errors(trial)
            trial_cost = huber(trial_errors, weights)
        better = trial_cost < cost
        x[better], errors[better], cost[better] = trial[better], trial_errors[better], trial_cost[better]
        damping = np.clip(np.where(better, damping * 0.3, damping * 4), 1e-12, 1e8)
    return x
