"""Quantized matrices that a block type holds as they are: no second rounding.

A QuantizedTensor is codes and scales, and so are the blocks of a file. Where a type has the same grid and its blocks
lie within one scale's, the numbers need only be laid into bytes, and the file holds the very weights that the model
computed with:

    whole numbers from -8 to 7, a scale for each 32 weights, or 64, 96 ...       Q4_0            stored plus 8
    whole numbers from -128 to 127, likewise                                     Q8_0
    -1, 0 and 1, a scale for each 256 weights, or 512, or the whole matrix       TQ1_0, TQ2_0    stored plus 1

Scales that blocks share are repeated. They must be float16 numbers, for that is what a block stores. (A ternary matrix
whose scale is a float32, as training leaves it, keeps its trits all the same: the block type finds them again, and only
the scale is rounded.) Zero points and column scales have no place in these blocks.

Everything else is exported by its dequantized weights and rounded again; in general that costs some accuracy.
"""

import numpy as np
import torch

from qlearn.formats.gguf_blocks import BLOCK_TYPES

CONTAINERS = ("Q4_0", "Q8_0", "TQ1_0", "TQ2_0")


def exact(quantized, name):
    """The blocks of a quantized matrix that mean exactly its weights, or None where the type cannot hold them.

    quantized: QuantizedTensor (rows, columns).  name: of a block type.
    Returns uint8 array (rows, bytes of a row), or None.

    >>> import qlearn
    >>> quantized = qlearn.quantize(torch.linspace(-1, 1, 64)[None], "signed_absmax", bits=4, group_size=32)
    >>> blocks = exact(quantized, "Q4_0")
    >>> from qlearn.formats.gguf_blocks import dequantize
    >>> bool((dequantize(blocks, "Q4_0") == quantized.dequantize().numpy()).all()), exact(quantized, "Q4_K")
    (True, None)
    """
    more = (quantized.zeros, quantized.column_scales, quantized.hadamard)
    if name not in CONTAINERS or any(part is not None for part in more):
        return None
    kind, (rows, columns) = BLOCK_TYPES[name], quantized.shape
    if columns % kind.weights or quantized.block[1] % kind.weights:
        return None
    numbers = _integers(quantized)
    scales = quantized.scales.float().cpu()
    d = scales.half()
    if numbers is None or not torch.equal(d.float(), scales):
        return None
    reach = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}.get(name, (-1, 1))
    if numbers.min(initial=0) < reach[0] or numbers.max(initial=0) > reach[1]:
        return None
    repeated = d.repeat_interleave(quantized.block[0], 0).repeat_interleave(quantized.block[1] // kind.weights, 1)
    return kind.pack(_fields(name, numbers.reshape(-1, kind.weights), repeated.numpy().reshape(-1))).reshape(rows, -1)


def _integers(quantized):
    """The whole numbers that the codes stand for, int16 (rows, columns); None where they are no whole numbers."""
    values = quantized.format.decode(quantized.format.to_unsigned(quantized.codes().cpu())).numpy()
    with np.errstate(invalid="ignore"):
        numbers = values.astype(np.int16)
    return numbers if np.array_equal(numbers, values) else None


def _fields(name, numbers, d):
    """What `pack` of the block type lays into bytes: numbers int16 (blocks, weights), d float16 (blocks,)."""
    if name == "Q8_0":
        return {"d": d, "codes": numbers.astype(np.int8)}
    return {"d": d, "codes": (numbers + (8 if name == "Q4_0" else 1)).astype(np.uint8)}
