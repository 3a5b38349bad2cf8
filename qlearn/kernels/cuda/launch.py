"""Starting kernels on torch's tensors.

    kernel = Kernel(function, threads=256)
    kernel.launch(blocks, x, y, 4096)                     x, y: tensors; 4096: an int32

The function is compiled for the types of its arguments when it is launched for the first time, and goes onto torch's
current stream: so it takes its place among torch's own kernels, and a CUDA graph that records the stream records it.

**Two things that Numba's own launch does not do** are needed by the fastest kernels. One is more than 48 KiB of shared
memory for a block. The other is the launch that overlaps: with `overlap=True` a kernel may begin while the one before
it still runs ("programmatic dependent launch", compute capability 9.0). It can set itself up and fetch what the last
kernel has no part in, such as weights; before it touches anything else it has to call `ptx.wait_for_last_kernel()`. On
small matrices that saves a third of the time.

**In the simulator** the tensors are on the CPU, and the blocks run one after another.
"""

import ctypes
import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from numba import cuda, types

from qlearn.kernels.cuda import SIMULATED

_DTYPES = {
    torch.uint8: types.uint8,
    torch.int8: types.int8,
    torch.int16: types.int16,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.float16: types.float16,
    torch.bfloat16: types.uint16,  # Numba's arrays have no bfloat16: a kernel gets the bits
    torch.float32: types.float32,
    torch.float64: types.float64,
}
OPT_IN_SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB a block


class Kernel:
    """A function to be run by many threads.

    function: written for Numba-CUDA.  threads: in a block.  shared_bytes: of dynamic shared memory for each block.
    registers: no more than these for a thread, so that more blocks fit side by side.
    needs: the least compute capability.
    """

    def __init__(self, function, threads, shared_bytes=0, registers=None, needs=(7, 5)):
        self.function, self.threads, self.shared_bytes, self.needs = function, threads, shared_bytes, needs
        self.__doc__ = function.__doc__
        self._jitted = cuda.jit(**({} if SIMULATED else {"max_registers": registers}))(function)
        self._loaded = {}  # (device, signature) -> driver's function

    def launch(self, blocks, *args, overlap=False, shared_bytes=None):
        """Run it once. blocks: how many, or a tuple of up to three numbers. args: tensors, ints, floats."""
        self.prepare(blocks, *args, overlap=overlap, shared_bytes=shared_bytes)()

    def prepare(self, blocks, *args, overlap=False, shared_bytes=None):
        """A function without arguments that runs the kernel on these tensors, which it keeps alive.

        overlap: let it begin while the kernel before it still runs.
        Raises TypeError for a tensor that is not contiguous or of a dtype that kernels do not know, and for an int that
        does not fit into 32 bits.
        """
        shared = self.shared_bytes if shared_bytes is None else shared_bytes
        signature = tuple(_type_of(arg) for arg in args)
        if SIMULATED:
            arrays = [_as_numpy(arg, kind) for arg, kind in zip(args, signature, strict=True)]
            return lambda: self._jitted[blocks, self.threads, 0, shared](*arrays)
        return _launcher(self.load(signature, shared), blocks, self.threads, shared, overlap, args)

    def load(self, signature, shared_bytes=None):
        """Compile for argument types and for this GPU. Returns the driver's function.

        Raises ValueError where the GPU's compute capability is less than the kernel needs.
        """
        has = capability(torch.cuda.current_device())
        if has < self.needs:
            raise ValueError(
                "this GPU has compute capability {}.{}, and the kernel needs {}.{}".format(*has, *self.needs)
            )
        shared = self.shared_bytes if shared_bytes is None else shared_bytes
        key = torch.cuda.current_device(), signature
        if key not in self._loaded:
            self._loaded[key] = _Loaded(self._jitted, signature)
        self._loaded[key].allow(shared)
        return self._loaded[key].function

    def ptx(self, signature, capability):
        """The kernel in PTX for a compute capability such as (9, 0). Needs no GPU."""
        gpu = SimpleNamespace(compute_capability=capability)  # device functions are compiled for the GPU that is there
        with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: gpu):
            return cuda.compile_ptx(self.function, signature, cc=capability)[0]


class _Loaded:
    """A kernel in the GPU's memory."""

    def __init__(self, jitted, signature):
        from cuda.bindings import driver

        jitted.compile(signature)
        definition = jitted.overloads[signature]
        compiled = definition._codelibrary.get_cufunc()
        self.function = _checked(driver.cuKernelGetFunction(driver.CUkernel(int(compiled.handle))))
        self.shared = 48 * 1024

    def allow(self, shared_bytes):
        """More than 48 KiB of shared memory has to be asked for once."""
        if shared_bytes > self.shared:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self.function, attribute, shared_bytes))
            self.shared = shared_bytes


def _launcher(function, blocks, threads, shared_bytes, overlap, args):
    """What `prepare` returns on a GPU: the arguments lie ready in memory, and only the stream is looked up."""
    from cuda.bindings import driver

    cells = [cell for arg in args for cell in _cells(arg)]
    pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
    config = driver.CUlaunchConfig()
    grid = (*((blocks,) if isinstance(blocks, int) else blocks), 1, 1)[:3]
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1

    def launch():
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))

    launch.holds = cells, pointers, args
    return launch


def _cells(arg):
    """An argument as Numba passes it: an array becomes its owner, length, item size, address, shape and strides."""
    if isinstance(arg, torch.Tensor):
        strides = (stride * arg.element_size() for stride in arg.stride())
        fields = 0, 0, arg.numel(), arg.element_size(), arg.data_ptr(), *arg.shape, *strides
        return [ctypes.c_int64(field) for field in fields]
    return [ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int32(arg)]


def _type_of(arg):
    if isinstance(arg, torch.Tensor):
        if arg.dtype not in _DTYPES or not arg.is_contiguous():
            raise TypeError(f"a kernel takes contiguous tensors of {list(_DTYPES)}, not {arg.dtype}, {arg.stride()}")
        return _array_type(arg.dtype, arg.dim())
    if isinstance(arg, float):
        return types.float32
    if isinstance(arg, int) and -(2**31) <= arg < 2**31:
        return types.int32
    raise TypeError(f"a kernel takes tensors, floats and ints of 32 bits, not {arg!r} of {type(arg).__name__}")


@functools.cache  # Numba takes ten microseconds to make one
def _array_type(dtype, dimensions):
    return types.Array(_DTYPES[dtype], dimensions, "C")


def _as_numpy(arg, kind):
    if not isinstance(arg, torch.Tensor):
        return np.float32(arg) if kind is types.float32 else np.int32(arg)
    return (arg.view(torch.uint16) if arg.dtype == torch.bfloat16 else arg).detach().numpy()


def _checked(result):
    """What a call of the driver returned; RuntimeError if it failed."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"the CUDA driver says {error.name}; see the CUDA driver API's list of errors")
    return values[0] if values else None


def registers_for(warps, blocks):
    """How many registers a thread may have if so many blocks of so many warps are to fit on a multiprocessor.

    It has four parts with 16,384 registers each, which share the warps: with 18 warps, two parts have 5 to care for.

    >>> registers_for(18, 1), registers_for(10, 2)
    (96, 96)
    """
    return min(255, 16384 // (-(-warps * blocks // 4) * 32) // 8 * 8)


@functools.cache
def multiprocessors(device=0):
    """How many blocks run at once if each takes a multiprocessor for itself."""
    return 4 if SIMULATED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device=0):
    """The compute capability of the GPU, such as (9, 0); in the simulator it can do what the newest can."""
    return (10, 0) if SIMULATED else torch.cuda.get_device_capability(device)
