"""Which kernel multiplies with a quantized weight: one function, y = x W^T + b, and three ways to compute it.

    cuda         on a GPU, from the packed codes                            `kernels.cuda`
    cpu          on a processor, from the packed codes                      `kernels.cpu.packed`
    reference    the float matrix is made, and torch multiplies with it     the two lines that say what is meant

They are asked in this order, and the first that has nothing to say against it is taken. What the others said is kept:

    >>> import qlearn
    >>> weight = qlearn.quantize(torch.ones(256, 256), "absmax", bits=4, group_size=64)
    >>> choose(torch.ones(1, 256), weight).backend, choose(torch.ones(100, 256), weight).backend
    ('cpu', 'reference')
    >>> print(explain(torch.ones(100, 256), weight))
    cuda       no: x is on cpu
    cpu        no: x has 100 rows; the cpu kernel gains with up to 8
    reference  yes

**The rule for the processor.** The kernel there is for generating text, one token at a time or a few: at most 8 rows of
x, float32, and a weight of at least 32,768 numbers (the smallest layers of the bundled model). It was
faster than the reference at every number of bits that `qlearn.bench.cpu_kernels` measures, with 1, 4 and 8 rows, on the
layers of Llama 8B. The more rows, the less is gained, since torch's product of floats is made for many; and then the
result of the reference, which is F.linear to the last bit, is worth more. The first call waits a second or two for the
compiler; small matrices would never earn that back.

**Overriding it.** `with use("reference"):` or the environment variable QLEARN_KERNELS=reference (or cpu, or cuda)
leaves no choice. A backend that was asked for and cannot do it raises its reason; it is not replaced silently.

Results of the three differ by the rounding of float32 sums, which `kernels/cpu/packed.py` bounds.
"""

import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F

BACKENDS = ("cuda", "cpu", "reference")
VARIABLE = "QLEARN_KERNELS"
MOST_ROWS = 8
LEAST_WEIGHTS = 2**15
_asked_for = ContextVar("kernels", default=None)


class Choice(NamedTuple):
    """backend: "cuda", "cpu" or "reference".  reasons: dict backend -> why it was passed over."""

    backend: str
    reasons: dict


def matmul(x, quantized, bias=None):
    """x W^T + b, by the backend that `choose` names.

    x: floating point (..., in).  quantized: QuantizedTensor (out, in), on the same device.  bias: (out,) or None.
    Returns (..., out) in the dtype that F.linear would have.
    Raises ValueError as `choose` does.

    >>> import qlearn
    >>> weight = qlearn.quantize(torch.tensor([[3.0, -7.0]]), "absmax", bits=4, scale_dtype=torch.float32)
    >>> matmul(torch.ones(1, 2), weight, torch.ones(1))
    tensor([[-3.]])
    """
    return _PRODUCTS[choose(x, quantized).backend](x, quantized, bias)


def choose(x, quantized):
    """The backend for a product, and what spoke against those before it: a Choice.

    Raises ValueError where a backend was asked for, by `use` or the environment, that is unknown or cannot do it.
    """
    only, reasons = asked_for(), {}
    for backend in (only,) if only else BACKENDS:
        reason = _REASONS[backend](x, quantized, only is not None)
        if reason is None:
            return Choice(backend, reasons)
        reasons[backend] = reason
    raise ValueError(f"the kernels of {only!r} were asked for, but {reasons[only]}; ask for 'reference', or for none")


def asked_for():
    """The backend that `use` or the environment leave as the only one; None where there is a choice.

    Raises ValueError for an unknown one.
    """
    return _asked_for.get() or _checked(os.environ.get(VARIABLE) or None, VARIABLE)


def explain(x, quantized):
    """The same as text, a line for each backend that was looked at."""
    choice = choose(x, quantized)
    lines = [f"{backend:<10} no: {reason}" for backend, reason in choice.reasons.items()]
    return "\n".join([*lines, f"{choice.backend:<10} yes"])


@contextmanager
def use(backend):
    """Have all products inside of it computed by one backend; None for the usual choice.

    It holds for this thread, and goes before the environment.  Raises ValueError for an unknown name.

    >>> import qlearn
    >>> weight = qlearn.quantize(torch.ones(256, 256), "absmax", bits=4, group_size=64)
    >>> with use("reference"):
    ...     choose(torch.ones(1, 256), weight).backend
    'reference'
    """
    token = _asked_for.set(_checked(backend, "use"))
    try:
        yield
    finally:
        _asked_for.reset(token)


def _checked(backend, where):
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{where}: there are no kernels {backend!r}; choose {', '.join(map(repr, BACKENDS))}")
    return backend


# ---- what speaks against a backend -----------------------------------------------------------------------------------


def _against_cuda(x, quantized, asked):
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    try:
        from qlearn.kernels.cuda import backend
    except ImportError as error:
        return f"the package numba-cuda is not in order ({error}); install qlearn[gpu]"
    return _needs_torch(x) or backend.why_not(x, quantized)


def _against_cpu(x, quantized, asked):
    """asked: then only what is impossible counts, and not what is slower."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    slower = None if asked else _not_faster_on_cpu
    return _needs_torch(x) or (slower and slower(x, quantized)) or _cpu().why_not(x, quantized)


def _against_reference(x, quantized, asked):
    return None


def _not_faster_on_cpu(x, quantized):
    """See the rule at the top."""
    rows, weights = x.numel() // max(1, x.shape[-1] if x.dim() else 1), quantized.shape[0] * quantized.shape[1]
    if rows > MOST_ROWS:
        return f"x has {rows} rows; the cpu kernel gains with up to {MOST_ROWS}"
    if weights < LEAST_WEIGHTS:
        return f"the weight has {weights} numbers; it takes {LEAST_WEIGHTS} for the cpu kernel to pay"
    if x.dtype != torch.float32:
        return f"x is {str(x.dtype).removeprefix('torch.')}; the cpu kernel is taken for float32"
    return None


def _needs_torch(x):
    """What no kernel can do, since it takes the numbers out of torch."""
    if x.requires_grad and torch.is_grad_enabled():
        return "x wants a gradient, and the kernels give none"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on, and decides on another dtype"
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"x is a {type(x).__name__}, and the kernels take plain tensors"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "torch is tracing or transforming the program, and cannot look into the kernels"
    return None


# ---- the backends ----------------------------------------------------------------------------------------------------


def _cpu():
    from qlearn.kernels.cpu import packed  # here: it brings Numba, which takes a third of a second

    return packed


def _by_cuda(x, quantized, bias):
    from qlearn.kernels.cuda import backend

    return backend.matmul(x, quantized, bias)


def _by_cpu(x, quantized, bias):
    return _cpu().packed_matmul(x, quantized, bias)


def _by_reference(x, quantized, bias):
    return F.linear(x, quantized.dequantize(x.dtype), bias)


_REASONS = {"cuda": _against_cuda, "cpu": _against_cpu, "reference": _against_reference}
_PRODUCTS = {"cuda": _by_cuda, "cpu": _by_cpu, "reference": _by_reference}
