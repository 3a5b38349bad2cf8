"""The exercise of lesson 10: SINQ's balancing and its two scales, a turn of HQQ, and what NF4 costs.

`balance` asks for what the package's `sinkhorn` finds, `imbalance` and `step` for its parts, `hqq_turn` for one of
`turns`, `nf4_bits` for the bits of a `QuantizedTensor`. Balancing ends after the first step that makes the imbalance
larger, which is a decision, so no case comes near a tie. No deviation in the cases is below 0.001, where the package
would take 0.001 in its place.
"""

import torch

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats.integers import Integers
from qlearn.methods.hqq import shrink, starting_grid, turns
from qlearn.methods.nf4 import nf4
from qlearn.methods.sinkhorn import LOG_MU, STEP, deviations, sinkhorn
from qlearn.methods.sinkhorn import imbalance as imbalance_of
from qlearn.tensor import QuantizedTensor

BY_HAND = torch.tensor([[3.0, -8, 1, -3], [-1, 24, -3, 1], [8, -192, 24, -8], [-3, 8, -1, 3]])


# What is right.


def imbalance(tile):
    """The largest standard deviation of a row or column over the smallest, which counts as 1e-12 at least."""
    return imbalance_of(*deviations(tile)).squeeze()


def step(tile, u1, u2, tau):
    """u1 and u2 after one step."""
    now = tile / u1.exp() / u2.exp()[:, None]
    return tuple((u + (now.std(axis) / tau).clamp(*STEP).log()).clamp(*LOG_MU) for u, axis in ((u1, 0), (u2, 1)))


def balance(tile, order):
    """mu1 and mu2 of the best of `order` states, the search ending at the first that is worse than the one before."""
    return tuple(sinkhorn(tile, order)[1:3])


def dequantize(codes, zeros, scales, column_scales):
    """(codes - zero) · scale · mu1, float32 (rows, columns)."""
    block = 1, codes.shape[1] // scales.shape[1]
    return QuantizedTensor.from_codes(
        codes, scales, Integers(4, signed=False), block, zeros=zeros, column_scales=column_scales
    ).dequantize()


def hqq_turn(weight, s, zero, qmax):
    """The zero for the next turn, float32 (groups, 1)."""
    return next(turns(weight, s, zero, qmax)).next_zero


def nf4_bits(rows, columns, double_quant):
    """True bits per weight of a matrix in NF4, blocks of 64."""
    return nf4(torch.zeros(rows, columns), double_quant=double_quant).bits_per_weight


# The cases.


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _spoilt(rows, columns, seed=0, row=1.0, column=1.0):
    """Normal random numbers with a row and a column so many times as large."""
    tile = _random(rows, columns, seed=seed)
    tile[rows // 3] *= row
    tile[:, columns // 2] *= column
    return tile


def _imbalance_cases():
    flat_row, flat_column = _random(4, 5, seed=6), _random(5, 4, seed=7)
    flat_row[2], flat_column[:, 1] = 0, 0
    return [
        Case("the matrix of the lesson", (BY_HAND,)),
        Case("the second column is twice the first", (torch.tensor([[1.0, -2.0], [-4.0, 8.0]]),)),
        Case("random", (_random(8, 12),)),
        Case("a large row", (_spoilt(8, 8, 1, row=20),)),
        Case("a large column", (_spoilt(8, 8, 2, column=20),)),
        Case("a small row", (_spoilt(12, 6, 3, row=0.05),)),
        Case("a small column", (_spoilt(6, 12, 4, column=0.05),)),
        Case("a small row and a large column", (_spoilt(7, 9, 8, row=0.05, column=9),)),
        Case("numbers that are far from 0", (_random(6, 5, seed=5) + torch.linspace(5, 9, 6)[:, None],)),
        Case("rows that are far from 0", (_random(6, 4, seed=9) + 10 * _random(6, 1, seed=10),)),
        Case("a row of zeros", (flat_row,)),
        Case("a column of zeros", (flat_column,)),
        Case("two by two", (_random(2, 2, seed=11),)),
        Case("many rows, few columns", (_random(40, 3, seed=12),)),
        Case("small numbers", (0.01 * _random(6, 6, seed=13),)),
    ]


def _step_case(name, tile, seed=None, tau=None):
    """A case; u1 and u2 are zeros, or random if there is a seed."""
    rows, columns = tile.shape
    u1, u2 = torch.zeros(columns), torch.zeros(rows)
    if seed is not None:
        u1, u2 = 0.4 * _random(columns, seed=seed) + 0.3, 0.4 * _random(rows, seed=seed + 1) + 0.3
    tau = torch.cat([tile.std(0), tile.std(1)]).min().item() if tau is None else tau
    return Case(name, (tile, u1.clamp(min=-0.3), u2.clamp(min=-0.3), tau))


def _step_cases():
    still = _random(4, 6, seed=20)
    still[1] = 0
    return [
        _step_case("the matrix of the lesson", BY_HAND),
        _step_case("the first step", _spoilt(6, 5, 1, row=3)),
        _step_case("a large column: the step is cut off", _spoilt(5, 7, 2, column=30)),
        _step_case("on the way", _spoilt(6, 6, 3, column=2), seed=30),
        _step_case("on the way, more columns than rows", _spoilt(4, 9, 4, row=2), seed=32),
        _step_case("on the way, as many rows as columns", _random(5, 5, seed=5), seed=34),
        _step_case("all are smaller than tau", _random(5, 6, seed=6), tau=4.0),
        _step_case("some are a little smaller than tau", _random(5, 6, seed=7), tau=1.1),
        _step_case("all are near tau", _random(30, 40, seed=8), tau=0.9),
        Case("at the floor", (_random(4, 3, seed=9), torch.full((3,), -0.25), torch.full((4,), -0.25), 2.0)),
        Case("near the ceiling", (1e6 * _random(4, 3, seed=10), torch.full((3,), 9.9), torch.zeros(4), 1e-3)),
        _step_case("a row of zeros", still, tau=0.5),
        _step_case("two by two", _random(2, 2, seed=11), seed=36),
    ]


def _balance_cases():
    return [
        Case("the matrix of the lesson", (BY_HAND, 16)),
        Case("the matrix of the lesson, three states", (BY_HAND, 3)),
        Case("a large column", (_spoilt(16, 8, 1, column=10), 16)),
        Case("a large row", (_spoilt(12, 12, 2, row=6), 16)),
        Case("a row and a column", (_spoilt(10, 14, 3, row=20, column=20), 16)),
        Case("random, which is soon as good as it gets", (_random(24, 16, seed=4), 16)),
        Case("one state: the tile as it is", (_spoilt(6, 8, 5, column=4), 1)),
        Case("two states", (_spoilt(6, 8, 6, column=4), 2)),
        Case("as many rows as columns", (_spoilt(9, 9, 7, row=0.2), 16)),
        Case("numbers that are far from 0", (_random(8, 6, seed=8) + 2, 16)),
        Case("small numbers", (0.05 * _spoilt(32, 16, 9, row=5, column=5), 10)),
        Case("very small numbers", (0.004 * _spoilt(20, 16, 11, row=3, column=3), 8)),
        Case("a large one", (0.1 * _spoilt(128, 64, 10, row=3, column=8), 16)),
    ]


def _stored(rows, columns, group, seed=0, qmax=15, integral=True):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, qmax + 1, (rows, columns), generator=generator).to(torch.uint8)
    shape = rows, columns // group
    zeros = torch.randint(0, qmax + 1, shape, generator=generator).to(torch.uint8)
    if not integral:
        zeros = 6 + 3 * torch.randn(shape, generator=generator)
    scales, mu1 = (0.5 * torch.randn(n, generator=generator).exp() for n in (shape, (columns,)))
    return codes, zeros, scales, mu1


def _dequantize_cases():
    ones = _stored(4, 6, 3, seed=7)
    return [
        Case("one group a row", _stored(3, 8, 8)),
        Case("two groups", _stored(3, 8, 4, seed=1)),
        Case("many groups", _stored(5, 24, 3, seed=2)),
        Case("as many rows as columns", _stored(6, 6, 2, seed=3)),
        Case("as many rows as groups", _stored(4, 16, 4, seed=4)),
        Case("zeros that are no integers", _stored(4, 12, 4, seed=5, integral=False)),
        Case("one row", _stored(1, 10, 5, seed=6)),
        Case("column scales of 1", (*ones[:3], torch.ones(6))),
        Case("codes smaller than their zero", (torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
             torch.tensor([[2]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([1.0, 2.0, 1.0, 4.0]))),
        Case("groups of one", _stored(3, 4, 1, seed=8)),
    ]  # fmt: skip


def _turn(name, weight, bits, shift=0.0):
    qmax = 2**bits - 1
    s, zero = starting_grid(weight, qmax)
    return Case(name, (weight, s, zero + shift, qmax))


def _hqq_cases():
    outlier = 0.3 * _random(4, 16, seed=3)
    outlier[:, 5] = 6.0
    return [
        _turn("five weights, 2 bits", torch.tensor([[0.0, 0.03, 0.13, 0.22, 0.3]]), 2),
        _turn("weights of a language model, 4 bits", 0.05 * _random(6, 32), 4),
        _turn("weights of a language model, 2 bits", 0.05 * _random(6, 32, seed=1), 2),
        _turn("large errors", 2 * _random(5, 16, seed=2), 2),
        _turn("errors of both kinds", 0.8 * _random(6, 24, seed=4), 2),
        _turn("an outlier", outlier, 3),
        _turn("a zero that was moved: some codes are cut off", 0.5 * _random(4, 16, seed=5), 2, shift=-1.3),
        _turn("a zero that was moved up", 0.5 * _random(4, 16, seed=6), 3, shift=0.9),
        _turn("weights that are all positive", 0.1 * _random(3, 16, seed=7).abs() + 0.4, 3),
        _turn("weights on the grid", torch.tensor([[0.0, 1.0, 2.0, 3.0], [-3.0, 0.0, -1.0, -2.0]]), 2),
        _turn("as many groups as weights", 0.6 * _random(8, 8, seed=8), 2),
        _turn("one group", 0.7 * _random(1, 12, seed=9), 3),
    ]


def _nf4_cases():
    sizes = {
        "one block": (1, 64),
        "as many blocks as share a step": (64, 256),
        "one block more": (257, 64),
        "a square of 256": (256, 256),
        "a matrix of the model": (768, 256),
        "a narrow one": (100, 64),
        "a wide one": (3, 1024),
    }
    return [
        Case(f"{name}, {'double quantization' if double else 'plain'}", (*size, double))
        for name, size in sizes.items()
        for double in (False, True)
    ]


# The mistakes: `imbalance`.


def _over(largest, smallest):
    return largest / smallest.clamp(min=1e-12)


def _both(tile, **options):
    return torch.cat([tile.std(0, **options), tile.std(1, **options)])


_IMBALANCE_MUTANTS = (
    Mutant(
        "rows alone",
        lambda tile: _over(tile.std(1).max(), tile.std(1).min()),
        "This is the imbalance of the rows alone: the columns count as well.",
    ),
    Mutant(
        "columns alone",
        lambda tile: _over(tile.std(0).max(), tile.std(0).min()),
        "This is the imbalance of the columns alone: the rows count as well.",
    ),
    Mutant(
        "the larger of two ratios",
        lambda tile: torch.maximum(*(_over(tile.std(a).max(), tile.std(a).min()) for a in (0, 1))),
        "This compares rows with rows and columns with columns: the largest of all is divided by the smallest of all.",
    ),
    Mutant(
        "divided by n",
        lambda tile: _over(_both(tile, correction=0).max(), _both(tile, correction=0).min()),
        "This is what you get when the deviations divide by n: rows and columns are differently long, so it matters; "
        "take n - 1, as `std` does.",
    ),
    Mutant(
        "variances",
        lambda tile: _over(_both(tile).max() ** 2, _both(tile).min() ** 2),
        "This is the square of the imbalance: divide standard deviations, not variances.",
    ),
    Mutant(
        "root mean square",
        lambda tile: _over(*(f(torch.cat([tile.square().mean(0), tile.square().mean(1)]).sqrt()) for f in (max, min))),
        "This is what you get from root mean squares: a deviation is measured from the mean of its row or column.",
    ),
    Mutant(
        "largest magnitudes",
        lambda tile: _over(*(f(torch.cat([tile.abs().amax(0), tile.abs().amax(1)])) for f in (max, min))),
        "This compares largest magnitudes: SINQ compares standard deviations.",
    ),
    Mutant(
        "upside down",
        lambda tile: _both(tile).min() / _both(tile).max(),
        "This is the smallest over the largest: it is to be 1 or more.",
    ),
    Mutant(
        "no floor",
        lambda tile: _both(tile).max() / _both(tile).min(),
        "Only a row or column of zeros is wrong: the smallest deviation counts as 1e-12 at least.",
    ),
    Mutant(
        "added to",
        lambda tile: _both(tile).max() / (_both(tile).min() + 1e-3),
        "This adds something to the smallest deviation: it counts as 1e-12 at least, and is left alone otherwise.",
    ),
)


# `step`.


def _step(tile, u1, u2, tau, clip=STEP, limits=LOG_MU, sign=1, order="both", log=True, **options):
    """The step, with something wrong about it."""
    now = tile / u1.exp() / u2.exp()[:, None]
    rows = now.std(1, **options)

    def move(u, sigma):
        factor = (sigma / tau).clamp(*clip)
        return (u + sign * (factor.log() if log else factor)).clamp(*limits)

    new1 = move(u1, now.std(0, **options))
    if order == "columns first":
        rows = (tile / new1.exp() / u2.exp()[:, None]).std(1)
    return new1, move(u2, rows)


_STEP_MUTANTS = (
    Mutant(
        "columns first",
        lambda *a: _step(*a, order="columns first"),
        "This is what you get when the rows are measured after the columns have moved: both are measured in the same "
        "state.",
    ),
    Mutant(
        "not the present state",
        lambda tile, u1, u2, tau: tuple(
            (u + (tile.std(axis) / tau).clamp(*STEP).log()).clamp(*LOG_MU) for u, axis in ((u1, 0), (u2, 1))
        ),
        "This measures the tile as it was at first: divide it by exp(u1) and exp(u2) before.",
    ),
    Mutant(
        "multiplied",
        lambda tile, u1, u2, tau: tuple(
            (u + ((tile * u1.exp() * u2.exp()[:, None]).std(axis) / tau).clamp(*STEP).log()).clamp(*LOG_MU)
            for u, axis in ((u1, 0), (u2, 1))
        ),
        "This multiplies the tile by exp(u1) and exp(u2): the present state is the tile divided by them.",
    ),
    Mutant(
        "subtracted",
        lambda *a: _step(*a, sign=-1),
        "This moves the other way: what varies too much has to be divided by more, so u grows.",
    ),
    Mutant(
        "no clamp on the step",
        lambda *a: _step(*a, clip=(0, torch.inf)),
        "This is what you get when σ / τ is not clamped to 0.7 ... 2: no step is larger.",
    ),
    Mutant(
        "only the upper clamp",
        lambda *a: _step(*a, clip=(0, 2.0)),
        "Only where a deviation is far below τ it is wrong: σ / τ counts as 0.7 at least.",
    ),
    Mutant(
        "clamped after the logarithm",
        lambda tile, u1, u2, tau: tuple(
            (u + ((tile / u1.exp() / u2.exp()[:, None]).std(axis) / tau).log().clamp(*STEP)).clamp(*LOG_MU)
            for u, axis in ((u1, 0), (u2, 1))
        ),
        "This clamps the logarithm to 0.7 ... 2: it is the factor σ / τ that is clamped, and then its logarithm taken.",
    ),
    Mutant(
        "no floor",
        lambda *a: _step(*a, limits=(-torch.inf, 10.0)),
        "Only where u has come down far it is wrong: it stays at -0.3 or above.",
    ),
    Mutant(
        "no ceiling",
        lambda *a: _step(*a, limits=(-0.3, torch.inf)),
        "Only where u has grown far it is wrong: it stays at 10 or below.",
    ),
    Mutant(
        "no limits",
        lambda *a: _step(*a, limits=(-torch.inf, torch.inf)),
        "This is what you get when u is not limited: it stays within -0.3 ... 10.",
    ),
    Mutant(
        "no logarithm",
        lambda *a: _step(*a, log=False),
        "This adds the factor itself: u is a logarithm, so the factor's logarithm is added.",
    ),
    Mutant(
        "divided by n",
        lambda *a: _step(*a, correction=0),
        "This is what you get when the deviations divide by n: take n - 1, as `std` does.",
    ),
    Mutant(
        "u1 alone",
        lambda tile, u1, u2, tau: (_step(tile, u1, u2, tau)[0], u2),
        "Only u2 is wrong: it has stayed as it was, and the rows have to move as well.",
    ),
    Mutant(
        "exchanged",
        lambda *a: _step(*a)[::-1],
        "These are u2 and u1: the columns come first.",
    ),
    Mutant(
        "mu in place of u",
        lambda *a: tuple(u.exp() for u in _step(*a)),
        "These are the scales, exp(u): return the logarithms.",
    ),
)


# `balance`.


def _balance(tile, order, stop=True, keep="best", tau_always=False, limits=LOG_MU, start=None):
    """The loop, with something wrong about it."""
    u1, u2 = torch.zeros(tile.shape[1]), torch.zeros(tile.shape[0])
    best, kept, tau = torch.inf, (u1.exp(), u2.exp()), start
    for _ in range(order):
        now = tile / u1.exp() / u2.exp()[:, None]
        found = imbalance(now).item()
        if found <= best:
            best, kept = found, (u1.exp(), u2.exp())
        elif stop:
            break
        if tau is None or tau_always:
            tau = _both(now).min().item() + 1e-6
        u1, u2 = _step(tile, u1, u2, tau, limits=limits)
    return kept if keep == "best" else (u1.exp(), u2.exp())


_BALANCE_MUTANTS = (
    Mutant(
        "the last state",
        lambda tile, order: _balance(tile, order, keep="last"),
        "This is what you get when the last state is returned: return the best, which is one before the state that was "
        "worse.",
    ),
    Mutant(
        "never stopped",
        lambda tile, order: _balance(tile, order, stop=False),
        "This goes on after a step that made the imbalance larger, and may find a better state later: the search ends "
        "there.",
    ),
    Mutant(
        "never stopped, and the last state",
        lambda tile, order: _balance(tile, order, stop=False, keep="last"),
        "This makes all steps and returns the last state: return the best, and end at the first that is worse.",
    ),
    Mutant(
        "one state too many",
        lambda tile, order: _balance(tile, order + 1),
        "This looks at one state too many: the tile itself is the first of `order` states.",
    ),
    Mutant(
        "one state too few",
        lambda tile, order: _balance(tile, order - 1),
        "This looks at one state too few: `order` states are looked at, the tile itself being the first.",
    ),
    Mutant(
        "tau anew at each step",
        lambda tile, order: _balance(tile, order, tau_always=True),
        "This is what you get when τ is measured anew at each step: it is the smallest deviation of the tile as it was "
        "at first.",
    ),
    Mutant(
        "nothing added to tau",
        lambda tile, order: _balance(tile, order, start=_both(tile).min().item()),
        "Only with very small weights it is wrong: τ is the smallest deviation plus 1e-6.",
    ),
    Mutant(
        "tau is 1",
        lambda tile, order: _balance(tile, order, start=1.0),
        "This brings all deviations to 1: they are to come down to τ, the smallest deviation of the tile.",
    ),
    Mutant(
        "tau is the largest",
        lambda tile, order: _balance(tile, order, start=_both(tile).max().item()),
        "This takes the largest deviation for τ: it is the smallest.",
    ),
    Mutant(
        "tau of the rows",
        lambda tile, order: _balance(tile, order, start=tile.std(1).min().item() + 1e-6),
        "This takes the smallest deviation of a row for τ: the columns count as well.",
    ),
    Mutant(
        "exchanged",
        lambda tile, order: _balance(tile, order)[::-1],
        "These are mu2 and mu1: the columns come first.",
    ),
    Mutant(
        "logarithms",
        lambda tile, order: tuple(mu.log() for mu in _balance(tile, order)),
        "These are the logarithms u1 and u2: return exp of them.",
    ),
    Mutant(
        "the balanced tile",
        lambda tile, order: sinkhorn(tile, order).balanced,
        "This is the balanced tile: return the two vectors that it was divided by.",
    ),
)


# `dequantize`.


def _spread(x, codes):
    return x.float().repeat_interleave(codes.shape[1] // x.shape[1], 1)


def _read(codes, zeros, scales):
    return (codes.float() - _spread(zeros, codes)) * _spread(scales, codes)


def _with_rows(codes, zeros, scales, mu1):
    if len(mu1) != len(codes):
        raise ValueError("the shapes do not fit")
    return _read(codes, zeros, scales) * mu1[:, None]


_DEQUANTIZE_MUTANTS = (
    Mutant(
        "no column scales",
        lambda codes, zeros, scales, mu1: _read(codes, zeros, scales),
        "This is what you get without the column scales: each column is multiplied by its own as well.",
    ),
    Mutant(
        "divided by the column scales",
        lambda codes, zeros, scales, mu1: _read(codes, zeros, scales) / mu1,
        "This divides by the column scales: the matrix was divided by them before it was rounded, so they are "
        "multiplied back.",
    ),
    Mutant(
        "unsigned subtraction",
        lambda codes, zeros, scales, mu1: (
            ((codes - zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], 1)).float() * _spread(scales, codes))
            * mu1
        ),
        "Only codes smaller than their zero are wrong: both are uint8, in which 0 - 1 is 255. Make them floats before "
        "you subtract.",
    ),
    Mutant(
        "the zero added",
        lambda codes, zeros, scales, mu1: (codes.float() + _spread(zeros, codes)) * _spread(scales, codes) * mu1,
        "This adds the zero: the code of the number 0 is the zero, so it is subtracted.",
    ),
    Mutant(
        "no zero",
        lambda codes, zeros, scales, mu1: codes.float() * _spread(scales, codes) * mu1,
        "This is what you get without the zero: subtract it from the codes.",
    ),
    Mutant(
        "the zero after the scale",
        lambda codes, zeros, scales, mu1: (codes.float() * _spread(scales, codes) - _spread(zeros, codes)) * mu1,
        "This subtracts the zero after scaling: it is a code, and is subtracted from codes.",
    ),
    Mutant(
        "groups interleaved",
        lambda codes, zeros, scales, mu1: (
            (codes.float() - zeros.float().repeat(1, codes.shape[1] // zeros.shape[1]))
            * scales.repeat(1, codes.shape[1] // scales.shape[1])
            * mu1
        ),
        "This is what you get when scales and zeros are repeated as a whole: the first group is the first columns, so "
        "each number is repeated for all columns of its group (`repeat_interleave`).",
    ),
    Mutant(
        "the first group for all",
        lambda codes, zeros, scales, mu1: (codes.float() - zeros[:, :1].float()) * scales[:, :1] * mu1,
        "This uses the scale and zero of the first group for the whole row: each group has its own.",
    ),
    Mutant(
        "rows",
        _with_rows,
        "This multiplies rows by the column scales: mu1[:, None] goes along the rows, mu1 along the columns.",
    ),
    Mutant(
        "the zero not scaled back",
        lambda codes, zeros, scales, mu1: (
            codes.float() * _spread(scales, codes) * mu1 - _spread(zeros, codes) * _spread(scales, codes)
        ),
        "This multiplies the codes by the column scales, and not the zero: subtract first.",
    ),
)


# `hqq_turn`.


def _turned(weight, s, zero, qmax, outliers=shrink, clamp=True, rounded=True, sign=1):
    """The turn, with something wrong about it."""
    codes = weight * s + zero
    codes = codes.round() if rounded else codes
    codes = codes.clamp(0, qmax) if clamp else codes
    rest = weight - (codes - zero) / s
    return (codes - (weight - sign * outliers(rest)) * s).mean(-1, keepdim=True)


def _plain_shrink(x):
    return x.sign() * (x.abs() - 1 / 10).clamp(min=0)


_HQQ_MUTANTS = (
    Mutant(
        "nothing given up",
        lambda *a: _turned(*a, outliers=torch.zeros_like),
        "Only where errors are large it is wrong: this is plain least squares, with W_e = 0.",
    ),
    Mutant(
        "codes not clamped",
        lambda *a: _turned(*a, clamp=False),
        "Only where weights lie beyond the grid it is wrong: the codes are clamped to 0 ... qmax.",
    ),
    Mutant(
        "codes not rounded",
        lambda *a: _turned(*a, rounded=False),
        "This does not round the codes: then there is no error, and hardly anything to move.",
    ),
    Mutant(
        "outliers added",
        lambda *a: _turned(*a, sign=-1),
        "Only where errors are large it is wrong: W_e is subtracted from W, not added.",
    ),
    Mutant(
        "soft threshold",
        lambda *a: _turned(*a, outliers=_plain_shrink),
        "This takes 1/β off each error, which is right for p = 1: with p = 0.7 it is |x|**(p - 1) / β.",
    ),
    Mutant(
        "the power p",
        lambda *a: _turned(*a, outliers=lambda x: x.sign() * (x.abs() - x.abs() ** 0.7 / 10).clamp(min=0)),
        "This takes |x|**p / β off each error: the power is p - 1.",
    ),
    Mutant(
        "sign forgotten",
        lambda *a: _turned(*a, outliers=lambda x: shrink(x).abs()),
        "Only where large errors are negative it is wrong: shrink keeps the sign of x.",
    ),
    Mutant(
        "mean over all groups",
        lambda *a: _turned(*a).mean().expand(len(a[0]), 1).clone(),
        "This is the mean over all groups: each group has a zero of its own.",
    ),
    Mutant(
        "axis dropped",
        lambda *a: _turned(*a).squeeze(-1),
        "The numbers are right, the shape is not: return (groups, 1), with keepdim=True.",
    ),
    Mutant(
        "the other sign",
        lambda *a: -_turned(*a),
        "This has the other sign: (W_q - z) / s = W gives z = W_q - W · s.",
    ),
    Mutant(
        "divided by s",
        lambda weight, s, zero, qmax: (
            (weight * s + zero).round().clamp(0, qmax) - weight / s
        ).mean(-1, keepdim=True),
        "This divides by s: s is one over the scale, so weights become codes by multiplying.",
    ),
    Mutant(
        "rounded zero",
        lambda *a: _turned(*a).round(),
        "This rounds the new zero: it is no integer, which is the point of it.",
    ),
)  # fmt: skip


# `nf4_bits`.


def _bits(rows, columns, double_quant, scale=32, first=8, second=32, share=256, mean=32, block=64, up=True):
    blocks = rows * columns // block
    if not double_quant:
        return 4 + blocks * scale / (rows * columns)
    steps = -(-blocks // share) if up else blocks / share
    return 4 + (blocks * first + steps * second + mean) / (rows * columns)


_NF4_MUTANTS = (
    Mutant("codes alone", lambda *a: 4.0, "These are the codes alone: the scales are stored as well."),
    Mutant(
        "scales of 16 bits",
        lambda *a: _bits(*a, scale=16),
        "Only plain NF4 is wrong: its scales are float32, 32 bits each.",
    ),
    Mutant(
        "the mean forgotten",
        lambda *a: _bits(*a, mean=0),
        "Only double quantization is wrong: the mean that was taken off all scales is stored as well, 32 bits once.",
    ),
    Mutant(
        "not rounded up",
        lambda *a: _bits(*a, up=False),
        "Only where 256 does not divide the number of blocks it is wrong: a step that fewer scales share takes 32 bits "
        "all the same.",
    ),
    Mutant(
        "the formula of the paper",
        lambda *a: _bits(*a, up=False, mean=0),
        "This is 4 + 8/64 + 32/(64 · 256), right for very large matrices: here the steps are counted one by one, and "
        "the mean once.",
    ),
    Mutant(
        "the second scales forgotten",
        lambda *a: _bits(*a, second=0, mean=0),
        "Only double quantization is wrong: 256 scales share a float32, which is stored as well.",
    ),
    Mutant(
        "256 weights share a step",
        lambda *a: _bits(*a, share=4),
        "This has a step for each 256 weights: 256 *scales* share one, which are 16,384 weights.",
    ),
    Mutant(
        "both kinds of scales",
        lambda rows, columns, double: _bits(rows, columns, double) + (32 / 64 if double else 0),
        "This counts the float32 scales although their codes have replaced them.",
    ),
    Mutant(
        "a scale for each row",
        lambda rows, columns, double: _bits(rows, columns, double, block=columns),
        "This has one scale for each row: a block is 64 weights, so a row has columns / 64 of them.",
    ),
    Mutant(
        "bytes",
        lambda *a: _bits(*a) / 8,
        "These are bytes: multiply by 8.",
    ),
    Mutant(
        "all bits",
        lambda rows, columns, double: _bits(rows, columns, double) * rows * columns,
        "These are the bits of the whole matrix: divide by the number of weights.",
    ),
)  # fmt: skip


TASKS = (
    Task(
        name="sinkhorn.imbalance",
        title="Imbalance",
        points=2,
        minutes=5,
        difficulty=1,
        importance=4,
        reference=imbalance,
        cases=_imbalance_cases,
        tolerance=1e-5,
        hints=(
            "tile.std(0) is a deviation for each column, tile.std(1) one for each row. Put them together before you "
            "look for the largest and the smallest.",
            "spread = torch.cat([tile.std(0), tile.std(1)]); return spread.max() / spread.min().clamp(min=1e-12).",
        ),
        mutants=_IMBALANCE_MUTANTS,
    ),
    Task(
        name="sinkhorn.step",
        title="One step",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=step,
        cases=_step_cases,
        tolerance=1e-4,
        hints=(
            "First the tile as it is by now, divided by exp(u1) along the columns and exp(u2) along the rows. Both "
            "deviations are measured in it; only then do u1 and u2 move.",
            "now = tile / u1.exp() / u2.exp()[:, None]; the new u1 is (u1 + (now.std(0) / tau).clamp(0.7, 2)"
            ".log()).clamp(-0.3, 10), and u2 likewise with now.std(1).",
        ),
        mutants=_STEP_MUTANTS,
    ),
    Task(
        name="sinkhorn.balance",
        title="The loop, and the best so far",
        points=3,
        minutes=12,
        difficulty=3,
        importance=5,
        reference=balance,
        cases=_balance_cases,
        tolerance=1e-4,
        hints=(
            "Look at the present state first: if it is worse than the best, end; else remember exp(u1) and exp(u2). "
            "Then step. The tile itself is the first state.",
            "tau = torch.cat([tile.std(0), tile.std(1)]).min() + 1e-6, once. In each of `order` turns: found = "
            "imbalance(tile / u1.exp() / u2.exp()[:, None]); if found > best: break; best, mu1, mu2 = found, u1.exp(), "
            "u2.exp(); u1, u2 = step(tile, u1, u2, tau).",
        ),
        mutants=_BALANCE_MUTANTS,
    ),
    Task(
        name="sinkhorn.dequantize",
        title="Reading with two scales",
        points=2,
        minutes=7,
        difficulty=2,
        importance=5,
        reference=dequantize,
        cases=_dequantize_cases,
        tolerance=1e-5,
        hints=(
            "A group's zero and scale belong to columns / groups neighbours: x.repeat_interleave(n, 1) writes each of "
            "them n times. Codes and zeros may be uint8, which has no negative numbers.",
            "n = codes.shape[1] // scales.shape[1]; return (codes.float() - zeros.float().repeat_interleave(n, 1)) * "
            "scales.repeat_interleave(n, 1) * column_scales.",
        ),
        mutants=_DEQUANTIZE_MUTANTS,
    ),
    Task(
        name="sinkhorn.hqq_turn",
        title="A turn of HQQ",
        points=3,
        minutes=10,
        difficulty=3,
        importance=4,
        reference=hqq_turn,
        cases=_hqq_cases,
        tolerance=1e-4,
        hints=(
            "Four lines: the codes, the error that is left, what of it is given up (shrink), and the mean over each "
            "group, with keepdim=True.",
            "codes = (weight * s + zero).round().clamp(0, qmax); rest = weight - (codes - zero) / s; outliers = "
            "rest.sign() * (rest.abs() - rest.abs() ** -0.3 / 10).clamp(min=0); return (codes - (weight - outliers) * "
            "s).mean(-1, keepdim=True).",
        ),
        mutants=_HQQ_MUTANTS,
    ),
    Task(
        name="sinkhorn.nf4_bits",
        title="What NF4 costs",
        points=2,
        minutes=6,
        difficulty=2,
        importance=4,
        reference=nf4_bits,
        cases=_nf4_cases,
        hints=(
            "Add up all bits, then divide by rows · columns. A matrix has rows · columns / 64 blocks, so as many "
            "scales.",
            "Plain: 4 bits a weight and 32 a block. Double: 4 a weight, 8 a block, 32 for each 256 blocks, rounded up "
            "(-(-blocks // 256)), and 32 once.",
        ),
        mutants=_NF4_MUTANTS,
    ),
)
