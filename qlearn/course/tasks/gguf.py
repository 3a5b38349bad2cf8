"""The exercise of lesson 07: bytes of GGUF files, packed and read back, the search for a scale, and where layers go.

`pack_q4_0`, `six_bits` and `decode_q4_k` ask for what `qlearn.formats.gguf_blocks` gives, byte for byte; `header` for
what `qlearn.export.GGUFFile` reads first. `fit_scale` is the least squares within the package's searches, in float64 so
that an answer is not judged by the order of its sums. `n_gpu_layers` is `qlearn.models.memory.plan` on plain numbers.
"""

import struct

import numpy as np

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats import gguf_blocks
from qlearn.formats.gguf_blocks.k_quants import unpack_six

# What is right.


def pack_q4_0(weights):
    """32 weights as the 18 bytes of a Q4_0 block, uint8."""
    return gguf_blocks.quantize(weights, "Q4_0")


def six_bits(twelve):
    """The 8 scales and the 8 minimums in the 12 bytes of Q4_K."""
    scales, mins = unpack_six(twelve[None])
    return scales[0], mins[0]


def decode_q4_k(block):
    """The 256 weights of a Q4_K block of 144 bytes, float32."""
    return gguf_blocks.dequantize(block, "Q4_K")


def header(data):
    """(version, tensors, entries, first key) of the first bytes of a GGUF file; ValueError for another file."""
    if len(data) < 24 or data[:4] != b"GGUF":
        raise ValueError("this is no GGUF file")
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    if not entries:
        return version, tensors, entries, ""
    (length,) = struct.unpack_from("<Q", data, 24)
    return version, tensors, entries, data[32 : 32 + length].decode("utf-8")


def fit_scale(x, importance, candidates):
    """The scale with the smallest weighted error, of the least-squares scales to the codes of all candidates."""
    best = (np.inf, 0.0)
    for candidate in candidates:
        codes = _codes(x, candidate)
        scale = _least_squares(x, importance, codes)
        if scale is not None:
            best = min(best, (_error(x, importance, codes, scale), scale), key=lambda found: found[0])
    return best[1]


def n_gpu_layers(layers, head, cache, memory):
    """The head, then the layers from the last one backwards, each with its cache, as long as they fit."""
    return _count(layers[::-1], head, cache, memory)


def _codes(x, scale, low=-8, high=7):
    return np.clip(np.round(x / scale), low, high)


def _least_squares(x, w, codes):
    """sum(w x l) / sum(w l l), or None where it does not say anything."""
    total = (w * codes * codes).sum()
    return (w * x * codes).sum() / total if total > 0 else None


def _error(x, w, codes, scale):
    return (w * (x - scale * codes) ** 2).sum()


def _count(layers, head, cache, memory):
    """How many fit, the head first, then the layers in the order given."""
    sizes = [head, *(layer + cache for layer in layers)]
    fits = np.cumsum(sizes) <= memory
    return int(fits.sum())


# The cases.


def _random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _pack_cases():
    def spread(*numbers):
        return np.float32([*numbers, *([0.0] * (32 - len(numbers)))])

    eighths = (np.arange(32, dtype=np.float32) - 16) / 8
    outlier = _random(32, seed=3)
    outlier[17] = 40
    return [
        Case("the largest weight is negative", (spread(-2.0, 0.25, 1.75, -0.5),)),
        Case("the largest weight is positive", (spread(2.0, 0.25, -1.75, 0.5),)),
        Case("eighths in order", (eighths,)),
        Case("half-way between two codes", (spread(-2.0, 0.125, 0.375, -0.125, -0.375, 0.875),)),
        Case("one beyond the far end", (spread(-2.0, 1.95, 1.9, 1.8),)),
        Case("random", (_random(32, seed=1),)),
        Case("random, as small as weights are", (0.02 * _random(32, seed=2),)),
        Case("all positive", (np.abs(_random(32, seed=7)) + np.float32(0.1),)),
        Case("one outlier, in the second half", (outlier,)),
        Case("two of the same size with different signs", (spread(0.5, -1.0, 1.0),)),
        Case("a constant", (np.full(32, 0.7, np.float32),)),
        Case("zeros", (np.zeros(32, np.float32),)),
        Case("a scale that float16 rounds", (_float16_rounds(),)),
    ]


def _float16_rounds():
    """Weights whose codes are other ones when they are found with d rounded to float16."""
    for seed in range(1000):
        weights = _random(32, seed=seed)
        if not np.array_equal(_pack(weights), _pack(weights, rounded=True)):
            return weights
    raise AssertionError("no such weights")


def _twelve(scales, mins):
    first = [s | (t >> 4 << 6) for s, t in zip(scales[:4], scales[4:], strict=True)]
    second = [s | (t >> 4 << 6) for s, t in zip(mins[:4], mins[4:], strict=True)]
    third = [s & 15 | (m & 15) << 4 for s, m in zip(scales[4:], mins[4:], strict=True)]
    return np.uint8([*first, *second, *third])


def _six_bits_cases():
    random = np.random.RandomState(0)
    return [
        Case("0, 1, 2 ... and 63, 62 ...", (_twelve(list(range(8)), list(range(63, 55, -1))),)),
        Case("scales only", (_twelve([9 * i for i in range(8)], [0] * 8),)),
        Case("minimums only", (_twelve([0] * 8, [9 * i for i in range(8)]),)),
        Case("all below 16", (_twelve([1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 0]),)),
        Case("the largest there are", (_twelve([63] * 8, [63] * 8),)),
        Case("zeros", (np.zeros(12, np.uint8),)),
        *(Case(f"random, {i}", (random.randint(0, 256, 12).astype(np.uint8),)) for i in range(4)),
    ]


def _q4_k_block(d, dmin, scales, mins, codes):
    """144 bytes from numbers."""
    fields = {
        "d": np.float16([d]), "dmin": np.float16([dmin]), "scales": np.uint8([scales]), "mins": np.uint8([mins]),
        "codes": np.uint8(codes).reshape(1, 256),
    }  # fmt: skip
    return gguf_blocks.BLOCK_TYPES["Q4_K"].pack(fields)[0]


def _decode_cases():
    random = np.random.RandomState(1)
    ramp, counted = np.arange(256) % 16, np.arange(256) // 16
    weights = 0.03 * _random(256, seed=4) * np.repeat(np.float32([1, 2, 3, 4, 0.5, 1, 6, 0.1]), 32)
    return [
        Case("a block of random weights", (gguf_blocks.quantize(weights, "Q4_K"),)),
        Case("scales 1, no minimum", (_q4_k_block(1, 1, [1] * 8, [0] * 8, ramp),)),
        Case("the codes say which 16 weights they belong to", (_q4_k_block(1, 0, [1] * 8, [0] * 8, counted),)),
        Case("only minimums", (_q4_k_block(1, 0.5, [0] * 8, list(range(8)), ramp),)),
        Case("large scales", (_q4_k_block(0.25, 0.5, [40, 50, 60, 63, 33, 45, 57, 63], [0] * 8, ramp),)),
        Case("large minimums", (_q4_k_block(0.5, 0.25, [1] * 8, [40, 50, 60, 63, 33, 45, 57, 63], ramp),)),
        Case("zeros", (np.zeros(144, np.uint8),)),
        Case("all that a block can hold", (_finite(random.randint(0, 256, 144).astype(np.uint8)),)),
    ]


def _finite(block):
    block[:4] = np.float16([0.0123, 0.0045]).view(np.uint8)
    return block


def _file(version=3, tensors=0, entries=0, key="", rest=b""):
    text = key.encode()
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + struct.pack("<Q", len(text)) + text + rest


def _header_cases():
    value = struct.pack("<IQ", 8, 5) + b"llama"
    return [
        Case("a model", (_file(3, 74, 27, "general.architecture", value),)),
        Case("version 2", (_file(2, 5, 1, "general.name", value),)),
        Case("more tensors than 32 bits count", (_file(3, 2**32 + 3, 1, "a.key", value),)),
        Case("more entries than 32 bits count", (_file(3, 1, 2**33 + 1, "a.key", value),)),
        Case("a key of one letter", (_file(3, 1, 2, "k", value),)),
        Case("a key of more than 255 letters", (_file(3, 1, 2, "long." * 60, value),)),
        Case("a key with letters of two bytes", (_file(3, 1, 2, "größe", value),)),
        Case("no metadata", (_file(3, 1, 0, "")[:24] + b"\x05" + bytes(30),)),
        Case("the smallest file there is", (_file(3)[:24],)),
        Case("another kind of file", (b"PK\x03\x04" + bytes(60),)),
        Case("letters that are nearly the right ones", (b"GGML" + _file(3, 1, 1, "key", value)[4:],)),
        Case("cut off in the header", (_file(3, 1, 1, "key", value)[:20],)),
    ]


def _fit_scale_cases():
    def case(name, seed, importance=None, n=16, candidates=None):
        x = _random(n, seed=seed).astype(np.float64)
        importance = np.ones(n) if importance is None else importance(x)
        largest = x[np.abs(x).argmax()]
        candidates = [largest / -(8 + 0.1 * i) for i in range(-9, 10)] if candidates is None else candidates(largest)
        return Case(name, (x, importance, candidates))

    random = np.random.RandomState(5)
    return [
        case("every weight alike", 0),
        case("importance that differs", 1, lambda x: random.lognormal(0, 1.5, len(x))),
        case("one weight that counts", 2, lambda x: np.where(np.arange(len(x)) == 3, 100.0, 1.0)),
        case("weights that do not count at all", 3, lambda x: (np.arange(len(x)) % 3 > 0).astype(float)),
        case("one candidate", 4, lambda x: np.exp(x), candidates=lambda top: [top / -8]),
        case("candidates that are far too small", 5, lambda x: x * x, candidates=lambda top: [top / -40, top / -20]),
        case("candidates that are far too large", 6, candidates=lambda top: [50 * top, top / -7, 2 * top]),
        case("positive and negative candidates", 7, lambda x: x * x, candidates=lambda top: [top / 8, top / -8]),
        case("the best one first", 8, candidates=lambda top: [top / -8.3, top / -5, top / -3]),
        case("the best one last", 8, candidates=lambda top: [top / -3, top / -5, top / -8.3]),
        Case("another candidate is better once it is fitted", _better_when_fitted()),
        Case("on the grid", (np.arange(-8.0, 8.0) / 4, np.ones(16), [0.24, 0.25, 0.27])),
        Case("zeros", (np.zeros(8), np.ones(8), [0.5, 1.0])),
    ]


def _better_when_fitted():
    """Arguments for which choosing a candidate before fitting it gives another scale."""
    for seed in range(1000):
        x = _random(16, seed=seed).astype(np.float64)
        arguments = x, np.abs(x), [x[np.abs(x).argmax()] / -steps for steps in (7.1, 7.7, 8.0, 8.6)]
        if abs(_fitted_last(*arguments) / fit_scale(*arguments) - 1) > 1e-3:
            return arguments
    raise AssertionError("no such weights")


def _layers_cases():
    return [
        Case("everything fits", ([10, 10, 10], 5, 1, 100)),
        Case("nothing fits", ([10, 10, 10], 5, 1, 4)),
        Case("only the head", ([10, 10, 10], 5, 1, 15)),
        Case("to the last byte", ([10, 10, 10], 5, 1, 38)),
        Case("one byte short", ([10, 10, 10], 5, 1, 37)),
        Case("the first layers are larger", ([30, 30, 10, 10], 8, 2, 40)),
        Case("the last layers are larger", ([10, 10, 30, 30], 8, 2, 45)),
        Case("a small layer behind a large one", ([5, 50, 10, 10], 5, 0, 40)),
        Case("a large cache", ([10] * 6, 10, 15, 100)),
        Case("no cache", ([10] * 6, 10, 0, 45)),
        Case("a head that is larger than a layer", ([10] * 6, 40, 1, 63)),
        Case("a head that does not fit", ([10] * 6, 40, 1, 39)),
        Case("everything would fit but for the cache", ([10, 10, 10], 5, 3, 35)),
        Case("no head", ([10] * 4, 0, 0, 30)),
        Case("a model of 8 billion, 6 GB", ([125 * 10**6] * 32, 431 * 10**6, 16 * 2**20, 5 * 10**9)),
    ]


# The mistakes: `pack_q4_0`.


def _pack(
    weights, half=8, top=15, rounded=False, sign=True, round_half=np.floor, high_first=False, pairs=False,
    order="<f2", last=False, add=0.5, codes_of_zero=8,
):  # fmt: skip
    """`pack_q4_0` with one thing or another done differently."""
    weights = np.asarray(weights, np.float32)
    largest = weights[np.abs(weights).argmax()]
    d = largest / np.float32(-half) if sign else np.abs(largest) / np.float32(half)
    divisor = d.astype(np.float16).astype(np.float32) if rounded else d
    steps = weights * (np.float32(1) / divisor) if divisor else weights * 0
    codes = round_half(steps + np.float32(8) + np.float32(add))
    if not divisor:
        codes[:] = codes_of_zero
    codes = np.clip(codes, None, top).astype(np.int64).astype(np.uint8)
    first, second = (codes[::2], codes[1::2]) if pairs else (codes[:16], codes[16:])
    nibbles = (first << 4 | second) if high_first else (first | second << 4)
    scale = np.array([d]).astype(order).view(np.uint8)
    return np.concatenate([nibbles, scale] if last else [scale, nibbles]).astype(np.uint8)


def _truncated_scale(weights):
    """The upper half of the float32 d: a bfloat16."""
    found = _pack(weights)
    d = np.float32([weights[np.abs(weights).argmax()] / np.float32(-8)])
    found[:2] = d.view(np.uint8)[2:]
    return found


def _zeros(weights, d):
    """`pack_q4_0` with other bytes for a block of zeros."""
    return _pack(weights) if np.any(weights) else np.uint8([0, 0, *([d] * 16)])


_PACK_MUTANTS = (
    Mutant(
        "the sign of d lost",
        lambda weights: _pack(weights, sign=False),
        "This is what you get when d is max|w| / 8: it loses the sign. d is the largest weight *with its sign*, "
        "divided by -8, so that it gets the code 0, whichever sign it has.",
    ),
    Mutant(
        "divided by 8",
        lambda weights: _pack(weights, half=-8),
        "This is what you get when d is the largest weight divided by 8: it would need the code 16, which there is "
        "not. Divide by -8, and it gets 0.",
    ),
    Mutant(
        "divided by -7",
        lambda weights: _pack(weights, half=7),
        "This is what you get when the largest weight is divided by -7: codes 0 to 15 less 8 reach down to -8.",
    ),
    Mutant(
        "neighbours in a byte",
        lambda weights: _pack(weights, pairs=True),
        "This is what you get when a byte holds weights 2j and 2j + 1: it holds j and j + 16.",
    ),
    Mutant(
        "nibbles swapped",
        lambda weights: _pack(weights, high_first=True),
        "This is what you get when the first 16 codes go to the high halves of the bytes: they go to the low halves.",
    ),
    Mutant(
        "nibbles of neighbours swapped",
        lambda weights: _pack(weights, pairs=True, high_first=True),
        "This is what you get when a byte holds weights 2j and 2j + 1, the first in the high half: it holds j in its "
        "low half and j + 16 in its high half.",
    ),
    Mutant(
        "d behind the codes",
        lambda weights: _pack(weights, last=True),
        "This is what you get when d stands behind the codes: it is the first two bytes.",
    ),
    Mutant(
        "big-endian d",
        lambda weights: _pack(weights, order=">f2"),
        "This is what you get when the high byte of d comes first: GGUF is little-endian, the low byte comes first.",
    ),
    Mutant(
        "d as a bfloat16",
        _truncated_scale,
        "This is what you get when d is stored as the upper half of a float32: that is a bfloat16; a float16 has other "
        "fields.",
    ),
    Mutant(
        "codes from the stored d",
        lambda weights: _pack(weights, rounded=True),
        "Only few codes are wrong: you divide by d as float16. ggml divides by d in float32, and rounds only what it "
        "stores.",
    ),
    Mutant(
        "ties to even",
        lambda weights: _pack(weights, round_half=np.round, add=0),
        "Only weights half-way between two codes are wrong: you round them to the even code, as np.round does. Add 8.5 "
        "and cut off, as ggml does.",
    ),
    Mutant(
        "cut off",
        lambda weights: _pack(weights, add=0),
        "This is what you get when w / d + 8 is cut off: add 8.5, so that cutting off rounds.",
    ),
    Mutant(
        "not clipped",
        lambda weights: _pack(weights, top=16),
        "Only weights near the negative of the largest are wrong: they get the code 16, which spills into another "
        "nibble. 15 is the largest.",
    ),
    Mutant(
        "clipped at 14",
        lambda weights: _pack(weights, top=14),
        "This is what you get when codes stop at 14: four bits reach to 15.",
    ),
    Mutant(
        "code 0 for zeros",
        lambda weights: _pack(weights, codes_of_zero=0),
        "Only the block of zeros is wrong: with d = 0 ggml multiplies by 0 instead of dividing, so each code is 8.",
    ),
    Mutant(
        "+0 for zeros",
        lambda weights: _zeros(weights, 0x88),
        "Only the block of zeros is wrong: 0 / -8 is -0.0, and its float16 has the sign bit set, 0x8000.",
    ),
    Mutant(
        "zero bytes for zeros",
        lambda weights: _zeros(weights, 0),
        "Only the block of zeros is wrong: d is 0 / -8 = -0.0, whose float16 is 0x8000, and each code is 8.",
    ),
    Mutant(
        "halves down",
        lambda weights: _pack(weights, round_half=lambda x: np.ceil(x) - 1),
        "Only weights half-way between two codes are wrong: they go up to the next code, as cutting off w / d + 8.5 "
        "makes them.",
    ),
)


# The mistakes: `six_bits`.


def _parts(twelve):
    return twelve[:4], twelve[4:8], twelve[8:]


def _six(low_scales, low_mins, high_scales, high_mins):
    """Scales and minimums from their first and their last four."""
    return tuple(np.concatenate([low & 63, high]) for low, high in ((low_scales, high_scales), (low_mins, high_mins)))


def _stream(twelve):
    bits = np.unpackbits(twelve, bitorder="little").reshape(16, 6)
    return np.packbits(bits, axis=-1, bitorder="little")[:, 0]


def _variant(scale_nibble=0, high=(0, 1), shift=4, mask=True):
    """`six_bits` with other nibbles, other bytes for the high bits, or another shift."""

    def unpack(twelve):
        a, b, c = _parts(twelve)
        tops = (a >> 6, b >> 6)
        nibbles = (c & 15, c >> 4) if scale_nibble == 0 else (c >> 4, c & 15)
        last = [nibbles[i] | (tops[high[i]] << shift) for i in (0, 1)]
        first = (a & 63, b & 63) if mask else (a, b)
        return tuple(np.concatenate([x, y]) for x, y in zip(first, last, strict=True))

    return unpack


def _low_bits_only(twelve):
    a, b, c = _parts(twelve)
    return _six(a, b, c & 15, c >> 4)


def _high_bits_lowest(twelve):
    a, b, c = _parts(twelve)
    return _six(a, b, (c & 15) << 2 | a >> 6, c >> 4 << 2 | b >> 6)


def _unshifted(twelve):
    a, b, c = _parts(twelve)
    return _six(a, b, c & 15 | a & 192, c >> 4 | b & 192)


def _interleaved(twelve):
    scales, mins = six_bits(twelve)
    return tuple(np.stack([numbers[:4], numbers[4:]], axis=1).ravel() for numbers in (scales, mins))


_SIX_BITS_MUTANTS = (
    Mutant(
        "one stream of bits",
        lambda twelve: (_stream(twelve)[:8], _stream(twelve)[8:]),
        "This is what you get when the 12 bytes are one stream of sixteen numbers of 6 bits: only the first four "
        "scales and minimums lie in one piece, the others are cut in two.",
    ),
    Mutant(
        "high bits left out",
        _low_bits_only,
        "The last four are wrong where they are 16 and more: their two high bits are in bits 6 and 7 of bytes 0-3 "
        "(scales) and 4-7 (minimums).",
    ),
    Mutant(
        "nibbles swapped",
        _variant(scale_nibble=1),
        "This is what you get when the last four scales are taken from the high halves of bytes 8-11: they are in the "
        "low halves, the minimums in the high ones.",
    ),
    Mutant(
        "both from the low halves",
        lambda twelve: _six(*_parts(twelve)[:2], *(twelve[8:] & 15 | part >> 6 << 4 for part in _parts(twelve)[:2])),
        "The last four minimums are wrong: their low four bits are the high halves of bytes 8-11.",
    ),
    Mutant(
        "both from the high halves",
        lambda twelve: _six(*_parts(twelve)[:2], *(twelve[8:] >> 4 | part >> 6 << 4 for part in _parts(twelve)[:2])),
        "The last four scales are wrong: their low four bits are the low halves of bytes 8-11.",
    ),
    Mutant(
        "the minimums' high bits from the scales' bytes",
        _variant(high=(0, 0)),
        "The last four minimums are wrong: their high bits are in bytes 4-7, above the first four minimums.",
    ),
    Mutant(
        "high bits exchanged",
        _variant(high=(1, 0)),
        "The last four have each other's high bits: those of the scales are in bytes 0-3, those of the minimums in "
        "bytes 4-7.",
    ),
    Mutant(
        "high bits two places too far left",
        _unshifted,
        "This is what you get when bits 6 and 7 are left where they are: as bits 4 and 5 of the number they have to "
        "move, b >> 6 << 4.",
    ),
    Mutant(
        "high bits one place off",
        _variant(shift=5),
        "This is what you get when the high bits are shifted by 5: below them are 4 bits, so shift by 4.",
    ),
    Mutant(
        "high bits put below",
        _high_bits_lowest,
        "This is what you get when the two bits of bytes 0-7 are put below the four of bytes 8-11: they are the high "
        "ones.",
    ),
    Mutant(
        "first four not masked",
        _variant(mask=False),
        "The first four are wrong: bits 6 and 7 of their bytes belong to the last four; keep b & 63.",
    ),
    Mutant(
        "scales and minimums exchanged",
        lambda twelve: six_bits(twelve)[::-1],
        "This is the right pair in the wrong order: scales first, then minimums.",
    ),
    Mutant(
        "interleaved",
        _interleaved,
        "All numbers are right, their order is not: first the four from bytes 0-3, then the other four.",
    ),
)


# The mistakes: `decode_q4_k`.


def _decode(block, order="<f2", swap=False, minimum=-1, offset=0, six=six_bits, codes=None, start=16):
    """`decode_q4_k` with one thing or another done differently."""
    d, dmin = block[:4].copy().view(order).astype(np.float32)[:: -1 if swap else 1]
    scales, mins = (numbers.astype(np.float32) for numbers in six(block[4:16]))
    found = (codes or _in_runs)(block[start:144]).astype(np.float32).reshape(8, 32) - offset
    return (d * scales[:, None] * found + minimum * dmin * mins[:, None]).ravel()


def _in_runs(qs, run=32, high_first=False):
    """Codes of runs of so many bytes: the low halves of a run, then its high halves."""
    runs = qs.reshape(-1, run)
    halves = [runs >> 4, runs & 15] if high_first else [runs & 15, runs >> 4]
    return np.stack(halves, axis=1).ravel()


def _neighbours(qs):
    return np.stack([qs & 15, qs >> 4], axis=1).ravel()


def _by_sub_block(block, change):
    """`decode_q4_k` with the sub-blocks' scales and minimums changed."""
    return _decode(block, six=lambda twelve: tuple(change(numbers) for numbers in six_bits(twelve)))


def _minimum_without_its_scale(block):
    d, scales, mins = block[:2].copy().view("<f2").astype(np.float32), *six_bits(block[4:16])
    codes = _in_runs(block[16:]).astype(np.float32).reshape(8, 32)
    return (d * scales[:, None] * codes - mins.astype(np.float32)[:, None]).ravel()


def _minimum_within(block):
    d, dmin = block[:4].copy().view("<f2").astype(np.float32)
    scales, mins = (numbers.astype(np.float32)[:, None] for numbers in six_bits(block[4:16]))
    return (d * scales * (_in_runs(block[16:]).astype(np.float32).reshape(8, 32) - dmin * mins)).ravel()


def _products_of_bytes(block):
    """d * (scale * code) with the product in uint8."""
    d, dmin = block[:4].copy().view("<f2").astype(np.float32)
    scales, mins = six_bits(block[4:16])
    return (d * (scales[:, None] * _in_runs(block[16:]).reshape(8, 32)) - dmin * mins[:, None]).ravel()


def _in_float16(block):
    """Everything computed in float16."""
    d, dmin = block[:4].copy().view("<f2")
    scales, mins = (numbers.astype(np.float16)[:, None] for numbers in six_bits(block[4:16]))
    codes = _in_runs(block[16:]).astype(np.float16).reshape(8, 32)
    return (d * scales * codes - dmin * mins).ravel().astype(np.float32)


def _zero_point(block):
    d = block[:2].copy().view("<f2").astype(np.float32)
    scales, mins = (numbers.astype(np.float32)[:, None] for numbers in six_bits(block[4:16]))
    return (d * scales * (_in_runs(block[16:]).astype(np.float32).reshape(8, 32) - mins)).ravel()


_DECODE_MUTANTS = (
    Mutant(
        "minimum added",
        lambda block: _decode(block, minimum=1),
        "This is what you get when dmin * m is added: the file holds how far the smallest weight is *below* zero, so "
        "subtract.",
    ),
    Mutant(
        "no minimum",
        lambda block: _decode(block, minimum=0),
        "This is d * s * code alone: subtract dmin * m of the sub-block.",
    ),
    Mutant(
        "minimum not scaled",
        _minimum_without_its_scale,
        "This is what you get when the 6-bit m itself is subtracted: it counts in units of dmin.",
    ),
    Mutant(
        "minimum inside the bracket",
        _minimum_within,
        "This is d * s * (code - dmin * m): the minimum has a scale of its own and is no zero point. d * s * code - "
        "dmin * m.",
    ),
    Mutant(
        "d and dmin exchanged",
        lambda block: _decode(block, swap=True),
        "This is what you get when dmin is read first: bytes 0 and 1 are d, 2 and 3 are dmin.",
    ),
    Mutant(
        "big-endian",
        lambda block: np.nan_to_num(_decode(block, order=">f2"), posinf=1e30, neginf=-1e30),
        "This is what you get when the high byte of d and dmin is taken to be the first: the low one is.",
    ),
    Mutant(
        "8 subtracted",
        lambda block: _decode(block, offset=8),
        "This is what you get when 8 is subtracted from the codes, as in Q4_0: Q4_K has a minimum instead.",
    ),
    Mutant(
        "neighbours in a byte",
        lambda block: _decode(block, codes=_neighbours),
        "This is what you get when a byte holds two neighbours: its halves are weights that lie 32 apart.",
    ),
    Mutant(
        "runs of 16",
        lambda block: _decode(block, codes=lambda qs: _in_runs(qs, 16)),
        "This is what you get when the halves of a byte lie 16 apart, as in Q4_0: in Q4_K they lie 32 apart.",
    ),
    Mutant(
        "all low halves first",
        lambda block: _decode(block, codes=lambda qs: _in_runs(qs, 128)),
        "This is what you get when weights 0-127 are the low halves of all bytes and the others the high ones: after "
        "32 low halves come the 32 high halves of the same bytes.",
    ),
    Mutant(
        "halves swapped",
        lambda block: _decode(block, codes=lambda qs: _in_runs(qs, high_first=True)),
        "Each pair of sub-blocks is exchanged: the low halves are the first of the two.",
    ),
    Mutant(
        "scales of the other half",
        lambda block: _by_sub_block(block, lambda numbers: np.roll(numbers, 4)),
        "The sub-blocks have each other's scales: the first four are those in bytes 4-7 of the block.",
    ),
    Mutant(
        "scales repeated by tile",
        lambda block: _scales_tiled(block),
        "This is what you get when weight i gets the scale i % 8, as np.tile repeats them: it is i // 32, which "
        "np.repeat gives, or codes of the shape (8, 32).",
    ),
    Mutant(
        "products of bytes",
        _products_of_bytes,
        "Large scales are wrong: scale * code is a product of two uint8, which wraps at 256. Multiply by d first, or "
        "make them float32.",
    ),
    Mutant(
        "float16 throughout",
        _in_float16,
        "Nearly right, but computed in float16, which has 11 bits: make d and dmin float32 first.",
    ),
    Mutant(
        "minimum as a zero point",
        _zero_point,
        "This is d * s * (code - m), as if m were a zero point: it is d * s * code - dmin * m.",
    ),
    Mutant(
        "scales and minimums exchanged",
        lambda block: _decode(block, six=lambda twelve: six_bits(twelve)[::-1]),
        "The scales and the minimums are exchanged: six_bits returns the scales first.",
    ),
    Mutant(
        "the high bits of the scales left out",
        lambda block: _decode(block, six=_low_bits_only),
        "Sub-blocks 4-7 are wrong where their scale is 16 or more: use your six_bits, with the high bits.",
    ),
)


def _scales_tiled(block):
    d, dmin = block[:4].copy().view("<f2").astype(np.float32)
    scales, mins = (np.tile(numbers.astype(np.float32), 32) for numbers in six_bits(block[4:16]))
    return d * scales * _in_runs(block[16:]).astype(np.float32) - dmin * mins


# The mistakes: `header`.


def _read(data, counts="<IQQ", length="<Q", key_at=None, check=True, swap=False, decode=None, always=False):
    """`header` with one thing or another done differently."""
    if check and (len(data) < 24 or data[:4] != b"GGUF"):
        raise ValueError("this is no GGUF file")
    version, tensors, entries = struct.unpack_from(counts, data.ljust(24, b"\0"), 4)
    tensors, entries = (entries, tensors) if swap else (tensors, entries)
    if not entries and not always:
        return version, tensors, entries, ""
    at = 4 + struct.calcsize(counts) if key_at is None else key_at
    data = data.ljust(at + 8, b"\0")
    (size,) = struct.unpack_from(length, data, at)
    first = at + struct.calcsize(length)
    return version, tensors, entries, (decode or _utf8)(data, first, size)


def _utf8(data, first, size):
    return data[first : first + size].decode("utf-8", "replace")


def _counted_letters(data, first, size):
    return data[first:].decode("utf-8", "replace")[:size]


_HEADER_MUTANTS = (
    Mutant(
        "big-endian",
        lambda data: _read(data, counts=">IQQ", length=">Q"),
        "This is what you get from '>': GGUF is little-endian, '<'.",
    ),
    Mutant(
        "counts of 32 bits",
        lambda data: _read(data, counts="<III"),
        "This is what you get when the counts are read as uint32 ('I'): they have 8 bytes each, 'Q'. (In version 1 of "
        "the format they had 4.)",
    ),
    Mutant(
        "counts exchanged",
        lambda data: _read(data, swap=True),
        "The two counts are exchanged: the number of tensors comes first.",
    ),
    Mutant(
        "length of 32 bits",
        lambda data: _read(data, length="<I"),
        "The key is wrong: the length in front of a string has 8 bytes, so the text begins at byte 32.",
    ),
    Mutant(
        "aligned by struct",
        lambda data: _read(data.ljust(32, b"\0"), counts="@IQQ", key_at=24),
        "This is what you get without '<': struct then aligns a Q to a multiple of 8, and skips 4 bytes that are not "
        "skipped in the file.",
    ),
    Mutant(
        "length of one byte",
        lambda data: _read(data, length="<B", decode=lambda d, first, size: _utf8(d, first + 7, size)),
        "Only long keys are wrong: their length has more than the 8 bits of its first byte.",
    ),
    Mutant(
        "key as bytes",
        lambda data: _read(data, decode=lambda d, first, size: d[first : first + size]),
        "The key is still bytes: .decode() makes a str of it.",
    ),
    Mutant(
        "letters counted",
        lambda data: _read(data, decode=_counted_letters),
        "Only keys with letters of two bytes are wrong: the length counts bytes, so cut first and decode then.",
    ),
    Mutant(
        "latin-1",
        lambda data: _read(data, decode=lambda d, first, size: d[first : first + size].decode("latin-1")),
        "Only keys with letters of two bytes are wrong: the text is UTF-8.",
    ),
    Mutant(
        "the length taken for the key",
        lambda data: _read(data, decode=lambda d, first, size: _utf8(d, first - 8, size)),
        "The key begins too early: its first 8 bytes are its length.",
    ),
    Mutant(
        "magic not checked",
        lambda data: _read(data, check=False),
        "Every file is taken for a GGUF file: raise ValueError unless it begins with b'GGUF' and has at least 24 "
        "bytes.",
    ),
    Mutant(
        "two letters of the magic checked",
        lambda data: header(b"GGUF" + data[4:] if data[:2] == b"GG" else data),
        "Files that begin with nearly the right letters are taken too: compare all four.",
    ),
    Mutant(
        "a key where there is none",
        lambda data: _read(data, always=True),
        "Only files without metadata are wrong: what follows is no key then; return an empty string.",
    ),
)


# The mistakes: `fit_scale`.


def _search(x, w, candidates, judge=_error, fit=_least_squares, low=-8, high=7, refit=True, first_wins=True):
    """`fit_scale` with one thing or another done differently."""
    best = (np.inf, 0.0)
    for candidate in candidates:
        codes = _codes(x, candidate, low, high)
        scale = fit(x, w, codes)
        if scale is not None:
            scale = scale if refit else candidate
            error = judge(x, w, codes, scale)
            if error < best[0] or not first_wins:
                best = error, scale
    return best[1]


def _unweighted(function):
    return lambda x, w, *rest: function(x, np.ones_like(x), *rest)


def _weighted_by(power):
    return lambda x, w, candidates: fit_scale(x, w**power, candidates)


_FIT_SCALE_MUTANTS = (
    Mutant(
        "importance ignored",
        lambda x, w, candidates: fit_scale(x, np.ones_like(x), candidates),
        "This is what you get without the importance: it weighs both the fit and the error.",
    ),
    Mutant(
        "importance in the error only",
        lambda x, w, candidates: _search(x, w, candidates, fit=_unweighted(_least_squares)),
        "The scale is fitted without the importance: sum(importance * x * l) / sum(importance * l * l).",
    ),
    Mutant(
        "importance in the fit only",
        lambda x, w, candidates: _search(x, w, candidates, judge=_unweighted(_error)),
        "The candidates are compared without the importance: it weighs the squared errors as well.",
    ),
    Mutant(
        "importance squared",
        _weighted_by(2),
        "This is what you get when the importance is squared: it multiplies a squared error once.",
    ),
    Mutant(
        "root of the importance",
        _weighted_by(0.5),
        "This is what you get for the root of the importance: it multiplies a squared error, so it needs no root.",
    ),
    Mutant(
        "not fitted",
        lambda x, w, candidates: _search(x, w, candidates, refit=False),
        "This is the best of the candidates themselves: each only gives codes, for which least squares finds a scale.",
    ),
    Mutant(
        "chosen first, fitted then",
        lambda x, w, candidates: _fitted_last(x, w, candidates),
        "This is what you get when the best candidate is chosen first and fitted then: fit each, and compare the "
        "errors after that.",
    ),
    Mutant(
        "absolute errors",
        lambda x, w, candidates: _search(
            x, w, candidates, judge=lambda x, w, codes, s: (w * np.abs(x - s * codes)).sum()
        ),
        "The candidates are compared by |error|: take squares, which is what least squares makes small.",
    ),
    Mutant(
        "the last one",
        lambda x, w, candidates: _search(x, w, candidates, first_wins=False),
        "This is the scale of the last candidate: keep the one with the smallest error.",
    ),
    Mutant(
        "the first one",
        lambda x, w, candidates: fit_scale(x, w, candidates[:1]),
        "This is the scale of the first candidate: keep the one with the smallest error.",
    ),
    Mutant(
        "codes not clipped",
        lambda x, w, candidates: _search(x, w, candidates, low=-np.inf, high=np.inf),
        "Only some candidates come out wrong: codes must stay within -8 ... 7, or a small scale looks perfect.",
    ),
    Mutant(
        "clipped at -7",
        lambda x, w, candidates: _search(x, w, candidates, low=-7),
        "This is what you get when codes stop at -7: four bits reach from -8 to 7.",
    ),
    Mutant(
        "clipped at 8",
        lambda x, w, candidates: _search(x, w, candidates, high=8),
        "This is what you get when codes reach 8: four bits reach from -8 to 7.",
    ),
    Mutant(
        "0 to 15",
        lambda x, w, candidates: _search(x, w, candidates, low=0, high=15),
        "This is what you get when codes are kept within 0 ... 15: here they have a sign, -8 ... 7.",
    ),
    Mutant(
        "codes cut off",
        lambda x, w, candidates: _cut_off(x, w, candidates),
        "This is what you get when x / candidate is cut off or rounded down: take the nearest code.",
    ),
    Mutant(
        "importance above only",
        lambda x, w, candidates: _search(
            x, w, candidates, fit=lambda x, w, codes: _least_squares(x, w, codes) and _above_only(x, w, codes)
        ),
        "The scale is sum(w x l) / sum(l l): the importance belongs below the line as well.",
    ),
    Mutant(
        "importance below only",
        lambda x, w, candidates: _search(
            x, w, candidates, fit=lambda x, w, codes: _least_squares(x, w, codes) and _below_only(x, w, codes)
        ),
        "The scale is sum(x l) / sum(w l l): the importance belongs above the line as well.",
    ),
    Mutant(
        "ratio of the sums",
        lambda x, w, candidates: _search(x, w, candidates, fit=_ratio_of_sums),
        "This is sum(w x) / sum(w l): least squares multiplies by the code once more, sum(w x l) / sum(w l l).",
    ),
    Mutant(
        "upside down",
        lambda x, w, candidates: _search(x, w, candidates, fit=_upside_down),
        "This is the scale the wrong way round: sum(w x l) / sum(w l l), not sum(w l l) / sum(w x l).",
    ),
)


def _fitted_last(x, w, candidates):
    best = min(candidates, key=lambda s: _error(x, w, _codes(x, s), s))
    return _least_squares(x, w, _codes(x, best)) or 0.0


def _cut_off(x, w, candidates):
    best = (np.inf, 0.0)
    for candidate in candidates:
        codes = np.clip(np.floor(x / candidate), -8, 7)
        scale = _least_squares(x, w, codes)
        if scale is not None:
            best = min(best, (_error(x, w, codes, scale), scale), key=lambda found: found[0])
    return best[1]


def _above_only(x, w, codes):
    return (w * x * codes).sum() / (codes * codes).sum()


def _below_only(x, w, codes):
    return (x * codes).sum() / (w * codes * codes).sum()


def _ratio_of_sums(x, w, codes):
    total = (w * codes).sum()
    return (w * x).sum() / total if abs(total) > 1e-12 else None


def _upside_down(x, w, codes):
    total = (w * x * codes).sum()
    return (w * codes * codes).sum() / total if abs(total) > 1e-12 else None


# The mistakes: `n_gpu_layers`.


def _skipping(layers, head, cache, memory):
    """Layers that do not fit are passed over, and smaller ones in front of them taken."""
    count = 0
    for size in [head, *(layer + cache for layer in layers[::-1])]:
        if size <= memory:
            memory, count = memory - size, count + 1
    return count


def _head_last(layers, head, cache, memory):
    count = _count(layers[::-1], 0, cache, memory) - 1
    return count + (count == len(layers) and sum(layers) + cache * len(layers) + head <= memory)


_LAYERS_MUTANTS = (
    Mutant(
        "from the first layer",
        lambda layers, head, cache, memory: _count(layers, head, cache, memory),
        "This is what you get when layers are taken from the first one on: llama.cpp takes them from the last one "
        "back.",
    ),
    Mutant(
        "head not counted",
        lambda layers, head, cache, memory: max(0, n_gpu_layers(layers, head, cache, memory) - 1),
        "This is the number of layers alone: the head counts as one, so a model of 32 layers is whole at 33.",
    ),
    Mutant(
        "head for nothing",
        lambda layers, head, cache, memory: _count(layers[::-1], 0, cache, memory),
        "The head is counted, but its bytes are not: it takes memory before the first layer does.",
    ),
    Mutant(
        "head last",
        _head_last,
        "This is what you get when the head comes after all layers: it is the first to go to the GPU.",
    ),
    Mutant(
        "head last, with a cache",
        lambda layers, head, cache, memory: _count(
            [layer + cache for layer in layers[-2::-1]] + [head + cache], layers[-1] + cache, 0, memory
        ),
        "This is what you get when the head comes after all layers, with a cache of its own: it is the first to go to "
        "the GPU, and has none.",
    ),
    Mutant(
        "no head at all",
        lambda layers, head, cache, memory: _count(layers[::-1], 0, cache, memory) - 1,
        "This is what you get without the head: its bytes come first, and it counts as one.",
    ),
    Mutant(
        "cache ignored",
        lambda layers, head, cache, memory: n_gpu_layers(layers, head, 0, memory),
        "The cache is left out: every layer on the GPU keeps its keys and values there too.",
    ),
    Mutant(
        "cache once",
        lambda layers, head, cache, memory: n_gpu_layers(layers, head, 0, memory - cache),
        "The cache is counted once: it is that of one layer, and every layer on the GPU brings its own.",
    ),
    Mutant(
        "cache of all layers",
        lambda layers, head, cache, memory: n_gpu_layers(layers, head, 0, memory - cache * len(layers)),
        "The cache of all layers is put on the GPU: it lies where its layer computes.",
    ),
    Mutant(
        "cache for the head",
        lambda layers, head, cache, memory: n_gpu_layers(layers, head + cache, cache, memory),
        "The head gets a cache too: only layers have keys and values.",
    ),
    Mutant(
        "less than",
        lambda layers, head, cache, memory: n_gpu_layers(layers, head, cache, memory - 1),
        "This is what you get from '<': what fills the memory to the last byte still fits.",
    ),
    Mutant(
        "small ones squeezed in",
        _skipping,
        "A layer that does not fit is passed over, and a smaller one in front of it taken: the layers on the GPU are "
        "the last ones without a gap, so stop at the first that does not fit.",
    ),
    Mutant(
        "all of the same size",
        lambda layers, head, cache, memory: _count([sum(layers) / len(layers)] * len(layers), head, cache, memory),
        "This is what you get for the mean size of a layer: add up the layers' own sizes, from the last one back.",
    ),
    Mutant(
        "what is left",
        lambda layers, head, cache, memory: len(layers) + 1 - n_gpu_layers(layers, head, cache, memory),
        "This is the number that stays in main memory: asked for is what goes to the GPU.",
    ),
)


TASKS = (
    Task(
        name="gguf.pack_q4_0",
        title="Thirty-two weights in eighteen bytes",
        points=3,
        minutes=12,
        difficulty=2,
        importance=5,
        reference=pack_q4_0,
        cases=_pack_cases,
        tolerance=0,
        same_dtype=True,
        hints=(
            "In this order: the weight with the largest magnitude (argmax of np.abs), d = that / -8 in float32, the "
            "codes, two codes to a byte, and np.float16([d]).view(np.uint8) in front. Where d is 0, multiply by 0.",
            "codes = np.minimum(15, (weights * inverse + np.float32(8.5)).astype(np.uint8)), then "
            "codes[:16] | codes[16:] << 4.",
        ),
        mutants=_PACK_MUTANTS,
    ),
    Task(
        name="gguf.six_bits",
        title="Sixteen numbers of six bits",
        points=2,
        minutes=10,
        difficulty=3,
        importance=3,
        reference=six_bits,
        cases=_six_bits_cases,
        hints=(
            "Cut the bytes into three fours: a, b, c. The first four scales are a & 63. The last four are put together "
            "from four bits of c and two bits of a.",
            "scales: a & 63, then c & 15 | a >> 6 << 4; mins: b & 63, then c >> 4 | b >> 6 << 4.",
        ),
        mutants=_SIX_BITS_MUTANTS,
    ),
    Task(
        name="gguf.decode_q4_k",
        title="A block of Q4_K",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=decode_q4_k,
        cases=_decode_cases,
        tolerance=1e-5,
        hints=(
            "block[:4].view(np.float16) is d and dmin. As (4, 32), block[16:] has the codes of sub-blocks 0, 2, 4, 6 "
            "in the low halves and those of 1, 3, 5, 7 in the high halves.",
            "qs = block[16:].reshape(4, 32); codes = np.stack([qs & 15, qs >> 4], axis=1).reshape(8, 32); then "
            "d * scales[:, None] * codes - dmin * mins[:, None], all in float32.",
        ),
        mutants=_DECODE_MUTANTS,
    ),
    Task(
        name="gguf.header",
        title="The first bytes of a file",
        points=2,
        minutes=8,
        difficulty=2,
        importance=4,
        reference=header,
        cases=_header_cases,
        hints=(
            "struct.unpack_from(format, data, offset): '<' for little-endian, I for 4 bytes, Q for 8. A string is its "
            "length (Q), then that many bytes.",
            "version, tensors, entries = struct.unpack_from('<IQQ', data, 4); the length of the key is at 24, the key "
            "at 32.",
        ),
        mutants=_HEADER_MUTANTS,
    ),
    Task(
        name="gguf.fit_scale",
        title="The best scale of a few",
        points=3,
        minutes=10,
        difficulty=3,
        importance=4,
        reference=fit_scale,
        cases=_fit_scale_cases,
        hints=(
            "One loop over the candidates: codes from the candidate, a scale from the codes, an error from the scale; "
            "keep the scale of the smallest error so far, beginning with 0.0 and an infinite error.",
            "l = np.clip(np.round(x / candidate), -8, 7); s = (importance * x * l).sum() / (importance * l * l).sum(), "
            "if that is not 0 / 0; error = (importance * (x - s * l) ** 2).sum().",
        ),
        mutants=_FIT_SCALE_MUTANTS,
    ),
    Task(
        name="gguf.n_gpu_layers",
        title="What fits on the GPU",
        points=2,
        minutes=6,
        difficulty=2,
        importance=4,
        reference=n_gpu_layers,
        cases=_layers_cases,
        hints=(
            "Go through the head and then the layers from the last one back; subtract what each takes, and stop at the "
            "first that does not fit.",
            "count = 0; for size in [head, *(layer + cache for layer in reversed(layers))]: if size > memory: break; "
            "memory -= size; count += 1.",
        ),
        mutants=_LAYERS_MUTANTS,
    ),
)
