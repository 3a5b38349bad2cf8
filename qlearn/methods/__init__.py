"""How a weight matrix gets its codes: one file for each method, one line for each in the registry below.

A method is a function (weight, bits, group_size, **its own options) -> QuantizedTensor.
"""

from qlearn.methods.affine import absmax, zero_point
from qlearn.methods.asinq import asinq
from qlearn.methods.awq import awq
from qlearn.methods.gptq import gptq
from qlearn.methods.hadamard import hadamard
from qlearn.methods.hqq import hqq
from qlearn.methods.microscaling import mxfp4, mxfp6, mxfp8, mxint8, nvfp4
from qlearn.methods.nf4 import nf3, nf4
from qlearn.methods.signed_absmax import signed_absmax
from qlearn.methods.sinq import sinq
from qlearn.methods.ternary import binary, ternary

METHODS = {
    "absmax": absmax,
    "zero_point": zero_point,
    "signed_absmax": signed_absmax,
    "hadamard": hadamard,
    "hqq": hqq,
    "sinq": sinq,
    "nf4": nf4,
    "nf3": nf3,
    "gptq": gptq,
    "awq": awq,
    "asinq": asinq,
    "ternary": ternary,
    "binary": binary,
    "mxfp4": mxfp4,
    "mxfp6": mxfp6,
    "mxfp8": mxfp8,
    "mxint8": mxint8,
    "nvfp4": nvfp4,
}
CALIBRATED = frozenset({"gptq", "awq", "asinq"})  # they learn from inputs, which are a further argument `inputs`

__all__ = [
    "CALIBRATED",
    "METHODS",
    "absmax",
    "asinq",
    "awq",
    "binary",
    "gptq",
    "hadamard",
    "hqq",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "mxint8",
    "nf3",
    "nf4",
    "nvfp4",
    "quantize",
    "signed_absmax",
    "sinq",
    "ternary",
    "zero_point",
]


def quantize(weight, method="absmax", bits=4, group_size=None, **options):
    """Quantize a matrix by the name of a method.

    weight: (rows, columns), floating point.  options: passed to the method.
    Returns a QuantizedTensor.  Raises ValueError for an unknown method, and what the method raises.

    >>> import torch
    >>> quantize(torch.ones(4, 128), "absmax", bits=4, group_size=64).bits_per_weight
    4.25
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose from {', '.join(sorted(METHODS))}")
    return METHODS[method](weight, bits=bits, group_size=group_size, **options)
