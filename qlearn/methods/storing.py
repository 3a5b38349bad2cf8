"""Scales and zeros, rounded to the type they are stored in.

A method finds them in float32. Stored, a scale is a float16, or whatever the method was told, and the nearest value is
taken: what matters is how far off a weight ends up, and 11 significant bits move it by 1/2048 of itself at most.
(`absmax` and `zero_point` round up instead, to keep their bound of half a step: `affine.store_scale`.)

**In 8 bits**, as SINQ's package has it, they take less: scales are laid out in 32 rows, and each column of that table,
scales that are far apart in the matrix, is stored as zero-point would store it, with a step and a minimum of its own:

    scale = code · step + minimum        step = (max − min) / 255        (8 + 64 / 32) bits a scale instead of 16

Zeros do with one step and one minimum for all. Steps and minima are float32: a step is a 255th of a difference of
scales, about 4e-6, and float16 has only 67 numbers up to there.
"""

import torch

from qlearn.formats.integers import Integers
from qlearn.scales import QuantizedScales

ROWS = 32  # scales that share a step
UINT8 = Integers(8, signed=False)


def stored(x, dtype, what="scale", option="scale_dtype"):
    """x, float32, as the nearest values of a float type.

    Raises ValueError, which says `what` it was and which option would help, when a value is beyond the type's range.

    >>> stored(torch.tensor([0.1, 3.0]), torch.float16).tolist()
    [0.0999755859375, 3.0]
    """
    largest = x.abs().max()
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"a {what} of {largest.item():.3g} does not fit {dtype}; pass {option}=torch.float32")
    return x.to(dtype)


def integral_zeros(zeros, qmax):
    """Integer zero-points, float32, as they are stored: as small as they can be without changing one.

    Inside the grid 0 ... qmax they become uint8, which `QuantizedTensor` packs like codes. A group that does not
    contain the number 0 has its zero outside; then all of them are float16, or float32 if that is not exact.

    >>> [integral_zeros(torch.tensor([z, 7.0]), qmax=15).dtype for z in (0.0, -3.0, -4097.0)]
    [torch.uint8, torch.float16, torch.float32]
    """
    if ((zeros >= 0) & (zeros <= qmax)).all():
        return zeros.to(torch.uint8)
    half = zeros.half()
    return half if (half.float() == zeros).all() else zeros


def eight_bit_scales(scales):
    """Scales (block rows, block columns), float32, in 8 bits, 32 to a step: QuantizedScales.

    >>> eight_bit_scales(torch.tensor([[1.0, 1.2, 1.5, 2.0]])).float()
    tensor([[1.0000, 1.2000, 1.4980, 2.0000]])
    """
    return _eight_bits(scales, (ROWS, -(-scales.numel() // ROWS)))


def eight_bit_zeros(zeros):
    """Zeros (block rows, block columns), float32, in 8 bits with one step for all: QuantizedScales."""
    return _eight_bits(zeros, (zeros.numel(), 1))


def _eight_bits(x, layout):
    """A table in a layout, each of whose columns has its own step and minimum; missing places repeat the last entry."""
    flat = x.flatten()
    missing = layout[0] * layout[1] - flat.numel()
    table = torch.cat([flat, flat[-1:].expand(missing)]).view(layout)
    minimum = table.amin(0, keepdim=True)
    step = (table.amax(0, keepdim=True) - minimum) / 255
    codes = ((table - minimum) / torch.where(step == 0, 1, step)).round().clamp(0, 255).to(torch.uint8)
    codes = codes.flatten()[: flat.numel()].view(x.shape)
    return QuantizedScales.from_codes(codes, UINT8, step, minimum, layout)
