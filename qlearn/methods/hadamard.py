"""Round-to-nearest after a Hadamard rotation: outliers are spread out before anything is rounded.

A grid must reach the largest weight of its group, so one weight that is ten times larger than the rest makes all steps
of the group ten times as long. A rotation of the row (`qlearn/rotation.py`) turns each weight into a sum of n weights
with signs, over √n. An outlier of 10 becomes 10/√n in every place, and what the grid has to reach comes down to a small
multiple of the typical size:

    a row               0.1   -0.2    0.1    2.0   -0.1    0.1    0.3   -0.1        largest 2.0, root mean square 0.72
    rotated, n = 8     0.78  -0.49  -0.85   0.57   0.64  -0.64  -0.71   0.99        largest 1.0, root mean square 0.72

Then the rotated row is rounded as any other would be, and rotated back when it is read:

    W  →  W H  →  codes, scales of W H           W'  =  dequantize(codes, scales) H         H is its own inverse

A rotation keeps lengths, so the squared error of W' is that of the rotated row: the whole gain or loss is in how well
the rounding does on W H. Its entries look normally distributed whatever W was. Where the weights look like that anyway
nothing is won; and where the large weights of a row lie in one group, while all others are small, rotating can lose:
then every group has some of them. The papers rotate the inputs in the same way, whose outliers are far worse, and fold
H into the layers around, which costs nothing. Here the weight alone is rotated, and `dequantize` rotates back.

Some papers turn the sign of each column at random first. It guards against rows that happen to be aligned with H, such
as one of equal weights, whose rotation is a single spike; trained weights hardly ever are, and the signs are left out.

Source: QuIP# (arXiv 2402.04396), section 3; QuaRot (arXiv 2404.00456), section 4.
"""

from dataclasses import replace

import torch

from qlearn.methods.affine import absmax, zero_point
from qlearn.methods.blocking import check_weight
from qlearn.rotation import hadamard as rotate
from qlearn.rotation import largest_size


def hadamard(weight, bits=4, group_size=None, *, size=None, sym=False, clip="minmax", scale_dtype=torch.float16):
    """Quantize a matrix whose rows have been rotated.

    weight: (rows, columns), floating point.  bits, group_size, clip, scale_dtype: as for `zero_point`.
    size: how many consecutive weights are rotated together, a power of two that divides the columns; None takes the
    largest there is, 256 for a row of 768.
    sym: False for the grids of `zero_point`, True for those of `absmax`.
    Returns a QuantizedTensor that rotates back in `dequantize`.
    Raises ValueError as those methods do, and for a size that is no power of two or does not divide.

    >>> weight = torch.tensor([[0.1, -0.2, 0.1, 2.0, -0.1, 0.1, 0.3, -0.1]])
    >>> errors = [weight - method(weight, bits=3).dequantize() for method in (zero_point, hadamard)]
    >>> [round(error.square().mean().item(), 4) for error in errors]
    [0.0095, 0.0052]
    """
    weight = check_weight(weight)
    size = largest_size(weight.shape[1]) if size is None else size
    method = absmax if sym else zero_point
    quantized = method(rotate(weight, size), bits, group_size, clip=clip, scale_dtype=scale_dtype)
    return replace(quantized, hadamard=size)
