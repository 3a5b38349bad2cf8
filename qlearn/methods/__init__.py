"""How a weight matrix gets its codes: one file for each method, one line for each in the registry below.

A method is a function (weight, bits, group_size, **its own options) -> QuantizedTensor.
"""

from qlearn.methods.affine import absmax, zero_point
from qlearn.methods.awq import awq
from qlearn.methods.gptq import gptq
from qlearn.methods.signed_absmax import signed_absmax
from qlearn.methods.ternary import binary, ternary

METHODS = {
    "absmax": absmax,
    "zero_point": zero_point,
    "signed_absmax": signed_absmax,
    "gptq": gptq,
    "awq": awq,
    "ternary": ternary,
    "binary": binary,
}
CALIBRATED = frozenset({"gptq", "awq"})  # those that learn from inputs, and take them as a further argument `inputs`

__all__ = [
    "CALIBRATED",
    "METHODS",
    "absmax",
    "awq",
    "binary",
    "gptq",
    "quantize",
    "signed_absmax",
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
