"""GPTQ's loop over the columns of a block, compiled: what takes the time of `methods.gptq` for small layers.

Column by column, with torch, each step starts some eight operations on short vectors, and then updates the rest of the
block, which by then has left the fast memory. But the rows do not disturb each other. So here 64 rows walk through all
the columns before the next 64 come, and what they need, 32 kB for a block of 128 columns, stays beside the processor.

The results are the same to the last bit, so a code can never differ: the operations are those of the readable loop, on
the same float32 numbers. One of them needs a question first. torch's `addcmul`, w - u * e, rounds once where the
processor multiplies and adds in one instruction, and twice elsewhere. `fused` tries it, and the loop does the same.

Source: `methods.gptq`, whose names are used here.
"""

import functools

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qlearn.kernels.cpu.threads import share

ROWS = 64
compiled = njit(cache=True, nogil=True, error_model="numpy")


def round_columns(W, U, grids, scale, zero, codes, errors):
    """Round the first columns of a block, and pass the error of each on to the later ones of the block.

    W: float32 (batch, columns, rows), changed.  U: float32 (batch, columns, columns), upper triangular.
    grids: has the range of the codes, low and high.  scale, zero: float32 (batch, n or 1, rows).
    codes: int8 or uint8 (batch, n, rows), and errors: float32 (batch, n, rows), are filled in.

    >>> from types import SimpleNamespace
    >>> W, U = torch.tensor([[[1.4], [1.4]]]), torch.tensor([[[1.0, -0.5], [0.0, 1.0]]])
    >>> codes, errors = torch.zeros(1, 2, 1, dtype=torch.int8), torch.zeros(1, 2, 1)
    >>> round_columns(W, U, SimpleNamespace(low=-3, high=3), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), codes, errors)
    >>> codes.flatten().tolist(), W.flatten()           # the second takes half of what the first was short of
    ([1, 2], tensor([1.4000, 1.6000]))
    """
    rows = W.shape[-1]
    threads = max(1, min(torch.get_num_threads(), rows // ROWS))
    for one in zip(W, U.contiguous(), scale.contiguous(), zero.contiguous(), codes, errors, strict=True):
        arrays = [t.numpy() for t in one]
        work = functools.partial(_round_columns, *arrays, np.float32(grids.low), np.float32(grids.high), fused())
        share(work, 0, rows, threads)


@functools.cache
def fused():
    """Whether torch's addcmul rounds once here: 1 - (1 + e)(1 - e) is e squared then, and 0 otherwise."""
    e = 2.0**-13
    ones = torch.ones(64)
    return torch.addcmul(ones, ones * (1 + e), ones * (1 - e), value=-1).tolist() == [e * e] * 64


@compiled
def _round_columns(W, U, scale, zero, codes, errors, low, high, once, first, last):
    for start in range(first, last, ROWS):
        rows = slice(start, min(start + ROWS, last))
        for i in range(codes.shape[0]):
            g, error = min(i, scale.shape[0] - 1), errors[i, rows]
            _round(W[i, rows], scale[g, rows], zero[g, rows], low, high, U[i, i], codes[i, rows], error)
            for j in range(i + 1, W.shape[0]):
                _add(W[j, rows], -U[i, j], error, once)


@compiled
def _round(w, scale, zero, low, high, divisor, codes, errors):
    for r in range(len(w)):
        code = min(max(np.rint(w[r] / scale[r]) + zero[r], low), high)
        codes[r] = code
        errors[r] = (w[r] - (code - zero[r]) * scale[r]) / divisor


@compiled
def _add(w, factor, errors, once):
    """w += factor * errors."""
    if once:
        for r in range(len(w)):
            w[r] = _multiply_add(factor, errors[r], w[r])
    else:
        for r in range(len(w)):
            w[r] += factor * errors[r]


@intrinsic
def _multiply_add(typing, a, b, c):
    """a * b + c, rounded once."""

    def build(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), arguments)

    return types.float32(types.float32, types.float32, types.float32), build
