"""What the explorers measure: a matrix through a method of the package and back, and the error that this left.

rms error   the root of the mean squared difference between a weight and what is read back
SQNR        signal to quantization noise ratio, 20 log10(rms weight / rms error), in decibels: 6.02 for a factor of two
worst       the largest error as a multiple of half the scale of its block; rounding alone never exceeds 1
bits        true bits per weight, everything stored counted
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

import qlearn

TENSOR, ROW = "tensor", None  # the two coarsest choices of who shares a scale, beside group sizes


@dataclass(frozen=True)
class Error:
    """What one way of quantizing a matrix costs."""

    rms: float
    relative: float  # rms error / rms weight
    largest: float
    worst: float
    bits_per_weight: float
    scale: float  # of the first block
    values: np.ndarray  # float32, one error a weight

    @property
    def sqnr(self):
        """In decibels; infinite without error."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


def as_matrix(weights):
    """Weights of any kind as a float32 matrix on the CPU; a vector becomes one row.

    Raises ValueError when there is none, when one is not finite, when all are zero, or when the shape is not 1-D or
    2-D.
    """
    weights = torch.as_tensor(weights).detach().cpu().float()
    weights = weights[None] if weights.ndim == 1 else weights
    if weights.ndim != 2 or weights.numel() == 0:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; explore a vector or a matrix with at least one entry"
        )
    if not weights.isfinite().all() or not weights.any():
        raise ValueError("weights hold NaN or infinity, or nothing but zeros; explore a matrix of ordinary numbers")
    return weights


def one_thread(function):
    """Run a function with one torch thread: on small matrices and a busy CPU, threads cost far more than they save."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


@one_thread
def quantize(weights, method, bits, share):
    """The QuantizedTensor of a matrix; share: "tensor", None for a row, or a group size."""
    if share == TENSOR:
        return qlearn.quantize(weights, method, bits=bits, per="tensor")
    return qlearn.quantize(weights, method, bits=bits, group_size=share)


@one_thread
def measure(weights, qt):
    """The Error of a QuantizedTensor as a copy of `weights`."""
    error = qt.dequantize() - weights
    scales = qt.scales.float().repeat_interleave(qt.block[0], 0).repeat_interleave(qt.block[1], 1)
    rms = error.square().mean().sqrt().item()
    return Error(
        rms=rms,
        relative=rms / weights.square().mean().sqrt().item(),
        largest=error.abs().max().item(),
        worst=(error.abs() / (scales / 2)).max().item(),
        bits_per_weight=qt.bits_per_weight,
        scale=qt.scales.flatten()[0].item(),
        values=error.flatten().numpy(),
    )


def sharers(weights, group_size):
    """[(label, share)] for a menu: whole tensor, row, and the group sizes given.

    Without any, those of 256, 128, 64 and 32 that divide the columns. An unsuitable size raises ValueError.
    """
    columns = weights.shape[1]
    if group_size is None:
        group_size = [None] + [size for size in (256, 128, 64, 32) if columns % size == 0]
    for size in group_size:
        if size is not None and (size < 1 or columns % size):
            raise ValueError(f"groups of {size} do not divide rows of {columns} weights; choose sizes that do")
    labels = [("row", ROW) if size is None else (f"groups of {size}", size) for size in group_size]
    return [("whole tensor", TENSOR), *labels]


def bit_range(bits):
    """(low, high) as a range of bits that quantizers take; ValueError otherwise."""
    low, high = bits
    if not 2 <= low <= high <= 8:
        raise ValueError(f"bits={tuple(bits)} is no range within 2 to 8")
    return range(low, high + 1)


def lines(positions, bottom=0.0, top=1.0):
    """(x, y) of vertical lines at all positions, for one Line2D: the pieces are separated by NaN."""
    return np.repeat(positions, 3), np.tile([bottom, top, np.nan], len(positions))
