"""The exercise of lesson 04: what a model weighs, and a layer that multiplies integers, from its scales to its sums.

Four of the five references are the package's own: `absmax` for the bytes, `models/int8.py` for the tokens and for the
product, `smoothing_factors` of `models/smoothquant.py`. The percentile is a formula and stands here, as the package's
observer reads it off a histogram, to the width of a bin; the exercise's last cells hold the two together.
"""

import math

import torch

from qlearn import methods
from qlearn.course.tasks import Case, Mutant, Task
from qlearn.models import int8
from qlearn.models.smoothquant import smoothing_factors

QMAX = 127


# What is right.


def megabytes(matrices, others, bits, group_size=None):
    """Megabytes of a model, read off matrices that really are stored."""
    stored = sum(methods.absmax(torch.zeros(*shape), bits, group_size).nbytes for shape in matrices)
    return (stored + 2 * others) / 10**6


quantize_tokens = int8.quantize_tokens


def int8_linear(x_codes, x_scale, w_codes, w_scale):
    """The outputs of a layer (tokens, out) from the codes of its inputs and of its weight."""
    return int8.float32_matmul(x_codes, w_codes).float() * x_scale * w_scale


def static_scale(batches, percentile):
    """The 8-bit scale whose grid ends at a percentile, by nearest rank, of the magnitudes in all batches."""
    magnitudes = torch.cat([batch.flatten() for batch in batches]).abs().sort().values
    rank = math.ceil(percentile * len(magnitudes) / 100)
    return magnitudes[rank - 1].item() / QMAX or 1.0


def smooth(x, weight, alpha):
    """Inputs and weight with the difficulty moved from the one to the other."""
    s = smoothing_factors(x.abs().amax(0), [weight], alpha)
    return x / s, weight * s


# The cases.


def _random(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _of_all_sizes(x, dim):
    """Each row (dim 0) or column (dim 1) ten times as large as the one before, so that a wrong axis shows."""
    sizes = 10.0 ** torch.arange(-1, x.shape[dim] - 1)
    return x * (sizes[:, None] if dim == 0 else sizes)


def _megabytes_cases():
    block = [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (768, 256), (256, 768)]
    return [
        Case("one layer by hand: 256 x 256, 4 bits, groups of 64", ([(256, 256)], 0, 4, 64)),
        Case("the bundled model, 4 bits, groups of 64", (8 * block, 1_052_928, 4, 64)),
        Case("the bundled model, 8 bits, a scale for each row", (8 * block, 1_052_928, 8, None)),
        Case("3 bits, groups of 32", (block, 1000, 3, 32)),
        Case("2 bits, groups of 128", (block, 5000, 2, 128)),
        Case("a scale for each row, more rows than columns", ([(768, 256)], 0, 4, None)),
        Case("a scale for each row, more columns than rows", ([(256, 768)], 0, 4, None)),
        Case("two matrices whose codes do not end with a byte", ([(1, 5), (3, 7)], 0, 3, None)),
        Case("two more, each with a byte that is mostly empty", ([(1, 3), (3, 7)], 0, 3, None)),
        Case("groups of one", ([(4, 8)], 10, 2, 1)),
        Case("nothing is quantized", ([], 7_344_384, 4, 64)),
    ]


def _tokens_cases():
    zeros = _random(4, 6, seed=4)
    zeros[2] = 0
    giant = _random(5, 12, seed=5)
    giant[0, 3] = 133.0
    column = _random(6, 8, seed=6)
    column[:, 5] *= 50
    return [
        Case("two tokens by hand", (torch.tensor([[0.5, -1.0, 0.25], [2.54, 0.02, -0.3]]),)),
        Case("random", (_random(6, 16),)),
        Case("as many tokens as channels, of all sizes", (_of_all_sizes(_random(5, 5, seed=1), 0),)),
        Case("channels of all sizes", (_of_all_sizes(_random(4, 6, seed=2), 1),)),
        Case("all positive", (_random(3, 7, seed=3).abs(),)),
        Case("the largest magnitudes are negative", (-_random(3, 7, seed=7).abs(),)),
        Case("one giant number in one token", (giant,)),
        Case("one large channel in all tokens", (column,)),
        Case("a token of zeros", (zeros,)),
        Case("a token of tiny numbers", (torch.stack([_random(8, seed=8), _random(8, seed=9, spread=1e-9)]),)),
        Case("a token of the tiniest numbers", (_random(1, 7, seed=12, spread=1e-30),)),
        Case("halfway between two codes", (torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]),)),
        Case("one token", (_random(1, 9, seed=10),)),
        Case("one channel", (_random(4, 1, seed=11),)),
        Case("nothing but zeros", (torch.zeros(2, 3),)),
    ]


def _codes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-QMAX, QMAX + 1, shape, generator=generator).to(torch.int8)


def _layer(tokens, columns, out, seed):
    """Random codes, and scales that differ between tokens and between outputs."""
    x_scale, w_scale = _random(tokens, 1, seed=seed).exp() / 100, _random(out, seed=seed + 1).exp() / 1000
    return _codes(tokens, columns, seed=seed), x_scale, _codes(out, columns, seed=seed + 1), w_scale


def _nearly_cancelling():
    """Sums that grow far beyond 2**24 on the way and come back to little: floats lose their last digits."""
    x, first = _codes(3, 4096, seed=70).abs(), _codes(4, 4096, seed=71).abs()
    small = (torch.arange(4096) % 7 == 0).to(torch.int8)
    w = torch.cat([first, -(first - small)], 1)
    return torch.cat([x, x], 1), torch.full((3, 1), 0.01), w, torch.full((4,), 0.002)


def _largest(columns):
    full = torch.full((1, columns), QMAX, dtype=torch.int8)
    return full, torch.tensor([[1e-3]]), full.clone(), torch.tensor([1e-4])


def _int8_linear_cases():
    by_hand = torch.tensor([[50, -127, 25], [127, 15, -50]]).to(torch.int8), torch.tensor([[0.01], [0.02]])
    weight = torch.tensor([[127, 10, -40], [-127, 40, 100]]).to(torch.int8), torch.tensor([0.01, 0.005])
    return [
        Case("the 2 x 3 of the lesson", (*by_hand, *weight)),
        Case("random", _layer(4, 32, 6, seed=0)),
        Case("as many tokens as outputs", _layer(5, 24, 5, seed=10)),
        Case("tokens, channels and outputs: all the same", _layer(8, 8, 8, seed=20)),
        Case("one token", _layer(1, 64, 7, seed=30)),
        Case("one output", _layer(6, 64, 1, seed=40)),
        Case("768 channels", _layer(3, 768, 4, seed=60)),
        Case("a sum that leaves 16 bits", _largest(3)),
        Case("the longest sum that fits into 32 bits", _largest((2**31 - 1) // 128**2)),
        Case("long sums that nearly cancel", _nearly_cancelling()),
        Case(
            "a token of zeros", (torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 1), *_layer(2, 4, 3, seed=80)[2:])
        ),
    ]


def _static_cases():
    giant = _random(200, seed=1)
    giant[17] = -90.0
    sparse = _random(300, seed=2)
    sparse[:200] = 0
    return [
        Case("ten numbers, 90 %", ([torch.arange(-5.0, 6.0)[torch.arange(11) != 5]], 90)),
        Case("everything", ([_random(4, 9, seed=3), _random(2, 9, seed=4)], 100)),
        Case("one giant, 99 %", ([giant], 99)),
        Case("a giant in the first of three batches, 99 %", ([giant, _random(80, seed=5), _random(45, seed=6)], 99)),
        Case("batches of different spread", ([_random(40, seed=7), _random(60, seed=8, spread=9.0)], 75)),
        Case("batches of different length", ([_random(6, seed=9, spread=5.0), _random(150, seed=10)], 95)),
        Case("a lopsided batch: large numbers are negative", ([-_random(120, seed=11).exp()], 90)),
        Case("after a ReLU: two thirds are zeros", ([sparse.abs()], 80)),
        Case("the middle of an even count", ([torch.tensor([3.0, -1.0, 2.0, -4.0])], 50)),
        Case("99.9 % of a few numbers is all of them", ([_random(3, 5, seed=12)], 99.9)),
        Case("matrices", ([_random(16, 24, seed=13), _random(7, 24, seed=14)], 99.5)),
        Case("tiny numbers", ([_random(30, seed=15, spread=1e-7)], 85)),
        Case("nothing but zeros", ([torch.zeros(4), torch.zeros(2, 2)], 99)),
        Case("so many zeros that the percentile is 0", ([sparse], 50)),
    ]


def _smooth_cases():
    silent, unread = _random(6, 5, seed=4), _random(3, 5, seed=5)
    silent[:, 2] = 0
    unread[:, 4] = 0
    outlier = _random(9, 8, seed=6)
    outlier[:, 3] *= 64
    return [
        Case(
            "the 2 x 2 of the lesson",
            (torch.tensor([[1.0, 16.0], [-0.5, 12.0]]), torch.tensor([[1.0, 0.5], [0.25, -1.0]]), 0.5),
        ),
        Case("random", (_random(7, 6), _random(4, 6, seed=1), 0.5)),
        Case(
            "tokens, channels and outputs: all the same",
            (_random(5, 5, seed=2), _of_all_sizes(_random(5, 5, seed=3), 0), 0.5),
        ),
        Case("a large channel", (outlier, _random(5, 8, seed=7, spread=0.1), 0.5)),
        Case("alpha 0.75", (outlier, _random(5, 8, seed=7, spread=0.1), 0.75)),
        Case("alpha 0.25", (_random(6, 4, seed=8, spread=3.0), _random(6, 4, seed=9, spread=0.2), 0.25)),
        Case("alpha 1: all the trouble goes into the weight", (outlier, _random(5, 8, seed=7), 1.0)),
        Case("alpha 0: all of it goes into the inputs", (outlier, _random(5, 8, seed=7), 0.0)),
        Case("all negative", (-_random(4, 3, seed=10).abs(), -_random(2, 3, seed=11).abs(), 0.5)),
        Case("a channel that is always 0", (silent, _random(3, 5, seed=5), 0.5)),
        Case("a channel that no output reads", (_random(6, 5, seed=4), unread, 0.5)),
        Case("one token, one output", (_random(1, 4, seed=12), _random(1, 4, seed=13), 0.6)),
        Case("alpha 0, and a channel that is always 0", (silent, _random(3, 5, seed=5), 0.0)),
        Case("alpha 1, and a channel that no output reads", (_random(6, 5, seed=4), unread, 1.0)),
    ]


# The mistakes: `megabytes`.


def _weigh(matrices, others, bits, group_size, code_bits=None, scale_bytes=2, scales=None, other_bytes=2.0, unit=1e6):
    """`megabytes` with one thing different."""
    total = other_bytes * others
    for rows, columns in matrices:
        count = rows * columns // (group_size or columns) if scales is None else scales(rows, columns, group_size)
        total += -(-rows * columns * (code_bits or bits) // 8) + scale_bytes * count
    return total / unit


_MEGABYTES_MUTANTS = (
    Mutant(
        "scales forgotten",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scale_bytes=0),
        "This is what you get when only the codes are counted: each group, or each row, has a scale of two bytes.",
    ),
    Mutant(
        "one scale a matrix",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scales=lambda rows, columns, g: 1),
        "This is what you get with one scale for each matrix: there is one for each group of a row, or for each row.",
    ),
    Mutant(
        "one scale a row",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scales=lambda rows, columns, g: rows),
        "This is what you get when each row has one scale even where there are groups: a row of 256 weights has four "
        "groups of 64.",
    ),
    Mutant(
        "a scale for each column",
        lambda m, o, b, g=None: _weigh(
            m, o, b, g, scales=lambda rows, columns, g: rows * columns // g if g else columns
        ),
        "This is what you get when a matrix without groups has a scale for each column: it is one for each row.",
    ),
    Mutant(
        "no scale without groups",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scales=lambda rows, columns, g: rows * columns // g if g else 0),
        "This is what you get when a matrix without groups has no scales: it has one for each row.",
    ),
    Mutant(
        "scales of 32 bits",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scale_bytes=4),
        "This is what you get with scales of four bytes: they are stored with 16 bits.",
    ),
    Mutant(
        "others forgotten",
        lambda m, o, b, g=None: _weigh(m, o, b, g, other_bytes=0),
        "This is what you get when the parameters that are not quantized are left out: the embedding and the norms "
        "are in the file, too.",
    ),
    Mutant(
        "others quantized",
        lambda m, o, b, g=None: _weigh(m, o, b, g, other_bytes=b / 8),
        "This is what you get when all parameters have few bits: the others stay at 16.",
    ),
    Mutant(
        "others in 32 bits",
        lambda m, o, b, g=None: _weigh(m, o, b, g, other_bytes=4),
        "This is what you get when the parameters that are not quantized take four bytes: checkpoints store them with "
        "16 bits.",
    ),
    Mutant(
        "a byte for each code",
        lambda m, o, b, g=None: _weigh(m, o, b, g, code_bits=8),
        "This is what you get when each code takes a whole byte: they are packed, two to a byte at 4 bits.",
    ),
    Mutant(
        "bits for bytes",
        lambda m, o, b, g=None: _weigh(m, o, b, g, code_bits=8 * b),
        "This is what you get when the bits of the codes are counted as bytes: divide them by 8.",
    ),
    Mutant(
        "mebibytes",
        lambda m, o, b, g=None: _weigh(m, o, b, g, unit=2**20),
        "These are mebibytes (MiB), of 2**20 bytes: a megabyte (MB) has 10**6. GB and GiB are 7 % apart.",
    ),
    Mutant(
        "bytes",
        lambda m, o, b, g=None: _weigh(m, o, b, g, unit=1),
        "These are bytes: a megabyte has 10**6 of them.",
    ),
    Mutant(
        "half a byte kept",
        lambda m, o, b, g=None: (sum(r * c * b / 8 + 2 * (r * c // (g or c)) for r, c in m) + 2 * o) / 1e6,
        "Only odd sizes are wrong: 15 bits of codes fill two bytes, not 1.875. Round up, for each matrix.",
    ),
    Mutant(
        "rounded up once",
        lambda m, o, b, g=None: (
            (math.ceil(sum(r * c * b for r, c in m) / 8) + sum(2 * (r * c // (g or c)) for r, c in m) + 2 * o) / 1e6
        ),
        "Only odd sizes are wrong: each matrix begins with a byte of its own, so round up for each of them.",
    ),
    Mutant(
        "rounded down",
        lambda m, o, b, g=None: (sum(r * c * b // 8 + 2 * (r * c // (g or c)) for r, c in m) + 2 * o) / 1e6,
        "Only odd sizes are wrong: 15 bits of codes do not fit into one byte. Round up, for each matrix.",
    ),
    Mutant(
        "each row rounded up",
        lambda m, o, b, g=None: (sum(r * -(-c * b // 8) + 2 * (r * c // (g or c)) for r, c in m) + 2 * o) / 1e6,
        "Only odd sizes are wrong: the rows of a matrix are packed one after another, and only its last byte may be "
        "partly empty. Round up once for each matrix, not for each row.",
    ),
    Mutant(
        "no code across two bytes",
        lambda m, o, b, g=None: (sum(-(-r * c // (8 // b)) + 2 * (r * c // (g or c)) for r, c in m) + 2 * o) / 1e6,
        "This is what you get when a byte holds only whole codes, two of 3 bits: they are packed without gaps, so "
        "eight codes of 3 bits take three bytes.",
    ),
    Mutant(
        "bits of the scales for bytes",
        lambda m, o, b, g=None: _weigh(m, o, b, g, scale_bytes=16),
        "This is what you get when a scale takes 16 bytes: it has 16 bits, which are two bytes.",
    ),
)


# The mistakes: `quantize_tokens`.


def _tokens(x, dim=-1, qmax=127, size=torch.abs, guard=True, rounding=torch.round, keepdim=True):
    """`quantize_tokens` with one thing different."""
    most = size(x).max() if dim is None else size(x).amax(dim, keepdim=keepdim)
    scale = most / qmax
    scale = torch.where(scale == 0, 1.0, scale) if guard else scale
    codes = rounding(x / scale).nan_to_num().clamp(-127, 127).to(torch.int8)
    return codes, scale


def _one_scale(x):
    codes, scale = _tokens(x, dim=None)
    return codes, scale.expand(len(x), 1).clone()


def _little_added(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().to(torch.int8), scale


def _upside_down(x):
    scale = 127 / x.abs().amax(-1, keepdim=True)
    scale = torch.where(scale.isinf(), 1.0, scale)
    return (x * scale).round().to(torch.int8), scale


def _uncut(x, scale, clamp=None):
    """Codes as a plain cast to int8 leaves them: one outside its range wraps around."""
    scale = torch.where(scale == 0, 1.0, scale)
    codes = torch.round(x / scale)
    return (codes if clamp is None else codes.clamp(*clamp)).to(torch.int8), scale


def _away_from_zero(x):
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


_TOKENS_MUTANTS = (
    Mutant(
        "one scale for all",
        _one_scale,
        "This is what you get with one scale for the whole tensor: each token, a row of x, has its own.",
    ),
    Mutant(
        "a scale for each channel",
        lambda x: _tokens(x, dim=0),
        "This is what you get with a scale for each channel, a column of x: it could not be taken out of the sum. Each "
        "token, a row, has its own.",
    ),
    Mutant(
        "without keepdim",
        lambda x: _tokens(x, keepdim=False),
        "This is what you get without keepdim=True: a scale of shape (tokens,) is laid over the channels, which torch "
        "refuses only where the two numbers differ. It needs the shape (tokens, 1).",
    ),
    Mutant(
        "divided by 128",
        lambda x: _tokens(x, qmax=128),
        "This is what you get when the largest magnitude is divided by 128: it would get the code 128, which int8 does "
        "not have. The last code is 127.",
    ),
    Mutant(
        "largest, not largest magnitude",
        lambda x: _tokens(x, size=lambda v: v.clamp(min=0)),
        "This is what you get when the scale is made from the largest number: a negative one may be larger in "
        "magnitude. Take abs() first.",
    ),
    Mutant(
        "truncated",
        lambda x: _tokens(x, rounding=torch.trunc),
        "This is what you get when the fraction is dropped, which is what a cast to an integer does: round first.",
    ),
    Mutant(
        "floor for round",
        lambda x: _tokens(x, rounding=torch.floor),
        "This is what you get when the division is rounded down: round to the nearest code.",
    ),
    Mutant(
        "ties away from even",
        lambda x: _tokens(x, rounding=lambda v: torch.floor(v + 0.5)),
        "This is what you get with floor(x + 0.5): only ties differ. torch.round takes them to the even code.",
    ),
    Mutant(
        "no scale for zeros",
        lambda x: _tokens(x, guard=False),
        "Only a token of zeros is wrong: its scale is 0, and 0 / 0 is no code. Use 1.",
    ),
    Mutant(
        "a least scale",
        _little_added,
        "This is what you get when a small constant keeps the scale from 0: a token of tiny numbers is lost, and one "
        "of zeros should have scale 1.",
    ),
    Mutant(
        "scale upside down",
        _upside_down,
        "This is what you get with scale = 127 / largest: the codes are right, but a scale is what a code is "
        "multiplied with to come back.",
    ),
    Mutant(
        "dequantized",
        lambda x: (_tokens(x)[0] * _tokens(x)[1], _tokens(x)[1]),
        "These are the numbers that come back: return the codes, which are integers.",
    ),
    Mutant(
        "a scale without its second axis",
        lambda x: (_tokens(x)[0], _tokens(x)[1][:, 0]),
        "The codes are right, but the scales have the shape (tokens,): return (tokens, 1), so that a scale belongs to "
        "a row of codes when the two are multiplied.",
    ),
    Mutant(
        "largest number, not cut",
        lambda x: _uncut(x, x.amax(-1, keepdim=True) / 127),
        "This is what you get without abs(): where the largest magnitude is negative, the scale is too small, or "
        "itself negative, and codes beyond the range of int8 wrap around.",
    ),
    Mutant(
        "divided by 128, not cut",
        lambda x: _uncut(x, x.abs().amax(-1, keepdim=True) / 128),
        "This is what you get when the largest magnitude is divided by 128: a positive one gets the code 128 and wraps "
        "around to -128. Divide by 127.",
    ),
    Mutant(
        "divided by 128, down to -128",
        lambda x: _uncut(x, x.abs().amax(-1, keepdim=True) / 128, (-128, 127)),
        "This is what you get with a grid from -128 to 127: this one is symmetric, from -127 to 127, so divide by 127.",
    ),
    Mutant(
        "ties away from zero",
        lambda x: _tokens(x, rounding=_away_from_zero),
        "Only ties differ: they went away from 0, as people round. torch.round takes them to the even code.",
    ),
    Mutant(
        "largest magnitude 1 for zeros",
        lambda x: (_tokens(x)[0], torch.where(x.abs().amax(-1, keepdim=True) == 0, 1 / 127, _tokens(x)[1])),
        "Only a token of zeros is wrong: its largest magnitude was set to 1, so its scale is 1 / 127. The scale has to "
        "be 1.",
    ),
)


# The mistakes: `int8_linear`.


def _sums(x_codes, w_codes):
    return x_codes.long() @ w_codes.long().T


def _rescaled(sums, x_scale, w_scale):
    return sums.float() * x_scale * w_scale


def _wrapping(dtype):
    return lambda x, sx, w, sw: _rescaled(_sums(x, w).to(dtype), sx, sw)


def _wrapped_products(x, sx, w, sw):
    products = (x.int()[:, None] * w.int()[None]).to(torch.int8)
    return _rescaled(products.sum(-1, dtype=torch.int64), sx, sw)


_INT8_LINEAR_MUTANTS = (
    Mutant(
        "sums in int8",
        _wrapping(torch.int8),
        "This is what you get when sums are kept in int8: they wrap around at 127. The codes have 8 bits, their sums "
        "need 32: cast before you multiply.",
    ),
    Mutant(
        "products in int8",
        _wrapped_products,
        "This is what you get when two int8 codes are multiplied as int8: 50 * 127 is 6350, and wraps around to -50. "
        "Cast to int32 before you multiply.",
    ),
    Mutant(
        "sums in int16",
        _wrapping(torch.int16),
        "This is what you get when sums are kept in 16 bits: three of the largest products, 127 * 127, are already too "
        "much. They need 32.",
    ),
    Mutant(
        "sums clamped to codes",
        lambda x, sx, w, sw: _rescaled(_sums(x, w).clamp(-127, 127), sx, sw),
        "This is what you get when sums are clamped as if they were codes: they may be as large as 32 bits allow.",
    ),
    Mutant(
        "sums in float16",
        lambda x, sx, w, sw: _rescaled(_sums(x, w).to(torch.float16), sx, sw),
        "This is what you get when sums are kept in float16: it ends at 65,504, and has 11 bits for an integer.",
    ),
    Mutant(
        "sums in float32",
        lambda x, sx, w, sw: (x.float() @ w.float().T) * sx * sw,
        "This is what you get when the codes are multiplied as float32: it holds integers up to 2**24 only, so long "
        "sums lose their last digits. Integers lose none.",
    ),
    Mutant(
        "inputs' scales forgotten",
        lambda x, sx, w, sw: _sums(x, w).float() * sw,
        "This is what you get without the scales of the inputs: each row of the product has to be multiplied with its "
        "token's.",
    ),
    Mutant(
        "weights' scales forgotten",
        lambda x, sx, w, sw: _sums(x, w).float() * sx,
        "This is what you get without the scales of the weight: each column of the product has to be multiplied with "
        "its output's.",
    ),
    Mutant(
        "no scales",
        lambda x, sx, w, sw: _sums(x, w).float(),
        "These are the sums of the codes: multiply with both scales.",
    ),
    Mutant(
        "scales divided by",
        lambda x, sx, w, sw: _sums(x, w).float() / sx / sw,
        "This is what you get when the product is divided by the scales: that is the way to a code. On the way back "
        "they are multiplied.",
    ),
    Mutant(
        "inputs' scales along the outputs",
        lambda x, sx, w, sw: _sums(x, w).float() * sx.T * sw,
        "This is what you get when the scales of the tokens are laid along the outputs: as (tokens, 1) they belong to "
        "the rows of the product. Where there are as many tokens as outputs, torch does not notice.",
    ),
    Mutant(
        "weights' scales along the tokens",
        lambda x, sx, w, sw: _sums(x, w).float() * sx * sw[:, None],
        "This is what you get when the scales of the weight are laid along the tokens: as (out,) they belong to the "
        "columns of the product. Where there are as many tokens as outputs, torch does not notice.",
    ),
    Mutant(
        "weight not transposed",
        lambda x, sx, w, sw: _rescaled(x.long() @ w.long(), sx, sw),
        "This is what you get without transposing the weight: its rows are outputs, so the product is x_codes @ "
        "w_codes.T. Where the weight is square, torch does not notice.",
    ),
    Mutant(
        "dequantized first",
        lambda x, sx, w, sw: (x.float() * sx) @ (w.float() * sw[:, None]).T,
        "This is what you get when codes are multiplied with their scales before the product: it is one of floats "
        "then, and long sums lose their last digits. Sum the integers first.",
    ),
)


# The mistakes: `static_scale`.


def _magnitudes(batches, signed=False):
    values = torch.cat([batch.flatten() for batch in batches])
    return (values if signed else values.abs()).sort().values


def _at_rank(values, percentile, qmax=QMAX, shift=0, rounding=math.ceil, for_zero=1.0):
    """`static_scale` of sorted numbers, with one thing different."""
    rank = rounding(percentile * len(values) / 100) + shift
    return values[max(rank, 1) - 1].item() / qmax or for_zero


def _at_index(batches, percentile, rounding):
    values = _magnitudes(batches)
    return values[rounding(percentile * len(values) / 100)].item() / QMAX or 1.0


def _each(batches, percentile):
    return [_at_rank(_magnitudes([batch]), percentile) for batch in batches]


def _not_zero(batches, percentile):
    values = _magnitudes(batches)
    return _at_rank(values[values > 0], percentile) if values.any() else 1.0


_STATIC_MUTANTS = (
    Mutant(
        "no magnitudes",
        lambda batches, percentile: _at_rank(_magnitudes(batches, signed=True), percentile),
        "This is what you get from the numbers with their signs: large negative ones would be cut off. Take abs() "
        "first.",
    ),
    Mutant(
        "the largest",
        lambda batches, percentile: _at_rank(_magnitudes(batches), 100),
        "This is the min-max observer: it takes the largest magnitude, whatever the percentile.",
    ),
    Mutant(
        "mean of the batches",
        lambda batches, percentile: sum(_each(batches, percentile)) / len(batches),
        "This is what you get when the percentiles of the batches are averaged: a percentile is one of all numbers "
        "together.",
    ),
    Mutant(
        "largest of the batches",
        lambda batches, percentile: max(_each(batches, percentile)),
        "This is what you get from the largest of the batches' percentiles: a percentile is one of all numbers "
        "together.",
    ),
    Mutant(
        "the last batch",
        lambda batches, percentile: _each(batches, percentile)[-1],
        "This is what you get when each batch replaces the one before: look at all of them together.",
    ),
    Mutant(
        "one rank too low",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, shift=-1),
        "This is what you get one rank too low: the number of rank r in a sorted tensor has the index r - 1.",
    ),
    Mutant(
        "rank rounded down",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, rounding=math.floor),
        "This is what you get when the rank is rounded down: at least the wanted share has to be covered, so round up.",
    ),
    Mutant(
        "interpolated",
        lambda batches, percentile: torch.quantile(_magnitudes(batches), percentile / 100).item() / QMAX or 1.0,
        "This is what you get from torch.quantile or numpy.percentile, which interpolate between two numbers: take "
        "the one of rank ceil(percentile / 100 * count).",
    ),
    Mutant(
        "the limit",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, qmax=1),
        "This is where the grid ends: the scale is the distance between two codes, a 127th of it.",
    ),
    Mutant(
        "divided by 128",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, qmax=128),
        "This is what you get when the limit is divided by 128: the last code is 127.",
    ),
    Mutant(
        "zeros left out",
        _not_zero,
        "This is what you get when zeros are not counted: they belong to the numbers, of which `percentile` percent "
        "have to be covered.",
    ),
    Mutant(
        "no scale for zeros",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, for_zero=0.0),
        "Only a limit of 0 is wrong: its scale would be 0, and nothing can be divided by it. Use 1.",
    ),
    Mutant(
        "rank rounded to the nearest",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, rounding=round),
        "This is what you get when the rank is rounded to the nearest: at least the wanted share has to be covered, so "
        "always round up.",
    ),
    Mutant(
        "one rank too high",
        lambda batches, percentile: _at_index(batches, percentile, math.ceil),
        "This is what you get one rank too high: indices begin at 0, so the number of rank r has the index r - 1.",
    ),
    Mutant(
        "index rounded down",
        lambda batches, percentile: _at_index(batches, percentile, int),
        "This is what you get with the index int(percentile / 100 * count), which is one too high where that product "
        "is whole: the index is ceil(percentile / 100 * count) - 1.",
    ),
    Mutant(
        "a share of the largest",
        lambda batches, percentile: _magnitudes(batches)[-1].item() * percentile / 100 / QMAX or 1.0,
        "This is a percentage of the largest magnitude: a percentile counts numbers, it does not scale them.",
    ),
    Mutant(
        "counted from the largest",
        lambda batches, percentile: _at_rank(_magnitudes(batches).flip(0), percentile),
        "This is what you get when the magnitudes are counted from the largest down: sort them upwards.",
    ),
    Mutant(
        "divided by 255",
        lambda batches, percentile: _at_rank(_magnitudes(batches), percentile, qmax=255),
        "This is what you get when the limit is divided by 255: that is for a grid from 0 to 255. This one goes from "
        "-127 to 127.",
    ),
)


# The mistakes: `smooth`.


def _guarded(x_max, w_max, s):
    return torch.where((x_max > 0) & (w_max > 0), s, 1.0)


def _smoothed(x, weight, alpha, factor=None, x_max=None, w_max=None, guard=True):
    """`smooth` with one thing different."""
    x_max = x.abs().amax(0) if x_max is None else x_max
    w_max = weight.abs().amax(0) if w_max is None else w_max
    s = x_max**alpha / w_max ** (1 - alpha) if factor is None else factor(x_max, w_max)
    s = _guarded(x_max, w_max, s) if guard else s
    return x / s, weight * s


def _other_way(x, weight, alpha):
    s = _guarded(x.abs().amax(0), weight.abs().amax(0), x.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha))
    return x * s, weight / s


def _half_done(x, weight, alpha):
    return _smoothed(x, weight, alpha)[0], weight


def _made_finite(s):
    return torch.where((s > 0) & s.isfinite(), s, 1.0)


def _authors_way(x_max, w_max, alpha):
    return (x_max**alpha / w_max.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)


_SMOOTH_MUTANTS = (
    Mutant(
        "alpha on the wrong side",
        lambda x, weight, alpha: _smoothed(x, weight, 1 - alpha),
        "This is what you get when alpha and 1 - alpha are exchanged: alpha belongs to the inputs, and the larger it "
        "is, the more goes into the weight. At 0.5 nobody notices.",
    ),
    Mutant(
        "multiplied and divided the other way round",
        _other_way,
        "This is what you get when the inputs are multiplied and the weight is divided: the product stays the same, "
        "but the outliers grow. Divide the inputs.",
    ),
    Mutant(
        "only the inputs",
        _half_done,
        "This is what you get when only the inputs are divided: what the layer computes has changed. Multiply the "
        "columns of the weight.",
    ),
    Mutant(
        "maxima multiplied",
        lambda x, weight, alpha: _smoothed(
            x, weight, alpha, factor=lambda x_max, w_max: x_max**alpha * w_max ** (1 - alpha)
        ),
        "This is what you get when the two powers are multiplied: a column whose weights are large needs a smaller "
        "factor. Divide.",
    ),
    Mutant(
        "no power for the weight",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, factor=lambda x_max, w_max: x_max**alpha / w_max),
        "This is what you get without the power 1 - alpha of the weight's maxima.",
    ),
    Mutant(
        "maxima of the weight's rows",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, w_max=weight.abs().amax(1)),
        "This is what you get with the largest weight of each row: a row is an output. Channel j of the inputs meets "
        "column j. Where the weight is square, torch does not notice.",
    ),
    Mutant(
        "maxima of the tokens",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, x_max=x.abs().amax(1)),
        "This is what you get with the largest input of each token: s has one factor for each channel, a column of x. "
        "Where there are as many tokens as channels, torch does not notice.",
    ),
    Mutant(
        "one factor for all",
        lambda x, weight, alpha: _smoothed(
            x, weight, alpha, x_max=x.abs().max().expand(x.shape[1]), w_max=weight.abs().max().expand(x.shape[1])
        ),
        "This is what you get with one factor for all channels: it moves nothing. Each channel has its own.",
    ),
    Mutant(
        "mean for maximum",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, x_max=x.abs().mean(0), w_max=weight.abs().mean(0)),
        "This is what you get with mean magnitudes: a grid has to reach the largest one.",
    ),
    Mutant(
        "no magnitudes",
        lambda x, weight, alpha: _smoothed(
            x, weight, alpha, x_max=x.amax(0).clamp(min=0), w_max=weight.amax(0).clamp(min=0)
        ),
        "This is what you get with the largest number instead of the largest magnitude: take abs() first.",
    ),
    Mutant(
        "nothing kept from zero",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, guard=False),
        "Only a channel of zeros is wrong, which gets a factor of 0 or of infinity: give it the factor 1.",
    ),
    Mutant(
        "the inputs without magnitudes",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, x_max=x.amax(0).clamp(min=0)),
        "This is what you get with the largest number of each channel of the inputs, not the largest magnitude: take "
        "abs() there too.",
    ),
    Mutant(
        "the weight without magnitudes",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, w_max=weight.amax(0).clamp(min=0)),
        "This is what you get with the largest number of each column of the weight, not the largest magnitude: take "
        "abs() there too.",
    ),
    Mutant(
        "only the weight",
        lambda x, weight, alpha: (x, _smoothed(x, weight, alpha)[1]),
        "This is what you get when only the weight is multiplied: what the layer computes has changed. Divide the "
        "inputs by the same factors.",
    ),
    Mutant(
        "both divided",
        lambda x, weight, alpha: (_smoothed(x, weight, alpha)[0], _other_way(x, weight, alpha)[1]),
        "This is what you get when inputs and weight are both divided: what the layer computes has changed. Multiply "
        "the columns of the weight.",
    ),
    Mutant(
        "always the root",
        lambda x, weight, alpha: _smoothed(x, weight, 0.5),
        "This is what you get when alpha is not used: the roots of the maxima are right for 0.5 alone.",
    ),
    Mutant(
        "alpha on both sides",
        lambda x, weight, alpha: _smoothed(x, weight, alpha, factor=lambda x_max, w_max: (x_max / w_max) ** alpha),
        "This is what you get when both maxima have the power alpha: the weight's has 1 - alpha. At 0.5 nobody "
        "notices.",
    ),
    Mutant(
        "only the factors put right that are 0 or infinite",
        lambda x, weight, alpha: _smoothed(
            x, weight, alpha, factor=lambda x_max, w_max: _made_finite(x_max**alpha / w_max ** (1 - alpha)), guard=False
        ),
        "Only a channel of zeros is wrong, where alpha is 0 or 1: 0 to the power of 0 is 1, so its factor looks like "
        "any other. Ask for the maxima, not for s.",
    ),
    Mutant(
        "a least factor",
        lambda x, weight, alpha: _smoothed(
            x, weight, alpha, factor=lambda x_max, w_max: _authors_way(x_max, w_max, alpha), guard=False
        ),
        "Only a channel of zeros is wrong: clamped to a small number, as in the authors' own code, its factor is tiny "
        "or huge. Here it keeps the factor 1.",
    ),
)


TASKS = (
    Task(
        name="ptq.megabytes",
        title="What a model weighs",
        points=2,
        minutes=10,
        difficulty=1,
        importance=4,
        reference=megabytes,
        cases=_megabytes_cases,
        hints=(
            "Three things are stored: codes, scales, and what was not quantized. Count the bytes of each for a single "
            "matrix first.",
            "codes: ceil(rows * columns * bits / 8) bytes a matrix; scales: 2 bytes for each group, and without groups "
            "for each row; others: 2 bytes each. A megabyte has 10**6 bytes.",
        ),
        mutants=_MEGABYTES_MUTANTS,
    ),
    Task(
        name="ptq.quantize_tokens",
        title="A scale for each token",
        points=2,
        minutes=8,
        difficulty=2,
        importance=5,
        reference=quantize_tokens,
        cases=_tokens_cases,
        same_dtype=True,
        hints=(
            "A token is a row of x. Its scale has to be such that its largest magnitude gets the code 127.",
            "scale = x.abs().amax(-1, keepdim=True) / 127, with 1 where that is 0; codes = torch.round(x / scale), "
            "cast to int8.",
        ),
        mutants=_TOKENS_MUTANTS,
    ),
    Task(
        name="ptq.int8_linear",
        title="A layer that multiplies integers",
        points=3,
        minutes=10,
        difficulty=2,
        importance=5,
        reference=int8_linear,
        cases=_int8_linear_cases,
        hints=(
            "How large can a product of two codes be, and a sum of a thousand of them? And to which axis of the result "
            "does each of the two scales belong?",
            "(x_codes.int() @ w_codes.int().T).float() * x_scale * w_scale: x_scale is (tokens, 1), so it goes along "
            "the rows, and w_scale is (out,), so it goes along the columns.",
        ),
        mutants=_INT8_LINEAR_MUTANTS,
    ),
    Task(
        name="ptq.static_scale",
        title="A scale chosen beforehand",
        points=2,
        minutes=10,
        difficulty=2,
        importance=3,
        reference=static_scale,
        cases=_static_cases,
        hints=(
            "Put the magnitudes of all batches into one tensor and sort it. Which of them covers `percentile` percent, "
            "itself included?",
            "rank = math.ceil(percentile * count / 100), the limit is sorted[rank - 1], and the scale is limit / 127, "
            "or 1.0 where that is 0.",
        ),
        mutants=_STATIC_MUTANTS,
    ),
    Task(
        name="ptq.smooth",
        title="Moving the difficulty",
        points=3,
        minutes=12,
        difficulty=3,
        importance=4,
        reference=smooth,
        cases=_smooth_cases,
        hints=(
            "Channel j is column j of x and column j of weight. Find the largest magnitude of each, then s. What makes "
            "x / s and weight * s give the same layer?",
            "s = x.abs().amax(0)**alpha / weight.abs().amax(0)**(1 - alpha), then torch.where(...) puts 1 where one of "
            "the maxima is 0; return x / s, weight * s.",
        ),
        mutants=_SMOOTH_MUTANTS,
        tolerance=1e-5,
    ),
)
