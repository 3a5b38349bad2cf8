"""The types a tensor can have in a GGUF file: a number, a name, and so many weights in so many bytes.

A tensor in a GGUF file is a sequence of rows, and a row is a sequence of **blocks**. The type says how large a block
is, and so how many bytes a tensor takes; a plain type is one whose block is a single number:

    F32       1 weight in 4 bytes        32    bits per weight
    Q4_0     32 weights in 18 bytes       4.5
    Q4_K    256 weights in 144 bytes      4.5
    TQ1_0   256 weights in 54 bytes       1.6875

Here are all types that files hold today. Those that this package writes are made by `qlearn.formats.gguf_blocks`, in
whose files their bytes are explained. Some of the others (IQ2_XXS ... IQ4_XS, NVFP4) are decoded by the package `gguf`;
the rest can be listed, not decoded.

Source: enum ggml_type in ggml/include/ggml.h, and the structs in ggml/src/ggml-common.h.
"""

import math
from dataclasses import dataclass

import numpy as np

from qlearn.formats import floats, gguf_blocks
from qlearn.formats.gguf_blocks import BLOCK_TYPES
from qlearn.kernels.cpu import gguf as kernel


@dataclass(frozen=True)
class TensorType:
    """id: the number in the file.  weights, nbytes: of one block.

    >>> TENSOR_TYPES["Q4_K"].bits_per_weight
    4.5
    """

    id: int
    name: str
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self):
        return 8 * self.nbytes / self.weights

    def size(self, shape):
        """Bytes of a tensor of that shape, rows first.

        >>> TENSOR_TYPES["Q4_0"].size((2, 64))
        72
        """
        return math.prod(shape) // self.weights * self.nbytes


_BLOCK_TYPE_IDS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
TENSOR_TYPES = {
    name: TensorType(id, name, weights, nbytes)
    for id, name, weights, nbytes in [
        (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (28, "F64", 1, 8),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
        (9, "Q8_1", 32, 36), (41, "Q1_0", 128, 18), (42, "Q2_0", 64, 18),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (22, "IQ2_S", 256, 82), (18, "IQ3_XXS", 256, 98),
        (21, "IQ3_S", 256, 110), (19, "IQ1_S", 256, 50), (29, "IQ1_M", 256, 56), (20, "IQ4_NL", 32, 18),
        (23, "IQ4_XS", 256, 136),
        (40, "NVFP4", 64, 36),
        *((id, name, BLOCK_TYPES[name].weights, BLOCK_TYPES[name].nbytes) for name, id in _BLOCK_TYPE_IDS.items()),
    ]
}  # fmt: skip
BY_ID = {type.id: type for type in TENSOR_TYPES.values()}

_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def encode(x, name, imatrix=None):
    """The bytes of a matrix.

    x: float32 array (rows, columns).  name: F32, F16, BF16, or a type of `gguf_blocks.BLOCK_TYPES`.
    imatrix: float32 (columns,), how much an error in each column matters, or None.
    Returns uint8 (rows, bytes of a row).
    Raises ValueError for an unknown type, and for a matrix that the type cannot hold: NaN, infinity, numbers beyond the
    range of F16 or BF16, rows that are not whole blocks.

    >>> encode(np.float32([[1.0, -2.0]]), "F16").tolist()
    [[0, 60, 0, 192]]
    """
    broken = int((~np.isfinite(x)).sum())
    if broken:
        raise ValueError(f"{broken} of the numbers are not finite; mend them first")
    if name in BLOCK_TYPES:
        return kernel.quantize(x, name, imatrix)
    if name == "F32":
        return np.ascontiguousarray(x, "<f4").view(np.uint8)
    if name not in ("F16", "BF16"):
        known = ", ".join(["F32", "F16", "BF16", *BLOCK_TYPES])
        raise ValueError(f"type {name!r} cannot be written; choose from {known}")
    with np.errstate(over="ignore"):
        codes = x.astype("<f2") if name == "F16" else floats.BF16.encode(x).astype("<u2")
        beyond = ~np.isfinite(codes if name == "F16" else floats.BF16.decode(codes))
    if beyond.any():
        raise ValueError(f"{abs(x[beyond]).max():g} is beyond the range of {name}; use F32")
    return np.ascontiguousarray(codes).view(np.uint8)


def decode(data, name):
    """The numbers that the bytes stand for: uint8 (rows, bytes of a row) -> float32 (rows, columns).

    Raises ValueError for a type that neither this package nor the package `gguf` decodes.

    >>> decode(encode(np.float32([[1.0, -2.0]]), "BF16"), "BF16").tolist()
    [[1.0, -2.0]]
    """
    if name in BLOCK_TYPES:
        return gguf_blocks.dequantize(data, name)
    if name == "BF16":
        return floats.BF16.decode(np.ascontiguousarray(data).view("<u2"))
    if name in _PLAIN:
        return np.ascontiguousarray(data).view(_PLAIN[name]).astype(np.float32)
    return _decode_elsewhere(data, name)


def _decode_elsewhere(data, name):
    """What the package `gguf` decodes: the types that are made with an imatrix only."""
    import gguf

    try:
        return gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name])
    except (KeyError, NotImplementedError) as error:
        raise ValueError(f"type {name} is not decoded here; take a file of another one, such as Q4_K_M") from error
