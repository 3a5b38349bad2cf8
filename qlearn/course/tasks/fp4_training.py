"""The exercise of lesson 09: what FP4 training is made of, and the fit that says what it costs.

`round_e2m1`, `stochastic` and `hadamard` ask for functions of the package (stochastic rounding is given its random
numbers, so that it can be judged), `quest` for what its quantizer QuEST gives. `mx_scale` is the scale of its MXFP4,
with the subnormal powers left out. `efficiency` fits one number of a law on losses, as `fit_efficiency` does.
"""

import functools
import math

import numpy as np
import torch

from qlearn import rotation
from qlearn.course.tasks import Case, Mutant, Task
from qlearn.methods import e2m1
from qlearn.training import low_precision
from qlearn.training.scaling_law import Law, fit_efficiency

TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
BY_HAND = torch.tensor([5.5, -0.2, 0.2, 0.2, -2.8, 1.2, 0.1, 0.2])
CLIP = low_precision.GAUSSIAN_CLIP["fp4"]


# What is right.


def round_e2m1(x):
    """The nearest number of FP4, ties to even; 6 beyond 6."""
    return e2m1.round_e2m1(x)


def stochastic(x, random):
    """One of the two neighbours, up where the fraction of the way plus the random number reaches 1."""
    return e2m1.round_e2m1_stochastically(x, random)


def hadamard(x):
    """The normalized Hadamard transform of each row."""
    return rotation.hadamard(x, x.shape[-1])


def mx_scale(groups):
    """2 ** (floor(log2 of the largest magnitude) - 2) for each group; 2 ** -127 at least."""
    return e2m1.mx_scale(groups.abs().amax(-1, keepdim=True))


def quest(groups):
    """(what comes back, the trust mask) of groups along the last axis."""
    values, _, mask = low_precision.QuEST(group=groups.shape[-1])(groups)
    return values, mask


def efficiency(law, N, D, loss):
    """The eff_N with which a law fits these losses best."""
    return _efficiency(Law(**law), tuple(zip(N.tolist(), D.tolist(), loss.tolist(), strict=True)))


@functools.lru_cache(maxsize=128)
def _efficiency(law, runs):
    """The same; several mutants begin with it, and a learner waits for all of them."""
    points = [{"params": size, "tokens": tokens, "loss": value} for size, tokens, value in runs]
    return fit_efficiency(law, points, ("N",)).N


# The cases.


def _random(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def _round_cases():
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return [
        Case("the eight of the lesson", (BY_HAND,)),
        Case("random", (_random(64, size=2.5),)),
        Case("a matrix", (_random(5, 8, seed=1, size=2.0),)),
        Case("ties", (TIES,)),
        Case("negative ties", (-TIES,)),
        Case("the grid itself", (torch.cat([grid, -grid[1:]]),)),
        Case("beyond the end", (torch.tensor([6.1, 7.0, 8.5, 100.0, -6.5, -1e6]),)),
        Case("small ones", (torch.tensor([0.01, -0.24, 0.26, 1e-9, -0.3]),)),
        Case("just beside the ties", (torch.cat([TIES * (1 - 1e-6), TIES * (1 + 1e-6)]),)),
        Case("a single number", (torch.tensor(2.6),)),
        Case("none", (torch.empty(0),)),
    ]


def _stochastic_cases():
    by_hand = torch.tensor([0.5, 0.7, 0.1, 0.3, 0.3, 0.4, 0.9, 0.8])
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -3.0, -6.0])
    return [
        Case("the eight of the lesson", (BY_HAND, by_hand)),
        Case("random", (_random(200, size=2.5), _uniform(200))),
        Case("a matrix", (_random(6, 8, seed=1, size=2.0), _uniform(6, 8, seed=1))),
        Case("negative ones", (-_random(60, seed=2, size=2.0).abs(), _uniform(60, seed=2))),
        Case("steps of one half", (1.9 * _uniform(60, seed=3), _uniform(60, seed=4))),
        Case("steps of one", (2 + 1.9 * _uniform(60, seed=5), _uniform(60, seed=6))),
        Case("steps of two", (4 + 1.9 * _uniform(60, seed=7), _uniform(60, seed=8))),
        Case("the grid itself", (grid, _uniform(11, seed=9))),
        Case("the grid itself, and random numbers that are 0", (grid, torch.zeros(11))),
        Case("beyond the end", (torch.tensor([6.5, 9.0, -7.9, 100.0, -1e5]), _uniform(5, seed=10))),
        Case("random numbers that are all 0", (_random(40, seed=11, size=2.0), torch.zeros(40))),
        Case("random numbers close to 1", (_random(40, seed=12, size=2.0), torch.full((40,), 0.999))),
    ]


def _hadamard_cases():
    outlier = torch.zeros(3, 16)
    outlier[:, 5] = torch.tensor([8.0, -4.0, 1.0])
    return [
        Case("an outlier of the lesson", (torch.tensor([[40.0, 1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 1.5]]),)),
        Case("one number", (_random(4, 1),)),
        Case("two", (_random(3, 2, seed=1),)),
        Case("four", (torch.tensor([[1.0, 2.0, 3.0, 4.0]]),)),
        Case("thirty-two", (_random(5, 32, seed=2),)),
        Case("as many rows as columns", (_random(8, 8, seed=3),)),
        Case("only an outlier", (outlier,)),
        Case("a single row without a second axis", (_random(16, seed=4),)),
        Case("three axes", (_random(2, 3, 8, seed=5),)),
        Case("all the same", (torch.ones(2, 16),)),
        Case("a long row", (_random(2, 512, seed=6),)),
    ]


def _scale_cases():
    powers = 2.0 ** torch.arange(-6, 7)[:, None] * torch.tensor([[1.0, 0.3, -0.2, 0.1]])
    return [
        Case("random groups", (_random(12, 32),)),
        Case("a matrix of groups", (_random(4, 3, 32, seed=1, size=3.0),)),
        Case("largest numbers that are powers of two", (powers,)),
        Case("just below powers of two", (powers * (1 - 2**-20),)),
        Case("the largest is negative", (torch.tensor([[0.5, -7.0, 1.0, 2.0], [-0.9, 0.1, 0.2, 0.3]]),)),
        Case("all negative", (-_random(5, 16, seed=2).abs(),)),
        Case("tiny gradients", (_random(6, 32, seed=3, size=1e-7),)),
        Case("large ones", (_random(6, 32, seed=4, size=1e5),)),
        Case("one group", (_random(1, 8, seed=5),)),
        Case("groups of one", (_random(7, 1, seed=6),)),
    ]


def _quest_cases():
    outlier = _random(4, 32, seed=2)
    outlier[:, 3] = 30.0
    shifted = _random(3, 32, seed=3) + 2
    at_the_end = _random(3, 32, seed=11)  # its groups get the scale 1/2, so the grid ends at 3
    at_the_end[:, 4], at_the_end[:, 9] = 3.0, -3.0
    return [
        Case("random groups", (_random(16, 32),)),
        Case("random groups of many sizes", (_random(24, 32, seed=1) * 2 ** torch.linspace(-3, 3, 24)[:, None],)),
        Case("many groups", (_random(300, 32, seed=9) * 2 ** torch.linspace(-1, 1, 300)[:, None],)),
        Case("an outlier in each", (outlier,)),
        Case("a negative outlier", (-outlier,)),
        Case("numbers with a mean that is not 0", (shifted,)),
        Case("groups of 16", (_random(10, 16, seed=4),)),
        Case("three axes", (_random(3, 4, 32, seed=5),)),
        Case("tiny", (_random(5, 32, seed=6, size=1e-3),)),
        Case("one group", (_random(1, 32, seed=7),)),
        Case("a group of zeros among others", (_random(4, 32, seed=10) * torch.tensor([[1.0], [0.0], [1.0], [2.0]]),)),
        Case("a heavy tail", (_random(12, 32, seed=8) ** 3,)),
        Case("numbers at exactly 6 scales", (at_the_end,)),
    ]


PUBLISHED = {"A": 1.274e5, "alpha": 0.5785, "B": 4.658e5, "beta": 0.5389, "E": 1.3408, "gamma": 0.2764}
SIMPLE = {"A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28, "E": 1.69, "gamma": 1.0}


def _made(law, eff_N, noise=0.0, seed=0, sizes=(3e7, 5e7, 1e8, 2e8), ratios=(25, 50, 100, 200)):
    """N, D and losses of a law with that efficiency, each loss off by a random share."""
    N, D = (m.ravel() for m in np.meshgrid(sizes, ratios))
    D = N * D
    off = noise * np.random.default_rng(seed).standard_normal(len(N))
    return dict(law), N, D, Law(**law).loss(N, D, eff_N) * np.exp(off)


def _outlying(eff_N):
    law, N, D, loss = _made(PUBLISHED, eff_N)
    loss[0] *= 1.05
    return law, N, D, loss


def _efficiency_cases():
    return [
        Case("losses that the law meets exactly", _made(PUBLISHED, 0.65)),
        Case("another efficiency", _made(PUBLISHED, 0.4)),
        Case("nothing lost", _made(PUBLISHED, 1.0)),
        Case("something gained", _made(PUBLISHED, 1.3)),
        Case("another law", _made(SIMPLE, 0.7)),
        Case("one run", _made(PUBLISHED, 0.5, sizes=(1e8,), ratios=(40,))),
        Case("large models", _made(PUBLISHED, 0.8, sizes=(1e9, 1e10), ratios=(20, 400))),
        Case("one run that went wrong", _outlying(0.65)),
        Case("runs that differ a little from the law", _made(PUBLISHED, 0.65, noise=2e-4, seed=1)),
        Case("runs that differ hardly from the law", _made(PUBLISHED, 0.65, noise=5e-5, seed=3)),
        Case("another law, and runs that differ a little", _made(SIMPLE, 0.7, noise=2e-4, seed=2)),
    ]


# The mistakes: `round_e2m1`.


def _clamped(x):
    return x.abs().clamp(max=6)


def _by_step(rounding, limits=(2, 4), steps=(0.5, 1.0, 2.0), clamp=True, back=torch.copysign):
    """`round_e2m1` with another rounding, other stretches, another end or another sign."""

    def answer(x):
        a = _clamped(x) if clamp else x.abs()
        s = torch.where(a < limits[0], steps[0], torch.where(a < limits[1], steps[1], steps[2]))
        return back(rounding(a / s) * s, x)

    return answer


def _up(x):
    return (x + 0.5).floor()


def _down(x):
    return (x - 0.5).ceil()


def _nearest_of(grid):
    grid = torch.tensor(grid)
    return lambda x: torch.copysign(grid[(x.abs()[..., None] - grid).abs().argmin(-1)], x)


_ROUND_MUTANTS = (
    Mutant(
        "ties away from zero",
        _by_step(_up),
        "Only ties are wrong: floor(v + 0.5) sends each to the larger magnitude. torch.round goes to the even one, as "
        "hardware does.",
    ),
    Mutant(
        "ties down",
        _by_step(_down),
        "Only ties are wrong: each goes to the smaller magnitude. That is what argmin over the eight magnitudes gives, "
        "as it takes the first; torch.round goes to the even one.",
    ),
    Mutant(
        "floor",
        _by_step(torch.floor),
        "This is what you get with floor for round: always the smaller neighbour.",
    ),
    Mutant(
        "ceil",
        _by_step(torch.ceil),
        "This is what you get with ceil for round: always the larger neighbour.",
    ),
    Mutant(
        "one step for all",
        lambda x: torch.copysign((_clamped(x) * 2).round() / 2, x),
        "This is what you get with the step 0.5 everywhere: from 2 on it is 1, from 4 on 2, so 2.5 and 5 do not exist.",
    ),
    Mutant(
        "two for three",
        _by_step(torch.round, limits=(2, 7)),
        "This is what you get without the last stretch: between 4 and 6 the step is 2, so there is no 5.",
    ),
    Mutant(
        "not cut off",
        _by_step(torch.round, clamp=False),
        "Only numbers beyond 6 are wrong: there is nothing above 6, so cut the magnitude off first.",
    ),
    Mutant(
        "eight as the end",
        lambda x: _by_step(torch.round, clamp=False)(x.clamp(-8, 8)),
        "Only numbers beyond 7 are wrong: E2M1 has no infinity, yet its largest number is 6, not 8.",
    ),
    Mutant(
        "four as the end",
        lambda x: _by_step(torch.round)(x.clamp(-4, 4)),
        "Only numbers above 5 are wrong: 6 is a number of FP4, too.",
    ),
    Mutant(
        "sign lost",
        lambda x: _by_step(torch.round)(x.abs()),
        "This is what you get when the sign is not put back.",
    ),
    Mutant(
        "stretches by the number",
        lambda x: (x.clamp(-6, 6) / (s := e2m1.step_of(x.clamp(-6, 6)))).round() * s,
        "Only negative numbers are wrong: x < 2 holds for all of them, so they get the step 0.5. Choose the step by "
        "the magnitude.",
    ),
    Mutant(
        "whole numbers",
        lambda x: x.round().clamp(-6, 6),
        "This is rounding to whole numbers: FP4 has 0.5 and 1.5, and no 5.",
    ),
    Mutant(
        "no halves below one",
        _nearest_of([0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
        "0.5 is missing: it is the one subnormal number of E2M1.",
    ),
)


# The mistakes: `stochastic`.


def _drawn(up, clamp=True, sign=True):
    """`stochastic`, with another rule for when to go up: up(fraction, random)."""

    def answer(x, random):
        a = _clamped(x) if clamp else x.abs()
        s = e2m1.step_of(a)
        low = (a / s).floor()
        result = (low + up(a / s - low, random)) * s
        return torch.copysign(result, x) if sign else result

    return answer


_STOCHASTIC_MUTANTS = (
    Mutant(
        "to nearest",
        lambda x, random: round_e2m1(x),
        "This is rounding to nearest: the random numbers decide, and they are not used.",
    ),
    Mutant(
        "a coin",
        _drawn(lambda p, u: ((u < 0.5) & (p > 0)).float()),
        "This is what you get when a fair coin decides: the mean is then the middle of the two neighbours. The chance "
        "to go up has to be the fraction of the way.",
    ),
    Mutant(
        "the wrong way round",
        _drawn(lambda p, u: ((u < 1 - p) & (p > 0)).float()),
        "This is what you get when a number goes up with the chance of going down: the further it is on its way, the "
        "likelier it is to get there.",
    ),
    Mutant(
        "up for small random numbers",
        _drawn(lambda p, u: (u < p).float()),
        "Your rounding is unbiased too, but goes up where u < fraction. Here it is agreed that it goes up where the "
        "fraction plus u reaches 1: floor(a / s + u).",
    ),
    Mutant(
        "round for floor",
        lambda x, random: torch.copysign(((a := _clamped(x)) / (s := e2m1.step_of(a)) + random).round() * s, x),
        "This is what you get with round after u was added: u has moved the number already, by half a step on average, "
        "so this moves it by half a step too far.",
    ),
    Mutant(
        "random around zero",
        lambda x, random: torch.copysign(((a := _clamped(x)) / (s := e2m1.step_of(a)) + random - 0.5).floor() * s, x),
        "This is what you get with u - 0.5 inside of floor: it rounds down by half a step too much on average.",
    ),
    Mutant(
        "random not in steps",
        lambda x, random: torch.copysign((((a := _clamped(x)) + random) / (s := e2m1.step_of(a))).floor() * s, x),
        "This is what you get when u is added before the division: u counts in steps, so divide by the step first.",
    ),
    Mutant(
        "floor with the sign",
        lambda x, random: ((c := x.clamp(-6, 6)) / (s := e2m1.step_of(c.abs())) + random).floor() * s,
        "Only negative numbers are drawn otherwise: this is unbiased too, but here the magnitude is rounded and the "
        "sign put back, so that -x with the same u gives the negative result.",
    ),
    Mutant(
        "ceil less 1",
        lambda x, random: torch.copysign((((a := _clamped(x)) / (s := e2m1.step_of(a)) + random).ceil() - 1) * s, x),
        "Only sums a / s + u that are whole numbers are wrong: ceil(v) - 1 is one below floor(v) there, so numbers of "
        "the grid can move.",
    ),
    Mutant(
        "sign lost",
        _drawn(lambda p, u: (p + u).floor(), sign=False),
        "This is what you get when the sign is not put back.",
    ),
    Mutant(
        "one step for all",
        lambda x, random: torch.copysign((_clamped(x) / 0.5 + random).floor() * 0.5, x),
        "This is what you get with the step 0.5 everywhere: from 2 on it is 1, from 4 on 2.",
    ),
    Mutant(
        "not cut off",
        _drawn(lambda p, u: (p + u).floor(), clamp=False),
        "Only numbers beyond 6 are wrong: cut the magnitude off first.",
    ),
    Mutant(
        "cut off at the end",
        lambda x, random: _drawn(lambda p, u: (p + u).floor(), clamp=False)(x, random * 0).clamp(-6, 6),
        "This is rounding towards zero: the random numbers are not used.",
    ),
)


# The mistakes: `hadamard`.


def _sylvester(blocks):
    """x times a matrix that is doubled by another rule; divided by the root of the size."""

    def answer(x):
        H = torch.ones(1, 1)
        while len(H) < x.shape[-1]:
            H = blocks(H)
        return x @ H / math.sqrt(len(H))

    return answer


def _stages(count=lambda k: k, first=1):
    """The butterflies with another number of stages, not divided by more than all stages would need."""

    def answer(x):
        n = x.shape[-1]
        stages = n.bit_length() - 1
        y, distance = x, first
        for _ in range(count(stages)):
            pairs = y.unflatten(-1, (-1, 2, distance))
            a, b = pairs.unbind(-2)
            y = torch.stack((a + b, a - b), -2).flatten(-3)
            distance *= 2
        return y / math.sqrt(n)

    return answer


def _over_rows(x):
    if x.dim() < 2 or x.shape[-2] & (x.shape[-2] - 1):
        return x * torch.nan
    return hadamard(x.transpose(-1, -2).contiguous()).transpose(-1, -2)


_HADAMARD_MUTANTS = (
    Mutant(
        "not divided",
        lambda x: hadamard(x) * math.sqrt(x.shape[-1]),
        "This is what you get without the division by the root of the size: lengths grow, and it is no rotation.",
    ),
    Mutant(
        "divided by the size",
        lambda x: hadamard(x) / math.sqrt(x.shape[-1]),
        "This is what you get when the sums are divided by n: divide by its root, so that applying it twice gives x.",
    ),
    Mutant(
        "one stage too few",
        _stages(lambda k: max(k - 1, 0)),
        "This is what you get when the last stage is missing: distances run 1, 2, 4 ... up to half of the length.",
    ),
    Mutant(
        "only neighbours",
        _stages(lambda k: min(k, 1)),
        "This is what you get from the first stage alone: sums and differences at distance 1. Each result has to be a "
        "sum of all numbers.",
    ),
    Mutant(
        "all signs plus",
        _sylvester(lambda H: torch.cat([torch.cat([H, H], 1)] * 2)),
        "This is what you get when no sign is turned: all results are the same sum.",
    ),
    Mutant(
        "another block turned",
        _sylvester(lambda H: torch.cat([torch.cat([H, H], 1), torch.cat([-H, H], 1)])),
        "This is a rotation, but another one: in the second row the last block is turned, first - second, and not "
        "second - first.",
    ),
    Mutant(
        "the first block turned",
        _sylvester(lambda H: torch.cat([torch.cat([-H, H], 1), torch.cat([H, H], 1)])),
        "This is a rotation, but another one: of the four blocks the last one is turned, not the first.",
    ),
    Mutant(
        "over the rows",
        _over_rows,
        "This is what you get when columns are transformed: each row, the last axis, is rotated by itself.",
    ),
    Mutant(
        "the whole array as one row",
        lambda x: hadamard(x.flatten()).view(x.shape) if x.numel() & (x.numel() - 1) == 0 else x * torch.nan,
        "This is what you get when all rows are joined into one: each row is rotated by itself.",
    ),
    Mutant(
        "results in another order",
        lambda x: hadamard(x).flip(-1),
        "Your results are right but in another order: sum before difference, at each stage.",
    ),
    Mutant(
        "differences turned",
        lambda x: hadamard(x) * torch.tensor([-1.0 if bin(i).count("1") % 2 else 1.0 for i in range(x.shape[-1])]),
        "This is what you get when each difference is second - first: it is first - second.",
    ),
)


# The mistakes: `mx_scale`.


def _scaled_by(largest=lambda g: g.abs().amax(-1, keepdim=True), exponent=lambda v: v.log2().floor() - 2):
    """`mx_scale` with another largest number, or another exponent."""
    return lambda groups: torch.exp2(exponent(largest(groups)))


_SCALE_MUTANTS = (
    Mutant(
        "2 forgotten",
        _scaled_by(exponent=lambda v: v.log2().floor()),
        "This is 2 ** floor(log2 max): over it the largest number is between 1 and 2, and most of the grid, which "
        "reaches to 6 = 1.5 * 2 ** 2, is not used. Subtract 2.",
    ),
    Mutant(
        "nearest power",
        _scaled_by(exponent=lambda v: v.log2().round() - 2),
        "This is what you get with round for floor: the specification rounds the exponent down.",
    ),
    Mutant(
        "rounded up",
        _scaled_by(exponent=lambda v: v.log2().ceil() - 2),
        "This is what you get with ceil for floor: then nothing is cut off, but the specification rounds down.",
    ),
    Mutant(
        "max over six",
        lambda groups: groups.abs().amax(-1, keepdim=True) / 6,
        "This is max / 6, which is no power of two: a scale of MXFP4 is an exponent of 8 bits.",
    ),
    Mutant(
        "power of max over six",
        _scaled_by(exponent=lambda v: (v / 6).log2().floor()),
        "This is the power of two below max / 6: it is half the scale for largest numbers between 1 and 1.5 times a "
        "power of two. The exponent of the largest number less 2 is what is asked for.",
    ),
    Mutant(
        "without magnitude",
        lambda groups: _scaled_by(lambda g: g.amax(-1, keepdim=True).clamp(min=2**-100))(groups),
        "Only groups whose largest magnitude is negative are wrong: take abs() first.",
    ),
    Mutant(
        "one scale for all",
        lambda groups: mx_scale(groups.flatten()[None]).expand(*groups.shape[:-1], 1).clone(),
        "This is what you get with one scale for all groups: each group, a row of the last axis, has its own.",
    ),
    Mutant(
        "the mean",
        _scaled_by(lambda g: g.abs().mean(-1, keepdim=True)),
        "This is what you get from the mean magnitude: the largest one sets the scale.",
    ),
    Mutant(
        "axis lost",
        lambda groups: mx_scale(groups)[..., 0],
        "The numbers are right, but the last axis is gone: keepdim=True leaves it with length 1, so that "
        "groups / scale works.",
    ),
    Mutant(
        "natural logarithm",
        lambda groups: torch.exp2(groups.abs().amax(-1, keepdim=True).log().floor() - 2),
        "This is what you get with log for log2.",
    ),
    Mutant(
        "three for two",
        _scaled_by(exponent=lambda v: v.log2().floor() - 3),
        "This is half the scale: over it the largest number is 8 to 16, and FP4 ends at 6.",
    ),
    Mutant(
        "one for two",
        _scaled_by(exponent=lambda v: v.log2().floor() - 1),
        "This is twice the scale: over it the largest number is 2 to 4, and 4 and 6 are hardly used. Subtract 2.",
    ),
    Mutant(
        "inverse",
        lambda groups: 1 / mx_scale(groups),
        "This is 1 / scale: numbers are divided by the scale, not multiplied.",
    ),
)


# The mistakes: `quest`.


def _quest(
    deviation=lambda g: g.std(-1, keepdim=True, correction=0),
    share=CLIP / 6,
    power=lambda s: e2m1.power_of_two(s + 1e-8, "nearest"),
    rounding=lambda v: e2m1.round_e2m1(v, "down"),
    trusted=lambda v, scaled: scaled.abs() < 6,
    values=lambda rounded, scale, groups, mask: rounded * scale,
):
    """`quest` with one of its parts exchanged."""

    def answer(groups):
        scale = power(deviation(groups) * share)
        scaled = groups / scale
        rounded = rounding(scaled)
        mask = trusted(rounded, scaled)
        return values(rounded, scale, groups, mask), mask

    return answer


_QUEST_MUTANTS = (
    Mutant(
        "the largest number",
        _quest(deviation=lambda g: g.abs().amax(-1, keepdim=True), share=0.25, power=e2m1.power_of_two),
        "This is MXFP4's own scale, from the largest number: QuEST takes the standard deviation.",
    ),
    Mutant(
        "exponent rounded down",
        _quest(power=lambda s: e2m1.power_of_two(s)),
        "This is what you get when the scale becomes the power of two below: take the nearest, 2 ** round(log2).",
    ),
    Mutant(
        "exponent rounded up",
        _quest(power=lambda s: e2m1.power_of_two(s, "ceil")),
        "This is what you get when the scale becomes the power of two above: take the nearest, 2 ** round(log2).",
    ),
    Mutant(
        "not a power of two",
        _quest(power=lambda s: s),
        "This is what you get when the scale is used as it is: it has to become a power of two.",
    ),
    Mutant(
        "zeros not guarded",
        _quest(power=lambda s: torch.exp2(s.log2().round())),
        "Only a group of zeros is wrong: its standard deviation is 0, and so is the scale, by which it is divided. Add "
        "1e-8 before the power of two is taken.",
    ),
    Mutant(
        "6 forgotten",
        _quest(share=CLIP),
        "This is what you get when the scale is 2.92 standard deviations: that is where the grid ends, at 6 scales, so "
        "divide by 6.",
    ),
    Mutant(
        "3 for 2.92",
        _quest(share=3 / 6),
        "This is what you get with 3 standard deviations in place of 2.92247856.",
    ),
    Mutant(
        "n - 1",
        _quest(deviation=lambda g: g.std(-1, keepdim=True)),
        "This is what you get with n - 1 in the standard deviation, torch's own choice: pass correction=0.",
    ),
    Mutant(
        "root mean square",
        _quest(deviation=lambda g: g.square().mean(-1, keepdim=True).sqrt()),
        "Only groups whose mean is far from 0 are wrong: the root of the mean square is no standard deviation then.",
    ),
    Mutant(
        "one deviation for all",
        _quest(deviation=lambda g: g.std(correction=0)),
        "This is what you get with one standard deviation for all groups: each group has its own.",
    ),
    Mutant(
        "mask turned",
        _quest(trusted=lambda v, scaled: scaled.abs() >= 6),
        "The values are right, and the mask is turned round: True is where the gradient passes, which is where nothing "
        "was cut off.",
    ),
    Mutant(
        "mask of what is below the last number",
        _quest(trusted=lambda v, scaled: v.abs() < 6),
        "The values are right, and the mask leaves out too much: what lies between 5 and 6 is rounded to 6, but not "
        "cut off.",
    ),
    Mutant(
        "mask with the end",
        _quest(trusted=lambda v, scaled: scaled.abs() <= 6),
        "Only numbers at exactly 6 scales are wrong: trusted is what lies below, so the mask is < 6, not <= 6.",
    ),
    Mutant(
        "mask without magnitude",
        _quest(trusted=lambda v, scaled: scaled < 6),
        "The values are right, and the mask forgets what is cut off below -6: compare the magnitude.",
    ),
    Mutant(
        "mask everywhere",
        _quest(trusted=lambda v, scaled: torch.ones_like(scaled, dtype=torch.bool)),
        "The values are right, and the mask lets everything pass: what is cut off gets no gradient.",
    ),
    Mutant(
        "what is cut off becomes zero",
        _quest(values=lambda rounded, scale, groups, mask: rounded * scale * mask),
        "This is what you get when the mask is applied to the values: forward, what is cut off comes back as 6 scales; "
        "the mask is for the gradient.",
    ),
    Mutant(
        "what is cut off stays",
        _quest(values=lambda rounded, scale, groups, mask: torch.where(mask, rounded * scale, groups)),
        "This is what you get when numbers beyond the end are left as they are: they come back as 6 scales.",
    ),
    Mutant(
        "not multiplied again",
        _quest(values=lambda rounded, scale, groups, mask: rounded),
        "These are the numbers of FP4, over their scale: multiply by the scale.",
    ),
)


# The mistakes: `efficiency`.


def _huber_sum(errors):
    return _huber(errors).sum(-1)


def _fitted(loss_of, misfit=_huber_sum, error=lambda fitted, loss: np.log(fitted / loss)):
    """`efficiency` with another formula, loss_of(law, N, D, eff), another misfit, or other errors; by two searches."""

    def answer(law, N, D, loss):
        def best_of(grid):  # errors are (grid, runs)
            return grid[np.argmin(misfit(error(loss_of(Law(**law), N, D, np.exp(grid)[:, None]), loss)))]

        coarse = best_of(np.linspace(math.log(0.05), math.log(2.0), 801))
        middle = best_of(np.linspace(coarse - 5e-3, coarse + 5e-3, 401))
        return math.exp(best_of(np.linspace(middle - 3e-5, middle + 3e-5, 61)))

    return answer


def _huber(errors, delta=1e-4):
    size = np.abs(errors)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


_EFFICIENCY_MUTANTS = (
    Mutant(
        "of the tokens",
        _fitted(lambda law, N, D, e: law.loss(N, D, 1, e)),
        "This is eff_D: it is N that is to be multiplied.",
    ),
    Mutant(
        "inverse",
        lambda law, N, D, loss: 1 / efficiency(law, N, D, loss),
        "This is 1 / eff_N: N is multiplied by the efficiency, so a scheme that loses has less than 1.",
    ),
    Mutant(
        "least squares",
        _fitted(lambda law, N, D, e: law.loss(N, D, e), misfit=lambda e: np.square(e).sum(-1)),
        "This is what you get with squares: one run that went wrong pulls all. Beyond 1e-4 an error counts "
        "by its size, Huber's loss.",
    ),
    Mutant(
        "absolute errors",
        _fitted(lambda law, N, D, e: law.loss(N, D, e), misfit=lambda e: np.abs(e).sum(-1)),
        "Only runs close to the law count otherwise: within 1e-4 Huber's loss is half the square of an error.",
    ),
    Mutant(
        "without the logarithm",
        _fitted(lambda law, N, D, e: law.loss(N, D, e), error=lambda fitted, loss: fitted - loss),
        "This is what you get from the difference of the losses: take that of their logarithms.",
    ),
    Mutant(
        "the first run alone",
        lambda law, N, D, loss: efficiency(law, N[:1], D[:1], loss[:1]),
        "This is what the first run alone would give: sum over all of them.",
    ),
    Mutant(
        "both at once",
        _fitted(lambda law, N, D, e: law.loss(N, D, e, e)),
        "This is what you get when tokens are multiplied as well: only N is.",
    ),
    Mutant(
        "the loss multiplied",
        lambda law, N, D, loss: float(np.median(Law(**law).loss(N, D) / loss)),
        "This is the ratio of two losses: an efficiency multiplies N inside of the law.",
    ),
    Mutant(
        "one at most",
        lambda law, N, D, loss: min(efficiency(law, N, D, loss), 1.0),
        "Only runs that are better than the law are wrong: an efficiency may come out above 1, so search up to 2.",
    ),
    Mutant(
        "summed first",
        _fitted(lambda law, N, D, e: law.loss(N, D, e), misfit=lambda e: abs(e.sum(-1))),
        "This is Huber's loss of the sum of the errors, in which errors of different sign cancel: take Huber's loss of "
        "each, and then the sum.",
    ),
    Mutant(
        "logarithm to base 10",
        _fitted(lambda law, N, D, e: law.loss(N, D, e), error=lambda fitted, loss: np.log10(fitted / loss)),
        "This is what you get with log10: Huber's loss changes its kind at an error of 1e-4 in natural logarithms.",
    ),
    Mutant(
        "no more than nothing",
        lambda law, N, D, loss: 1.0,
        "This is 1, as if nothing were lost: did the minimizer move at all?",
    ),
    Mutant(
        "the power forgotten",
        lambda law, N, D, loss: efficiency(law, N, D, loss) ** law["alpha"],
        "This is what multiplies N to the power of alpha: the efficiency stands inside of that power.",
    ),
)


TASKS = (
    Task(
        name="fp4_training.round_e2m1",
        title="Round to FP4",
        points=2,
        minutes=7,
        difficulty=2,
        importance=5,
        reference=round_e2m1,
        cases=_round_cases,
        hints=(
            "Cut the magnitude off at 6. Up to 2 the numbers stand 0.5 apart, up to 4 they stand 1 apart, then 2: "
            "divide by that step, round, multiply again.",
            "a = x.abs().clamp(max=6); s = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0)); then "
            "torch.copysign((a / s).round() * s, x).",
        ),
        mutants=_ROUND_MUTANTS,
    ),
    Task(
        name="fp4_training.stochastic",
        title="Round stochastically",
        points=2,
        minutes=6,
        difficulty=2,
        importance=5,
        reference=stochastic,
        cases=_stochastic_cases,
        hints=(
            "As before, but in place of rounding a / s to nearest, add the random number and round down.",
            "torch.copysign((a / s + random).floor() * s, x), with a and s as in round_e2m1.",
        ),
        mutants=_STOCHASTIC_MUTANTS,
    ),
    Task(
        name="fp4_training.hadamard",
        title="A rotation by additions alone",
        points=3,
        minutes=12,
        difficulty=3,
        importance=4,
        reference=hadamard,
        cases=_hadamard_cases,
        tolerance=1e-5,
        hints=(
            "For the distances 1, 2, 4 ...: split the last axis into (-1, 2, distance); the two halves of each pair "
            "become their sum and their difference. At the end divide by the root of the length.",
            "first, second = y.unflatten(-1, (-1, 2, distance)).unbind(-2); then "
            "y = torch.stack((first + second, first - second), -2).flatten(-3), and distance *= 2.",
        ),
        mutants=_HADAMARD_MUTANTS,
    ),
    Task(
        name="fp4_training.mx_scale",
        title="The scale of a group",
        points=2,
        minutes=5,
        difficulty=2,
        importance=4,
        reference=mx_scale,
        cases=_scale_cases,
        hints=(
            "Of each group take the largest magnitude; its logarithm to base 2, rounded down, less 2, is the exponent.",
            "torch.exp2(groups.abs().amax(-1, keepdim=True).log2().floor() - 2).",
        ),
        mutants=_SCALE_MUTANTS,
    ),
    Task(
        name="fp4_training.quest",
        title="Clip, and whom to trust",
        points=3,
        minutes=10,
        difficulty=3,
        importance=4,
        reference=quest,
        cases=_quest_cases,
        hints=(
            "Standard deviation of each group (correction=0), times CLIP / 6, plus 1e-8, to the nearest power of two: "
            "that is the scale. The mask is True where the number over its scale is below 6 in size.",
            "scale = torch.exp2((groups.std(-1, keepdim=True, correction=0) * CLIP / 6 + 1e-8).log2().round()); return "
            "round_e2m1(groups / scale) * scale, and (groups / scale).abs() < 6.",
        ),
        mutants=_QUEST_MUTANTS,
    ),
    Task(
        name="fp4_training.efficiency",
        title="What FP4 costs, as one number",
        points=3,
        minutes=10,
        difficulty=3,
        importance=4,
        reference=efficiency,
        cases=_efficiency_cases,
        tolerance=5e-5,
        hints=(
            "Write a function of one number that multiplies N by it, computes the law's losses and returns the sum of "
            "Huber's losses of log(law / loss); then let minimize_scalar find its least.",
            "minimize_scalar(misfit, bounds=(0.05, 2), method='bounded', options={'xatol': 1e-7}).x, with "
            "misfit(e) = huber(np.log(law_loss(law, e * N, D) / loss)).sum().",
        ),
        mutants=_EFFICIENCY_MUTANTS,
    ),
)
