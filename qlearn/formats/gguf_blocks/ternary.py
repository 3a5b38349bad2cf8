"""Blocks of 256 trits, the numbers -1, 0, 1, with one scale: TQ1_0 and TQ2_0.

    TQ2_0  66 bytes  2.0625 bits     codes of 2 bits, stacked by four; d
    TQ1_0  54 bytes  1.6875 bits     five trits in most bytes, four in the last four; d

    d = max|w|        code = round(w / d) + 1        w' = d * (code - 1)

They are made for networks that are ternary already: then d is the network's own scale, and nothing is lost. Any other
weight below half of the largest becomes 0, which destroys a model.

Five trits fit a byte because 3**5 = 243 <= 256. TQ1_0 stores the number t0 t1 t2 t3 t4 in base 3 as a fraction of 256:
byte = ceil(256 * number / 243). Then multiplying by 3 and taking what carries over into the ninth bit gives t0, the
next multiplication t1, and so on: five trits without a division.

Source: quantize_row_tq1_0_ref, quantize_row_tq2_0_ref in ggml/src/ggml-quants.c.
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
from qlearn.formats.gguf_blocks.simple import half_away, reciprocal

WEIGHTS = 256
_D = Field("d", 2, "the scale, float16")
_RUNS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # weights from, to; trits in a byte


class _Ternary(BlockType):
    weights, uses_importance = WEIGHTS, False

    def search(self, x, importance, fit):
        groups = x.reshape(-1, WEIGHTS)
        d = abs(groups).max(-1)
        codes = half_away(groups * reciprocal(d)[:, None]) + 1
        return {"d": to_float16(d), "codes": codes.astype(np.uint8)}

    def values(self, fields):
        return (fields["codes"].astype(np.float32) - 1) * fields["d"].astype(np.float32)[:, None]


class _TQ2(_Ternary):
    name = "TQ2_0"
    layout = (Field("qs", 64, "a code of 2 bits for each weight, stacked by four"), _D)

    def pack(self, fields):
        stacked = stack(fields["codes"].reshape(-1, 2, 4, 32), 2)
        return self.join(qs=stacked.reshape(-1, 64), d=float16_bytes(fields["d"]))

    def unpack(self, blocks):
        parts = self.split(blocks)
        codes = unstack(parts["qs"].reshape(-1, 2, 32), 2).reshape(-1, WEIGHTS)
        return {"d": float16_of(parts["d"]), "codes": codes}


class _TQ1(_Ternary):
    name = "TQ1_0"
    layout = (
        Field("qs", 48, "five trits a byte, the first one the highest digit: weights 0-159, then 160-239"),
        Field("qh", 4, "four trits a byte: weights 240-255"),
        _D,
    )

    def pack(self, fields):
        first, second, last = (
            join_trits(fields["codes"][:, start:stop].reshape(-1, trits, (stop - start) // trits))
            for start, stop, trits in _RUNS
        )
        return self.join(qs=np.concatenate([first, second], -1), qh=last, d=float16_bytes(fields["d"]))

    def unpack(self, blocks):
        parts = self.split(blocks)
        runs = (parts["qs"][:, :32], 5), (parts["qs"][:, 32:], 5), (parts["qh"], 4)
        codes = [split_trits(stored, trits).reshape(len(blocks), -1) for stored, trits in runs]
        return {"d": float16_of(parts["d"]), "codes": np.concatenate(codes, -1)}


def join_trits(digits):
    """Four or five base-3 digits a byte, the first row the highest: uint8 (..., 4 or 5, n) -> (..., n).

    >>> join_trits(np.uint8([[2], [0], [0], [0], [1]])).tolist()       # 2 * 81 + 1 = 163; 256 * 163 / 243, rounded up
    [172]
    """
    number = np.zeros((*digits.shape[:-2], digits.shape[-1]), np.uint16)
    for place in range(5):
        number = number * 3 + (digits[..., place, :] if place < digits.shape[-2] else 0)
    return ((number * 256 + 242) // 243).astype(np.uint8)


def split_trits(stored, trits):
    """The inverse of `join_trits`: uint8 (..., n) -> (..., trits, n).

    >>> split_trits(np.uint8([172]), 5).ravel().tolist()
    [2, 0, 0, 0, 1]
    """
    rest, digits = stored.astype(np.uint16), []
    for _ in range(trits):
        rest = rest * 3
        digits.append(rest >> 8)
        rest = rest & 255
    return np.stack(digits, -2).astype(np.uint8)


TQ1_0, TQ2_0 = _TQ1(), _TQ2()
