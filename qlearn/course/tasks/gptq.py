"""The exercise of lesson 06: GPTQ from its Hessian to its last column, then the two steps of AWQ.

`hessian` and `quantize` ask for what the package's `InputStatistics` and `gptq_steps` give. `inverse_factor`,
`spread_error`, `awq_scale` and `fold` are a formula each: the parts from which the exercise puts GPTQ and AWQ together.
Matrices are float64 where they are inverted, so that an answer is not judged by how it rounds; inputs are eighths,
whose sums of products float32 holds exactly.
"""

import torch

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.methods import zero_point
from qlearn.methods.gptq import gptq_steps
from qlearn.methods.statistics import InputStatistics

TOKENS_BY_HAND = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])
BY_HAND = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64)


# What is right.


def hessian(x):
    """(2 / n) Σ x xᵀ over all n tokens, float32 (columns, columns)."""
    return InputStatistics.from_inputs(x, sample=0).hessian


def inverse_factor(hessian, percdamp):
    """U, upper triangular, with Uᵀ U the inverse of the damped Hessian."""
    damping = percdamp * hessian.diagonal().mean()
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def spread_error(weight, i, quantized, U):
    """The matrix after column i was rounded: column i quantized, the columns behind it shifted."""
    error = (weight[:, i] - quantized) / U[i, i]
    shifted = weight.clone()
    shifted[:, i] = quantized
    shifted[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
    return shifted


def quantize(weight, hessian, bits, group_size):
    """All columns, one after another; the grid of a group is set when its first column's turn comes."""
    *_, last = gptq_steps(weight, hessian, bits, group_size)
    return last.weight


def awq_scale(x, ratio):
    """mean |x| to the power of the ratio, at least 1e-4, with the largest and the smallest each other's inverse."""
    scale = (x.abs().mean(0) ** ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def fold(norm, weights, scale, offset=0):
    """The norm divided and all matrices behind it multiplied, column by column."""
    return (offset + norm) / scale - offset, [weight * scale for weight in weights]


# The cases.


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _eighths(*shape, seed=0, offset=0):
    """Random multiples of 1/8, float32: sums of their products are exact."""
    return ((8 * _random(*shape, seed=seed)).round() / 8 + offset).float()


def _mixed(tokens, columns, seed=0):
    """Inputs whose channels are mixtures of half as many causes, of different size."""
    causes = _random(tokens, max(columns // 2, 1), seed=seed)
    inputs = causes @ _random(max(columns // 2, 1), columns, seed=seed + 1) + 0.3 * _random(tokens, columns, seed=seed)
    return inputs * torch.linspace(0.4, 2, columns, dtype=torch.float64)


def _hessian_of(tokens, columns, seed=0):
    x = _mixed(tokens, columns, seed)
    return 2 / tokens * x.T @ x


def _hessian_cases():
    silent = _eighths(12, 4, seed=6)
    silent[:, 2] = 0
    return [
        Case("the four tokens of the lesson", (TOKENS_BY_HAND,)),
        Case("more tokens than columns", (_eighths(40, 6),)),
        Case("fewer tokens than columns", (_eighths(3, 5, seed=1),)),
        Case("as many tokens as columns", (_eighths(4, 4, seed=2),)),
        Case("one token", (_eighths(1, 3, seed=3),)),
        Case("windows of tokens", (_eighths(3, 5, 4, seed=4),)),
        Case("one window", (_eighths(1, 6, 3, seed=5),)),
        Case("batches of windows", (_eighths(2, 3, 4, 5, seed=10),)),
        Case("a channel that is always 0", (silent,)),
        Case("inputs that are far from 0", (_eighths(16, 3, seed=7, offset=2),)),
        Case("one channel", (_eighths(9, 1, seed=8),)),
        Case("a single vector", (_eighths(4, seed=9),)),
    ]


def _silent_hessian():
    h = _hessian_of(32, 6, seed=8)
    h[3], h[:, 3] = 0, 0
    return h


def _inverse_factor_cases():
    return [
        Case("the Hessian of the lesson, undamped", (BY_HAND, 0.0)),
        Case("the Hessian of the lesson", (BY_HAND, 0.01)),
        Case("random, 8 columns", (_hessian_of(64, 8), 0.01)),
        Case("random, 8 columns, much damping", (_hessian_of(64, 8, seed=2), 0.3)),
        Case("channels of very different size", (torch.tensor([[90.0, 2.0], [2.0, 0.5]], dtype=torch.float64), 0.01)),
        Case("fewer tokens than columns", (_hessian_of(5, 12, seed=4), 0.01)),
        Case("a channel that is always 0", (_silent_hessian(), 0.01)),
        Case("two channels that always carry the same", (torch.ones(2, 2, dtype=torch.float64), 0.5)),
        Case("a diagonal", (torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)), 0.0)),
        Case("one column", (torch.tensor([[4.0]], dtype=torch.float64), 0.25)),
        Case("a larger one", (_hessian_of(200, 40, seed=6), 0.05)),
    ]


def _spread(name, rows, columns, i, seed=0):
    """A case with a random factor, and column i rounded to halves."""
    weight, U = _random(rows, columns, seed=seed), inverse_factor(_hessian_of(4 * columns, columns, seed), 0.01)
    return Case(name, (weight, i, (2 * weight[:, i]).round() / 2, U))


def _spread_error_cases():
    by_hand = torch.tensor([[0.3, 0.3, 0.3]], dtype=torch.float64)
    U, exact = inverse_factor(BY_HAND, 0.0), _random(2, 4, seed=20)
    return [
        Case("the first column of the lesson", (by_hand, 0, torch.zeros(1, dtype=torch.float64), U)),
        Case("the second column of the lesson", (by_hand + 0.1, 1, torch.zeros(1, dtype=torch.float64), U)),
        _spread("the first of many columns", 5, 12, 0),
        _spread("a column in the middle", 5, 12, 6, seed=1),
        _spread("the last column", 4, 6, 5, seed=2),
        _spread("the last but one", 3, 6, 4, seed=3),
        _spread("a single row", 1, 8, 3, seed=4),
        _spread("as many rows as columns", 6, 6, 2, seed=5),
        Case(
            "a column that is on the grid already",
            (exact, 1, exact[:, 1].clone(), inverse_factor(_hessian_of(9, 4), 1)),
        ),
        Case(
            "channels that have nothing to do with each other", (exact, 0, exact[:, 0].round(), torch.eye(4).double())
        ),
    ]


def _quantize_cases():
    def case(name, rows, columns, bits, group_size, tokens=64, seed=0):
        return Case(name, (_random(rows, columns, seed=seed), _hessian_of(tokens, columns, seed + 1), bits, group_size))

    return [
        case("one group, 3 bits", 4, 12, 3, 12),
        case("one group, 2 bits", 6, 16, 2, 16, seed=2),
        case("three groups, 3 bits", 5, 24, 3, 8, seed=4),
        case("two groups, 4 bits", 5, 16, 4, 8, seed=6),
        case("eight groups, 2 bits", 3, 32, 2, 4, seed=8),
        case("a single row", 1, 16, 2, 8, seed=10),
        case("fewer tokens than columns", 4, 24, 3, 12, tokens=10, seed=12),
        case("as many rows as columns", 16, 16, 3, 4, seed=14),
        Case("channels that have nothing to do with each other", (_random(3, 8, seed=16), torch.eye(8).double(), 3, 4)),
    ]


def _awq_scale_cases():
    outlier, silent, loud = _random(20, 6, seed=3).float(), _random(10, 5, seed=4).float(), 300 * _random(8, 4).float()
    outlier[:, 2] *= 60
    silent[:, 1] = 0
    faint = silent + torch.tensor([0, 1e-9, 0, 0, 0])
    return [
        Case("random, half way", (_random(32, 8).float(), 0.5)),
        Case("not scaled at all", (_random(32, 8, seed=1).float(), 0.0)),
        Case("nearly all the way", (_random(16, 5, seed=2).float(), 0.95)),
        Case("one large channel", (outlier, 0.3)),
        Case("a channel that is always 0", (silent, 0.5)),
        Case("a channel that is always 0, hardly scaled", (silent, 0.05)),
        Case("a channel that is almost 0", (faint, 0.7)),
        Case("large inputs", (loud, 0.7)),
        Case("one token", (_random(1, 6, seed=5).float(), 0.4)),
        Case("channels that are never negative", (_random(12, 4, seed=6).float().abs(), 0.6)),
        Case("one channel", (_random(12, 1, seed=7).float(), 0.8)),
    ]


def _fold_cases():
    def case(name, columns, *rows, offset=0, seed=0):
        weights = [_random(n, columns, seed=seed + n).float() for n in rows]
        norm, scale = (
            1 + 0.2 * _random(columns, seed=seed).float(),
            (0.8 * _random(columns, seed=seed + 1)).exp().float(),
        )
        return Case(name, (norm - offset, weights, scale), {"offset": offset} if offset else {})

    return [
        case("one matrix", 6, 4),
        case("q, k and v", 8, 8, 4, 4, seed=1),
        case("gate and up", 5, 9, 9, seed=2),
        case("as many rows as columns", 4, 4, seed=3),
        case("a norm that is stored less 1, as Gemma's is", 6, 3, 6, offset=1, seed=4),
        case("a norm that is stored less a half", 5, 3, offset=0.5, seed=8),
        case("one row", 7, 1, seed=5),
        Case("all scales 1", (_random(3).float(), [_random(2, 3, seed=6).float()], torch.ones(3))),
        Case("powers of two", (torch.ones(3), [torch.tensor([[1.0, -2.0, 0.5]])], torch.tensor([2.0, 0.5, 4.0]))),
    ]


# The mistakes: `hessian`.


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _sum(x):
    return _flat(x).T @ _flat(x)


def _centred(x):
    x = _flat(x) - _flat(x).mean(0)
    return 2 / len(x) * x.T @ x


_HESSIAN_MUTANTS = (
    Mutant(
        "2 forgotten",
        lambda x: _sum(x) / len(_flat(x)),
        "This is the mean of x xᵀ, half of the Hessian: the second derivative of a square has a factor 2. (GPTQ's "
        "codes are the same with any factor; figures that are compared with others' are not.)",
    ),
    Mutant(
        "not divided",
        lambda x: 2 * _sum(x),
        "This is what you get when the sum is not divided by the number of tokens: then it grows with the text.",
    ),
    Mutant("a plain sum", _sum, "This is Σ x xᵀ: it lacks the factor 2 / n."),
    Mutant(
        "divided by the columns",
        lambda x: 2 / x.shape[-1] * _sum(x),
        "This is what you get when the sum is divided by the number of columns: n is the number of tokens.",
    ),
    Mutant(
        "n - 1",
        lambda x: 2 / (len(_flat(x)) - 1) * _sum(x) if len(_flat(x)) > 1 else _sum(x) * torch.inf,
        "This is what you get when the sum is divided by n - 1, as a covariance is: no mean was estimated here, so "
        "divide by n.",
    ),
    Mutant(
        "centred",
        _centred,
        "This is what you get when the mean of each channel is subtracted first, as in a covariance: the output error "
        "is made by the inputs as they are, and their mean is a part of them.",
    ),
    Mutant(
        "tokens by tokens",
        lambda x: 2 / len(_flat(x)) * _flat(x) @ _flat(x).T,
        "This is x @ x.T, one number for each pair of tokens: the Hessian has one for each pair of channels, x.T @ x.",
    ),
    Mutant(
        "n of the first axis",
        lambda x: 2 / x.shape[0] * _sum(x),
        "This is what you get when n is x.shape[0]: for windows of tokens that counts windows, and for a single vector "
        "channels. Make it (tokens, columns) first.",
    ),
    Mutant(
        "two axes joined",
        lambda x: hessian(x) if x.dim() < 4 else x.flatten(0, 1).mT @ x.flatten(0, 1),
        "Only batches of windows are wrong: joining the first two axes is not enough there. "
        "x.reshape(-1, x.shape[-1]) joins all of them but the last.",
    ),
    Mutant(
        "one Hessian for each window",
        lambda x: 2 / x.shape[-2] * x.mT @ x if x.dim() > 1 else hessian(x),
        "This is what you get when each window keeps a Hessian of its own: all tokens are summed up into one matrix.",
    ),
    Mutant(
        "Hessian of the mean input",
        lambda x: 2 * torch.outer(_flat(x).mean(0), _flat(x).mean(0)),
        "This is what you get when the tokens are averaged before the product: products first, then the mean.",
    ),
    Mutant(
        "absolute values",
        lambda x: 2 / len(_flat(x)) * _sum(x.abs()),
        "This is what you get from |x|: the signs say whether two errors add up or cancel.",
    ),
    Mutant(
        "scaled twice",
        lambda x: (2 / len(_flat(x))) ** 2 * _sum(x),
        "This is what you get when x is multiplied by 2 / n before the product, so that the factor is squared: it is "
        "the square root that goes into x.",
    ),
    Mutant(
        "diagonal only",
        lambda x: torch.diag((2 / len(_flat(x)) * _sum(x)).diagonal()),
        "This is what you get when only each channel's own square is kept: what one weight can do for another is off "
        "the diagonal.",
    ),
)


# The mistakes: `inverse_factor`.


def _factor_of(damped):
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def _damped(hessian, percdamp):
    return hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def _damped_by(amount):
    """`inverse_factor` with another amount added to the diagonal."""
    return lambda hessian, percdamp: _factor_of(hessian + percdamp * amount(hessian) * torch.eye(len(hessian)).double())


_INVERSE_FACTOR_MUTANTS = (
    Mutant(
        "lower factor",
        lambda hessian, percdamp: inverse_factor(hessian, percdamp).T,
        "This is the lower factor, U transposed: torch.linalg.cholesky gives it unless you say upper=True. Its rows "
        "reach to the left, where the columns are done.",
    ),
    Mutant(
        "factor of the Hessian",
        lambda hessian, percdamp: torch.linalg.cholesky(_damped(hessian, percdamp), upper=True),
        "This is the factor of the damped Hessian itself: invert it first.",
    ),
    Mutant(
        "the factor inverted",
        lambda hessian, percdamp: torch.linalg.inv(torch.linalg.cholesky(_damped(hessian, percdamp), upper=True)),
        "This is the inverse of the Hessian's factor. It is upper triangular, but U Uᵀ is the inverse, not Uᵀ U: "
        "invert first, then factor.",
    ),
    Mutant(
        "upper half of the inverse",
        lambda hessian, percdamp: torch.linalg.inv(_damped(hessian, percdamp)).triu(),
        "This is the upper half of the inverse, not factored: Uᵀ U has to be the inverse.",
    ),
    Mutant(
        "the inverse",
        lambda hessian, percdamp: torch.linalg.inv(_damped(hessian, percdamp)),
        "This is the inverse itself: its Cholesky factor is wanted.",
    ),
    Mutant(
        "not damped",
        lambda hessian, percdamp: inverse_factor(hessian, 0.0),
        "This is what you get without damping: a Hessian of fewer tokens than columns has no inverse.",
    ),
    Mutant(
        "percdamp itself added",
        _damped_by(lambda hessian: 1),
        "This is what you get when percdamp itself is added to the diagonal: it is a share of the diagonal's mean, so "
        "that the size of the inputs does not matter.",
    ),
    Mutant(
        "share of the largest",
        _damped_by(lambda hessian: hessian.diagonal().max()),
        "This is what you get for a share of the largest diagonal entry: one outlier channel would then damp all "
        "others. Take the mean.",
    ),
    Mutant(
        "share of the trace",
        _damped_by(lambda hessian: hessian.diagonal().sum()),
        "This is what you get for a share of the diagonal's sum: it would grow with the number of columns. Take the "
        "mean.",
    ),
    Mutant(
        "mean of the whole matrix",
        _damped_by(lambda hessian: hessian.mean()),
        "This is what you get for a share of the mean of all entries: take the mean of the diagonal.",
    ),
    Mutant(
        "silent channels set to 1",
        lambda hessian, percdamp: inverse_factor(hessian + torch.diag((hessian.diagonal() == 0).double()), percdamp),
        "Only a channel that is always 0 is wrong: GPTQ's programs put 1 on its diagonal first, but the damping alone "
        "makes it invertible, and that is all that is asked for here.",
    ),
    Mutant(
        "mean of the channels that speak",
        _damped_by(lambda hessian: hessian.diagonal()[hessian.diagonal() > 0].mean()),
        "Only a channel that is always 0 is wrong: it counts in the mean of the diagonal, like all others.",
    ),
    Mutant(
        "each entry damped by itself",
        lambda hessian, percdamp: _factor_of(hessian + percdamp * torch.diag(hessian.diagonal())),
        "This is what you get when each diagonal entry grows by a share of itself: add the same amount, a share of the "
        "mean, to all of them.",
    ),
    Mutant(
        "added everywhere",
        lambda hessian, percdamp: _factor_of(hessian + percdamp * hessian.diagonal().mean()),
        "This is what you get when the damping is added to every entry of the matrix: only the diagonal gets it. "
        "torch.eye is one way to say so.",
    ),
    Mutant(
        "the inverse damped",
        lambda hessian, percdamp: torch.linalg.cholesky(_damped(torch.linalg.inv(hessian), percdamp), upper=True),
        "This is what you get when the inverse is damped: what cannot be inverted needs the damping before.",
    ),
)


# The mistakes: `spread_error`.


def _shifted(weight, i, quantized, shift):
    """Column i quantized, and `shift` subtracted from all columns behind it."""
    after = weight.clone()
    after[:, i] = quantized
    after[:, i + 1 :] -= shift[:, i + 1 :]
    return after


def _outer(weight, i, quantized, row, divisor):
    return torch.outer((weight[:, i] - quantized) / divisor, row)


def _row_of(matrix):
    """`spread_error` with a row of another matrix, made from U."""

    def wrong(weight, i, quantized, U):
        m = matrix(U)
        return _shifted(weight, i, quantized, _outer(weight, i, quantized, m[i], m[i, i]))

    return wrong


def _done_columns_shifted(weight, i, quantized, U):
    inverse = U.T @ U
    after = weight - _outer(weight, i, quantized, inverse[i], inverse[i, i])
    after[:, i] = quantized
    return after


def _not_stored(weight, i, quantized, U):
    after = spread_error(weight, i, quantized, U)
    after[:, i] = weight[:, i]
    return after


def _mean_error(weight, i, quantized, U):
    error = (weight[:, i] - quantized).mean().expand(len(weight))
    return _shifted(weight, i, quantized, torch.outer(error / U[i, i], U[i]))


def _evenly(weight, i, quantized, U):
    share = torch.full((U.shape[1],), -1.0 / max(U.shape[1] - i - 1, 1), dtype=U.dtype)
    return _shifted(weight, i, quantized, _outer(weight, i, quantized, share, 1))


def _next_only(weight, i, quantized, U):
    row = torch.zeros_like(U[i])
    row[i + 1 : i + 2] = U[i, i + 1 : i + 2]
    return _shifted(weight, i, quantized, _outer(weight, i, quantized, row, U[i, i]))


_SPREAD_ERROR_MUTANTS = (
    Mutant(
        "wrong sign",
        lambda weight, i, quantized, U: _shifted(weight, i, quantized, -_outer(weight, i, quantized, U[i], U[i, i])),
        "This is what you get when the shift has the wrong sign, so that the error is doubled instead of taken back: "
        "the error is weight - quantized, and the shift is subtracted.",
    ),
    Mutant(
        "not divided",
        lambda weight, i, quantized, U: _shifted(weight, i, quantized, _outer(weight, i, quantized, U[i], 1)),
        "This is what you get when the error is not divided by U[i, i].",
    ),
    Mutant(
        "divided twice",
        lambda weight, i, quantized, U: _shifted(
            weight, i, quantized, _outer(weight, i, quantized, U[i], U[i, i] ** 2)
        ),
        "This is what you get when the error is divided by the square of U[i, i], the diagonal of the inverse: that "
        "goes with a row of the inverse; a row of U needs U[i, i] once.",
    ),
    Mutant(
        "multiplied",
        lambda weight, i, quantized, U: _shifted(weight, i, quantized, _outer(weight, i, quantized, U[i], 1 / U[i, i])),
        "This is what you get when the error is multiplied by U[i, i]: divide.",
    ),
    Mutant(
        "nothing spread",
        lambda weight, i, quantized, U: _shifted(weight, i, quantized, torch.zeros_like(weight)),
        "This is what you get when no column behind i moves. If you did spread: column i of U is 0 below the diagonal; "
        "it is row i that counts.",
    ),
    Mutant(
        "column not stored",
        _not_stored,
        "Only column i is wrong: it still holds the weight, and should hold what it was rounded to.",
    ),
    Mutant(
        "inverse of all columns",
        _row_of(lambda U: U.T @ U),
        "This is what you get with a row of the whole inverse: it counts on columns that are done and can no longer "
        "move. A row of U does not.",
    ),
    Mutant(
        "done columns shifted",
        _done_columns_shifted,
        "This is what you get when columns in front of i are shifted too: they are rounded, and no longer on the grid "
        "after that.",
    ),
    Mutant(
        "Hessian for its inverse",
        _row_of(lambda U: torch.linalg.inv(U.T @ U)),
        "This is what you get with a row of the Hessian: the best shift needs its inverse, which U belongs to.",
    ),
    Mutant(
        "one error for all rows",
        _mean_error,
        "This is what you get when all rows are shifted by the mean of their errors: each row has an error of its own.",
    ),
    Mutant(
        "spread evenly",
        _evenly,
        "This is what you get when all columns behind i get an equal part of the error: how much each can take back is "
        "in row i of U.",
    ),
    Mutant(
        "next column only",
        _next_only,
        "This is what you get when only column i + 1 is shifted: all columns behind i are.",
    ),
)


# The mistakes: `quantize`.


def _grid(columns, bits):
    fitted = zero_point(columns, bits)
    return fitted.scales.double()[:, 0], fitted.zero_points().double()[:, 0]


def _on_grid(w, scale, zero, bits):
    return ((torch.round(w / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


def _loop(
    weight, hessian, bits, group_size, *, factor=None, spread=spread_error, fit_from=None, fit_at=None, last=None
):
    """`quantize` with one thing different: the factor, the spreading, whom a grid is fitted to, or where it ends."""
    U = inverse_factor(hessian, 0.01) if factor is None else factor(hessian)
    W = weight.clone()
    for i in range(W.shape[1] if last is None else W.shape[1] + last):
        if i % group_size == 0 if fit_at is None else fit_at(i):
            scale, zero = _grid((W if fit_from is None else weight)[:, i : i + group_size], bits)
        W = spread(W, i, _on_grid(W[:, i], scale, zero, bits), U)
    return W


def _with(**different):
    return lambda *args: _loop(*args, **different)


def _nothing_spread(weight, i, quantized, U):
    return _shifted(weight, i, quantized, torch.zeros_like(weight))


def _within_groups(weight, hessian, bits, group_size):
    def spread(W, i, quantized, U):
        end = i - i % group_size + group_size
        return torch.hstack([spread_error(W, i, quantized, U)[:, :end], W[:, end:]])

    return _loop(weight, hessian, bits, group_size, spread=spread)


def _whole_rows(weight, hessian, bits, group_size):
    return _loop(weight, hessian, bits, weight.shape[1])


def _originals_rounded(weight, hessian, bits, group_size):
    U, W = inverse_factor(hessian, 0.01), weight.clone()
    for i in range(W.shape[1]):
        if i % group_size == 0:
            grid = _grid(W[:, i : i + group_size], bits)
        W = spread_error(W, i, _on_grid(weight[:, i], *grid, bits), U)
    return W


def _reversed(weight, hessian, bits, group_size):
    return _loop(weight.flip(1), hessian.flip(0, 1), bits, group_size).flip(1)


_QUANTIZE_MUTANTS = (
    Mutant(
        "round to nearest",
        _with(spread=_nothing_spread),
        "This is round-to-nearest: after a column is rounded, its error has to be spread before the next one's turn.",
    ),
    Mutant(
        "grids of the original weights",
        _with(fit_from="original"),
        "This is what you get when the grids are fitted to the original weights, static groups: here the grid of "
        "a group is fitted to its columns as they are when its first one's turn comes.",
    ),
    Mutant(
        "one grid for each row",
        _whole_rows,
        "This is what you get with one grid for a whole row: each group of columns has its own.",
    ),
    Mutant(
        "the first group's grid for all",
        _with(fit_at=lambda i: i == 0),
        "This is what you get when the grid of the first group is used for all of them: fit a new one whenever "
        "i % group_size is 0.",
    ),
    Mutant(
        "a new grid for each column",
        _with(fit_at=lambda i: True),
        "This is what you get when a grid is fitted anew for each column: all columns of a group share one, so it may "
        "only change where a group begins.",
    ),
    Mutant(
        "original columns rounded",
        _originals_rounded,
        "This is what you get when the original column is rounded, and not the one that the earlier errors have "
        "shifted: then nothing is ever made up for.",
    ),
    Mutant(
        "spread within the group only",
        _within_groups,
        "This is what you get when an error stays within its group: all columns behind it are shifted, in all groups.",
    ),
    Mutant(
        "Hessian for its inverse",
        _with(factor=lambda h: torch.linalg.cholesky(_damped(h, 0.01), upper=True)),
        "This is what you get with the factor of the Hessian in place of its inverse's.",
    ),
    Mutant(
        "the factor inverted",
        _with(factor=lambda h: torch.linalg.inv(torch.linalg.cholesky(_damped(h, 0.01), upper=True))),
        "This is what you get when the Hessian's factor is inverted, where the inverse had to be factored: your "
        "inverse_factor has the right order.",
    ),
    Mutant(
        "last column left out",
        _with(last=-1),
        "Only the last column is wrong: nobody is left to take its error, but it has to be rounded.",
    ),
    Mutant(
        "from the right",
        _reversed,
        "This is what you get when the columns are taken from right to left: begin with column 0.",
    ),
)


# The mistakes: `awq_scale`.


def _balanced(scale):
    return scale / (scale.max() * scale.min()).sqrt()


def _normalized(scale):
    return _balanced(scale.clamp(min=1e-4))


_AWQ_SCALE_MUTANTS = (
    Mutant(
        "not normalized",
        lambda x, ratio: (x.abs().mean(0) ** ratio).clamp(min=1e-4),
        "This is what you get without the last step: divide by the root of largest times smallest, so that weights and "
        "inputs keep their size on the whole.",
    ),
    Mutant(
        "divided by the mean",
        lambda x, ratio: (s := (x.abs().mean(0) ** ratio).clamp(min=1e-4)) / s.mean(),
        "This is what you get when the scale is divided by its mean: divide by the root of largest times smallest.",
    ),
    Mutant(
        "divided by the largest",
        lambda x, ratio: (s := (x.abs().mean(0) ** ratio).clamp(min=1e-4)) / s.max(),
        "This is what you get when the scale is divided by its largest entry: divide by the root of largest times "
        "smallest.",
    ),
    Mutant(
        "root forgotten",
        lambda x, ratio: (s := (x.abs().mean(0) ** ratio).clamp(min=1e-4)) / (s.max() * s.min()),
        "This is what you get when the scale is divided by largest times smallest: take the root of that.",
    ),
    Mutant(
        "mean without abs",
        lambda x, ratio: _normalized(x.mean(0).abs() ** ratio),
        "This is what you get from the mean of x: positive and negative inputs cancel in it, so a large channel may "
        "look small. Take |x| first.",
    ),
    Mutant(
        "root mean square",
        lambda x, ratio: _normalized(x.square().mean(0).sqrt() ** ratio),
        "This is what you get from the root of the mean square: AWQ takes the mean of |x|.",
    ),
    Mutant(
        "largest input",
        lambda x, ratio: _normalized(x.abs().amax(0) ** ratio),
        "This is what you get from the largest |x| of each channel: AWQ takes the mean, which one token cannot decide.",
    ),
    Mutant(
        "over the channels",
        lambda x, ratio: _normalized(x.abs().mean(1) ** ratio),
        "This is what you get when the mean is taken over the channels, one for each token: take it over the tokens.",
    ),
    Mutant(
        "inverse",
        lambda x, ratio: 1 / awq_scale(x, ratio),
        "This is 1 / s: the columns that read large inputs are to be made larger.",
    ),
    Mutant(
        "one minus the ratio",
        lambda x, ratio: _normalized(x.abs().mean(0) ** (1 - ratio)),
        "This is what you get for the power 1 - ratio: ratio 0 has to leave the weights alone.",
    ),
    Mutant(
        "multiplied by the ratio",
        lambda x, ratio: _normalized(x.abs().mean(0) * ratio),
        "This is what you get when mean |x| is multiplied by the ratio: the ratio is the exponent.",
    ),
    Mutant(
        "silent channel not guarded",
        lambda x, ratio: _balanced(x.abs().mean(0) ** ratio),
        "Only a channel that is always 0 is wrong: its scale is 0, and everything is divided by it. No scale may be "
        "below 1e-4.",
    ),
    Mutant(
        "only zeros guarded",
        lambda x, ratio: _balanced((s := x.abs().mean(0) ** ratio).where(s != 0, 1e-4)),
        "Only a channel that is almost 0 is wrong: not only zeros, but every scale below 1e-4 becomes 1e-4.",
    ),
    Mutant(
        "guarded before the power",
        lambda x, ratio: _balanced(x.abs().mean(0).clamp(min=1e-4) ** ratio),
        "Only a channel that is always 0 is wrong: 1e-4 is the least scale, not the least input, so the power comes "
        "first.",
    ),
    Mutant(
        "guarded at the end",
        lambda x, ratio: ((s := x.abs().mean(0) ** ratio) / (s.max() * s.min()).sqrt().clamp(min=1e-30)).clamp(
            min=1e-4
        ),
        "Only a channel that is always 0 is wrong: the scale has to be kept above 1e-4 before largest times smallest "
        "is taken.",
    ),
)


# The mistakes: `fold`.


def _behind(norm, weights, scale, offset=0):
    return [weight * scale for weight in weights]


def _rows(weight, scale):
    """What multiplying by scale[:, None] gives, where the matrix has as many rows as there are scales."""
    return weight * scale[:, None] if len(weight) == len(scale) else torch.full_like(weight, torch.nan)


_FOLD_MUTANTS = (
    Mutant(
        "exchanged",
        lambda norm, weights, scale, offset=0: ((offset + norm) * scale - offset, [w / scale for w in weights]),
        "This is the other way round: the product is unchanged as well, but the columns that read large inputs have "
        "been made smaller. Weights times s, norm divided by s.",
    ),
    Mutant(
        "both multiplied",
        lambda norm, weights, scale, offset=0: ((offset + norm) * scale - offset, _behind(norm, weights, scale)),
        "This is what you get when both are multiplied: one has to undo the other, so the norm is divided.",
    ),
    Mutant(
        "both divided",
        lambda norm, weights, scale, offset=0: ((offset + norm) / scale - offset, [w / scale for w in weights]),
        "This is what you get when both are divided: one has to undo the other, so the weights are multiplied.",
    ),
    Mutant(
        "norm left alone",
        lambda norm, weights, scale, offset=0: (norm, _behind(norm, weights, scale)),
        "This is what you get when only the weights change: the norm has to divide what they read.",
    ),
    Mutant(
        "weights left alone",
        lambda norm, weights, scale, offset=0: (fold(norm, weights, scale, offset)[0], weights),
        "This is what you get when only the norm changes: each column of the weights has to be multiplied by its s.",
    ),
    Mutant(
        "first matrix only",
        lambda norm, weights, scale, offset=0: (
            fold(norm, weights, scale, offset)[0],
            [weights[0] * scale, *weights[1:]],
        ),
        "This is what you get when only the first matrix is multiplied: all of them read what the norm has divided.",
    ),
    Mutant(
        "rows",
        lambda norm, weights, scale, offset=0: (
            fold(norm, weights, scale, offset)[0],
            [_rows(weight, scale) for weight in weights],
        ),
        "This is what you get when rows are multiplied, by scale[:, None]: an input channel meets a column.",
    ),
    Mutant(
        "offset forgotten",
        lambda norm, weights, scale, offset=0: (norm / scale, _behind(norm, weights, scale)),
        "Only a norm with an offset is wrong: what it multiplies by is offset + norm, and that has to be divided.",
    ),
    Mutant(
        "offset not taken off",
        lambda norm, weights, scale, offset=0: ((offset + norm) / scale, _behind(norm, weights, scale)),
        "Only a norm with an offset is wrong: what is stored is the factor less the offset, so subtract it again.",
    ),
    Mutant(
        "offset taken for 1",
        lambda norm, weights, scale, offset=0: fold(norm, weights, scale, 1 if offset else 0),
        "Only an offset that is neither 0 nor 1 is wrong: calculate with `offset` itself.",
    ),
    Mutant(
        "half for each",
        lambda norm, weights, scale, offset=0: (
            (offset + norm) / scale.sqrt() - offset,
            [weight * scale.sqrt() for weight in weights],
        ),
        "This is what you get for the root of s: the product is unchanged as well, but the columns are scaled by less "
        "than was asked for.",
    ),
)


TASKS = (
    Task(
        name="gptq.hessian",
        title="What calibration remembers",
        points=2,
        minutes=5,
        difficulty=1,
        importance=4,
        reference=hessian,
        cases=_hessian_cases,
        tolerance=1e-5,
        hints=(
            "Whatever the shape of x, make it (tokens, columns) first: x.reshape(-1, x.shape[-1]). Then one matrix "
            "product sums up x xᵀ over all tokens.",
            "2 / len(x) * x.T @ x, for x as (tokens, columns).",
        ),
        mutants=_HESSIAN_MUTANTS,
    ),
    Task(
        name="gptq.inverse_factor",
        title="Damp, invert, factor",
        points=3,
        minutes=8,
        difficulty=2,
        importance=4,
        reference=inverse_factor,
        cases=_inverse_factor_cases,
        tolerance=1e-5,
        hints=(
            "Three steps in this order: add the damping to the diagonal, invert, factor. Check yours: U.T @ U times "
            "the damped Hessian is the identity.",
            "damped = hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian)); then "
            "torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).",
        ),
        mutants=_INVERSE_FACTOR_MUTANTS,
    ),
    Task(
        name="gptq.spread_error",
        title="Spread the error of one column",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=spread_error,
        cases=_spread_error_cases,
        hints=(
            "Each row has its error, weight - quantized; divided by U[i, i] and times row i of U, that is what the "
            "columns behind i lose.",
            "error = (weight[:, i] - quantized) / U[i, i]; in a clone, column i becomes quantized, and "
            "error[:, None] * U[i, i + 1:] is subtracted from the columns i + 1 and up.",
        ),
        mutants=_SPREAD_ERROR_MUTANTS,
    ),
    Task(
        name="gptq.quantize",
        title="GPTQ",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=quantize,
        cases=_quantize_cases,
        tolerance=1e-5,
        hints=(
            "One loop over the columns: at the start of a group fit its grid, then round the column, then spread its "
            "error. Always work on the matrix as it is by then.",
            "U = inverse_factor(hessian, 0.01); for each i: if i % group_size == 0: scale, zero = grid(W[:, i : i + "
            "group_size], bits); then W = spread_error(W, i, on_grid(W[:, i], scale, zero, bits), U).",
        ),
        mutants=_QUANTIZE_MUTANTS,
    ),
    Task(
        name="gptq.awq_scale",
        title="AWQ's scale",
        points=2,
        minutes=6,
        difficulty=2,
        importance=4,
        reference=awq_scale,
        cases=_awq_scale_cases,
        tolerance=1e-5,
        hints=(
            "mean |x| over the tokens, then the power, then at least 1e-4, then the normalization: in this order.",
            "scale = (x.abs().mean(0) ** ratio).clamp(min=1e-4); divide it by (scale.max() * scale.min()).sqrt().",
        ),
        mutants=_AWQ_SCALE_MUTANTS,
    ),
    Task(
        name="gptq.fold",
        title="Fold the scale into the norm",
        points=2,
        minutes=6,
        difficulty=2,
        importance=4,
        reference=fold,
        cases=_fold_cases,
        tolerance=1e-5,
        hints=(
            "W x = (W · s) (x / s): the norm makes x, so it has to divide. What it multiplies by is offset + norm.",
            "return (offset + norm) / scale - offset, and a list of weight * scale for every weight.",
        ),
        mutants=_FOLD_MUTANTS,
    ),
)
