"""The exercise of lesson 02: absmax from the grid to the bytes.

Four of the five references are the package's own functions, called in a narrow way: `absmax` with float32 scales, so
that the learner need not round the scale, and `pack` of `formats.integers`. The ratio of signal to noise is a formula,
and stands here.

Each task comes in three parts, below in this order for all five: what is right, the cases, and what people write
instead. A mutant is made from a correct function with one thing changed, so that it is wrong in one way only.
"""

import torch

from qlearn import methods
from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats.integers import Integers, pack

BY_HAND = torch.tensor([0.9, -0.31, 0.14, -0.02, 0.6])


# What is right.


def quantize(weights, bits):
    """Codes (int8, shaped as the weights) and the one scale (float32, a single number) of a tensor of any shape."""
    quantized = methods.absmax(weights.reshape(1, -1), bits, scale_dtype=torch.float32)
    return quantized.codes().reshape(weights.shape), quantized.scales[0, 0]


def grouped(weight, bits, group_size):
    """Codes (rows, columns) and scales (rows, columns / group_size) of a matrix."""
    quantized = methods.absmax(weight, bits, group_size, scale_dtype=torch.float32)
    return quantized.codes(), quantized.scales


def sqnr(original, reconstructed):
    """Ratio of signal to quantization noise in decibels: 10 log10(sum of w**2 / sum of (w - w')**2)."""
    return 10 * torch.log10(original.square().sum() / (original - reconstructed).square().sum())


def bits_per_weight(rows, columns, bits, group_size=None):
    """Bits stored for each weight, read off a matrix that really is stored."""
    return methods.absmax(torch.zeros(rows, columns), bits, group_size).bits_per_weight


def pack4(codes):
    """Signed 4-bit codes, two to a byte."""
    return pack(Integers(4).to_unsigned(codes), 4)


# The cases.


def _random(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows_of_all_sizes(rows, columns, seed=0):
    """Each row ten times as large as the one above, so that sharing a scale with the wrong neighbours shows."""
    return _random(rows, columns, seed=seed) * 10.0 ** torch.arange(-2, rows - 2)[:, None]


def _quantize_cases():
    return [
        Case("the five weights of the lesson", (BY_HAND, 3)),
        Case("random, 4 bits", (_random(64), 4)),
        Case("random, 8 bits", (_random(256, seed=1), 8)),
        Case("random, 2 bits", (_random(40, seed=2), 2)),
        Case("a matrix: one scale for all of it", (_rows_of_all_sizes(4, 6), 5)),
        Case("the largest magnitude is negative", (torch.tensor([-2.0, 1.0, 0.5, 0.1]), 6)),
        Case("all positive", (torch.tensor([0.5, 0.625, 0.75, 0.99]), 3)),
        Case("one outlier", (torch.tensor([0.03, -0.02, 0.01, 3.0, -0.04]), 8)),
        Case("ties", (torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), 4)),
        Case("a constant", (torch.full((5,), -0.3), 7)),
        Case("tiny weights", (_random(32, seed=3, spread=1e-9), 4)),
        Case("a single weight", (torch.tensor([0.7]), 8)),
        Case("all zeros", (torch.zeros(6), 4)),
    ]


def _grouped_cases():
    outlier = _random(2, 12, seed=4, spread=0.1)
    outlier[0, 5] = 9.0
    zeros = _random(3, 8, seed=5)
    zeros[1, 4:] = 0
    return [
        Case("two rows, groups of two", (torch.tensor([[3.0, 1.0, -0.3, 0.2], [0.06, -0.02, 1.0, 1.5]]), 3, 2)),
        Case("random, groups of 16", (_random(4, 64), 4, 16)),
        Case("three groups in a row", (_random(2, 12, seed=1), 5, 4)),
        Case("as many rows as a group has weights", (_rows_of_all_sizes(4, 8), 4, 4)),
        Case("a square matrix", (_rows_of_all_sizes(4, 4, seed=2) * 10.0 ** torch.arange(4), 4, 2)),
        Case("a whole row is a group", (_rows_of_all_sizes(3, 6, seed=3), 8, 6)),
        Case("one outlier", (outlier, 4, 4)),
        Case("a group of zeros", (zeros, 4, 4)),
        Case("groups of one", (_random(2, 3, seed=6), 2, 1)),
        Case("8 bits", (_random(4, 32, seed=7), 8, 8)),
        Case("ties", (torch.tensor([[7.0, 0.5, 1.5, 2.5, -7.0, -0.5, -1.5, -2.5]]), 4, 4)),
        Case("tiny weights", (_random(2, 8, seed=8, spread=1e-9), 4, 4)),
    ]


def _sqnr_cases():
    def pair(spread, noise, seed, shape=(16, 32), offset=0.0):
        original = _random(*shape, seed=seed, spread=spread) + offset
        return original, original + _random(*shape, seed=seed + 100, spread=noise)

    uneven = _random(4, 50, seed=5)
    return [
        Case("by hand: 3 and 4, the second is off by one", (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))),
        Case("the five weights of the lesson", (BY_HAND, torch.tensor([0.9, -0.3, 0.0, 0.0, 0.6]))),
        Case("little noise", pair(1.0, 0.01, 0)),
        Case("more noise than signal", pair(0.1, 0.5, 1)),
        Case("weights that are not centred on zero", pair(0.1, 0.02, 2, offset=3.0)),
        Case("an error that is not centred on zero", (_random(64, seed=3), _random(64, seed=3) + 0.25)),
        Case("small weights", pair(1e-5, 1e-7, 4)),
        Case("rows with errors of different size", (uneven, uneven + 0.1 * _rows_of_all_sizes(4, 50, seed=6))),
        Case("nothing left", (BY_HAND, torch.zeros(5))),
        Case("nothing lost", (BY_HAND, BY_HAND.clone())),
    ]


def _bits_cases():
    return [
        Case("a layer of the model, 4 bits, groups of 64", (256, 256, 4, 64)),
        Case("a layer of the model, 8 bits, a scale for each row", (256, 256, 8, None)),
        Case("3 bits, groups of 32", (256, 768, 3, 32)),
        Case("another shape, a scale for each row", (768, 256, 5, None)),
        Case("groups of one", (4, 8, 2, 1)),
        Case("five weights at 3 bits: 15 bits of codes", (1, 5, 3, None)),
        Case("seven columns: rows do not end with a byte", (3, 7, 3, None)),
        Case("groups do not end with a byte", (2, 6, 3, 3)),
        Case("one weight", (1, 1, 2, 1)),
    ]


def _pack_cases():
    generator = torch.Generator().manual_seed(0)
    return [
        Case("two codes, one byte", (torch.tensor([1, 2], dtype=torch.int8),)),
        Case("a negative code comes first", (torch.tensor([-1, 2], dtype=torch.int8),)),
        Case("a negative code comes second", (torch.tensor([3, -7], dtype=torch.int8),)),
        Case("the codes of absmax, in order", (torch.arange(-7, 8, dtype=torch.int8),)),
        Case("random, odd length", (torch.randint(-7, 8, (257,), generator=generator).to(torch.int8),)),
        Case("random, even length", (torch.randint(-7, 8, (512,), generator=generator).to(torch.int8),)),
        Case("-8, which absmax never gives", (torch.tensor([-8, -8, 7, -8], dtype=torch.int8),)),
        Case("zeros", (torch.zeros(4, dtype=torch.int8),)),
        Case("a single code", (torch.tensor([-3], dtype=torch.int8),)),
        Case("no codes", (torch.zeros(0, dtype=torch.int8),)),
    ]


# What people write instead.


def _absmax(weights, bits, divisor=None, rounding=torch.round, largest=lambda w: w.abs().max(), clamp=None):
    """Absmax with one thing changed; without a change it is right."""
    scale = largest(weights) / (2 ** (bits - 1) - 1 if divisor is None else divisor)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = rounding(weights / scale)
    codes = codes if clamp is None else codes.clamp(*clamp)
    return codes.to(torch.int16).to(torch.int8), scale  # whole numbers wrap around the same way everywhere


def _half_away(x):
    return x.sign() * (x.abs() + 0.5).floor()


def _zeros_not_handled(weights, bits):
    scale = weights.abs().max() / (2 ** (bits - 1) - 1)
    return (weights / scale).round().to(torch.int8), scale


def _grouped(weight, bits, group_size, divisor=None, rounding=torch.round, largest=lambda g: g.abs().amax(-1)):
    """Grouped absmax with one thing changed; without a change it is right."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scales = largest(groups) / (2 ** (bits - 1) - 1 if divisor is None else divisor)
    scales = torch.where(scales == 0, 1.0, scales)
    return rounding(groups / scales[..., None]).to(torch.int8).reshape(weight.shape), scales


def _strided(weight, bits, group_size):
    """A group is every n-th weight of a row, n being the number of groups."""
    groups = weight.reshape(weight.shape[0], group_size, -1)
    codes, scales = _grouped(groups.mT.reshape(weight.shape), bits, group_size)
    return codes.reshape(groups.mT.shape).mT.reshape(weight.shape), scales


def _down_the_columns(weight, bits, group_size):
    codes, scales = _grouped(weight.T.contiguous(), bits, group_size)
    return codes.T, scales.T


def _one_scale_a_row(weight, bits, group_size):
    codes, scales = _grouped(weight, bits, weight.shape[1])
    return codes, scales.expand(-1, weight.shape[1] // group_size)


def _one_scale(weight, bits, group_size):
    codes, scale = _absmax(weight, bits)
    return codes, scale.expand(weight.shape[0], weight.shape[1] // group_size)


def _flat_scales(weight, bits, group_size):
    codes, scales = _grouped(weight, bits, group_size)
    return codes, scales.flatten()


def _a_scale_for_each_weight(weight, bits, group_size):
    codes, scales = _grouped(weight, bits, group_size)
    return codes, scales.repeat_interleave(group_size, dim=1)


def _zeros_give_nan(weight, bits, group_size):
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scales = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    return (groups / scales[..., None]).round().to(torch.int8).reshape(weight.shape), scales


def _stored(rows, columns, bits, group_size, code_bytes=None, scale_bytes=2, groups=None):
    """Bits per weight with one thing counted wrongly; without a change it is right."""
    group_size = columns if group_size is None else group_size
    groups = rows * columns // group_size if groups is None else groups
    code_bytes = -(-rows * columns * bits // 8) if code_bytes is None else code_bytes
    return 8 * (code_bytes + scale_bytes * groups) / (rows * columns)


def _pack(codes, low=slice(0, None, 2), high=slice(1, None, 2), number=lambda c: c.to(torch.uint8) & 15):
    """Two to a byte with one thing changed; without a change it is right, as a missing last code counts as 0."""
    nibbles = number(codes)
    nibbles = torch.cat([nibbles, nibbles.new_zeros(len(codes) % 2)])
    return (nibbles[low] | (nibbles[high] << 4)).to(torch.uint8)


def _halves(codes):
    middle = (len(codes) + 1) // 2
    return _pack(codes, slice(0, middle), slice(middle, None))


def _signs_smeared(codes):
    """The low nibble of a negative code is not cut out, so its sign bits overwrite the high one."""
    return _pack(codes, number=lambda c: c.to(torch.uint8))


def _sign_and_magnitude(codes):
    return _pack(codes, number=lambda c: (c.abs() | (8 * (c < 0))).to(torch.uint8) & 15)


def _odd_one_lost(codes):
    return _pack(codes[: len(codes) // 2 * 2])


def _odd_one_repeated(codes):
    return _pack(torch.cat([codes, codes[-1:]]) if len(codes) % 2 else codes)


def _ratio(signal, noise, factor=10, log=torch.log10):
    return factor * log(signal / noise)


QUANTIZE_MUTANTS = (
    Mutant(
        "scale divides by 2**(bits-1)",
        lambda w, bits: _absmax(w, bits, divisor=2 ** (bits - 1)),
        "This is what you get when the scale divides by 2**(bits - 1): the largest weight then gets that code, one "
        "more than the format has, and wraps around to the most negative one when it is stored. Divide by 2**(bits - "
        "1) - 1.",
    ),
    Mutant(
        "2**(bits-1), clamped",
        lambda w, bits: _absmax(w, bits, divisor=2 ** (bits - 1), clamp=(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)),
        "This is what you get when the scale divides by 2**(bits - 1) and the codes are clamped: the largest "
        "positive weight loses a whole step. A symmetric grid reaches from -(2**(bits - 1) - 1) to 2**(bits - 1) - "
        "1.",
    ),
    Mutant(
        "unsigned range",
        lambda w, bits: _absmax(w, bits, divisor=2**bits - 1),
        "This is what you get when the scale divides by 2**bits - 1: those are the steps of an unsigned grid, and "
        "half of the codes you return do not fit into the bits.",
    ),
    Mutant(
        "range of max and min",
        lambda w, bits: _absmax(w, bits, 2**bits - 2, largest=lambda w: w.max() - w.min(), clamp=_symmetric(bits)),
        "This is what you get when the scale comes from max - min: the grid has the right length but zero is not in "
        "the middle of the weights, so one end is cut off. The symmetric scale comes from the largest magnitude.",
    ),
    Mutant(
        "max without abs",
        lambda w, bits: _absmax(w, bits, largest=lambda w: w.max(), clamp=_symmetric(bits)),
        "This is what you get when the scale comes from the largest weight and not from the largest magnitude: large "
        "negative weights do not fit.",
    ),
    Mutant(
        "floor for round",
        lambda w, bits: _absmax(w, bits, rounding=torch.floor),
        "This is what you get when codes are rounded down: every error has the same sign, and it can be a whole "
        "step, not half of one.",
    ),
    Mutant(
        "truncation for round",
        lambda w, bits: _absmax(w, bits, rounding=torch.trunc),
        "This is what you get when converting to an integer does the rounding: it cuts the fraction off, toward "
        "zero. Round first.",
    ),
    Mutant(
        "ties away from zero",
        lambda w, bits: _absmax(w, bits, rounding=_half_away),
        "This is what you get when 0.5 is added before rounding down: ties go away from zero then. torch.round sends "
        "them to the even neighbour, as the package does.",
    ),
    Mutant(
        "one bit too few",
        lambda w, bits: _absmax(w, max(bits - 1, 2)),
        "This is what you get with one bit too few: 2**(bits - 1) - 1 codes on each side of zero, not 2**(bits - 2) "
        "- 1.",
    ),
    Mutant(
        "a scale for each row",
        lambda w, bits: _absmax(w, bits, largest=lambda w: w.abs().amax(-1, keepdim=True)),
        "This is what you get when every row has its own scale: here one scale serves the whole tensor.",
    ),
    Mutant(
        "all zeros give NaN",
        _zeros_not_handled,
        "Where all weights are zero, so is the scale, and 0 / 0 is not a number. Use scale 1 there: every code is 0 "
        "then.",
    ),
    Mutant(
        "scale kept away from zero",
        lambda w, bits: _absmax(w, bits, largest=lambda w: w.abs().max().clamp(min=1e-5)),
        "This is what you get when the scale is kept above a small constant: tiny weights then lose their codes. "
        "Only a scale of exactly 0 needs to be replaced, and by 1.",
    ),
    Mutant(
        "ties upward",
        lambda w, bits: _absmax(w, bits, rounding=lambda x: (x + 0.5).floor()),
        "This is what you get with floor(x + 0.5): only ties are wrong, all of them go up. torch.round sends them to "
        "the even neighbour.",
    ),
    Mutant(
        "scale in a list of one",
        lambda w, bits: _absmax(w, bits, largest=lambda w: w.abs().flatten().amax(0, keepdim=True)),
        "The scale has the shape (1,): return a single number, as weights.abs().max() gives it.",
    ),
)

GROUPED_MUTANTS = (
    Mutant(
        "one scale a row",
        _one_scale_a_row,
        "This is what you get when the largest magnitude is taken over the whole row: every group has its own.",
    ),
    Mutant(
        "one scale for all",
        _one_scale,
        "This is what you get when the largest magnitude is taken over the whole matrix: every group has its own.",
    ),
    Mutant(
        "every n-th weight",
        _strided,
        "This is what you get when a group is made of every n-th weight of a row: a group is consecutive weights. "
        "Reshape to (rows, groups, group_size), in this order.",
    ),
    Mutant(
        "down the columns",
        _down_the_columns,
        "This is what you get when groups run down a column: a group is consecutive weights of one row.",
    ),
    Mutant(
        "max without abs",
        lambda w, bits, g: _grouped(w, bits, g, largest=lambda x: x.amax(-1).abs()),
        "This is what you get without abs(): a group whose largest magnitude is negative gets a scale that does not "
        "cover it.",
    ),
    Mutant(
        "scale divides by 2**(bits-1)",
        lambda w, bits, g: _grouped(w, bits, g, divisor=2 ** (bits - 1)),
        "This is what you get when the scale divides by 2**(bits - 1): the largest code is 2**(bits - 1) - 1.",
    ),
    Mutant(
        "floor for round",
        lambda w, bits, g: _grouped(w, bits, g, rounding=torch.floor),
        "This is what you get when codes are rounded down; take the nearest.",
    ),
    Mutant(
        "flat scales",
        _flat_scales,
        "The scales are right, but as one long vector: they belong in a matrix (rows, groups of a row).",
    ),
    Mutant(
        "a scale for each weight",
        _a_scale_for_each_weight,
        "This is what you get when the scale is repeated for every weight of its group: stored like that it would "
        "cost as much as the weights did. Return one for each group.",
    ),
    Mutant(
        "a group of zeros gives NaN",
        _zeros_give_nan,
        "A group of zeros needs scale exactly 1: with 0 it gives 0 / 0, and a small constant is no better. Leave the "
        "other groups alone.",
    ),
    Mutant(
        "ties upward",
        lambda w, bits, g: _grouped(w, bits, g, rounding=lambda x: (x + 0.5).floor()),
        "This is what you get with floor(x + 0.5): only ties are wrong, all of them go up. torch.round sends them to "
        "the even neighbour.",
    ),
    Mutant(
        "scale kept away from zero",
        lambda w, bits, g: _grouped(w, bits, g, largest=lambda x: x.abs().amax(-1).clamp(min=1e-5)),
        "This is what you get when scales are kept above a small constant: tiny weights then lose their codes. Only a "
        "scale of exactly 0 needs to be replaced, and by 1.",
    ),
)

SQNR_MUTANTS = (
    Mutant(
        "20 log10 of the powers",
        lambda w, r: _ratio(w.square().sum(), (w - r).square().sum(), factor=20),
        "This is twice the right number: 20 log10 belongs to a ratio of amplitudes. Sums of squares are powers, and "
        "take 10 log10.",
    ),
    Mutant(
        "10 log10 of the amplitudes",
        lambda w, r: _ratio(w.square().sum().sqrt(), (w - r).square().sum().sqrt()),
        "This is half the right number: 10 log10 belongs to a ratio of powers, and you took the roots.",
    ),
    Mutant(
        "upside down",
        lambda w, r: _ratio((w - r).square().sum(), w.square().sum()),
        "This has the wrong sign: the signal goes above the line and the noise below it.",
    ),
    Mutant(
        "natural logarithm",
        lambda w, r: _ratio(w.square().sum(), (w - r).square().sum(), log=torch.log),
        "This is what you get with the natural logarithm; decibels use the one to base 10.",
    ),
    Mutant(
        "no decibels",
        lambda w, r: torch.log10(w.square().sum() / (w - r).square().sum()),
        "This is the ratio in bels: a decibel is a tenth of one, so multiply by 10.",
    ),
    Mutant(
        "variance for power",
        lambda w, r: _ratio(w.var(), (w - r).var()),
        "This is what you get with variances: they leave the mean out, and an error that is the same everywhere "
        "would count as none.",
    ),
    Mutant(
        "absolute values",
        lambda w, r: _ratio(w.abs().sum(), (w - r).abs().sum(), factor=20),
        "This is what you get with mean absolute values: power is the mean square.",
    ),
    Mutant(
        "rows averaged",
        lambda w, r: _ratio(w.square().sum(-1), (w - r).square().sum(-1)).mean(),
        "This is the mean of the decibels of each row: sum over all weights first, and take the logarithm once.",
    ),
    Mutant(
        "signal after quantization",
        lambda w, r: _ratio(r.square().sum(), (w - r).square().sum()),
        "This takes the reconstructed weights for the signal: the signal is what was there before.",
    ),
    Mutant(
        "kept away from zero",
        lambda w, r: _ratio(w.square().sum(), (w - r).square().sum() + 1e-8),
        "This adds a small constant to the noise: for small weights it drowns the noise that is really there. Where "
        "nothing is lost the answer is infinite, and torch gives that by itself.",
    ),
)

BITS_MUTANTS = (
    Mutant(
        "scales forgotten",
        lambda r, c, b, g=None: _stored(r, c, b, g, scale_bytes=0),
        "This counts the codes alone: the scales are stored as well, 2 bytes for each group.",
    ),
    Mutant(
        "not packed",
        lambda r, c, b, g=None: _stored(r, c, b, g, code_bytes=r * c),
        "This gives every code a byte of its own: packed codes fill `bits` bits each.",
    ),
    Mutant(
        "32-bit scales",
        lambda r, c, b, g=None: _stored(r, c, b, g, scale_bytes=4),
        "This counts 32 bits for a scale: float16 takes 16.",
    ),
    Mutant(
        "one scale a row, always",
        lambda r, c, b, g=None: _stored(r, c, b, c),
        "This counts one scale for each row whatever the group size says.",
    ),
    Mutant(
        "groups of one row",
        lambda r, c, b, g=None: _stored(r, c, b, g, groups=c // (g or c)),
        "This counts the scales of one row only: every row has its own.",
    ),
    Mutant(
        "last byte not rounded up",
        lambda r, c, b, g=None: b + 16 / (c if g is None else g),
        "This is the formula bits + 16 / group_size, which is right in the limit: a file holds whole bytes, so round "
        "the bytes of all codes together up.",
    ),
    Mutant(
        "last byte lost",
        lambda r, c, b, g=None: _stored(r, c, b, g, code_bytes=r * c * b // 8),
        "The bytes of the codes have to be rounded up: the last, partly filled byte is stored as well.",
    ),
    Mutant(
        "each row padded",
        lambda r, c, b, g=None: _stored(r, c, b, g, code_bytes=r * -(-c * b // 8)),
        "This rounds every row up to whole bytes: rows are packed one right after the other, and only the end is "
        "filled up.",
    ),
    Mutant(
        "each group padded",
        lambda r, c, b, g=None: _stored(r, c, b, g, code_bytes=r * c // (g or c) * -(-(g or c) * b // 8)),
        "This rounds every group up to whole bytes: codes are packed one right after the other, and only the end is "
        "filled up.",
    ),
    Mutant(
        "bytes for bits",
        lambda r, c, b, g=None: _stored(r, c, b, g) / 8,
        "These are bytes per weight: multiply by 8.",
    ),
    Mutant(
        "a whole number",
        lambda r, c, b, g=None: int(_stored(r, c, b, g)),
        "This is cut to a whole number: the fraction is what the scales cost. Divide with /, not //.",
    ),
)

PACK_MUTANTS = (
    Mutant(
        "first code in the high nibble",
        lambda c: _pack(c, slice(1, None, 2), slice(0, None, 2)),
        "This is what you get when the first code of a pair goes into the upper four bits: here it goes into the "
        "lower.",
    ),
    Mutant(
        "signs smeared",
        _signs_smeared,
        "This is what you get when a negative code is not cut to four bits: its sign bits fill the upper nibble, "
        "where its neighbour should be. Take `codes & 15` first.",
    ),
    Mutant(
        "offset by 8",
        lambda c: _pack(c, number=lambda c: (c + 8).to(torch.uint8)),
        "This stores code + 8: another good way to make codes positive, but here they stay in two's complement, the "
        "low four bits of the int8 itself.",
    ),
    Mutant(
        "offset by 7",
        lambda c: _pack(c, number=lambda c: (c + 7).to(torch.uint8) & 15),
        "This stores code + 7: here codes stay in two's complement, the low four bits of the int8 itself.",
    ),
    Mutant(
        "sign and magnitude",
        _sign_and_magnitude,
        "This stores a sign bit and a magnitude, as floats do: two's complement is what the int8 has already, cut to "
        "its low four bits.",
    ),
    Mutant(
        "halves of the list",
        _halves,
        "This pairs each code with the one half a list further on (as the Q4_0 format does within its blocks): here "
        "neighbours share a byte.",
    ),
    Mutant(
        "last code lost",
        _odd_one_lost,
        "This drops the last code when their number is odd: it needs a byte, whose upper nibble stays 0.",
    ),
    Mutant(
        "last code repeated",
        _odd_one_repeated,
        "This fills the last byte with a second copy of the last code: its upper nibble should be 0.",
    ),
    Mutant(
        "a byte for each code",
        lambda c: c.to(torch.uint8) & 15,
        "The nibbles are right, but each has a byte of its own: half of the bits are stored for nothing.",
    ),
)


def _symmetric(bits):
    return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1


TASKS = (
    Task(
        name="absmax.quantize",
        title="Codes and a scale",
        points=3,
        minutes=6,
        difficulty=2,
        importance=5,
        reference=quantize,
        cases=_quantize_cases,
        hints=(
            "The largest magnitude must land on the largest code; what is that code at 3 bits, and in general?",
            "scale = weights.abs().max() / (2**(bits - 1) - 1), replaced by 1 when it is 0; codes = (weights / "
            "scale).round(), as int8.",
        ),
        mutants=QUANTIZE_MUTANTS,
    ),
    Task(
        name="absmax.grouped",
        title="A scale for each group",
        points=3,
        minutes=8,
        difficulty=3,
        importance=5,
        reference=grouped,
        cases=_grouped_cases,
        hints=(
            "Give the matrix a third axis, so that the last one runs over a group; then everything is as before, "
            "along that axis.",
            "groups = weight.reshape(rows, -1, group_size); scales = groups.abs().amax(-1) / qmax; divide by "
            "scales[..., None].",
        ),
        mutants=GROUPED_MUTANTS,
    ),
    Task(
        name="absmax.sqnr",
        title="Decibels",
        points=2,
        minutes=4,
        difficulty=1,
        importance=4,
        reference=sqnr,
        cases=_sqnr_cases,
        hints=(
            "Power is a sum of squares. There are two of them here: of the weights, and of what was lost.",
            "10 * torch.log10(signal / noise) with signal = original.square().sum(), and noise the same of the "
            "difference.",
        ),
        mutants=SQNR_MUTANTS,
        tolerance=1e-5,
    ),
    Task(
        name="absmax.bits_per_weight",
        title="What is really stored",
        points=2,
        minutes=5,
        difficulty=2,
        importance=5,
        reference=bits_per_weight,
        cases=_bits_cases,
        hints=(
            "Count bytes: those of all codes together, and two for each scale; only at the end divide by the number "
            "of weights.",
            "code_bytes = -(-rows * columns * bits // 8) rounds up; there are rows * columns // group_size scales of "
            "2 bytes.",
        ),
        mutants=BITS_MUTANTS,
    ),
    Task(
        name="absmax.pack4",
        title="Two codes to a byte",
        points=3,
        minutes=8,
        difficulty=3,
        importance=4,
        reference=pack4,
        cases=_pack_cases,
        hints=(
            "`codes & 15` keeps the low four bits of a code; `<< 4` moves them up; `|` joins two halves. What if one "
            "code is left over?",
            "nibbles = (codes & 15).to(torch.uint8), with a 0 appended when their number is odd; then nibbles[::2] | "
            "nibbles[1::2] << 4.",
        ),
        mutants=PACK_MUTANTS,
        same_dtype=True,
    ),
)
