"""Kernels on torch's tensors: which types arrive, in which grid, and what is refused."""

import math

import numpy as np
import pytest
import torch

from qlearn.kernels.cuda import SIMULATED, launch
from qlearn.kernels.cuda.launch import Kernel, registers_for

from numba import cuda, types  # isort: skip - after qlearn.kernels.cuda has chosen

pytestmark = pytest.mark.skipif(not SIMULATED, reason="this is about the simulator, and here kernels run on a GPU")

NUMBERS = {  # dtype: what is put in, and what a kernel sees of it
    torch.uint8: ([0, 255], np.uint8), torch.int8: ([-128, 127], np.int8), torch.int16: ([-(2**15), 1], np.int16),
    torch.int32: ([-(2**31), 1], np.int32), torch.int64: ([-(2**63), 1], np.int64),
    torch.float16: ([-0.1, 65504], np.float16), torch.float32: ([0.1, math.inf], np.float32),
    torch.float64: ([0.1, -1e300], np.float64),
}  # fmt: skip


def copy(source, target):
    n = cuda.grid(1)
    if n < source.size:
        target[n] = source[n]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_tensors_arrive_as_they_are(dtype):
    numbers, seen_as = NUMBERS[dtype]
    source, target, seen = torch.tensor(numbers, dtype=dtype), torch.zeros(2, dtype=dtype), []

    def kernel(source, target):
        if cuda.grid(1) == 0:
            seen.append(source[0].dtype)
        copy(source, target)

    Kernel(kernel, 2).launch(1, source, target)
    assert torch.equal(source, target) and seen == [np.dtype(seen_as)]


def test_bfloat16_arrives_as_its_bits():
    source, target, seen = torch.tensor([1.0, -3.140625]).bfloat16(), torch.zeros(2, dtype=torch.bfloat16), []

    def kernel(source, target):
        seen.append(int(source[cuda.grid(1)]))
        copy(source, target)

    Kernel(kernel, 2).launch(1, source, target)
    assert torch.equal(source, target) and sorted(seen) == [0x3F80, 0xC049]


def test_a_gpu_s_kernel_is_compiled_for_these_types():
    for dtype, (_, seen_as) in [*NUMBERS.items(), (torch.bfloat16, (None, np.uint16))]:
        expected = types.Array(getattr(types, np.dtype(seen_as).name), 2, "C")
        assert launch._type_of(torch.zeros(2, 3).to(dtype)) == expected
    assert (launch._type_of(7), launch._type_of(0.5)) == (types.int32, types.float32)
    assert set(launch._DTYPES) == {*NUMBERS, torch.bfloat16}  # and there are no others


def test_numbers_arrive_in_32_bits():
    seen = []

    def kernel(*args):
        seen.extend(args)

    Kernel(kernel, 1).launch(1, 7, -(2**31), 2**31 - 1, 0.1, math.inf, True)
    assert seen == [7, -(2**31), 2**31 - 1, np.float32(0.1), math.inf, 1]
    assert [value.dtype for value in seen] == [np.int32] * 3 + [np.float32] * 2 + [np.int32]


@pytest.mark.parametrize(
    "blocks, expected",
    [(3, (3, 1, 1)), ((3,), (3, 1, 1)), ((2, 3), (2, 3, 1)), ((2, 1, 3), (2, 1, 3))],
    ids=["a number", "one", "two", "three"],
)
def test_grids(blocks, expected):
    seen = []

    def kernel(out):
        grid, block = cuda.gridDim, cuda.blockIdx
        seen.append(((grid.x, grid.y, grid.z), (block.x, block.y, block.z), cuda.threadIdx.x, cuda.blockDim.x))

    Kernel(kernel, 2).launch(blocks, torch.zeros(1))
    assert {grid for grid, *_ in seen} == {expected} and {size for *_, size in seen} == {2}
    assert sorted((*block, thread) for _, block, thread, _ in seen) == list(np.ndindex(*expected, 2))


def test_shared_memory_is_the_kernel_s_or_the_launch_s():
    seen = []

    def kernel(out):
        seen.append(cuda.shared.array(0, types.uint8).size)

    kernel = Kernel(kernel, 1, shared_bytes=48)
    kernel.launch(1, torch.zeros(1))
    kernel.launch(1, torch.zeros(1), shared_bytes=96)
    assert seen == [48, 96]


def test_prepared_runs_read_what_the_tensors_hold_then():
    source, target = torch.zeros(4), torch.full((4,), 9.0)
    run = Kernel(copy, 4).prepare(1, source, target)
    assert (target == 9).all()  # nothing has run yet
    run()
    assert (target == 0).all()
    source.fill_(3)
    run()
    assert (target == 3).all()


def test_matrices_and_empty_tensors():
    matrix, total = torch.arange(6.0).view(2, 3), torch.zeros(2)

    def kernel(matrix, empty, total):
        row = cuda.grid(1)
        total[row] = matrix[row, 2] + empty.size

    Kernel(kernel, 1).launch(2, matrix, torch.zeros(0, 5), total)
    assert total.tolist() == [2, 5]


def test_a_parameter_that_is_trained():
    source, target = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
    Kernel(copy, 2).launch(1, source, target)
    assert (target == 1).all()


def test_the_kernel_keeps_its_words():
    def kernel(out):
        """What it is."""

    assert Kernel(kernel, 1).__doc__ == "What it is."


REFUSED = {
    "transposed": (torch.zeros(2, 3).T, r"contiguous tensors of .*, not torch.float32, \(1, 3\)"),
    "every second": (torch.zeros(6)[::2], r"not torch.float32, \(2,\)"),
    "complex64": (torch.zeros(2, dtype=torch.complex64), "not torch.complex64"),
    "bool": (torch.zeros(2, dtype=torch.bool), "not torch.bool"),
    "uint32": (torch.zeros(2, dtype=torch.uint32), "not torch.uint32"),
    "33 bits": (2**31, "ints of 32 bits, not 2147483648 of int"),
    "33 bits, negative": (-(2**31) - 1, "ints of 32 bits, not -2147483649"),
    "a number of NumPy's, which would have been cut off": (np.float32(1.5), "of float32"),
    "None": (None, "not None of NoneType"),
    "a list": ([1], "of list"),
}


@pytest.mark.parametrize("arg, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(arg, message):
    with pytest.raises(TypeError, match=message):
        Kernel(copy, 1).prepare(1, arg)


def test_an_error_of_a_thread_reaches_the_caller():
    def kernel(out):
        out[7] = 1

    with pytest.raises(IndexError):
        Kernel(kernel, 1).launch(1, torch.zeros(2))


def test_in_the_simulator_everything_can_be_tried():
    assert launch.capability() == (10, 0) and launch.multiprocessors() == 4


def test_a_gpu_that_can_do_too_little(monkeypatch):
    """Said before anything is compiled."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("qlearn.kernels.cuda.launch.capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"this GPU has compute capability 7\.5, and the kernel needs 8\.0"):
        Kernel(lambda x: None, 32, needs=(8, 0)).load(())


@pytest.mark.parametrize(
    ("warps", "blocks", "most"), [(4, 1, 255), (16, 1, 128), (17, 1, 96), (20, 1, 96), (10, 2, 96)], ids=str
)
def test_registers_are_shared_by_every_fourth_warp(warps, blocks, most):
    """Each quarter of a multiprocessor has 16,384; a warp takes 32 times as many as its threads have."""
    assert registers_for(warps, blocks) == most
    assert -(-warps * blocks // 4) * 32 * most <= 16384
