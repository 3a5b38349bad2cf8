"""The exercise of lesson 03: a grid with a zero point, a matrix product of its codes, and where to clip.

`parameters` and `best_clip` ask for what the package's `zero_point` found, read off the tensor it returns (with float32
scales, so that the learner needs no rounding of the scale). `quantize` and `integer_matmul` are a formula each. The
exercise's last cells hold the codes against the package's, and the product against the layer.
"""

import torch

from qlearn import methods
from qlearn.course.tasks import Case, Mutant, Task

BY_HAND = torch.tensor([-0.37, 0.0, 0.22, 0.58, 0.79, 1.03])


# What is right.


def _fitted(x, bits, clip="minmax"):
    return methods.zero_point(x.reshape(1, -1), bits, clip=clip, scale_dtype=torch.float32)


def parameters(x, bits):
    """Scale (float) and zero (int) of the grid that covers a tensor and 0."""
    quantized = _fitted(x, bits)
    return quantized.scales.item(), int(quantized.zero_points().item())


def quantize(x, scale, zero, bits):
    """Codes (uint8, shaped as x): round, add, clamp, cast."""
    return (torch.round(x / scale) + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def integer_matmul(product, x_sums, w_sums, zx, zw, k):
    """The product of the codes without their zeros, int32 (m, n), from the product of the codes."""
    return product - zx * w_sums - x_sums[:, None] * zw + k * zx * zw


def best_clip(x, bits):
    """The fraction of the interval, 1.00, 0.99 ... 0.01, with the least squared error."""
    return round(_fitted(x, bits, clip="mse").scales.item() / _fitted(x, bits).scales.item(), 2)


# The cases.


def _random(*shape, seed=0, spread=1.0, offset=0.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def _parameters_cases():
    return [
        Case("the six numbers of the lesson", (BY_HAND, 3)),
        Case("random, 8 bits", (_random(256), 8)),
        Case("random, 4 bits, lopsided", (_random(64, seed=1, offset=0.8), 4)),
        Case("random, 2 bits", (_random(48, seed=2), 2)),
        Case("more below zero than above", (torch.tensor([-7.0, -2.0, 0.4, 1.2]), 5)),
        Case("all positive", (torch.tensor([10.0, 11.0, 12.0]), 8)),
        Case("all negative", (torch.tensor([-3.5, -3.25, -4.0]), 4)),
        Case("a constant", (torch.full((6,), 2.0), 4)),
        Case("a negative constant", (torch.full((3,), -0.3), 8)),
        Case("after a ReLU: the smallest is 0", (_random(40, seed=3).relu(), 8)),
        Case("a matrix: one grid for all of it", (_random(4, 6, seed=4, offset=-0.4), 6)),
        Case("one outlier", (torch.tensor([0.03, -0.02, 0.01, 3.0, -0.04]), 8)),
        Case("tiny numbers", (_random(32, seed=5, spread=1e-6), 4)),
        Case("minus zero", (torch.tensor([-0.0, 1.5]), 3)),
        Case("a single number", (torch.tensor([0.7]), 8)),
        Case("all zeros", (torch.zeros(5), 4)),
    ]


def _quantize_cases():
    return [
        Case("the six numbers of the lesson", (BY_HAND, 0.2, 2, 3)),
        Case("above the interval, 8 bits", (torch.tensor([4.0, 9.0, 300.0]), 4 / 255, 64, 8)),
        Case("below the interval, 8 bits", (torch.tensor([-1.5, -9.0, -300.0]), 4 / 255, 64, 8)),
        Case("inside the interval, but more than 127 steps from zero", (torch.tensor([2.5, 2.9]), 4 / 255, 64, 8)),
        Case("random, 8 bits", (_random(128), 0.02, 117, 8)),
        Case("random, 4 bits, some clipped at both ends", (_random(64, seed=1), 0.25, 7, 4)),
        Case("random, 2 bits", (_random(32, seed=2), 0.9, 1, 2)),
        Case("halfway between two rulings, odd zero", (torch.tensor([0.25, 0.75, -0.25, -0.75, 1.25]), 0.5, 3, 3)),
        Case("zero is 0", (_random(20, seed=3).relu(), 0.1, 0, 5)),
        Case("zero is the last code", (-_random(20, seed=4).abs(), 0.1, 31, 5)),
        Case("0 and -0 get the code of zero", (torch.tensor([0.0, -0.0]), 0.3, 5, 4)),
        Case("a matrix", (_random(3, 5, seed=5), 0.11, 30, 6)),
        Case("infinities go to the ends", (torch.tensor([float("inf"), -float("inf")]), 0.1, 9, 4)),
        Case("no numbers", (torch.zeros(0), 0.1, 3, 4)),
    ]


def _product(name, m, n, k, seed, zx=None, zw=None, bits=8):
    """A case with random codes: their product in int32, their sums, and the zeros."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape):
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)

    qx, qw = codes(m, k), codes(n, k)
    zx = int(codes(1)) if zx is None else zx
    zw = codes(n) if zw is None else torch.full((n,), zw, dtype=torch.int32)
    return Case(name, (*_terms(qx, qw), zx, zw, k))


def _terms(qx, qw):
    return qx @ qw.T, qx.sum(1, dtype=torch.int32), qw.sum(1, dtype=torch.int32)


def _largest():
    """As many of the largest codes as fit into 31 bits, and zeros that take all of it away again."""
    k = (2**31 - 1) // 255**2
    full = torch.full((1, k), 255, dtype=torch.int32)
    return Case("the longest sum that fits", (*_terms(full, full), 255, torch.tensor([255], dtype=torch.int32), k))


def _integer_matmul_cases():
    qx, qw = torch.tensor([[7, 2, 0]]).int(), torch.tensor([[0, 4, 6], [3, 3, 3]]).int()
    return [
        Case("the codes of the lesson", (*_terms(qx, qw), 2, torch.tensor([4, 3]).int(), 3)),
        _product("random, 3 inputs, 5 outputs", 3, 5, 16, seed=0),
        _product("as many inputs as outputs", 4, 4, 32, seed=1),
        _product("one input", 1, 6, 24, seed=2),
        _product("one output", 5, 1, 24, seed=3),
        _product("one term", 2, 3, 1, seed=4),
        _product("symmetric weights: their zeros are 0", 4, 4, 16, seed=5, zw=0),
        _product("activations after a ReLU: their zero is 0", 4, 4, 16, seed=6, zx=0),
        _product("no zeros at all", 3, 3, 16, seed=7, zx=0, zw=0),
        _product("4 bits", 6, 6, 64, seed=8, bits=4),
        _product("a long sum", 3, 3, 20_000, seed=9),
        _largest(),
    ]


def _best_clip_cases():
    outlier = _random(2000, seed=3, spread=0.1)
    outlier[7] = 1.2
    return [
        Case("normal, 2 bits", (_random(400), 2)),
        Case("normal, 3 bits", (_random(400, seed=1), 3)),
        Case("normal, 4 bits", (_random(1000, seed=2), 4)),
        Case("a few numbers, 2 bits", (_random(5, seed=21), 2)),
        Case("one outlier, 3 bits", (outlier, 3)),
        Case("one outlier, 8 bits", (outlier, 8)),
        Case(
            "one huge outlier: nearly all is cut off",
            (torch.cat([torch.linspace(0, 1, 40_000), torch.tensor([100.0])]), 2),
        ),
        Case("two outliers, of different sign", (torch.cat([outlier, torch.tensor([-1.0])]), 2)),
        Case("lopsided", (_random(300, seed=4).exp(), 3)),
        Case("all negative", (-_random(300, seed=5).exp(), 3)),
        Case("a matrix", (_random(12, 30, seed=6, offset=0.5), 2)),
        Case("a constant", (torch.full((9,), 0.25), 4)),
        Case("numbers that the whole interval fits exactly", (torch.tensor([0.0, 1.0, 2.0, 3.0]), 2)),
        Case("all zeros", (torch.zeros(8), 4)),
    ]


# The mistakes: `parameters`.


def _span(x):
    return min(0.0, x.min().item()), max(0.0, x.max().item())


def _grid(x, bits, low=None, high=None, steps=None, zero=round):
    """`parameters` with one thing different: the interval, the number of steps, or how the zero is rounded."""
    spanned = _span(x)
    low, high = spanned[0] if low is None else low, spanned[1] if high is None else high
    scale = (high - low) / (steps or 2**bits - 1) or 1.0
    return scale, zero(-low / scale)


def _zero_clamped(x, bits):
    scale, zero = _grid(x, bits, low=x.min().item(), high=x.max().item())
    return scale, min(max(zero, 0), 2**bits - 1)


def _widened_downward(x, bits):
    scale, zero = _grid(x, bits, high=x.max().item())
    return scale, min(max(zero, 0), 2**bits - 1)


def _symmetric(x, bits):
    most = x.abs().max().item()
    return _grid(x, bits, low=-most, high=most)


def _no_guard(x, bits):
    low, high = _span(x)
    scale = torch.tensor((high - low) / (2**bits - 1))
    return scale.item(), int((-low / scale).round().nan_to_num())


def _zero_of_the_middle(x, bits):
    return _grid(x, bits)[0], 2 ** (bits - 1)


_PARAMETERS_MUTANTS = (
    Mutant(
        "0 left out of the range",
        lambda x, bits: _grid(x, bits, low=x.min().item(), high=x.max().item()),
        "This is what you get when the interval runs from the smallest to the largest number even if 0 is not in it: "
        "the zero point is then no code of the grid. Widen the interval to hold 0.",
    ),
    Mutant(
        "zero clamped, interval not widened",
        _zero_clamped,
        "This is what you get when the zero point is clamped into the range of codes while the interval leaves 0 out: "
        "scale and zero no longer belong together, and [10, 11, 12] comes back as [2, 2, 2]. Widen the interval "
        "first; then nothing needs clamping.",
    ),
    Mutant(
        "widened below only",
        _widened_downward,
        "This is what you get when only the lower end is moved to 0: numbers that are all negative need the upper end "
        "moved to it.",
    ),
    Mutant(
        "2**bits steps",
        lambda x, bits: _grid(x, bits, steps=2**bits),
        "This is what you get when the interval is divided by 2**bits: that many codes have one step fewer between "
        "them.",
    ),
    Mutant(
        "one step too few",
        lambda x, bits: _grid(x, bits, steps=2**bits - 2),
        "This is what you get when the interval is divided by 2**bits - 2, as for absmax: a grid with a zero point "
        "leaves no code unused.",
    ),
    Mutant(
        "the signed range's steps",
        lambda x, bits: _grid(x, bits, steps=2 ** (bits - 1) - 1),
        "This is what you get when the interval is divided by 2**(bits - 1) - 1, the largest signed code: it has to "
        "hold all 2**bits - 1 steps.",
    ),
    Mutant(
        "sign of the zero",
        lambda x, bits: _grid(x, bits, zero=lambda z: -round(z)),
        "This is what you get when the zero point is round(min / scale): its sign is the other way round, because min "
        "has to get the code 0.",
    ),
    Mutant(
        "floor for round",
        lambda x, bits: _grid(x, bits, zero=int),
        "This is what you get when the zero point is cut off to an integer, by int() or floor: round it to the "
        "nearest one.",
    ),
    Mutant(
        "zero not rounded",
        lambda x, bits: _grid(x, bits, zero=float),
        "This is what you get when the zero point stays a fraction: it has to be a code itself, so that 0 is stored "
        "exactly.",
    ),
    Mutant(
        "signed codes",
        lambda x, bits: _grid(x, bits, zero=lambda z: round(z) - 2 ** (bits - 1)),
        "This is what you get for signed codes, -2**(bits - 1) and up: here the codes are 0 to 2**bits - 1.",
    ),
    Mutant(
        "symmetric",
        _symmetric,
        "This is what you get when the interval goes from -max|x| to max|x|: half of it may be empty. Use the "
        "smallest and the largest number.",
    ),
    Mutant(
        "zero in the middle",
        _zero_of_the_middle,
        "This is what you get when the zero point is the middle code whatever the numbers are: it has to be as far "
        "from code 0 as 0 is from min.",
    ),
    Mutant(
        "no scale for zeros",
        _no_guard,
        "This is what you get when nothing is done about a tensor of zeros: its scale would be 0, and dividing by it "
        "gives NaN. Use 1.",
    ),
    Mutant(
        "a constant taken for zeros",
        lambda x, bits: (1.0, 0) if x.min() == x.max() else _grid(x, bits),
        "This is what you get when every constant gets scale 1: only where the widened interval is empty, all zeros, "
        "does the scale need replacing.",
    ),
    Mutant(
        "zero a rounded float",
        lambda x, bits: _grid(x, bits, zero=lambda z: float(round(z))),
        "This zero is whole, but still a float: return an int.",
    ),
)


# The mistakes: `quantize`.


def _steps(x, scale):
    return torch.round(x / scale)


def _wrapped(steps, dtype):
    """What a cast to 8 bits leaves of a whole number. By way of int64, so that every machine does the same."""
    return steps.clamp(-(2**62), 2**62).to(torch.int64).to(dtype).to(torch.int64)


def _top(bits):
    return 2**bits - 1


_QUANTIZE_MUTANTS = (
    Mutant(
        "cast to uint8 first",
        lambda x, scale, zero, bits: (
            (_wrapped(_steps(x, scale), torch.uint8) + zero).clamp(0, _top(bits)).to(torch.uint8)
        ),
        "This is what you get when the rounded number is cast to 8 bits before the zero is added and the range is "
        "enforced: -1 becomes 255, and 256 becomes 0. Cast last.",
    ),
    Mutant(
        "cast to int8 first",
        lambda x, scale, zero, bits: (
            (_wrapped(_steps(x, scale), torch.int8) + zero).clamp(0, _top(bits)).to(torch.uint8)
        ),
        "This is what you get when the rounded number is cast to int8 before the zero is added: what is more than 127 "
        "steps from zero comes out on the other side. Cast last.",
    ),
    Mutant(
        "cast before the clamp",
        lambda x, scale, zero, bits: (
            _wrapped(_steps(x, scale) + zero, torch.uint8).clamp(0, _top(bits)).to(torch.uint8)
        ),
        "This is what you get when the sum is cast to 8 bits before it is clamped: 319 has become 63 by then, which "
        "lies in the range. Clamp first.",
    ),
    Mutant(
        "no clamp",
        lambda x, scale, zero, bits: _wrapped(_steps(x, scale) + zero, torch.uint8).to(torch.uint8),
        "This is what you get without a clamp: numbers outside the interval get codes that do not exist, or wrap "
        "round to the other end.",
    ),
    Mutant(
        "clamped before the zero is added",
        lambda x, scale, zero, bits: (_steps(x, scale).clamp(0, _top(bits)) + zero).to(torch.int64),
        "This is what you get when the clamp comes before the zero is added: every negative number ends at the zero "
        "point. Add, then clamp.",
    ),
    Mutant(
        "zero added before rounding",
        lambda x, scale, zero, bits: torch.round(x / scale + zero).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get when the zero is added before rounding. Only ties differ, because they go to the even "
        "number: 0.5 rounds to 0, and 1 more is 1, but 1.5 rounds to 2. Round, then add.",
    ),
    Mutant(
        "floor for round",
        lambda x, scale, zero, bits: (torch.floor(x / scale) + zero).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get when the division is rounded down: errors reach a whole step instead of half a step.",
    ),
    Mutant(
        "truncated",
        lambda x, scale, zero, bits: (torch.trunc(x / scale) + zero).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get when the fraction is dropped, which is what a cast to an integer does: errors reach a "
        "whole step.",
    ),
    Mutant(
        "ties away from even",
        lambda x, scale, zero, bits: (torch.floor(x / scale + 0.5) + zero).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get with floor(x + 0.5): only ties differ. torch.round takes them to the even number, as "
        "torch.fake_quantize_per_tensor_affine does.",
    ),
    Mutant(
        "zero subtracted",
        lambda x, scale, zero, bits: (_steps(x, scale) - zero).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get when the zero is subtracted: that is the way back. On the way to a code it is added.",
    ),
    Mutant(
        "zero forgotten",
        lambda x, scale, zero, bits: _steps(x, scale).clamp(0, _top(bits)).to(torch.uint8),
        "This is what you get when no zero is added: every negative number ends at code 0.",
    ),
    Mutant(
        "always 8 bits",
        lambda x, scale, zero, bits: (_steps(x, scale) + zero).clamp(0, 255).to(torch.uint8),
        "This is what you get when codes are clamped to 255 at any width: with b bits the last code is 2**b - 1.",
    ),
    Mutant(
        "one code too many",
        lambda x, scale, zero, bits: (_steps(x, scale) + zero).clamp(0, 2**bits).to(torch.int64),
        "This is what you get when codes are clamped to 2**bits: that is how many there are, and the last one is "
        "2**bits - 1.",
    ),
    Mutant(
        "signed codes",
        lambda x, scale, zero, bits: (
            (_steps(x, scale) + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int64)
        ),
        "This is what you get when codes are clamped to the signed range: here they are 0 to 2**bits - 1.",
    ),
    Mutant(
        "infinity cast",
        lambda x, scale, zero, bits: quantize(x.masked_fill(x.isinf(), 0) - 1e9 * x.isinf(), scale, zero, bits),
        "Only infinity is wrong: no integer holds it, so a cast makes a wrong number of it. Clamp while it is a float.",
    ),
)


# The mistakes: `integer_matmul`.

_INTEGER_MATMUL_MUTANTS = (
    Mutant(
        "no constant",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums - x_sums[:, None] * zw,
        "This is what you get without the fourth term: zx * zw is subtracted twice in each of the k products, so it "
        "has to be added k times.",
    ),
    Mutant(
        "constant once",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums - x_sums[:, None] * zw + zx * zw,
        "This is what you get when zx * zw is added once: it stands in each of the k products of the sum.",
    ),
    Mutant(
        "constant subtracted",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums - x_sums[:, None] * zw - k * zx * zw,
        "This is what you get when the fourth term is subtracted too: minus times minus is plus.",
    ),
    Mutant(
        "corrections added",
        lambda product, x_sums, w_sums, zx, zw, k: product + zx * w_sums + x_sums[:, None] * zw + k * zx * zw,
        "This is what you get for the sum of (qx + zx) * (qw + zw): the zeros are subtracted, so the two middle terms "
        "have a minus.",
    ),
    Mutant(
        "sums exchanged",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * x_sums[:, None] - w_sums * zw + k * zx * zw,
        "This is what you get when each zero meets the sum of its own codes: zx multiplies the sum of the weights' "
        "codes, and zw that of the activations'.",
    ),
    Mutant(
        "inputs and outputs exchanged",
        lambda product, x_sums, w_sums, zx, zw, k: (
            product - (zx * w_sums)[:, None] - x_sums * zw[:, None] + (k * zx * zw)[:, None]
        ),
        "This is what you get when the corrections are laid over the wrong axis: rows of the product are inputs "
        "(x_sums), columns are outputs (w_sums and zw).",
    ),
    Mutant(
        "activations' sums over the columns",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums - x_sums * zw + k * zx * zw,
        "This is what you get when x_sums is left as a row: there is one sum for each row of the product, so it needs "
        "the shape (m, 1).",
    ),
    Mutant(
        "one zero for all rows",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums - x_sums[:, None] * zw[0] + k * zx * zw[0],
        "This is what you get when the zero of the first row of the weights is used for all: each row has its own.",
    ),
    Mutant(
        "only the weights' zeros",
        lambda product, x_sums, w_sums, zx, zw, k: product - x_sums[:, None] * zw,
        "This is what you get when only the zeros of the weights are taken out: the activations have one too.",
    ),
    Mutant(
        "only the activations' zero",
        lambda product, x_sums, w_sums, zx, zw, k: product - zx * w_sums,
        "This is what you get when only the zero of the activations is taken out, which is enough for symmetric "
        "weights: these have zeros too.",
    ),
    Mutant(
        "no correction",
        lambda product, x_sums, w_sums, zx, zw, k: product,
        "This is the product of the codes as it came: a code counts from the start of the grid, not from 0.",
    ),
    Mutant(
        "in float32",
        lambda product, x_sums, w_sums, zx, zw, k: (
            product.float() - zx * w_sums.float() - x_sums.float()[:, None] * zw + float(k * zx) * zw
        ).to(torch.int32),
        "This is what you get when the terms are added as float32, which has 24 bits for an integer: long sums lose "
        "their last digits. Stay with integers.",
    ),
)


# The mistakes: `best_clip`.

_FRACTIONS = [percent / 100 for percent in range(100, 0, -1)]


def _squares(error):
    return error.square().sum()


def _search(x, bits, loss=_squares, tried=_FRACTIONS, of_equals=max, clamp=True, in_steps=False):
    """`best_clip` with one thing different."""
    scale, zero = parameters(x, bits)
    losses = []
    for step in (fraction * scale for fraction in tried):
        codes = torch.round(x / step) + zero
        codes = codes.clamp(0, _top(bits)) if clamp else codes
        error = (codes - zero) * step - x
        losses.append(loss(error / step if in_steps else error).item())
    return of_equals(f for f, found in zip(tried, losses, strict=True) if found == min(losses))


def _downhill(x, bits):
    """Stops at the first fraction that is worse than the one before."""
    best, before = 1.0, _loss_at(x, bits, 1.0)
    for fraction in _FRACTIONS[1:]:
        loss = _loss_at(x, bits, fraction)
        if loss >= before:
            break
        best, before = fraction, loss
    return best


def _loss_at(x, bits, fraction, wrap=False):
    scale, zero = parameters(x, bits)
    codes = quantize(x, scale * fraction, zero, bits)
    steps = (codes - zero).float() if wrap else codes.float() - zero
    return (steps * scale * fraction - x).square().sum().item()


_BEST_CLIP_MUTANTS = (
    Mutant(
        "absolute error",
        lambda x, bits: _search(x, bits, loss=lambda error: error.abs().sum()),
        "This is what you get when absolute errors are added: the few large errors of clipped numbers then count too "
        "little. Square them.",
    ),
    Mutant(
        "largest error",
        lambda x, bits: _search(x, bits, loss=lambda error: error.abs().max()),
        "This is what you get when the largest error is made small: it hardly ever allows any clipping. Add up the "
        "squares.",
    ),
    Mutant(
        "never clipped",
        lambda x, bits: 1.0,
        "This is fraction 1 where another is better. If you did search: shrink the scale on the way back, too.",
    ),
    Mutant(
        "no clamp",
        lambda x, bits: _search(x, bits, clamp=False),
        "This is what you get when clipping costs nothing: numbers outside are not clamped, are left out, or are "
        "compared with the clipped x. Clamp, and add the error of every number against x itself.",
    ),
    Mutant(
        "error in steps",
        lambda x, bits: _search(x, bits, in_steps=True),
        "This is what you get when the error is measured in steps of the grid: a smaller step then makes the same "
        "error look larger. Measure it in the units of x.",
    ),
    Mutant(
        "codes subtracted as uint8",
        lambda x, bits: min(_FRACTIONS, key=lambda f: (_loss_at(x, bits, f, wrap=True), -f)),
        "This is what you get when the zero is subtracted from codes that are still uint8: below the zero they wrap "
        "round to 255. Make them floats first.",
    ),
    Mutant(
        "the last of equals",
        lambda x, bits: _search(x, bits, of_equals=min),
        "This is what you get when a later fraction replaces an equally good one: of equals keep the largest, which "
        "clips least.",
    ),
    Mutant(
        "stopped downhill",
        _downhill,
        "This is what you get when the search stops as soon as the error grows: it goes up and down on its way, so "
        "try all fractions.",
    ),
    Mutant(
        "only down to one half",
        lambda x, bits: _search(x, bits, tried=_FRACTIONS[:51]),
        "This is what you get when fractions below 0.5 are not tried: one outlier can make a tenth of the interval "
        "the best.",
    ),
    Mutant(
        "steps of five percent",
        lambda x, bits: _search(x, bits, tried=_FRACTIONS[::5]),
        "This is what you get in steps of 0.05: try every hundredth.",
    ),
    Mutant(
        "the best grid's error",
        lambda x, bits: min(_loss_at(x, bits, f) for f in _FRACTIONS),
        "This is the least squared error itself: return the fraction at which it is reached.",
    ),
    Mutant(
        "only down to one tenth",
        lambda x, bits: _search(x, bits, tried=_FRACTIONS[:91]),
        "This is what you get when fractions below 0.1 are not tried: go down to 0.01.",
    ),
    Mutant(
        "0.01 left out",
        lambda x, bits: _search(x, bits, tried=_FRACTIONS[:-1]),
        "Only 0.01 was not tried: range(100, 0, -1) ends with 1.",
    ),
)


TASKS = (
    Task(
        name="zero_point.parameters",
        title="Scale and zero point",
        points=3,
        minutes=10,
        difficulty=2,
        importance=5,
        reference=parameters,
        cases=_parameters_cases,
        hints=(
            "First decide where the interval begins and ends. Numbers that are all positive are the interesting case.",
            "low = min(x.min(), 0), high = max(x.max(), 0); scale = (high - low) / (2**bits - 1), or 1 where that is "
            "0; zero = round(-low / scale).",
        ),
        mutants=_PARAMETERS_MUTANTS,
    ),
    Task(
        name="zero_point.quantize",
        title="Codes, in the right order",
        points=2,
        minutes=8,
        difficulty=2,
        importance=5,
        reference=quantize,
        cases=_quantize_cases,
        hints=(
            "Four operations: round, add, clamp, cast. What does a cast to 8 bits do to a number that does not fit?",
            "(torch.round(x / scale) + zero).clamp(0, ...).to(torch.uint8): floats all the way, and the cast last.",
        ),
        mutants=_QUANTIZE_MUTANTS,
    ),
    Task(
        name="zero_point.integer_matmul",
        title="A matrix product of codes, corrected",
        points=3,
        minutes=12,
        difficulty=3,
        importance=4,
        reference=integer_matmul,
        cases=_integer_matmul_cases,
        hints=(
            "Multiply out (qx - zx) * (qw - zw) and sum each of the four terms over k by itself. Which of them depend "
            "on the row, and which on the column?",
            "product - zx * w_sums - x_sums[:, None] * zw + k * zx * zw: the second and the fourth vary along the "
            "columns, the third along both.",
        ),
        mutants=_INTEGER_MATMUL_MUTANTS,
    ),
    Task(
        name="zero_point.best_clip",
        title="Where to clip",
        points=3,
        minutes=15,
        difficulty=3,
        importance=4,
        reference=best_clip,
        cases=_best_clip_cases,
        hints=(
            "A smaller interval has the same zero and a smaller scale. Write the squared error for one fraction, then "
            "try all hundred.",
            "for each fraction: codes = quantize(x, fraction * scale, zero, bits), error = (codes.float() - zero) * "
            "fraction * scale - x. Begin at 1.00 and replace the best only by one that is strictly better.",
        ),
        mutants=_BEST_CLIP_MUTANTS,
    ),
)
