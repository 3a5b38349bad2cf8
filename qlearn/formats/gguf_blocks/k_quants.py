"""K-quants: super-blocks of 256 weights whose sub-blocks' scales are small integers themselves.

A scale in float16 for each 16 weights would cost a bit a weight. But the sub-blocks of a row resemble each other, so
their scales are quantized in turn: each is a small integer times one float16 for all 256 weights.

    Q2_K  84 bytes   2.625 bits    16 sub-blocks of 16    w' = d * scale * code - dmin * min        4-bit scale, min
    Q3_K  110 bytes  3.4375 bits   16 sub-blocks of 16    w' = d * scale * (code - 4)               6-bit scale
    Q4_K  144 bytes  4.5 bits       8 sub-blocks of 32    w' = d * scale * code - dmin * min        6-bit scale, min
    Q5_K  176 bytes  5.5 bits       8 sub-blocks of 32    w' = d * scale * code - dmin * min        6-bit scale, min
    Q6_K  210 bytes  6.5625 bits   16 sub-blocks of 16    w' = d * scale * (code - 32)              8-bit scale

The scales and mins are found sub-block by sub-block (`search.py`), then rounded to their integers, and then the codes
are rounded once more for the scales that were really stored. A scale or min is at least zero in the types that have a
min; in Q3_K and Q6_K it has a sign, and the sub-block's largest weight gets the code at the far end, as in Q4_0.

Two things look odd and have to be so, since the bytes are to be ggml's: a sub-block whose stored scale is 0 keeps the
codes of its search, which no reader ever sees; and a Q6_K super-block of zeros is 210 zero bytes, although code 32
means zero.

With an importance matrix the errors are weighted by  imatrix[j] * sqrt(s + x * x)  (s: twice the mean of x * x in the
super-block; once in Q2_K), in Q6_K by imatrix[j] alone, and the scales are rounded to their integers with weights too.

Source: quantize_row_q2_K_ref ... quantize_row_q6_K_impl in ggml/src/ggml-quants.c.
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
from qlearn.formats.gguf_blocks.search import TINY, error_weights, nearest, running_sum

WEIGHTS = 256
_D = Field("d", 2, "the scale of the scales, float16")
_DMIN = Field("dmin", 2, "the scale of the mins, float16")
_SCALES_AND_MINS = Field("scales", 12, "8 scales and 8 mins of 6 bits")


class _KQuant(BlockType):
    """What they all share. n: weights of a sub-block; the largest code and scale are set by the subclass."""

    weights = WEIGHTS
    times = 2  # the mean square of a super-block, in the weights of errors

    def __init__(self, name, n, layout):
        self.name, self.n, self.layout = name, n, layout

    def error_weights(self, x, importance):
        """float32 (rows, blocks, 256) and (blocks, 256) -> float32 (sub-blocks, n)."""
        power = running_sum(np.moveaxis(x * x, -1, 0))
        mean = self.times * power / np.float32(WEIGHTS)
        return error_weights(x, importance, mean[..., None]).reshape(-1, self.n)

    def per_block(self, numbers):
        """(sub-blocks,) -> (blocks, sub-blocks of a block)."""
        return numbers.reshape(-1, WEIGHTS // self.n)


class _WithMin(_KQuant):
    """Q2_K, Q4_K, Q5_K.

    bits: of a code.  scale_bits: of a sub-block's scale and min.  attempts: which scales the search tries.
    """

    def __init__(self, name, n, layout, bits, scale_bits, attempts):
        super().__init__(name, n, layout)
        self.bits, self.largest_scale, self.attempts = bits, 2**scale_bits - 1, attempts

    def search(self, x, importance, fit):
        groups, largest_code = x.reshape(-1, self.n), 2**self.bits - 1
        if importance is None:
            w = self._plain_weights(groups)
            codes, scale, minimum = fit.fit_scale_min(groups, w, largest_code, *self.attempts)
            d, scales = _share_largest(self.per_block(scale), self.largest_scale)
            dmin, mins = _share_largest(self.per_block(minimum), self.largest_scale)
        else:
            w = self.error_weights(x, importance)
            codes, scale, minimum = fit.fit_scale_min(groups, w, largest_code, -0.9, 0.05, 36)
            total = self.per_block(running_sum(w.T))
            scales, d = fit.fit_positive(self.per_block(scale), total, self.largest_scale)
            mins, dmin = fit.fit_positive(self.per_block(minimum), total, self.largest_scale)
        fields = {"d": to_float16(d), "dmin": to_float16(dmin), "scales": scales, "mins": mins}
        step, offset = self._steps(fields)
        codes = fit.round_again(groups, codes, step.ravel(), offset.ravel(), 0, largest_code)
        return {**fields, "codes": codes.reshape(-1, WEIGHTS)}

    def values(self, fields):
        step, offset = self._steps(fields)
        codes = fields["codes"].reshape(len(step), -1, self.n)
        return (step[..., None] * codes - offset[..., None]).reshape(-1, WEIGHTS)

    def _plain_weights(self, groups):
        """Without an importance matrix: large weights matter more."""
        if self.n == 16:
            return abs(groups)
        mean = running_sum((groups * groups).T) / np.float32(self.n)
        return np.sqrt(mean)[:, None] + abs(groups)

    def _steps(self, fields):
        """d * scale and dmin * min of each sub-block, float32 (blocks, sub-blocks)."""
        d, dmin = fields["d"].astype(np.float32)[:, None], fields["dmin"].astype(np.float32)[:, None]
        return d * fields["scales"], dmin * fields["mins"]


class _Q2K(_WithMin):
    """Two bits: codes stacked by four, a scale and a min share a byte."""

    times = 1

    def pack(self, fields):
        return self.join(
            scales=fields["scales"] | fields["mins"] << 4,
            qs=stack(fields["codes"].reshape(-1, 2, 4, 32), 2).reshape(-1, 64),
            d=float16_bytes(fields["d"]),
            dmin=float16_bytes(fields["dmin"]),
        )

    def unpack(self, blocks):
        parts = self.split(blocks)
        return {
            "d": float16_of(parts["d"]),
            "dmin": float16_of(parts["dmin"]),
            "scales": parts["scales"] & 15,
            "mins": parts["scales"] >> 4,
            "codes": unstack(parts["qs"].reshape(-1, 2, 32), 2).reshape(-1, WEIGHTS),
        }


class _Q45K(_WithMin):
    """Four bits, and five: the low four of each code stacked by two, the fifth by eight."""

    def pack(self, fields):
        codes = fields["codes"]
        parts = {"d": float16_bytes(fields["d"]), "dmin": float16_bytes(fields["dmin"])}
        parts["scales"] = pack_six(fields["scales"], fields["mins"])
        parts["qs"] = stack((codes & 15).reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
        if self.bits == 5:
            parts["qh"] = stack((codes >> 4).reshape(-1, 8, 32), 1)
        return self.join(**parts)

    def unpack(self, blocks):
        parts = self.split(blocks)
        scales, mins = unpack_six(parts["scales"])
        codes = unstack(parts["qs"].reshape(-1, 4, 32), 4).reshape(-1, WEIGHTS)
        if self.bits == 5:
            codes = codes | unstack(parts["qh"], 1).reshape(-1, WEIGHTS) << 4
        d, dmin = float16_of(parts["d"]), float16_of(parts["dmin"])
        return {"d": d, "dmin": dmin, "scales": scales, "mins": mins, "codes": codes}


class _Signed(_KQuant):
    """Q3_K and Q6_K. half: half the number of codes.  half_scale: half the number of scales."""

    def __init__(self, name, layout, half, half_scale):
        super().__init__(name, 16, layout)
        self.half, self.half_scale = half, half_scale

    def values(self, fields):
        step = self._steps(fields)
        codes = fields["codes"].reshape(len(step), -1, self.n).astype(np.float32) - np.float32(self.half)
        return (step[..., None] * codes).reshape(-1, WEIGHTS)

    def _fields(self, fit, groups, codes, d, scales):
        """Round the codes again for d * scales."""
        fields = {"d": to_float16(d), "scales": scales}
        step = self._steps(fields).ravel()
        codes = fit.round_again(groups, codes, step, np.zeros_like(step), -self.half, self.half - 1)
        return {**fields, "codes": codes.reshape(-1, WEIGHTS)}

    def _steps(self, fields):
        return fields["d"].astype(np.float32)[:, None] * fields["scales"]


class _Q3K(_Signed):
    """Three bits: the low two stacked by four, the third by eight; scales of six bits."""

    def search(self, x, importance, fit):
        groups = x.reshape(-1, self.n)
        if importance is None:
            codes, scale = fit.fit_stepwise(groups, self.half)
            d, scales = _share_signed(self.per_block(scale), self.half_scale)
            scales[d == 0] = -self.half_scale  # ggml leaves the bytes of these scales 0
        else:
            w = self.error_weights(x, importance)
            codes, scale = fit.fit_scale(groups, w, self.half)
            shifted, d = fit.fit_scale(self.per_block(scale), self.per_block(running_sum(w.T)), self.half_scale)
            scales = shifted.astype(np.int8) - np.int8(self.half_scale)
        return self._fields(fit, groups, codes, d, scales)

    def pack(self, fields):
        codes, scales = fields["codes"], (fields["scales"] + 32).astype(np.uint8)
        low, high = stack((scales & 15).reshape(-1, 2, 8), 4), stack((scales >> 4).reshape(-1, 4, 4), 2)
        return self.join(
            hmask=stack((codes >> 2).reshape(-1, 8, 32), 1),
            qs=stack((codes & 3).reshape(-1, 2, 4, 32), 2).reshape(-1, 64),
            scales=np.concatenate([low, high], -1),
            d=float16_bytes(fields["d"]),
        )

    def unpack(self, blocks):
        parts = self.split(blocks)
        low = unstack(parts["scales"][:, :8], 4).reshape(-1, 16)
        high = unstack(parts["scales"][:, 8:], 2).reshape(-1, 16)
        codes = unstack(parts["qs"].reshape(-1, 2, 32), 2).reshape(-1, WEIGHTS)
        codes = codes | unstack(parts["hmask"], 1).reshape(-1, WEIGHTS) << 2
        return {"d": float16_of(parts["d"]), "scales": (low | high << 4).astype(np.int8) - np.int8(32), "codes": codes}


class _Q6K(_Signed):
    """Six bits: the low four stacked by two, the high two by four; scales are signed bytes."""

    def search(self, x, importance, fit):
        groups = x.reshape(-1, self.n)
        w = groups * groups if importance is None else np.broadcast_to(importance, x.shape).reshape(-1, self.n)
        codes, scale = fit.fit_scale(groups, w, self.half)
        scale = self.per_block(scale)
        d, scales = _share_signed(scale, self.half_scale)
        fields = self._fields(fit, groups, codes, d, scales)
        zero = abs(scale).max(-1) < TINY
        for numbers in fields.values():
            numbers[zero] = 0
        return fields

    def pack(self, fields):
        codes = fields["codes"].reshape(-1, 2, 4, 32)
        return self.join(
            ql=stack((codes & 15).reshape(-1, 2, 2, 2, 32).reshape(-1, 2, 2, 64), 4).reshape(-1, 128),
            qh=stack(codes >> 4, 2).reshape(-1, 64),
            scales=fields["scales"].view(np.uint8),
            d=float16_bytes(fields["d"]),
        )

    def unpack(self, blocks):
        parts = self.split(blocks)
        low = unstack(parts["ql"].reshape(-1, 2, 64), 4).reshape(-1, WEIGHTS)
        high = unstack(parts["qh"].reshape(-1, 2, 32), 2).reshape(-1, WEIGHTS)
        scales = np.ascontiguousarray(parts["scales"]).view(np.int8)
        return {"d": float16_of(parts["d"]), "scales": scales, "codes": low | high << 4}


def pack_six(scales, mins):
    """Twelve bytes from 8 scales and 8 mins of 6 bits: uint8 (m, 8) twice -> (m, 12).

    The first four scales and mins fill the low 6 bits of bytes 0-3 and 4-7. The other four are cut in two: their low 4
    bits share bytes 8-11, and their high 2 bits fill what is left of bytes 0-3 (scales) and 4-7 (mins).
    """
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=-1)


def unpack_six(twelve):
    """The inverse of `pack_six`: uint8 (m, 12) -> (scales, mins), uint8 (m, 8) each.

    >>> scales, mins = np.arange(8, dtype=np.uint8)[None] * 9, np.arange(8, dtype=np.uint8)[None] + 56
    >>> [numbers.tolist() for numbers in unpack_six(pack_six(scales, mins))]
    [[[0, 9, 18, 27, 36, 45, 54, 63]], [[56, 57, 58, 59, 60, 61, 62, 63]]]
    """
    first, second, third = twelve[:, :4], twelve[:, 4:8], twelve[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, mins


def _share_largest(numbers, largest):
    """Numbers of at least zero as integers 0 ... largest times one scale: float32 (m, k) -> (d (m,), uint8 (m, k))."""
    high = numbers.max(-1).clip(min=0)
    inverse = np.where(high > 0, np.float32(largest) / np.where(high > 0, high, np.float32(1)), np.float32(0))
    integers = nearest(inverse[:, None] * numbers).astype(np.uint8).clip(max=largest)
    return high / np.float32(largest), integers


def _share_signed(numbers, half):
    """Numbers of either sign as integers -half ... half - 1 times one scale: float32 (m, k) -> (d (m,), int8 (m, k)).

    The one with the largest magnitude becomes -half, whatever its sign.
    """
    largest = np.take_along_axis(numbers, abs(numbers).argmax(-1)[:, None], -1)[:, 0]
    usable = largest != 0
    inverse = -np.float32(half) / np.where(usable, largest, np.float32(1))
    integers = nearest(inverse[:, None] * numbers).clip(-half, half - 1).astype(np.int8)
    return np.where(usable, 1 / inverse, np.float32(0)), np.where(usable[:, None], integers, np.int8(0))


Q2_K = _Q2K(
    "Q2_K",
    16,
    (
        Field("scales", 16, "a scale of 4 bits in the low half of each byte, a min in its high half"),
        Field("qs", 64, "codes of 2 bits, stacked by four"),
        _D,
        _DMIN,
    ),
    bits=2,
    scale_bits=4,
    attempts=(-0.5, 0.1, 15, True),
)
Q3_K = _Q3K(
    "Q3_K",
    (
        Field("hmask", 32, "the third bit of each code, stacked by eight"),
        Field("qs", 64, "the low 2 bits of the codes, stacked by four"),
        Field("scales", 12, "16 scales of 6 bits, 32 added: their low 4 bits, then their high 2"),
        _D,
    ),
    half=4,
    half_scale=32,
)
_LOW_FOUR = Field("qs", 128, "codes of 4 bits, stacked by two")
Q4_K = _Q45K("Q4_K", 32, (_D, _DMIN, _SCALES_AND_MINS, _LOW_FOUR), 4, 6, (-1.0, 0.1, 20))
Q5_K = _Q45K(
    "Q5_K",
    32,
    (
        _D,
        _DMIN,
        _SCALES_AND_MINS,
        Field("qh", 32, "the fifth bit of each code, stacked by eight"),
        Field("qs", 128, "the low 4 bits of the codes, stacked by two"),
    ),
    bits=5,
    scale_bits=6,
    attempts=(-0.5, 0.1, 15),
)
Q6_K = _Q6K(
    "Q6_K",
    (
        Field("ql", 128, "the low 4 bits of the codes, stacked by two"),
        Field("qh", 64, "their high 2 bits, stacked by four"),
        Field("scales", 16, "a signed byte for the scale of each sub-block"),
        Field("d", 2, "the scale of the scales, float16; it comes last"),
    ),
    half=32,
    half_scale=128,
)
