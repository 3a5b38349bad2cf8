"""The blocks of GGUF files, byte for byte as llama.cpp writes and reads them.

A GGUF tensor is a sequence of blocks. A block holds a fixed number of consecutive weights of a row together with their
scale, in a fixed number of bytes, so that a reader needs nothing but the name of the block type.

    type     weights  bytes  bits per weight      type   weights  bytes  bits per weight
    Q4_0          32     18  4.5                  Q2_K       256     84  2.625
    Q4_1          32     20  5                    Q3_K       256    110  3.4375
    Q5_0          32     22  5.5                  Q4_K       256    144  4.5
    Q5_1          32     24  6                    Q5_K       256    176  5.5
    Q8_0          32     34  8.5                  Q6_K       256    210  6.5625
    MXFP4         32     17  4.25                 TQ1_0      256     54  1.6875
                                                  TQ2_0      256     66  2.0625

How it works. Encoding has two halves that have nothing to do with each other. First the numbers are found, the scales
and a code for each weight: that is a search, and most of what there is to understand (`search.py`; which search for
which type: `simple.py`, `k_quants.py`, `ternary.py`, `mxfp4.py`). Then the numbers are laid into bytes (`layout.py`).
`unpack` shows them:

    weights --search--> fields {"d", "scales", "codes" ...} --pack--> bytes --unpack--> fields --values--> weights

An **importance matrix** says for each column of a weight matrix how much an error there matters: the mean of the
squared inputs that this column is multiplied with. It changes what the search finds, never the layout, so a reader
does not know of it.

This is the readable version. `qlearn.kernels.cpu.gguf.quantize` gives the same bytes from compiled loops.
"""

import numpy as np

from qlearn.formats.arrays import to_numpy
from qlearn.formats.gguf_blocks import fits, k_quants, mxfp4, simple, ternary
from qlearn.formats.gguf_blocks.signed_max import check_scales, signed_max, signed_max_values

BLOCK_TYPES = {
    block_type.name: block_type
    for block_type in (
        simple.Q4_0, simple.Q4_1, simple.Q5_0, simple.Q5_1, simple.Q8_0,
        k_quants.Q2_K, k_quants.Q3_K, k_quants.Q4_K, k_quants.Q5_K, k_quants.Q6_K,
        ternary.TQ1_0, ternary.TQ2_0, mxfp4.MXFP4,
    )
}  # fmt: skip
AT_A_TIME = 1 << 18  # weights that are searched together: the intermediate arrays are some thirty times as large

__all__ = ["BLOCK_TYPES", "check_scales", "dequantize", "quantize", "signed_max", "signed_max_values", "unpack"]


def quantize(x, block_type="Q4_0", imatrix=None, fit=fits):
    """Encode the rows of an array.

    x: real numbers (..., n), n a multiple of the block's weights; list, NumPy array or torch tensor.
    imatrix: None, or the importance of each column, (n,), not negative; Q8_0, TQ1_0, TQ2_0 and MXFP4 ignore it.
    fit: the functions that search, by default the readable ones.
    Returns uint8 (..., bytes of a row).
    Raises ValueError for an unknown block type, a row that does not divide into blocks, numbers that are not finite, an
    imatrix that does not fit, and a scale that float16 cannot hold.

    >>> row = np.arange(-16, 16) / 4
    >>> block = quantize(row)
    >>> block.shape, block[:2].view(np.float16), block[2:6].tolist()     # codes 0, 1, 1, 2 and 8, 9, 9, 10
    ((18,), array([0.5], dtype=float16), [128, 145, 145, 162])
    """
    kind = _kind(block_type)
    x, restore = to_numpy(x)
    rows = _rows(x, kind)
    importance = None if imatrix is None or not kind.uses_importance else _importance(imatrix, rows, kind)
    if importance is None:  # then rows do not matter, and a long one need not be worked on in one piece
        rows = rows.reshape(-1, 1, kind.weights)
    blocks_a_row = rows.shape[1]
    at_a_time = max(1, AT_A_TIME // (blocks_a_row * kind.weights))
    blocks = np.empty((len(rows) * blocks_a_row, kind.nbytes), np.uint8)
    for start in range(0, len(rows), at_a_time):
        stop = start + at_a_time
        blocks[start * blocks_a_row : stop * blocks_a_row] = kind.pack(kind.search(rows[start:stop], importance, fit))
    return restore(blocks.reshape(*x.shape[:-1], x.shape[-1] // kind.weights * kind.nbytes))


def dequantize(blocks, block_type="Q4_0"):
    """Decode what `quantize` returns: uint8 (..., bytes of a row) -> float32 (..., weights of a row).

    Raises ValueError for an unknown block type, and for bytes that are not whole blocks.

    >>> dequantize(quantize([0.5] * 31 + [-1.0]))[[0, 31]].tolist()
    [0.5, -1.0]
    """
    kind = _kind(block_type)
    blocks, restore = to_numpy(blocks)
    whole = _whole_blocks(blocks, kind)
    values = np.empty((len(whole), kind.weights), np.float32)
    at_a_time = AT_A_TIME // kind.weights
    for start in range(0, len(whole), at_a_time):
        values[start : start + at_a_time] = kind.values(kind.unpack(whole[start : start + at_a_time]))
    return restore(values.reshape(*blocks.shape[:-1], blocks.shape[-1] // kind.nbytes * kind.weights))


def unpack(blocks, block_type="Q4_0"):
    """The numbers that lie in the blocks: uint8 (..., bytes of a row) -> name -> array (blocks, ...).

    `codes` is (blocks, weights); `d`, `m` and `dmin` are float16 (blocks,), `scales` and `mins` (blocks, sub-blocks).
    Raises what `dequantize` raises.

    >>> fields = unpack(quantize(np.arange(256) / 10, "Q6_K"), "Q6_K")
    >>> fields["codes"].shape, fields["scales"][0, -2:].tolist()
    ((1, 256), [-120, -128])
    """
    kind = _kind(block_type)
    return kind.unpack(_whole_blocks(to_numpy(blocks)[0], kind))


def _kind(block_type):
    if block_type not in BLOCK_TYPES:
        raise ValueError(f"block type {block_type!r} is unknown; choose from {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[block_type]


def _rows(x, kind):
    """Finite float32 (rows, blocks, weights)."""
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % kind.weights:
        raise ValueError(
            f"rows of shape {tuple(x.shape)} do not divide into blocks of {kind.weights} weights; pad them, choose a "
            "type with smaller blocks, or leave the tensor unquantized"
        )
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32)
    broken = int((~np.isfinite(x)).sum())
    if broken:
        raise ValueError(f"{broken} of the numbers are not finite; mend them first")
    return x.reshape(-1, x.shape[-1] // kind.weights, kind.weights)


def _importance(imatrix, rows, kind):
    """float32 (blocks, weights)."""
    imatrix = np.asarray(to_numpy(imatrix)[0], dtype=np.float32)
    columns = rows.shape[1] * kind.weights
    if imatrix.shape != (columns,):
        raise ValueError(
            f"an imatrix of shape {imatrix.shape} does not fit rows of {columns} weights; give one for each"
        )
    if not (np.isfinite(imatrix).all() and (imatrix >= 0).all()):
        raise ValueError("the imatrix has numbers that are negative or not finite; it holds mean squares")
    return imatrix.reshape(-1, kind.weights)


def _whole_blocks(blocks, kind):
    """uint8 (blocks, bytes)."""
    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % kind.nbytes:
        raise ValueError(
            f"{blocks.dtype} of shape {tuple(blocks.shape)} holds no whole {kind.name} blocks; give uint8 rows of a "
            f"multiple of {kind.nbytes} bytes"
        )
    return np.ascontiguousarray(blocks).reshape(-1, kind.nbytes)
