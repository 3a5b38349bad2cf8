"""A block under the microscope: which bits are which number, and what it means.

    for field in dissect(block, "Q4_0"):
        print(field)

    d           bytes 0-1           13312          0.25  scale of the whole block
    codes[0]    byte 2 bits 0-3         9          0.25  weight 0: d * (code - 8)
    codes[1]    byte 3 bits 0-3         0            -2  weight 1: d * (code - 8)
    ...
    codes[16]   byte 2 bits 4-7         8             0  weight 16: d * (code - 8)

A number of a block may lie in pieces: the fifth bit of a Q5_0 code is in another byte than the four others, and so are
the two upper bits of half of the scales in Q4_K. So a field has a list of `Bits`, the lowest first, and `raw` is the
unsigned integer that they make together. `value` is what it stands for: a scale as a number, a code as its weight.

TQ1_0 is the exception, as its codes are no bits at all but digits in base 3, five of which share a byte (their `Bits`
are that whole byte).

The formulas, with the names of ggml's source; s is the sub-block of the weight:

    Q4_0, Q5_0      d * (code - 8), d * (code - 16)            Q4_1, Q5_1      d * code + m
    Q8_0            d * code                                   MXFP4           2**(e - 127) * number(code)
    Q3_K, Q6_K      d * scales[s] * (code - 4), (code - 32)    Q2_K, Q4_K, Q5_K    d * scales[s] * code - dmin * mins[s]
    TQ1_0, TQ2_0    d * (code - 1)

Source: the structs in ggml/src/ggml-common.h, dequantize_row_* in ggml/src/ggml-quants.c.
"""

from dataclasses import dataclass

import numpy as np

from qlearn.export.tensor_types import TENSOR_TYPES, decode
from qlearn.formats.gguf_blocks import BLOCK_TYPES, unpack


@dataclass(frozen=True)
class Bits:
    """Bits low ... low + count - 1 of a byte of the block."""

    byte: int
    low: int
    count: int


@dataclass(frozen=True)
class Field:
    """One number of a block.

    name: such as "d", "scales[3]", "codes[17]".  kind: "scale", "minimum", "code", or a part of a float.
    bits: where it lies, the lowest bits first.  raw: the unsigned integer there.  value: the number it stands for.
    meaning: in words.
    """

    name: str
    kind: str
    bits: tuple[Bits, ...]
    raw: int
    value: float
    meaning: str

    @property
    def bytes(self):
        """The bytes of the block that it has a part in, in order."""
        return tuple(sorted({piece.byte for piece in self.bits}))

    def __str__(self):
        return f"{self.name:<12}{_where(self.bits):<34}{self.raw:>8}  {self.value:>12.6g}  {self.meaning}"


def dissect(block, name):
    """All numbers of a block: list of Field, the scales first, then a code for each weight.

    block: the bytes of one block: bytes, or uint8 (bytes of the block,).
    name: of its type: any of `gguf_blocks.BLOCK_TYPES`, or F32, F16, BF16.
    Raises ValueError for another type, and another number of bytes.

    >>> from qlearn.formats.gguf_blocks import quantize
    >>> fields = dissect(quantize([0.25, -2.0] + [0.0] * 30), "Q4_0")
    >>> fields[2]
    Field(name='codes[1]', kind='code', bits=(Bits(byte=3, low=0, count=4),), raw=0, value=-2.0,
          meaning='weight 1: d * (code - 8)')
    """
    block = np.frombuffer(bytes(block), np.uint8)
    places = _PLACES.get(name)
    if places is None:
        raise ValueError(f"a block of type {name!r} cannot be dissected; choose from {', '.join(_PLACES)}")
    if len(block) != TENSOR_TYPES[name].nbytes:
        raise ValueError(f"a {name} block has {TENSOR_TYPES[name].nbytes} bytes, not {len(block)}; give one block")
    if name not in BLOCK_TYPES:
        return _float(block, name)
    weights, fields = decode(block[None], name)[0].tolist(), unpack(block, name)
    return [_field(block, name, *place, weights, fields) for place in places()]


def _field(block, name, part, index, bits, weights, fields):
    """The field with its value and its meaning."""
    raw = int(fields["codes"][0, index]) if name == "TQ1_0" and part == "codes" else _raw(block, bits)
    if part == "codes":
        s = index // (TENSOR_TYPES[name].weights // fields["scales"].shape[1]) if "scales" in fields else ""
        meaning = f"weight {index}: {_FORMULA[name].format(s=s)}"
        return Field(f"codes[{index}]", "code", bits, raw, weights[index], meaning)
    if part in ("scales", "mins"):
        return _sub_scale(part, index, bits, raw, fields, TENSOR_TYPES[name].weights)
    value = 2.0 ** (raw - 127) if part == "e" else float(fields[part][0])
    return Field(part, "minimum" if part in ("m", "dmin") else "scale", bits, raw, value, _WHOLE[part])


def _sub_scale(part, index, bits, raw, fields, weights):
    """An integer that scales a sub-block, or is its minimum."""
    value, size = int(fields[part][0, index]), weights // fields[part].shape[1]
    d = float(fields["d" if part == "scales" else "dmin"][0])
    what, name = ("scale", "d") if part == "scales" else ("minimum", "dmin")
    kept = ", stored plus 32" if raw - 32 == value else ""
    meaning = f"{what} of weights {index * size}-{(index + 1) * size - 1}: {name} * {value} = {d * value:.6g}{kept}"
    return Field(f"{part}[{index}]", what, bits, raw, value, meaning)


def _float(block, name):
    """The parts of a floating-point number."""
    mantissa, exponent, bias = {"F32": (23, 8, 127), "F16": (10, 5, 15), "BF16": (7, 8, 127)}[name]
    number, value = int.from_bytes(block.tobytes(), "little"), float(decode(block[None], name)[0, 0])
    raw = number & (2**mantissa - 1), number >> mantissa & (2**exponent - 1), number >> (mantissa + exponent)
    power, significand = max(raw[1], 1) - bias, raw[0] / 2**mantissa + (raw[1] > 0)
    stored = f"the power, stored plus {bias}" if raw[1] else "0 stands for the power of the smallest numbers"
    return [
        Field("mantissa", "mantissa", _bits(0, mantissa), raw[0], significand, "times 2**power"),
        Field("exponent", "exponent", _bits(mantissa, exponent), raw[1], power, stored),
        Field("sign", "sign", _bits(mantissa + exponent, 1), raw[2], 1 - 2 * raw[2], f"in all {value:.9g}"),
    ]


def _raw(block, bits):
    """The unsigned integer in some bits."""
    total, shift = 0, 0
    for piece in bits:
        total |= (int(block[piece.byte]) >> piece.low & (2**piece.count - 1)) << shift
        shift += piece.count
    return total


def _bits(first, count):
    """`count` bits from bit `first` of the block on, cut at the borders of bytes."""
    pieces, end = [], first + count
    while first < end:
        stop = min(end, (first // 8 + 1) * 8)
        pieces.append(Bits(first // 8, first % 8, stop - first))
        first = stop
    return tuple(pieces)


def _where(bits):
    """The place of a number in words."""
    if all(piece.count == 8 for piece in bits):
        first, last = bits[0].byte, bits[-1].byte
        return f"byte {first}" if first == last else f"bytes {first}-{last}"
    last = [f"s {piece.low}-{piece.low + piece.count - 1}" if piece.count > 1 else f" {piece.low}" for piece in bits]
    return ", ".join(f"byte {piece.byte} bit{end}" for piece, end in zip(bits, last, strict=True))


# ---- where the numbers lie: for each type a function that gives (part, index, bits) ----------------------------------


def _half(part, byte):
    """A float16."""
    return part, None, _bits(8 * byte, 16)


def _stacked(j, first, bits, run):
    """The bits of weight j in a stack: `run` bytes hold 8 / bits weights each, weight j and j + run sharing one."""
    each = run * (8 // bits)
    return Bits(first + j // each * run + j % run, j % each // run * bits, bits)


def _codes(count, *stacks):
    """The codes of a type that has its bits in stacks (first byte, bits, bytes of a run), the lowest bits first."""
    return [("codes", j, tuple(_stacked(j, *stack) for stack in stacks)) for j in range(count)]


def _fifth(first):
    """The fifth bits of 32 weights: those of 8 neighbours in a byte."""
    return [Bits(first + j // 8, j % 8, 1) for j in range(32)]


def _with_fifth(scales, qh, qs):
    codes = _codes(32, (qs, 4, 16))
    return scales + [(part, j, (*bits, fifth)) for (part, j, bits), fifth in zip(codes, _fifth(qh), strict=True)]


def _six_bits(first):
    """The 8 scales and 8 minimums of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    for part, byte, low in (("scales", first, 0), ("mins", first + 4, 4)):
        for s in range(8):
            lower = Bits(first + 8 + s - 4, low, 4)
            yield part, s, (Bits(byte + s, 0, 6),) if s < 4 else (lower, Bits(byte + s - 4, 6, 2))


def _q2_k():
    nibbles = [(part, s, (Bits(s, low, 4),)) for part, low in (("scales", 0), ("mins", 4)) for s in range(16)]
    return [_half("d", 80), _half("dmin", 82), *nibbles, *_codes(256, (16, 2, 32))]


def _q3_k():
    scales = [
        ("scales", s, (Bits(96 + s % 8, s // 8 * 4, 4), Bits(104 + s % 4, s // 4 * 2, 2))) for s in range(16)
    ]  # fmt: skip
    return [_half("d", 108), *scales, *_codes(256, (32, 2, 32), (0, 1, 32))]


def _q4_k():
    return [_half("d", 0), _half("dmin", 2), *_six_bits(4), *_codes(256, (16, 4, 32))]


def _q5_k():
    return [_half("d", 0), _half("dmin", 2), *_six_bits(4), *_codes(256, (48, 4, 32), (16, 1, 32))]


def _q6_k():
    scales = [("scales", s, _bits(8 * (192 + s), 8)) for s in range(16)]
    return [_half("d", 208), *scales, *_codes(256, (0, 4, 64), (128, 2, 32))]


def _tq1_0():
    runs = [*(j % 32 for j in range(160)), *(32 + j % 16 for j in range(80)), *(48 + j % 4 for j in range(16))]
    return [_half("d", 52), *(("codes", j, (Bits(byte, 0, 8),)) for j, byte in enumerate(runs))]


_PLACES = {
    "Q4_0": lambda: [_half("d", 0), *_codes(32, (2, 4, 16))],
    "Q4_1": lambda: [_half("d", 0), _half("m", 2), *_codes(32, (4, 4, 16))],
    "Q5_0": lambda: _with_fifth([_half("d", 0)], 2, 6),
    "Q5_1": lambda: _with_fifth([_half("d", 0), _half("m", 2)], 4, 8),
    "Q8_0": lambda: [_half("d", 0), *_codes(32, (2, 8, 32))],
    "MXFP4": lambda: [("e", None, _bits(0, 8)), *_codes(32, (1, 4, 16))],
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": lambda: [_half("d", 64), *_codes(256, (0, 2, 32))],
    "F32": list, "F16": list, "BF16": list,
}  # fmt: skip

_MINIMUM = "d * scales[{s}] * code - dmin * mins[{s}]"
_FORMULA = {
    "Q4_0": "d * (code - 8)", "Q5_0": "d * (code - 16)", "Q4_1": "d * code + m", "Q5_1": "d * code + m",
    "Q8_0": "d * code", "MXFP4": "2**(e - 127) * number(code)", "TQ1_0": "d * (code - 1)", "TQ2_0": "d * (code - 1)",
    "Q2_K": _MINIMUM, "Q4_K": _MINIMUM, "Q5_K": _MINIMUM,
    "Q3_K": "d * scales[{s}] * (code - 4)", "Q6_K": "d * scales[{s}] * (code - 32)",
}  # fmt: skip
_WHOLE = {
    "d": "scale of the whole block", "dmin": "scale of the minimums", "m": "the smallest weight",
    "e": "scale of the whole block, a power of two: 2**(e - 127)",
}  # fmt: skip
