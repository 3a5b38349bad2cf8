"""What becomes of a matrix before a low-precision unit multiplies it: one class for each way to round.

A quantizer takes a matrix and rounds it along its last axis, the one that the product sums over, since the numbers that
share a scale have to meet in the same sum. It gives back three things:

    values    the rounded numbers, each of which bfloat16 holds exactly
    factor    a number that the product is multiplied by afterwards, or None: a scale of the whole matrix
    mask      where the gradient passes, or None for everywhere

Multiplying `values` with bfloat16 units that sum in float32 gives what a unit for the small format would give: this is
an emulation in what it computes, and is exact but for the order of the sums. It is no emulation of speed.

    MXFP4            groups of 32 share a power of two; the largest number sets it
    QuEST            the same, but the scale is the one with the smallest error on a bell curve, so a few numbers are
                     cut off; and those, which no longer move, get no gradient: the *trust mask*
    Unclipped        for gradients: scaled by a further 3/4, so that nothing is cut off, then rounded stochastically
                     or to nearest
    NVFP4            groups of 16, a scale with three bits of mantissa, and one factor for the matrix
    FP8, MXFP8       eight bits, one factor for the matrix or a power of two for each 32
    Int4             fifteen whole numbers and one factor, clipped for the smallest error on a bell curve
    LogFP4           seven powers of two and zero, rounded stochastically so that the mean is right: LUQ

Source: Panferov et al., QuEST, arXiv 2502.05003; Castro et al., Quartet, arXiv 2505.14669; Tseng et al., Training LLMs
with MXFP4, arXiv 2502.20586; Chmiel et al., LUQ, arXiv 2112.10769; OCP Microscaling Formats 1.0; NVIDIA, NVFP4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qlearn.methods.e2m1 import MAX, mx_scale, power_of_two, round_e2m1, round_e2m1_stochastically

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
GAUSSIAN_CLIP = {"fp4": 2.92247856, "int4": 2.51393}  # standard deviations at which to cut off, for the smallest error
TINY = 1e-30


class Rounded(NamedTuple):
    """What a quantizer returns; see the top of this file."""

    values: torch.Tensor
    factor: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def numbers(self):
        """The numbers that are meant: values times factor."""
        return self.values if self.factor is None else self.values * self.factor


@dataclass(frozen=True)
class MXFP4:
    """Scale 2**(floor(log2 amax) - 2), nearest number: the rule of the OCP specification.

    >>> MXFP4(group=4)(torch.tensor([[0.1, 0.2, -0.3, 0.75]])).values       # the scale is 2**(-1 - 2) = 1/8
    tensor([[ 0.1250,  0.1875, -0.2500,  0.7500]])
    """

    group: int = 32
    ties: str = "even"

    def __call__(self, x):
        groups = _groups(x, self.group)
        scale = mx_scale(groups.abs().amax(-1, keepdim=True))
        return Rounded((round_e2m1(groups / scale, self.ties) * scale).view(x.shape))


@dataclass(frozen=True)
class QuEST:
    """The clip with the smallest expected error on a normal distribution, as a power of two, and the trust mask.

    exponent: how the scale becomes a power of two. With "nearest" the error on Gaussian numbers is the published one,
    1.32e-2 of their square, averaged over an octave of standard deviations; "floor" gives 2.2e-2.

    >>> x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    >>> values, _, mask = QuEST()(x)
    >>> round(float((values - x).square().mean()), 4), round(float(mask.float().mean()), 3)
    (0.0127, 0.997)
    """

    group: int = 32
    ties: str = "down"
    exponent: str = "nearest"

    def __call__(self, x):
        groups = _groups(x, self.group)
        deviation = groups.std(-1, keepdim=True, correction=0)
        scale = power_of_two(deviation * (GAUSSIAN_CLIP["fp4"] / MAX) + 1e-8, self.exponent)
        scaled = groups / scale
        mask = (scaled.abs() < MAX).view(x.shape)
        return Rounded((round_e2m1(scaled, self.ties) * scale).view(x.shape), None, mask)


@dataclass(frozen=True)
class Unclipped:
    """For gradients, in which a number that is cut off would be missed for good.

    amax / 2**(floor(log2 amax) - 2) lies in 4 ... 8, and FP4 ends at 6; three quarters of it lie in 3 ... 6. So with
    the scale 4/3 of MXFP4's, nothing is clipped, and stochastic rounding is unbiased. A unit multiplies by 3/4 before
    it rounds, and the product by 16/9 afterwards; here the factor of each matrix is 4/3.

    >>> Unclipped(stochastic=False)(torch.tensor([[7.9] + [0.5] * 31])).numbers()[0, :2]
    tensor([8.0000, 0.6667])
    """

    stochastic: bool = True
    group: int = 32

    def __call__(self, x):
        groups = _groups(x, self.group)
        scale = mx_scale(groups.abs().amax(-1, keepdim=True))
        scaled = groups / scale * 0.75
        rounded = round_e2m1_stochastically(scaled) if self.stochastic else round_e2m1(scaled)
        return Rounded((rounded * scale).view(x.shape), torch.full((), 4 / 3, device=x.device))


@dataclass(frozen=True)
class NVFP4:
    """Groups of 16, each with an E4M3 scale amax / 6, and a factor amax / (448 * 6) for the matrix.

    stochastic: round that way. A scale that is rounded to nearest may come out a sixteenth too small, and cut off the
    largest number of its group, which would bias the result. So with stochastic=True it is made larger by 17/16 first.
    Where E4M3 has no finer scales, in groups 30,000 times smaller than the matrix, a number can still be cut off.
    """

    stochastic: bool = False
    group: int = 16

    def __call__(self, x):
        groups = _groups(x, self.group)
        factor = (x.float().abs().amax() / (448 * MAX)).clamp(min=TINY)
        wanted = groups.abs().amax(-1, keepdim=True) / (MAX * factor)
        wanted = (wanted * (17 / 16) if self.stochastic else wanted).clamp(2**-9, 448)
        scale = wanted.to(torch.float8_e4m3fn).float()
        scaled = groups / (scale * factor)
        rounded = round_e2m1_stochastically(scaled) if self.stochastic else round_e2m1(scaled)
        return Rounded((rounded * scale).view(x.shape), factor)


@dataclass(frozen=True)
class FP8:
    """Eight bits and one factor for the matrix. kind: torch.float8_e4m3fn (3 bits of mantissa) or float8_e5m2 (2)."""

    kind: torch.dtype = torch.float8_e4m3fn

    def __call__(self, x):
        codes, factor = self.codes(x)
        return Rounded(codes.float(), factor)

    def codes(self, x):
        """(the matrix in `kind`, the factor), for units that multiply FP8 themselves."""
        factor = (x.float().abs().amax() / FP8_MAX[self.kind]).clamp(min=TINY)
        return (x.float() / factor).to(self.kind), factor


@dataclass(frozen=True)
class MXFP8:
    """Eight bits, groups of 32 with the smallest power of two under which nothing is cut off.

    The OCP specification rounds that power down, so that a number can be cut off by an eighth of its size, twice the
    largest error of E4M3's own rounding. NVIDIA rounds it up, as is done here.
    """

    kind: torch.dtype = torch.float8_e4m3fn
    group: int = 32

    def __call__(self, x):
        groups, most = _groups(x, self.group), FP8_MAX[self.kind]
        scale = power_of_two(groups.abs().amax(-1, keepdim=True) / most, "ceil")
        return Rounded(((groups / scale).clamp(-most, most).to(self.kind).float() * scale).view(x.shape))


@dataclass(frozen=True)
class Int4:
    """-7 ... 7 and one factor, which clips the matrix where that costs least on a normal distribution.

    >>> Int4()(torch.tensor([[1.0, -1.0, 0.1, 0.5]])).values
    tensor([[ 4., -4.,  0.,  2.]])
    """

    def __call__(self, x):
        deviation = x.float().square().mean().sqrt().clamp(min=TINY)
        factor = deviation * GAUSSIAN_CLIP["int4"] / 7
        return Rounded((x.float() / factor).round().clamp(-7, 7), factor)


@dataclass(frozen=True)
class LogFP4:
    """A sign and one of zero and 2**0 ... 2**6, times a factor; stochastic both between powers and down to zero.

    The largest magnitude of the matrix gets the largest power, so nothing is clipped, and the expected value of each
    number is the number.
    """

    def __call__(self, x):
        factor = (x.float().abs().amax() / 2**6).clamp(min=TINY)
        magnitude = (x.float().abs() / factor).clamp(max=64)
        low = torch.where(magnitude < 1, 0.0, power_of_two(magnitude).clamp(max=64))
        gap = torch.where(magnitude < 1, 1.0, low)  # from a power to the next; from zero to one
        up = torch.rand_like(magnitude) < (magnitude - low) / gap
        return Rounded(torch.copysign(torch.where(up, low + gap, low), x.float()), factor)


def _groups(x, group):
    """(..., n) -> (..., n / group, group), float32; ValueError unless it divides."""
    if x.shape[-1] % group:
        raise ValueError(f"groups of {group} do not divide the {x.shape[-1]} numbers of a row; pad them with zeros")
    return x.float().unflatten(-1, (-1, group))
