"""The exercise of lesson 08: BitNet's two roundings, the layer made of them, its bytes, its sums and its gradients.

`absmean`, `quantize_tokens` and `pack_trits` ask for functions of the package, `bitlinear` and `gradients` for what
its `BitLinear` computes forward and backward. `matvec` works on lists of Python's integers, and in some cases on
integers that refuse to be multiplied: NumPy would do so unseen, but NumPy is not what the task is about.
"""

import torch

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats import integers
from qlearn.methods.ternary import EPSILON
from qlearn.methods.ternary import absmean as absmean_of_row
from qlearn.models import bitlinear as packed
from qlearn.training.bitlinear import BitLinear

BY_HAND = torch.tensor([[1.0, -0.25, 0.5, 0.0], [-0.5, 0.75, -1.0, 0.0]])


# What is right.


def absmean(weight):
    """V, -1, 0, 1 in the weight's shape, and beta, the mean magnitude of the whole matrix."""
    V, beta = absmean_of_row(weight.flatten())
    return V.view(weight.shape), beta.squeeze()


def quantize_tokens(x):
    """X, int8, and the scale 127 / max|x| of each token."""
    return packed.quantize_tokens(x)


def bitlinear(x, weight):
    """What a layer with this float weight puts out, float32 (tokens, out)."""
    layer = _layer(weight)
    return layer(x).detach()


def gradients(x, weight, above):
    """What comes back to x and to the float weight when `above` arrives at the output."""
    layer, x = _layer(weight), x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), (x, layer.weight), above)


def pack_trits(trits):
    """Five trits to a byte, the first as the lowest digit: uint8."""
    return integers.pack_trits(trits)


def matvec(V, x):
    """A sum for each row of V, by adding and subtracting."""
    sums = []
    for row in V:
        total = 0
        for trit, number in zip(row, x, strict=True):
            if trit == 1:
                total += number
            elif trit == -1:
                total -= number
        sums.append(total)
    return sums


def _layer(weight):
    layer = BitLinear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer


# The cases.


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trits(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def _absmean_cases():
    outlier, uneven = _random(4, 8, seed=3), _random(6, 4, seed=4) * torch.tensor([[0.01], [0.1], [1], [3], [0.5], [2]])
    outlier[1, 2] = 40.0
    return [
        Case("the matrix of the lesson", (BY_HAND,)),
        Case("random", (_random(6, 10),)),
        Case("rows of very different size", (uneven,)),
        Case("columns of very different size", (uneven.T.contiguous(),)),
        Case("one outlier", (outlier,)),
        Case("numbers that lie half way", (torch.tensor([[0.25, -0.75, 0.5, 0.5], [-0.25, 0.75, -0.5, -0.5]]),)),
        Case("numbers far from 0", (_random(3, 5, seed=5) + 2.0,)),
        Case("mostly zeros", (torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.0, -0.06, 0.0, 0.0]]),)),
        Case("all the same", (torch.full((2, 3), -0.7),)),
        Case("nothing but zeros", (torch.zeros(2, 3),)),
        Case("numbers smaller than the smallest scale", (torch.tensor([[3e-6, -2e-6], [1e-7, 4e-6]]),)),
        Case("one row", (_random(1, 7, seed=6),)),
        Case("a single number", (torch.tensor([[-0.3]]),)),
    ]


def _token_cases():
    quiet, loud = _random(3, 6, seed=2), _random(4, 6, seed=3)
    quiet[1], loud[2] = 0, loud[2] * 300
    channel = _random(5, 4, seed=4)
    channel[:, 1] *= 50
    return [
        Case("random", (_random(4, 8),)),
        Case("the largest is negative", (torch.tensor([[0.5, -1.0, 0.25], [-4.0, 1.0, 3.0]]),)),
        Case("a token that is all zeros", (quiet,)),
        Case("one loud token", (loud,)),
        Case("one loud channel", (channel,)),
        Case("numbers that lie half way", (torch.tensor([[127, 0.5, 1.5, 2.5, -0.5], [-127, 3.5, 4.5, -2.5, 9.5]]),)),
        Case("never negative", (_random(3, 5, seed=5).abs(),)),
        Case("never positive", (-_random(3, 5, seed=6).abs() - 0.1,)),
        Case("numbers smaller than the smallest scale", (torch.tensor([[3e-6, -2e-6], [1.0, 0.5]]),)),
        Case("one token", (_random(1, 6, seed=7),)),
        Case("one channel", (_random(4, 1, seed=8),)),
        Case("windows of tokens", (_random(2, 3, 4, seed=9),)),
    ]  # fmt: skip


def _layer_case(name, tokens, columns, rows, seed=0):
    """A case of `bitlinear`: tokens of different size, rows of different size."""
    size = torch.linspace(0.2, 3, tokens)[:, None]
    return Case(name, (_random(tokens, columns, seed=seed) * size, _random(rows, columns, seed=seed + 1)))


def _bitlinear_cases():
    x, weight = _random(3, 8, seed=20), _random(4, 8, seed=21)
    silent = x.clone()
    silent[1] = 0
    one_row = weight.clone()
    one_row[1:] *= 0.01
    return [
        Case(
            "by hand",
            (torch.tensor([[127.0, 1.0, 2.0, 3.4], [0.0, -1.0, 0.5, 0.25]]), torch.tensor([[0.9, -0.2, 0.1, -0.8]])),
        ),
        _layer_case("random", 5, 16, 6),
        _layer_case("as many outputs as inputs", 3, 8, 8, seed=2),
        _layer_case("as many tokens as inputs", 8, 8, 3, seed=4),
        _layer_case("one token", 1, 12, 5, seed=6),
        _layer_case("one output", 4, 12, 1, seed=8),
        Case("small weights", (x, 0.02 * weight)),
        Case("large weights", (x, 30 * weight)),
        Case("rows of very different size", (x, one_row)),
        Case("a token that is all zeros", (silent, weight)),
        Case("weights that are all zeros", (x, torch.zeros(2, 8))),
        Case("sums beyond 127", (torch.full((2, 25), 0.5), torch.full((3, 25), 0.25))),
        Case("sums beyond 32767", (torch.full((2, 301), 0.5), torch.full((3, 301), 0.25))),
        _layer_case("as many tokens as outputs", 5, 9, 5, seed=10),
    ]


def _gradient_cases():
    def case(name, tokens, columns, rows, seed=0, size=1.0):
        x, weight = _layer_case(name, tokens, columns, rows, seed).args
        return Case(name, (x, size * weight, _random(tokens, rows, seed=seed + 2)))

    outlier = _random(3, 6, seed=33)
    outlier[0, 1] = 25.0
    return [
        case("random", 5, 8, 6),
        case("as many outputs as inputs", 3, 6, 6, seed=3),
        case("as many tokens as inputs", 6, 6, 4, seed=6),
        case("as many of everything", 4, 4, 4, seed=9),
        case("one token", 1, 8, 3, seed=12),
        case("one output", 4, 8, 1, seed=15),
        case("small weights", 3, 8, 4, seed=18, size=0.02),
        case("large weights", 3, 8, 4, seed=21, size=40.0),
        Case("one large weight", (_random(4, 6, seed=32), outlier, _random(4, 3, seed=34))),
        Case("nothing arrives", (_random(2, 4, seed=35), _random(3, 4, seed=36), torch.zeros(2, 3))),
        Case("trits", (torch.tensor([[127.0, -64.0, 3.0]]), torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 1))),
    ]


def _pack_cases():
    return [
        Case("five of the lesson", (torch.tensor([1, 0, -1, -1, -1], dtype=torch.int8),)),
        Case("six: one is left over", (torch.tensor([1, 0, -1, -1, -1, 1], dtype=torch.int8),)),
        Case("all ones", (torch.ones(10, dtype=torch.int8),)),
        Case("all zeros", (torch.zeros(10, dtype=torch.int8),)),
        Case("all zeros, three left over", (torch.zeros(8, dtype=torch.int8),)),
        Case("all minus ones", (-torch.ones(15, dtype=torch.int8),)),
        Case("only the first of five", (torch.tensor([1, -1, -1, -1, -1], dtype=torch.int8),)),
        Case("only the last of five", (torch.tensor([-1, -1, -1, -1, 1], dtype=torch.int8),)),
        Case("random, 40", (_trits(40),)),
        Case("random, 44", (_trits(44, seed=1),)),
        Case("random, 37", (_trits(37, seed=2),)),
        Case("a single one", (torch.tensor([0], dtype=torch.int8),)),
        Case("fewer than five", (_trits(3, seed=3),)),
    ]


class NoTimes(int):
    """An integer that can be added and subtracted, and that refuses to be multiplied."""

    def __mul__(self, other):
        raise TypeError("this number may only be added and subtracted")

    __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __pow__ = __mul__


def _matvec_cases():
    def case(name, rows, columns, seed=0, kind=int):
        x = torch.randint(-128, 128, (columns,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Case(name, (_trits(rows, columns, seed=seed).tolist(), [kind(number) for number in x]))

    return [
        Case("by hand", ([[1, 0, -1], [1, 1, 1]], [3, -4, 5])),
        case("random", 5, 12),
        case("numbers that refuse to be multiplied", 4, 6, seed=1, kind=NoTimes),
        case("as many rows as columns", 6, 6, seed=2),
        Case("sums far beyond 127", ([[1] * 300, [-1] * 300, [1, -1] * 150], [127, -128] * 150)),
        Case("all of the largest", ([[1] * 40, [-1] * 40], [-128] * 40)),
        Case("a row of zeros", ([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1]], [7, 8, 9, 10])),
        Case("numbers that are 0", ([[1, -1, 1], [-1, -1, 0]], [0, 0, 0])),
        Case("one row", ([[-1, 1, 1, 0, -1]], [5, 6, 7, 8, 9])),
        Case("one column", ([[1], [0], [-1]], [-42])),
    ]


# The mistakes: `absmean`.


def _clip(x):
    return x.round().clamp(-1, 1)


def _scaled_by(scale):
    """`absmean` with another scale."""

    def answer(weight):
        beta = scale(weight).clamp(min=EPSILON)
        return _clip(weight / beta), beta if beta.numel() > 1 else beta.reshape(())

    return answer


def _rounded_by(rounding):
    """`absmean` with another rounding of weight / beta."""

    def answer(weight):
        beta = weight.abs().mean().clamp(min=EPSILON)
        return rounding(weight / beta), beta

    return answer


def _no_epsilon(weight):
    beta = weight.abs().mean()
    return _clip(weight / beta), beta


def _added_epsilon(weight):
    beta = weight.abs().mean() + EPSILON
    return _clip(weight / beta), beta


_ABSMEAN_MUTANTS = (
    Mutant(
        "absmax",
        _scaled_by(lambda w: w.abs().max()),
        "This is what you get when beta is the largest magnitude: what is below half of it becomes 0. Take the mean.",
    ),
    Mutant(
        "mean of the weights",
        _scaled_by(lambda w: w.mean()),
        "This is what you get when the mean is taken without the magnitude: plus and minus cancel, and little is left.",
    ),
    Mutant(
        "magnitude of the mean",
        _scaled_by(lambda w: w.mean().abs()),
        "This is |mean W|: take the magnitudes first, then their mean.",
    ),
    Mutant(
        "one scale a row",
        _scaled_by(lambda w: w.abs().mean(-1, keepdim=True)),
        "This is what you get with one scale for each row: BitNet has one for the whole matrix.",
    ),
    Mutant(
        "one scale a column",
        _scaled_by(lambda w: w.abs().mean(0, keepdim=True)),
        "This is what you get with one scale for each column: BitNet has one for the whole matrix.",
    ),
    Mutant(
        "median",
        _scaled_by(lambda w: w.abs().median()),
        "This is what you get when beta is the median magnitude: it is the mean.",
    ),
    Mutant(
        "standard deviation",
        _scaled_by(lambda w: w.std() if w.numel() > 1 else w.abs().mean()),
        "This is what you get when beta is the standard deviation: it is the mean of the magnitudes.",
    ),
    Mutant(
        "root mean square",
        _scaled_by(lambda w: w.square().mean().sqrt()),
        "This is what you get when beta is the root mean square: it is the mean of the magnitudes, which is smaller.",
    ),
    Mutant(
        "mean of what is not 0",
        _scaled_by(lambda w: w[w != 0].abs().mean() if w.any() else w.sum()),
        "This is what you get when zeros are left out of the mean: they count.",
    ),
    Mutant(
        "not clipped",
        _rounded_by(torch.round),
        "This is what you get without the clip: what is more than one and a half times the mean becomes 2 or more.",
    ),
    Mutant(
        "truncated",
        _rounded_by(lambda x: x.trunc().clamp(-1, 1)),
        "This is what you get when the fraction is cut off: then all that is below the mean becomes 0. Round.",
    ),
    Mutant(
        "floor",
        _rounded_by(lambda x: x.floor().clamp(-1, 1)),
        "This is what you get when floor takes the place of round: small negative weights become -1.",
    ),
    Mutant(
        "half away from zero",
        _rounded_by(lambda x: (x.sign() * (x.abs() + 0.5).floor()).clamp(-1, 1)),
        "Only weights that lie exactly half way are wrong: torch.round takes them to the even neighbour, which is 0.",
    ),
    Mutant(
        "signs",
        _rounded_by(torch.sign),
        "These are signs: all that is not 0 became -1 or 1. Round weight / beta.",
    ),
    Mutant(
        "0 counts as positive",
        _rounded_by(lambda x: torch.where(x < 0, -1.0, 1.0)),
        "This is one bit a weight, with no 0 in it. Round weight / beta.",
    ),
    Mutant(
        "the mean taken off",
        lambda w: (_clip((w - w.mean()) / w.abs().mean().clamp(min=EPSILON)), w.abs().mean().clamp(min=EPSILON)),
        "This is what you get when the mean is taken off first: the first BitNet did so for its signs; with trits "
        "nothing is taken off.",
    ),
    Mutant(
        "multiplied by the scale",
        lambda w: (_clip(w * w.abs().mean().clamp(min=EPSILON)), w.abs().mean().clamp(min=EPSILON)),
        "This is what you get when the weight is multiplied by beta: divide.",
    ),
    Mutant(
        "beta inverted",
        lambda w: (absmean(w)[0], 1 / absmean(w)[1]),
        "V is right; what you give back beside it is 1 / beta.",
    ),
    Mutant(
        "the weights that come back",
        lambda w: (absmean(w)[0] * absmean(w)[1], absmean(w)[1]),
        "This is beta * V, what the trits stand for: give back V itself.",
    ),
    Mutant(
        "no smallest scale",
        _no_epsilon,
        "This is what you get without a smallest scale: a matrix of zeros is divided by 0. Let beta be 1e-5 at least.",
    ),
    Mutant(
        "1e-5 added",
        _added_epsilon,
        "This is what you get when 1e-5 is added to beta: it is the smallest that beta may be, so clamp.",
    ),
)


# The mistakes: `quantize_tokens`.


def _tokens(scale=None, rounding=torch.round, give=lambda X, scale: (X, scale)):
    """`quantize_tokens` with one of its parts changed."""
    scale = scale or (lambda x: 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON))

    def answer(x):
        s = scale(x)
        return give(rounding(x * s).clamp(-128, 127).to(torch.int8), s)

    return answer


def _over_all(x):
    return (127 / x.abs().amax().clamp(min=EPSILON)).expand(*x.shape[:-1], 1)


_TOKEN_MUTANTS = (
    Mutant(
        "one scale for all",
        _tokens(_over_all),
        "This is what you get with one scale for all tokens: a loud one takes the steps from all others. Each token "
        "has its own.",
    ),
    Mutant(
        "one number for all",
        _tokens(lambda x: 127 / x.abs().max().clamp(min=EPSILON)),
        "This is one scale for everything: each token has its own, with a last axis of 1.",
    ),
    Mutant(
        "one scale a channel",
        _tokens(lambda x: 127 / x.abs().amax(0, keepdim=True).clamp(min=EPSILON)),
        "This is what you get with one scale for each channel: in a product of integers it could not be taken out of "
        "the sum. Each token, each row, has its own.",
    ),
    Mutant(
        "one scale a window",
        _tokens(lambda x: 127 / x.abs().amax((-2, -1), keepdim=True).clamp(min=EPSILON) + 0 * x[..., :1]),
        "This is what you get when all tokens of a window share a scale: each has its own.",
    ),
    Mutant(
        "128",
        _tokens(lambda x: 128 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)),
        "This is what you get with 128 for 127: then the largest positive number does not fit and is cut off.",
    ),
    Mutant(
        "255",
        _tokens(lambda x: 255 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)),
        "This is what you get with 255: that is for grids from 0 up. Signed numbers of 8 bits end at 127.",
    ),
    Mutant(
        "seven bits",
        _tokens(lambda x: 63 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)),
        "This is what you get with 63: one bit too few.",
    ),
    Mutant(
        "largest, not largest magnitude",
        _tokens(lambda x: 127 / x.amax(-1, keepdim=True).clamp(min=EPSILON)),
        "This is what you get without the magnitude: where the largest is negative, another one sets the scale.",
    ),
    Mutant(
        "magnitude of the largest",
        _tokens(lambda x: 127 / x.amax(-1, keepdim=True).abs().clamp(min=EPSILON)),
        "This is |max x|: take the magnitudes first, then the largest.",
    ),
    Mutant(
        "mean magnitude",
        _tokens(lambda x: 127 / x.abs().mean(-1, keepdim=True).clamp(min=EPSILON)),
        "This is what you get with the mean magnitude: that is for the weights. 8 bits have room for the largest.",
    ),
    Mutant(
        "spread",
        _tokens(lambda x: 254 / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).clamp(min=EPSILON)),
        "This is what you get from largest minus smallest, as a zero-point grid has it: here 0 stays 0, and the "
        "largest magnitude sets the scale.",
    ),
    Mutant(
        "truncated",
        _tokens(rounding=torch.trunc),
        "This is what you get when .to(torch.int8) does the rounding: it cuts the fraction off. Round first.",
    ),
    Mutant(
        "floor",
        _tokens(rounding=torch.floor),
        "This is what you get when floor takes the place of round.",
    ),
    Mutant(
        "half up",
        _tokens(rounding=lambda x: (x + 0.5).floor()),
        "Only numbers that lie exactly half way are wrong: torch.round takes them to the even neighbour.",
    ),
    Mutant(
        "the scale inverted",
        _tokens(give=lambda X, scale: (X, 1 / scale)),
        "X is right; what you give back beside it is max|x| / 127, the inverse of the scale.",
    ),
    Mutant(
        "the magnitude given back",
        _tokens(give=lambda X, scale: (X, 127 / scale)),
        "X is right; what you give back beside it is max|x|, and 127 / max|x| was asked for.",
    ),
    Mutant(
        "no axis left",
        _tokens(give=lambda X, scale: (X, scale.squeeze(-1))),
        "X is right; the scale has lost its last axis. keepdim=True keeps it.",
    ),
    Mutant(
        "floats",
        _tokens(give=lambda X, scale: (X.float(), scale)),
        "The numbers are right, but they are floats: store them as int8.",
    ),
    Mutant(
        "the numbers that come back",
        _tokens(give=lambda X, scale: (X / scale, scale)),
        "This is X / scale, what the integers stand for: give back X itself.",
    ),
    Mutant(
        "no smallest scale",
        _tokens(lambda x: 127 / x.abs().amax(-1, keepdim=True)),
        "This is what you get without a smallest magnitude: a token of zeros is divided by 0. Let it be 1e-5 at least.",
    ),
    Mutant(
        "1e-5 added",
        _tokens(lambda x: 127 / (x.abs().amax(-1, keepdim=True) + EPSILON)),
        "This is what you get when 1e-5 is added to the magnitude: it is the smallest that it may be, so clamp.",
    ),
)


# The mistakes: `bitlinear`.


def _product(combine):
    """`bitlinear` with the parts put together in another way."""

    def answer(x, weight):
        (V, beta), (X, scale) = absmean(weight), quantize_tokens(x)
        return combine(X.float(), scale, V, beta, x, weight)

    return answer


_BITLINEAR_MUTANTS = (
    Mutant(
        "no scales",
        _product(lambda X, scale, V, beta, x, W: X @ V.T),
        "This is the sum of integers alone: beta and the scale of each token have to bring it back.",
    ),
    Mutant(
        "beta forgotten",
        _product(lambda X, scale, V, beta, x, W: X @ V.T / scale),
        "This is what you get without beta, the scale of the weight.",
    ),
    Mutant(
        "the tokens' scale forgotten",
        _product(lambda X, scale, V, beta, x, W: X @ V.T * beta),
        "This is what you get without the scale of the tokens: X is x times that, so divide by it at the end.",
    ),
    Mutant(
        "multiplied by the tokens' scale",
        _product(lambda X, scale, V, beta, x, W: X @ V.T * beta * scale),
        "This is what you get when the sum is multiplied by the tokens' scale: X is x times that, so divide.",
    ),
    Mutant(
        "divided by beta",
        _product(lambda X, scale, V, beta, x, W: X @ V.T / beta / scale),
        "This is what you get when the sum is divided by beta: V is W divided by that, so multiply.",
    ),
    Mutant(
        "inputs not rounded",
        _product(lambda X, scale, V, beta, x, W: x @ V.T * beta),
        "This is what you get when only the weight is rounded: the inputs have 8 bits.",
    ),
    Mutant(
        "weight not rounded",
        _product(lambda X, scale, V, beta, x, W: X @ W.T / scale),
        "This is what you get when only the inputs are rounded: the weight is V times beta.",
    ),
    Mutant(
        "a plain layer",
        _product(lambda X, scale, V, beta, x, W: x @ W.T),
        "This is a plain layer: round both.",
    ),
    Mutant(
        "scale of the trits",
        _product(lambda X, scale, V, beta, x, W: X @ V.T * (beta * V).abs().mean() / scale),
        "This is what you get when the mean is taken of the rounded weight: its zeros make it smaller. beta is that of "
        "the float weight.",
    ),
    Mutant(
        "largest for beta",
        _product(lambda X, scale, V, beta, x, W: X @ V.T * W.abs().max() / scale),
        "This is what you get when the largest weight takes the place of beta at the end.",
    ),
    Mutant(
        "rounded per row",
        lambda x, weight: quantize_tokens(x)[0].float() / quantize_tokens(x)[1]
        @ _scaled_by(lambda w: w.abs().mean(-1, keepdim=True))(weight)[0].T
        * weight.abs().mean(-1).clamp(min=EPSILON),
        "This is what you get with a scale for each row of the weight: BitNet has one for the whole matrix.",
    ),
    Mutant(
        "one scale for all tokens",
        lambda x, weight: (x * _over_all(x)).round() @ absmean(weight)[0].T * absmean(weight)[1] / _over_all(x),
        "This is what you get when all tokens share a scale: each has its own.",
    ),
    Mutant(
        "sums in 8 bits",
        _product(
            lambda X, scale, V, beta, x, W: (X.to(torch.int8) @ V.to(torch.int8).T).float() * beta / scale
        ),
        "This is what you get when int8 is multiplied with int8: torch keeps the sum in 8 bits, and it wraps around. "
        "Make both float32 (or int32) before the product.",
    ),
    Mutant(
        "sums in 16 bits",
        _product(lambda X, scale, V, beta, x, W: (X.short() @ V.short().T).float() * beta / scale),
        "Only long sums are wrong: in int16 they wrap around beyond 32767. Make both float32 (or int32) before the "
        "product.",
    ),
    Mutant(
        "sums in half precision",
        _product(lambda X, scale, V, beta, x, W: (X.half() @ V.half().T).float() * beta / scale),
        "Only large sums are wrong: float16 has no odd numbers beyond 2048. Make both float32 before the product.",
    ),
    Mutant(
        "tokens' scales along the outputs",
        _product(
            lambda X, scale, V, beta, x, W: X @ V.T * beta / (scale.T if len(x) == len(W) else scale)
        ),
        "Only layers with as many tokens as outputs are wrong: there the scales of the tokens were laid along the "
        "outputs. They belong to the rows, (tokens, 1).",
    ),
    Mutant(
        "absmax",
        _product(
            lambda X, scale, V, beta, x, W: X
            @ _clip(W / W.abs().max().clamp(min=EPSILON)).T
            * W.abs().max().clamp(min=EPSILON)
            / scale
        ),
        "This is what you get when the weight is rounded by its largest magnitude: call your `absmean`.",
    ),
)  # fmt: skip


# The mistakes: `gradients`.


def _back(combine):
    """`gradients` from other parts. combine(above, x read back, weight read back, x, weight) -> the two."""

    def answer(x, weight, above):
        (V, beta), (X, scale) = absmean(weight), quantize_tokens(x)
        return combine(above, X / scale, V * beta, x, weight, V, beta, X.float(), scale)

    return answer


_GRADIENT_MUTANTS = (
    Mutant(
        "float weight on the way to x",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ W, g.T @ xq)),
        "The gradient of the weight is right. That of x went back through the float weight: forward it was the rounded "
        "one, so backward it is that too.",
    ),
    Mutant(
        "float inputs on the way to W",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ x)),
        "The gradient of x is right. That of the weight is made with the inputs as they were: what met the weight were "
        "the rounded ones.",
    ),
    Mutant(
        "a plain layer",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ W, g.T @ x)),
        "These are the gradients of a plain layer: forward it saw rounded numbers, so they belong here.",
    ),
    Mutant(
        "beta forgotten",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ V, g.T @ xq)),
        "The gradient of the weight is right; that of x lacks beta: the layer multiplies by beta * V.",
    ),
    Mutant(
        "beta twice",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ xq * beta)),
        "The gradient of x is right; that of the weight has a beta too many: V is W / beta, and the two cancel.",
    ),
    Mutant(
        "integers for inputs",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ X)),
        "The gradient of x is right; that of the weight is made with the integers X: what they stand for is X / scale.",
    ),
    Mutant(
        "the tokens' scale left in",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: ((g * scale) @ wq, g.T @ xq)),
        "The gradient of the weight is right; that of x is multiplied by the tokens' scale: it is taken out again at "
        "the end, and the two cancel.",
    ),
    Mutant(
        "true derivative",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (torch.zeros_like(x), torch.zeros_like(W))),
        "This is the derivative of rounding, 0: straight-through pretends that rounding was not there.",
    ),
    Mutant(
        "nothing for the zeros",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ xq * (V != 0))),
        "The gradient of x is right; in that of the weight the zeros got nothing: none would ever come back.",
    ),
    Mutant(
        "masked beyond the clip",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ xq * (W.abs() <= 1.5 * beta))),
        "The gradient of x is right; in that of the weight, what lies beyond the clip got nothing. Lesson 05 did so; "
        "BitNet passes all of them straight through.",
    ),
    Mutant(
        "masked beyond the mean",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ xq * (W.abs() <= beta))),
        "The gradient of x is right; in that of the weight, what is larger than beta got nothing. BitNet passes all of "
        "them straight through.",
    ),
    Mutant(
        "mean over the tokens",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, g.T @ xq / len(x))),
        "The gradient of x is right; that of the weight was averaged over the tokens: they add up.",
    ),
    Mutant(
        "weight's gradient transposed",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g @ wq, xq.T @ g)),
        "The gradient of x is right; that of the weight is transposed: it has the weight's shape, (out, in).",
    ),
    Mutant(
        "other order",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (g.T @ xq, g @ wq)),
        "These are the two, in the other order: first that of x.",
    ),
    Mutant(
        "negative",
        _back(lambda g, xq, wq, x, W, V, beta, X, scale: (-(g @ wq), -(g.T @ xq))),
        "These have the wrong sign: the gradient points uphill, and it is the optimizer that subtracts.",
    ),
)


# The mistakes: `pack_trits`.


def _digits(trits, fill=0, offset=1, per_byte=5):
    codes = trits.flatten().int() + offset
    left = -len(codes) % per_byte
    return torch.cat([codes, torch.full((left,), fill, dtype=torch.int32)]).view(-1, per_byte)


def _packed(digits, places):
    return (digits * torch.tensor(places)).sum(-1).to(torch.uint8)


_LOWEST_FIRST = (1, 3, 9, 27, 81)

_PACK_MUTANTS = (
    Mutant(
        "first as the highest",
        lambda trits: _packed(_digits(trits), _LOWEST_FIRST[::-1]),
        "This is what you get when the first trit is the highest digit: here it is the lowest, times 1.",
    ),
    Mutant(
        "filled with trits of 0",
        lambda trits: _packed(_digits(trits, fill=1), _LOWEST_FIRST),
        "Only the last byte is wrong: the places that are left over were filled with trits of 0, whose digit is 1. "
        "They are digits of 0.",
    ),
    Mutant(
        "what is left over lost",
        lambda trits: _packed(_digits(trits[: len(trits) // 5 * 5]), _LOWEST_FIRST),
        "This is what you get when only whole fives are packed: what is left over needs a byte as well.",
    ),
    Mutant(
        "1 not added",
        lambda trits: _packed(_digits(trits, offset=0), _LOWEST_FIRST),
        "This is what you get when 1 is not added to the trits: digits are 0, 1, 2.",
    ),
    Mutant(
        "two's complement",
        lambda trits: _packed(_digits(trits, offset=0) % 3, _LOWEST_FIRST),
        "This is what you get when -1 is the digit 2, 0 is 0 and 1 is 1: the digit is the trit plus 1.",
    ),
    Mutant(
        "upside down",
        lambda trits: _packed(_digits(-trits), _LOWEST_FIRST),
        "This is what you get when the digit is 1 minus the trit: it is the trit plus 1.",
    ),
    Mutant(
        "base 4",
        lambda trits: _packed(_digits(trits, per_byte=4), (1, 4, 16, 64)),
        "This is two bits for each trit, four to a byte: five go in when a digit is worth three times the one before.",
    ),
    Mutant(
        "five digits of base 4",
        lambda trits: _packed(_digits(trits), (1, 4, 16, 64, 256)),
        "This is what you get with powers of 4: the fifth digit falls out of the byte. They are powers of 3.",
    ),
    Mutant(
        "powers of 2",
        lambda trits: _packed(_digits(trits), (1, 2, 4, 8, 16)),
        "This is what you get with powers of 2: then different trits make the same byte. They are powers of 3.",
    ),
    Mutant(
        "powers one too high",
        lambda trits: _packed(_digits(trits), (3, 9, 27, 81, 243)),
        "This is what you get when the first digit is worth 3: it is worth 1.",
    ),
    Mutant(
        "four to a byte",
        lambda trits: _packed(_digits(trits, per_byte=4), _LOWEST_FIRST[:4]),
        "This is what you get with four trits to a byte: 3 ** 5 is 243, so five fit.",
    ),
    Mutant(
        "as llama.cpp",
        lambda trits: ((_packed(_digits(trits), _LOWEST_FIRST[::-1]).int() * 256 + 242) // 243).to(torch.uint8),
        "This is the byte of llama.cpp's TQ1_0, which spreads 243 values over 256: here the byte is the number itself.",
    ),
    Mutant(
        "columns first",
        lambda trits: _packed(_digits(trits).flatten().view(5, -1).T, _LOWEST_FIRST),
        "This is what you get when a byte takes every n-th trit: it takes five that are neighbours.",
    ),
    Mutant(
        "signed",
        lambda trits: _packed(_digits(trits), _LOWEST_FIRST).view(torch.int8),
        "This is what you get in int8: bytes above 127 turn negative. Give back uint8.",
    ),
)


# The mistakes: `matvec`.


def _signed(plus, minus):
    """`matvec` with other rules: plus(trit), minus(trit) say which numbers are added and which are subtracted."""
    return lambda V, x: [
        sum(n for t, n in zip(row, x, strict=True) if plus(t)) - sum(n for t, n in zip(row, x, strict=True) if minus(t))
        for row in V
    ]


def _wrapped(bits):
    half = 2 ** (bits - 1)
    return lambda V, x: [(total + half) % (2 * half) - half for total in matvec(V, x)]


_MATVEC_MUTANTS = (
    Mutant(
        "multiplied",
        lambda V, x: [sum(t * n for t, n in zip(row, x, strict=True)) for row in V],
        "The sums are right, but they are made by multiplying: look at the trit, and add, subtract, or leave it.",
    ),
    Mutant(
        "the other way round",
        _signed(lambda t: t == -1, lambda t: t == 1),
        "This is what you get when 1 subtracts and -1 adds.",
    ),
    Mutant(
        "minus forgotten",
        _signed(lambda t: t == 1, lambda t: False),
        "This is what you get when -1 is passed over like 0: it subtracts.",
    ),
    Mutant(
        "0 subtracts",
        _signed(lambda t: t == 1, lambda t: t != 1),
        "This is what you get when all that is not 1 subtracts: 0 does nothing.",
    ),
    Mutant(
        "0 adds",
        _signed(lambda t: t != -1, lambda t: t == -1),
        "This is what you get when all that is not -1 adds: 0 does nothing.",
    ),
    Mutant(
        "minus adds",
        _signed(lambda t: t != 0, lambda t: False),
        "This is what you get when every trit but 0 adds: -1 is true for `if trit`, too.",
    ),
    Mutant(
        "trits added",
        lambda V, x: [sum(t + n for t, n in zip(row, x, strict=True) if t) for row in V],
        "This is what you get when the trit itself is added to the number.",
    ),
    Mutant(
        "trits counted",
        lambda V, x: [sum(row) for row in V],
        "This is what you get when the trits are added up: the numbers are to be.",
    ),
    Mutant(
        "one sum for all",
        lambda V, x: [sum(matvec(V, x)[: i + 1]) for i in range(len(V))],
        "This is what you get when the sum is not set back to 0 at the start of a row.",
    ),
    Mutant(
        "8 bits",
        _wrapped(8),
        "This is what you get when the sum is kept in 8 bits: it wraps around. The numbers have 8 bits, their sum has "
        "more.",
    ),
    Mutant(
        "last one missing",
        lambda V, x: matvec([row[:-1] for row in V], x[:-1]),
        "This is what you get when the loop stops before the last column.",
    ),
    Mutant(
        "columns",
        lambda V, x: matvec(list(map(list, zip(*V, strict=True))), x) if len(V) == len(x) else matvec(V, x),
        "Only square matrices are wrong: there you have gone down the columns. One sum belongs to a row.",
    ),
    Mutant(
        "floats",
        lambda V, x: [float(total) for total in matvec(V, x)],
        "The sums are right, but they are floats: whole numbers stay whole.",
    ),
)


# The exercise.


TASKS = (
    Task(
        name="bitnet.absmean",
        title="Three values",
        points=3,
        minutes=8,
        difficulty=1,
        importance=5,
        reference=absmean,
        cases=_absmean_cases,
        hints=(
            "One number for the whole matrix: the mean of the magnitudes. Divide by it, round, and cut off what lies "
            "beyond -1 and 1.",
            "beta = weight.abs().mean().clamp(min=1e-5); V = (weight / beta).round().clamp(-1, 1).",
        ),
        mutants=_ABSMEAN_MUTANTS,
    ),
    Task(
        name="bitnet.quantize_tokens",
        title="Eight bits for each token",
        points=2,
        minutes=8,
        difficulty=2,
        importance=4,
        reference=quantize_tokens,
        cases=_token_cases,
        same_dtype=True,
        hints=(
            "Each token, each row of the last axis, has a scale of its own: 127 over its largest magnitude, which "
            "counts as 1e-5 at least.",
            "scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5); X = (x * scale).round().to(torch.int8).",
        ),
        mutants=_TOKEN_MUTANTS,
    ),
    Task(
        name="bitnet.bitlinear",
        title="A BitLinear, forward",
        points=3,
        minutes=8,
        difficulty=2,
        importance=5,
        reference=bitlinear,
        cases=_bitlinear_cases,
        tolerance=1e-5,
        hints=(
            "The product of X and V, as whole numbers; then both scales at the end. X is x times its scale, and V is W "
            "divided by beta.",
            "y = X.float() @ V.T * beta / scale, with V, beta = absmean(weight) and X, scale = quantize_tokens(x).",
        ),
        mutants=_BITLINEAR_MUTANTS,
    ),
    Task(
        name="bitnet.gradients",
        title="A BitLinear, backward",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=gradients,
        cases=_gradient_cases,
        tolerance=1e-5,
        hints=(
            "Straight through, and scales are constants: it is the backward pass of a plain layer that was given what "
            "the rounded numbers stand for. For y = x Wᵀ that is above W for x, and aboveᵀ x for W.",
            "x_hat = X / scale and W_hat = beta * V; return above @ W_hat, above.T @ x_hat.",
        ),
        mutants=_GRADIENT_MUTANTS,
    ),
    Task(
        name="bitnet.pack_trits",
        title="Five in a byte",
        points=2,
        minutes=8,
        difficulty=2,
        importance=3,
        reference=pack_trits,
        cases=_pack_cases,
        same_dtype=True,
        hints=(
            "The digit of a trit is trit + 1. Five digits d0 ... d4 make the number d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4. "
            "Fill up with digits of 0 first.",
            "Append zeros to trits.int() + 1 until five divide the length, .view(-1, 5), multiply by torch.tensor([1, "
            "3, 9, 27, 81]), sum over the last axis, .to(torch.uint8).",
        ),
        mutants=_PACK_MUTANTS,
    ),
    Task(
        name="bitnet.matvec",
        title="A product without multiplying",
        points=2,
        minutes=6,
        difficulty=1,
        importance=4,
        reference=matvec,
        cases=_matvec_cases,
        hints=(
            "Two loops: over the rows, and over the pairs of a trit and a number. 1 adds the number, -1 subtracts it, "
            "0 does nothing.",
            "total += number if trit is 1; total -= number if trit is -1; append total after each row.",
        ),
        mutants=_MATVEC_MUTANTS,
    ),
)
