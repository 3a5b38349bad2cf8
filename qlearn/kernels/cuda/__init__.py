"""Kernels for NVIDIA GPUs, written in Python with Numba-CUDA.

A kernel is a function that thousands of threads run at once. Thirty-two of them, a warp, go in step; some warps make a
block, which runs on one of the GPU's multiprocessors and has a little fast memory of its own, called shared. What a
kernel is worth is mostly decided by how it moves bytes: `NOTES.md` tells what was counted, predicted and measured.

    ptx.py          single instructions that Numba has no word for, each with its meaning in Python beside it
    simulator.py    what the meanings stand on, where there is no GPU: memory, warps, barriers
    launch.py       starting a kernel on torch's tensors, also before the last one has ended
    ...             one family of kernels a file

**Without a GPU** everything here still runs, in Numba's simulator: each thread of the kernel is a thread of Python.
That is slow, and exact enough to find a wrong index. The choice is made when this folder is first imported, because
Numba makes it when `numba.cuda` is first imported.
"""

import os
import sys

import numpy as np
import torch

if not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # numba-cuda 0.30 asks for the name that NumPy 2.5 took away

if not torch.cuda.is_available():
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    from numba import config

    config.reload_config()
    if config.ENABLE_CUDASIM and "numba.cuda" in sys.modules and "numba.cuda.simulator_init" not in sys.modules:
        raise ImportError(
            "numba.cuda was imported before qlearn.kernels.cuda, so it will look for a GPU, and there is none;"
            " import qlearn.kernels.cuda first, or set the environment variable NUMBA_ENABLE_CUDASIM=1"
        )

from numba import config

SIMULATED = bool(config.ENABLE_CUDASIM)


def device_function(function):
    """A function that kernels call. In the simulator it stays what it is."""
    if SIMULATED:
        return function
    from numba import cuda

    return cuda.jit(device=True)(function)
