"""Blocks of 32 weights with one scale: Q4_0, Q5_0, Q8_0, and with a minimum as well, Q4_1 and Q5_1.

    Q4_0  18 bytes  4.5 bits    d, codes                w' = d * (code - 8)
    Q5_0  22 bytes  5.5 bits    d, codes                w' = d * (code - 16)
    Q8_0  34 bytes  8.5 bits    d, signed codes         w' = d * code
    Q4_1  20 bytes  5 bits      d, m, codes             w' = d * code + m
    Q5_1  24 bytes  6 bits      d, m, codes             w' = d * code + m

**Q4_0 and Q5_0** are the rule of `signed_max.py` at 4 and 5 bits. **Q8_0** is absmax: d = max|w| / 127, and the codes
are rounded half away from zero, as C's roundf does. **Q4_1 and Q5_1** stretch the codes from the smallest weight to the
largest: d = (max - min) / 15 or 31, m = min.

Dividing uses the float32 scale; what is stored is its float16. A fifth bit does not fit the nibbles: the 32 of them are
one 32-bit number, `qh`, the first weight's in its lowest bit.

With an importance matrix, the four narrow ones are searched for instead (`search.py`), an error of the weight x in
column j counting  imatrix[j] * sqrt(mean of x * x over the row + x * x).

Source: quantize_row_q4_0_ref, quantize_row_q4_0_impl and their neighbours in ggml/src/ggml-quants.c.
"""

import numpy as np

from qlearn.formats.gguf_blocks.layout import (
    BlockType,
    Field,
    float16_bytes,
    float16_of,
    stack,
    to_float16,
    unstack,
)
from qlearn.formats.gguf_blocks.search import error_weights, running_sum
from qlearn.formats.gguf_blocks.signed_max import signed_max_values

WEIGHTS = 32
_SCALE = Field("d", 2, "the scale, float16")
_MINIMUM = Field("m", 2, "the minimum, float16")
_HIGH = Field("qh", 4, "the fifth bit of each code, the first weight's in the lowest bit")
_NIBBLES = Field("qs", 16, "the low 4 bits of the codes: weight j in the low half of byte j, j + 16 in its high half")


class _Narrow(BlockType):
    """Codes of 4 or 5 bits."""

    weights = WEIGHTS

    def __init__(self, name, bits):
        self.name, self.bits = name, bits
        self.layout = (*self.scales, *((_HIGH,) if bits == 5 else ()), _NIBBLES)

    def pack(self, fields):
        codes = fields["codes"]
        parts = {name: float16_bytes(number) for name, number in fields.items() if name != "codes"}
        parts["qs"] = stack((codes & 15).reshape(-1, 2, 16), 4)
        if self.bits == 5:
            parts["qh"] = np.packbits(codes >> 4, axis=-1, bitorder="little")
        return self.join(**parts)

    def unpack(self, blocks):
        parts = self.split(blocks)
        codes = unstack(parts["qs"], 4).reshape(-1, WEIGHTS)
        if self.bits == 5:
            codes = codes | np.unpackbits(parts["qh"], axis=-1, bitorder="little") << 4
        return {**{field.name: float16_of(parts[field.name]) for field in self.scales}, "codes": codes}


class SignedMax(_Narrow):
    """Q4_0 and Q5_0."""

    scales = (_SCALE,)

    def search(self, x, importance, fit):
        if importance is None:
            codes, d = fit.signed_max(x.reshape(-1, WEIGHTS), self.bits)
            return {"d": to_float16(d)[:, 0], "codes": codes}
        codes, d = fit.fit_scale(x.reshape(-1, WEIGHTS), _error_weights(x, importance), 2 ** (self.bits - 1))
        return {"d": to_float16(d), "codes": codes}

    def values(self, fields):
        return signed_max_values(fields["codes"], fields["d"][:, None], self.bits)


class MinMax(_Narrow):
    """Q4_1 and Q5_1."""

    scales = (_SCALE, _MINIMUM)

    def search(self, x, importance, fit):
        groups, largest_code = x.reshape(-1, WEIGHTS), 2**self.bits - 1
        if importance is None:
            codes, d, m = fit.min_max(groups, largest_code)
        else:
            codes, d, below = fit.fit_scale_min(groups, _error_weights(x, importance), largest_code, -0.9, 0.05, 36)
            m = -below
        return {"d": to_float16(d), "m": to_float16(m), "codes": codes}

    def values(self, fields):
        d, m = fields["d"].astype(np.float32)[:, None], fields["m"].astype(np.float32)[:, None]
        return fields["codes"] * d + m


class Absmax8(BlockType):
    """Q8_0."""

    name, weights, uses_importance = "Q8_0", WEIGHTS, False
    layout = (_SCALE, Field("qs", 32, "the codes, one signed byte for each weight"))

    def search(self, x, importance, fit):
        codes, d = fit.absmax_8(x.reshape(-1, WEIGHTS))
        return {"d": to_float16(d), "codes": codes}

    def values(self, fields):
        return fields["codes"] * fields["d"].astype(np.float32)[:, None]

    def pack(self, fields):
        return self.join(d=float16_bytes(fields["d"]), qs=fields["codes"].view(np.uint8))

    def unpack(self, blocks):
        parts = self.split(blocks)
        return {"d": float16_of(parts["d"]), "codes": np.ascontiguousarray(parts["qs"]).view(np.int8)}


Q4_0, Q5_0 = SignedMax("Q4_0", 4), SignedMax("Q5_0", 5)
Q4_1, Q5_1 = MinMax("Q4_1", 4), MinMax("Q5_1", 5)
Q8_0 = Absmax8()


def _error_weights(x, importance):
    """See `search.error_weights`; the mean is that of a row. Returns float32 (rows * blocks, n)."""
    rows = x.reshape(len(x), -1)
    mean = running_sum((rows * rows).T) / np.float32(rows.shape[1])
    return error_weights(x, importance, mean[:, None, None]).reshape(-1, x.shape[-1])


def min_max(x, largest_code):
    """Codes stretched from the smallest weight to the largest: float32 (m, n) -> (codes uint8, d, m float32 (m,)).

    >>> codes, d, m = min_max(np.float32([[-1, 0, 2]]), 3)
    >>> codes.tolist(), d.tolist(), m.tolist()
    ([[0, 1, 3]], [1.0], [-1.0])
    """
    low = np.take_along_axis(x, x.argmin(-1)[:, None], -1)[:, 0]  # the first of equals: 0 and -0 are
    d = (x.max(-1) - low) / np.float32(largest_code)
    codes = (x - low[:, None]) * reciprocal(d)[:, None] + np.float32(0.5)
    return codes.clip(max=largest_code).astype(np.uint8), d, low


def absmax_8(x):
    """Q8_0's codes: float32 (m, n) -> (codes int8 (m, n) in -127 ... 127, d float32 (m,)).

    >>> codes, d = absmax_8(np.float32([[-127, 2.5, 0.49]]))
    >>> codes.tolist(), d.tolist()
    ([[-127, 3, 0]], [1.0])
    """
    d = abs(x).max(-1) / np.float32(127)
    return half_away(x * reciprocal(d)[:, None]).astype(np.int8), d


def half_away(x):
    """Round to the nearest integer, halves away from zero: C's roundf.

    >>> half_away(np.float32([0.5, -2.5, 0.49999997])).tolist()
    [1.0, -3.0, 0.0]
    """
    whole = np.trunc(x)
    return whole + np.where(abs(x - whole) >= 0.5, np.sign(x), np.float32(0))


def reciprocal(d):
    """1 / d in float32, and 0 where d is 0 or so small that its reciprocal might overflow."""
    usable = abs(d) >= np.finfo(np.float32).tiny
    return np.where(usable, 1 / np.where(usable, d, np.float32(1)), np.float32(0))
