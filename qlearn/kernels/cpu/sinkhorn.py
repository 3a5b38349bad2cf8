"""The deviations of a scaled tile, in one pass: what takes the time of `methods.sinkhorn`.

Each step of the balancing asks for the standard deviations of all rows and columns of tile[i, j] / (mu1[j] mu2[i]).
With torch's operations that is four passes over the memory, and each deviation is a long chain: Welford's method, which
torch uses, brings mean and sum of squares up to date with each number x, in float64,

    delta = x - mean        mean += delta / n        m2 += delta * (x - mean)        deviation = sqrt(m2 / (n - 1))

and waits for the division each time. Here eight columns, or eight rows, walk side by side, and each number is scaled
once for both.

The result is the very same, to the last bit: the same operations on the same numbers in the same order, in float64,
rounded to float32 at the end. (torch itself may split a chain of more than 32,767 numbers among threads. Then the last
bits of the float64 differ, which shows in a float32 about once in a million times.) So the logarithms and exponentials
of the scales stay with torch, and with them all that `methods.sinkhorn` decides.

Source: Welford, Note on a Method for Calculating Corrected Sums of Squares and Products, Technometrics, 1962; torch's
ReduceOpsKernel.cpp.
"""

import functools
import math

import numpy as np
import torch
from numba import njit

from qlearn.kernels.cpu.threads import share

LANES = 8
compiled = njit(cache=True, nogil=True, error_model="numpy")


def scaled_deviations(tile, mu1, mu2):
    """The standard deviations of the columns and the rows of tile / mu1 / mu2, each tile on its own.

    tile: float32 (..., rows, columns) on the CPU.  mu1: (..., 1, columns).  mu2: (..., rows, 1).
    Returns float32 (..., 1, columns) and (..., rows, 1).

    >>> scaled_deviations(torch.tensor([[1.0, 6.0], [2.0, 14.0]]), torch.tensor([[1.0, 2.0]]), torch.ones(2, 1))
    (tensor([[0.7071, 2.8284]]), tensor([[1.4142],
            [3.5355]]))
    """
    *lead, r, c = tile.shape
    count, columns, rows = math.prod(lead), torch.empty(*lead, 1, c), torch.empty(*lead, r, 1)
    tiles, mu1, mu2, sigma1, sigma2 = (
        t.contiguous().numpy().reshape(count, *size)
        for t, size in ((tile, (r, c)), (mu1, (c,)), (mu2, (r,)), (columns, (c,)), (rows, (r,)))
    )
    threads = max(1, min(torch.get_num_threads(), count))
    share(functools.partial(_deviations, tiles, mu1, mu2, sigma1, sigma2), 0, count, threads)
    return columns, rows


@compiled
def _deviations(tiles, mu1, mu2, columns, rows, first, last):
    r, c = tiles.shape[1:]
    block = np.zeros((c, LANES), np.float32)  # eight rows, turned
    mean, m2 = np.empty(c), np.empty(c)
    row_mean, row_m2 = np.empty(LANES), np.empty(LANES)
    for t in range(first, last):
        mean[:] = 0
        m2[:] = 0
        for start in range(0, r, LANES):
            here = min(LANES, r - start)
            for lane in range(here):
                i = start + lane
                for j in range(c):
                    x = tiles[t, i, j] / mu1[t, j] / mu2[t, i]
                    block[j, lane] = x
                    delta = x - mean[j]
                    mean[j] += delta / (i + 1)
                    m2[j] += delta * (x - mean[j])
            row_mean[:] = 0
            row_m2[:] = 0
            for j in range(c):
                for lane in range(LANES):
                    x = block[j, lane]
                    delta = x - row_mean[lane]
                    row_mean[lane] += delta / (j + 1)
                    row_m2[lane] += delta * (x - row_mean[lane])
            for lane in range(here):
                rows[t, start + lane] = np.sqrt(row_m2[lane] / (c - 1))
        for j in range(c):
            columns[t, j] = np.sqrt(m2[j] / (r - 1))
