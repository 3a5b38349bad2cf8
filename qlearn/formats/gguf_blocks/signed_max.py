"""The rule of Q4_0 and Q5_0, for any number of bits: the largest weight, with its sign, is sent to the far end.

    d = m / -half                                      half = 2**(bits - 1); m: the weight with the largest magnitude
    code = min(2 * half - 1, trunc(w / d + half + 0.5))
    w' = (code - half) * d

Half of the steps lie below zero and one fewer above, so m, whatever its sign, goes to the end that has one more: it
comes back as -half * d, exact up to the float16 of d. A weight near its negative has to do with a step less and is cut
off. Dividing uses d in float32; only what is stored is float16.

NumPy arrays and torch tensors alike, because `qlearn.methods.signed_absmax` trains under this rule on a GPU.

Source: quantize_row_q4_0_ref in ggml/src/ggml-quants.c.
"""

import numpy as np

from qlearn.formats.arrays import is_tensor


def signed_max(groups, bits):
    """The rule of Q4_0 for any number of bits.

    groups: float32 (..., n); the n weights of the last axis share a scale.
    Returns (codes uint8 (..., n) in 0 ... 2**bits - 1, d float16 (..., 1)), arrays or tensors like the input.

    >>> codes, d = signed_max(np.float32([[0.1, -0.8, 0.75, 0.0]]), bits=3)
    >>> codes.tolist(), d.tolist()                       # the largest, -0.8, is 4 steps below zero
    ([[5, 0, 7, 4]], [[0.199951171875]])
    """
    half = 2 ** (bits - 1)
    first = abs(groups).argmax(-1)[..., None]
    largest = groups.gather(-1, first) if is_tensor(groups) else np.take_along_axis(groups, first, -1)
    d = (largest + 0.0) / -half  # of a block of negative zeros ggml keeps +0
    usable = abs(d) >= np.finfo(np.float32).tiny  # the reciprocal of a smaller one may overflow
    inverse = usable / (d + ~usable)
    codes = (groups * inverse + (half + 0.5)).clip(max=2 * half - 1)
    return _as_uint8(codes), _as_float16(d)


def signed_max_values(codes, d, bits):
    """The inverse of `signed_max`: float32 (..., n)."""
    half = 2 ** (bits - 1)
    if is_tensor(codes):
        return (codes.float() - half) * d.float()
    return (codes.astype(np.float32) - np.float32(half)) * d.astype(np.float32)


def check_scales(d):
    """Raise ValueError when a scale has become infinite in float16.

    It is no part of `signed_max`, because looking at a value makes a GPU wait, which a training does at every step.
    """
    if not _isfinite(d).all():
        raise ValueError("a scale does not fit float16, whose largest number is 65504; scale the weights down first")


def _isfinite(x):
    return x.isfinite() if is_tensor(x) else np.isfinite(x)


def _as_uint8(x):
    return x.byte() if is_tensor(x) else x.astype(np.uint8)  # the cast cuts off what follows the point


def _as_float16(d):
    with np.errstate(over="ignore"):  # check_scales tells
        return d.half() if is_tensor(d) else d.astype(np.float16)
