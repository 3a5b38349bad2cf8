"""Slopes against differences, SciPy against a search of another kind, and many problems at once against one by one."""

import numpy as np
import pytest
from scipy.optimize import minimize as any_minimize

from qlearn.training import law_fitting
from qlearn.training.law_fitting import DELTA, LAW, Problem, huber
from qlearn.training.scaling_runs import logs, published

SETS = [logs(published("bf16")), logs(published("forward_quest")), logs(published("backward_sr"))]
X = np.array([1.0, 0.6, 0.8, 0.5, 0.3, 0.3, 0.0, 0.0, -0.4, 0.1, 0.05, -0.1])


@pytest.fixture
def problem():
    return Problem(SETS)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.0, 0.0), (5e-5, 1.25e-9), (-5e-5, 1.25e-9), (1e-4, 5e-9), (3e-4, 2.5e-8), (-3e-4, 2.5e-8)],
    ids=["zero", "inside", "inside, negative", "at delta", "beyond", "beyond, negative"],
)
def test_hubers_function(error, expected):
    assert huber([error]) == pytest.approx(expected, rel=1e-12)


def test_hubers_function_is_pytorchs():
    torch = pytest.importorskip("torch")
    errors = torch.linspace(-5e-4, 5e-4, 101, dtype=torch.float64)
    expected = torch.nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="sum", delta=DELTA)
    assert huber(errors.numpy()) == pytest.approx(expected.item(), rel=1e-12)


def test_errors_are_those_of_the_formula(problem):
    a, alpha, b, beta, e, gamma = X[:LAW]
    A, B = np.exp(a + alpha * problem.center[0]), np.exp(b + beta * problem.center[1])
    expected = []
    for scheme, shift in zip(("bf16", "forward_quest", "backward_sr"), X[LAW:].reshape(-1, 2), strict=True):
        for row in published(scheme):
            N, D = row["params"] * np.exp(shift[0]), row["tokens"] * np.exp(shift[1])
            expected.append(np.log(((A / N**alpha + B / D**beta) ** gamma + np.exp(e)) / row["loss"]))
    assert problem.errors(X) == pytest.approx(np.array(expected), abs=1e-12)


def test_slopes_are_the_differences(problem):
    step = 1e-6
    for i, column in enumerate(problem.slopes(X).T):
        more, less = X.copy(), X.copy()
        more[i] += step
        less[i] -= step
        differences = (problem.errors(more) - problem.errors(less)) / (2 * step)
        assert column == pytest.approx(differences, abs=1e-8), i


def test_a_stack_of_unknowns_is_many_problems(problem):
    stack = np.stack([X, X + 0.01, X - 0.02])
    for each, errors, slopes in zip(stack, problem.errors(stack), problem.slopes(stack), strict=True):
        assert np.array_equal(errors, problem.errors(each)) and np.array_equal(slopes, problem.slopes(each))


def test_only_what_is_free_moves(problem):
    for free in ([0, 4], [LAW + 2], [1, 5, LAW + 5]):
        x, cost = law_fitting.minimize(problem, X, free)
        assert set(np.flatnonzero(x != X)) == set(free)
        assert cost == huber(problem.errors(x)) < huber(problem.errors(X))
        many = law_fitting.minimize_many(problem, X[None], free, np.ones((1, len(problem.log_loss))))
        assert set(np.flatnonzero(many[0] != X)) == set(free)


def test_scipy_finds_what_a_method_without_slopes_finds():
    problem = Problem(SETS[:1])
    found, cost = law_fitting.minimize(problem, X[:8], range(LAW))
    simplex = any_minimize(
        lambda theta: 1e6 * huber(problem.errors(np.append(theta, [0, 0]))), found[:LAW] + 0.02, method="Nelder-Mead",
        options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-9, "adaptive": True},
    )  # fmt: skip
    assert cost <= simplex.fun / 1e6 * (1 + 1e-9)
    assert cost == pytest.approx(simplex.fun / 1e6, rel=1e-3)


def test_many_at_once_are_as_good_as_one_by_one():
    runs = SETS[0]
    problem, generator = Problem([runs]), np.random.default_rng(0)
    start, _ = law_fitting.minimize(problem, X[:8], range(LAW))
    draws = [generator.integers(runs.shape[1], size=runs.shape[1]) for _ in range(12)]
    weights = np.stack([np.bincount(draw, minlength=runs.shape[1]) for draw in draws])
    many = law_fitting.minimize_many(problem, np.tile(start, (12, 1)), range(LAW), weights)
    costs = huber(problem.errors(many), weights)
    for draw, cost in zip(draws, costs, strict=True):
        _, expected = law_fitting.minimize(Problem([runs[:, draw]], problem.center), start, range(LAW))
        assert cost == pytest.approx(expected, rel=2e-3)


def test_equal_weights_change_nothing_and_a_weight_of_zero_drops_a_run():
    problem = Problem(SETS[:1])
    start, cost = law_fitting.minimize(problem, X[:8], range(LAW))
    runs = SETS[0].shape[1]
    weights = np.ones((2, runs))
    weights[1, -1] = 0
    both, without = law_fitting.minimize_many(problem, np.tile(start, (2, 1)), range(LAW), weights)
    assert huber(problem.errors(both)) <= cost * (1 + 1e-12)
    _, expected = law_fitting.minimize(Problem([SETS[0][:, :-1]], problem.center), start, range(LAW))
    assert huber(problem.errors(without)[:-1]) == pytest.approx(expected, rel=1e-3)
