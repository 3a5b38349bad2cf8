"""What the dispatcher (`kernels/dispatch.py`) asks on a GPU: can this product be computed from the codes, and do it.

A weight is arranged for the kernel (`layout.py`) when it is first used, and stays so, beside the packed codes, as long
as these live.

The kernel overlaps with what runs before it: it fetches weights while that still works, and waits before it touches x.
So the weights must not be what the kernel just before has written; arranging them therefore ends with a wait.

With more rows than the kernel takes, the dispatcher goes on to the reference, which makes the float matrix for cuBLAS.
"""

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qlearn.kernels.cuda import layout
from qlearn.kernels.cuda.launch import capability
from qlearn.kernels.cuda.matmul import CAPABILITY, MAX_ROWS
from qlearn.kernels.cuda.matmul import matmul as product
from qlearn.rotation import hadamard

_arranged = WeakIdKeyDictionary()  # packed codes -> Units, and what they were made of


def why_not(x, quantized):
    """None, or a sentence that says why the kernel cannot multiply x with this weight."""
    rows = x.numel() // max(1, x.shape[-1] if x.dim() else 1)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {str(x.dtype).removeprefix('torch.')}; the kernel takes float16 and bfloat16"
    if not 1 <= rows <= MAX_ROWS:
        return f"x has {rows} rows; the kernel takes 1 to {MAX_ROWS}"
    if quantized.packed.device != x.device:
        return f"x is on {x.device} and the weight on {quantized.packed.device}"
    has = capability(x.device.index)
    if has < CAPABILITY:
        return f"the GPU has compute capability {has[0]}.{has[1]}, and the kernel needs {CAPABILITY[0]}.{CAPABILITY[1]}"
    return layout.why_not(quantized)


def matmul(x, quantized, bias=None):
    """x W^T + b. x: float16 or bfloat16 (..., columns), for which `why_not` has nothing to say."""
    units = arranged(quantized)
    flat = x.reshape(-1, x.shape[-1])
    if units.hadamard is not None:
        flat = hadamard(flat.float(), units.hadamard).to(x.dtype)
    flat = flat.contiguous()
    flat = flat.clone() if flat.data_ptr() % 16 else flat  # the copies begin at multiples of 16 bytes
    y = product(flat, units, overlap=True)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], -1)


def arranged(quantized):
    """The weight in the order of the kernel, made once, and again when one of the tensors was written to."""
    state = [(t.data_ptr(), None if t.is_inference() else t._version) for t in quantized.state_tensors().values()]
    units, made_of = _arranged.get(quantized.packed, (None, None))
    if made_of != state:
        units = layout.arrange(quantized)
        _arranged[quantized.packed] = units, state
        if quantized.packed.is_cuda:
            torch.cuda.current_stream(quantized.packed.device).synchronize()
    return units
