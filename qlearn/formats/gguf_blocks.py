"""The blocks of GGUF files, byte for byte as llama.cpp writes and reads them.

A GGUF tensor is a sequence of blocks. A block holds a fixed number of consecutive weights of a row together with their
scale, in a fixed number of bytes, so that a reader needs nothing but the name of the block type.

**Q4_0**, 32 weights in 18 bytes, 4.5 bits per weight:

    bytes 0-1     d, the scale, float16
    bytes 2-17    16 bytes of 4-bit codes: weight j in the low half of byte j, weight j + 16 in its high half

    d = m / -8            m: the weight with the largest magnitude, WITH its sign
    code = min(15, trunc(w / d + 8.5))
    w' = (code - 8) * d

Eight steps lie below zero and only seven above, so the largest weight, whatever its sign, is sent to the end with
eight: it comes back as -8 * d, exact up to the float16 of d. A weight near its negative has to do with seven
steps and is cut off. Dividing uses d in float32; only what is stored is float16.

The same rule with another number of steps is used by `qlearn.methods.signed_absmax` for 2 to 8 bits.

Source: quantize_row_q4_0_ref and dequantize_row_q4_0 in ggml/src/ggml-quants.c.
"""

import numpy as np

from qlearn.formats.arrays import is_tensor, native

Q4_0_WEIGHTS, Q4_0_BYTES = 32, 18


def quantize(x, block_type="Q4_0"):
    """Encode the rows of an array.

    x: real numbers (..., n), n a multiple of the block's weights; list, NumPy array or torch tensor.
    Returns uint8 (..., bytes of a row).
    Raises ValueError for an unknown block type, a row that does not divide into blocks, numbers that are not finite,
    and a scale that float16 cannot hold.

    >>> row = np.arange(-16, 16) / 4
    >>> block = quantize(row)
    >>> block.shape, block[:2].view(np.float16), block[2:6].tolist()     # codes 0, 1, 1, 2 and 8, 9, 9, 10
    ((18,), array([0.5], dtype=float16), [128, 145, 145, 162])
    """
    _check_type(block_type)
    x, restore = native(x)
    groups = _groups(_float32(x), Q4_0_WEIGHTS)
    codes, d = signed_max(groups, bits=4)
    check_scales(d)
    nibbles = codes[..., :16] | (codes[..., 16:] << 4)
    blocks = _join(_bytes_of(d), nibbles)
    return restore(blocks.reshape(*x.shape[:-1], -1))


def dequantize(blocks, block_type="Q4_0"):
    """Decode what `quantize` returns: uint8 (..., bytes of a row) -> float32 (..., weights of a row).

    Raises ValueError for an unknown block type, and for bytes that are not whole blocks.

    >>> dequantize(quantize([0.5] * 31 + [-1.0]))[[0, 31]].tolist()
    [0.5, -1.0]
    """
    _check_type(block_type)
    blocks, restore = native(blocks)
    if str(blocks.dtype) not in ("uint8", "torch.uint8") or blocks.shape[-1] % Q4_0_BYTES:
        raise ValueError(
            f"{blocks.dtype} of shape {tuple(blocks.shape)} holds no whole Q4_0 blocks; give uint8 rows of a multiple "
            f"of {Q4_0_BYTES} bytes"
        )
    grouped = blocks.reshape(*blocks.shape[:-1], -1, Q4_0_BYTES)
    d, nibbles = _float16_of(grouped[..., :2]), grouped[..., 2:]
    weights = signed_max_values(_join(nibbles & 15, nibbles >> 4), d, bits=4)
    return restore(weights.reshape(*blocks.shape[:-1], -1))


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
    d = largest / -half
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


def _groups(x, size):
    """(..., n) -> (..., n / size, size)."""
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % size:
        raise ValueError(
            f"rows of shape {tuple(x.shape)} do not divide into blocks of {size} weights; pad them, or leave the "
            "tensor unquantized"
        )
    return x.reshape(*x.shape[:-1], -1, size)


def _check_type(block_type):
    if block_type != "Q4_0":
        raise ValueError(f"block type {block_type!r} is unknown; choose Q4_0")


# ---- NumPy and torch differ in names only ----------------------------------------------------------------------------


def _float32(x):
    x = x.float() if is_tensor(x) else np.asarray(x, dtype=np.float32)
    broken = int((~_isfinite(x)).sum())
    if broken:
        raise ValueError(f"{broken} of the numbers are not finite; mend them first")
    return x


def _isfinite(x):
    return x.isfinite() if is_tensor(x) else np.isfinite(x)


def _as_uint8(x):
    return x.byte() if is_tensor(x) else x.astype(np.uint8)  # the cast cuts off what follows the point


def _as_float16(d):
    with np.errstate(over="ignore"):  # check_scales tells
        return d.half() if is_tensor(d) else d.astype(np.float16)


def _join(first, second):
    if is_tensor(first):
        import torch

        return torch.cat([first, second], -1)
    return np.concatenate([first, second], -1)


def _bytes_of(d):
    if is_tensor(d):
        import torch

        return d.contiguous().view(torch.uint8)
    return np.ascontiguousarray(d).view(np.uint8)


def _float16_of(two_bytes):
    if is_tensor(two_bytes):
        import torch

        return two_bytes.contiguous().view(torch.float16)
    return np.ascontiguousarray(two_bytes).view(np.float16)
