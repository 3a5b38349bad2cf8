"""Microscaling: numbers of four to eight bits, and one small scale for each short block of them.

A format of four bits reaches from 0.5 to 6, and no tensor lies there by itself. So consecutive numbers are cut into
blocks, and each block gets a scale of eight bits that moves it onto the grid:

    number = element * scale                       MX formats: the scale is a power of two (E8M0), for 32 numbers
    number = element * scale * tensor scale        NVFP4: the scale is an E4M3, for 16; one float32 for the whole tensor

    name                     element         numbers to a block     bits, scale counted
    mxfp8_e4m3, mxfp8_e5m2   E4M3 or E5M2    32                     8.25
    mxfp6_e3m2, mxfp6_e2m3   E3M2 or E2M3    32                     6.25
    mxfp4                    E2M1            32                     4.25
    mxint8                   fixed point     32                     8.25
    nvfp4                    E2M1            16                     4.5

**The scale of an MX block.** Let 2**emax be the largest power of two among the elements, 4 for E2M1. The standard puts
the largest magnitude of the block, amax, into the element's top binade:

    floor   X = 2**(floor(log2 amax) - emax)

For E2M1 that leaves amax / X in [4, 8), and the grid ends at 6: what lies beyond is cut off. Doubling X avoids that, at
the price of coarser steps for all others. Each further rule says when to double:

    ceil    if amax is not a power of two itself
    even    if amax, rounded to the element's mantissa, becomes the next power of two
    rceil   if amax / X is beyond the largest element, so that nothing is ever cut off (NVIDIA's)
    ggml    if log2 amax, rounded to float32, is the next whole number
    mse     X / 2, X and 2 X are tried on each block, and the one with the smallest squared error is kept

          amax    4    5    6.5    7    8        X for E2M1
    floor         1    1    1      1    2
    ceil          1    2    2      2    2
    even          1    1    1      2    2
    rceil         1    1    2      2    2

**Ties.** Elements are the nearest of the grid; implementations differ in a number exactly between two, and numbers that
were bfloat16 before are there often:

    even    to the even code: IEEE 754's rule, that of ml_dtypes, of torchao and of the hardware
    away    away from zero: microxcaling
    down    toward zero: Quartet, whose thresholds have to be exceeded
    ggml    toward zero too; and what becomes zero becomes +0, the first of two equal entries in ggml's list

scale_rule="ggml" and ties="ggml" together are the MXFP4 blocks of llama.cpp (`gguf_blocks/mxfp4.py`).

**NVFP4.** A power of two can miss what a block wants by almost a factor of two, an E4M3 by 6 %. But E4M3 ends at 448,
hence the tensor scale, amax of the tensor / (448 * 6), with which the scale of the largest block becomes 448:

    nearest   scale = E4M3(amax / 6 / tensor scale), at least 2**-9, the smallest that there is
    mse       that one, the two below and the five above it, up to half as much again, are tried on each block

It is computed in float32 in the order of torchao, scales as (amax / 6) / t, elements as x * ((1 / t) / scale), so that
the codes are the same; t is kept at 2**-118 or more, for its inverse has to be a float32.

**MXINT8** has fixed-point elements, two's complement with six bits behind the point: -127/64 ... 127/64. The standard
leaves it to the implementation whether -2, the code of -128, is used; here it is not, so that the grid is symmetric. It
is read as -2 where it occurs.

**The ends.** A block of zeros has the scale code 0, 2**-127. So has a block too small for anything else; its numbers
are rounded at that scale. The largest scale is 2**127 / 2**emax, the one that "floor" gives to the largest float32:
beyond it, a finite number could come back infinite. Larger numbers (float64) become the largest of the grid. Infinity
and NaN are refused: no scale suits a block that holds one.

By hand, a block of 32 with amax = 6.5. By "floor" X is 1: 6.5 is cut off to 6, and 5 and 0.75, halfway between two
numbers of the grid, go to those with even codes. By "rceil" X is 2: 6.5 / 2 is rounded to 3, which is 6 again, and 0.3
is lost. So not to cut off is not always better:

>>> block = [6.5, 5.0, -3.1, 0.75, 0.3] + [0.0] * 27
>>> codes, scales = MXFP4.quantize(block)
>>> codes[:6].tolist(), scales.tolist(), MXFP4.dequantize(codes, scales)[:5].tolist()
([7, 6, 13, 2, 1, 0], [127], [6.0, 4.0, -3.0, 1.0, 0.5])
>>> MXFP4.round(block, scale_rule="rceil")[:5].tolist()
[6.0, 4.0, -3.0, 1.0, 0.0]
>>> MXFP4.round(block, ties="away")[:5].tolist()
[6.0, 6.0, -3.0, 1.0, 0.5]

The squared error of normally distributed numbers, in percent of their mean square; each row of 32 is multiplied by a
number between 1 and 2, lest all blocks lie alike between two powers of two:

>>> random = np.random.RandomState(0)
>>> x = random.standard_normal((2**12, 32)) * 2 ** random.rand(2**12, 1)
>>> def error(format, rule):
...     return float(round(100 * np.mean((format.round(x, rule) - x) ** 2) / np.mean(x**2), 2))
>>> {rule: error(MXFP4, rule) for rule in ("floor", "ceil", "even", "rceil", "mse")}
{'floor': 1.35, 'ceil': 2.02, 'even': 1.26, 'rceil': 1.37, 'mse': 1.25}
>>> {rule: error(NVFP4, rule) for rule in ("nearest", "mse")}
{'nearest': 0.89, 'mse': 0.66}

Sources: OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3; Rouhani et al., Microscaling Data Formats
for Deep Learning (arXiv 2310.10537); "even", "ceil" and "rceil" as torchao's ScaleCalculationMode has them, "rceil" as
computed by the hardware, not through a logarithm; NVIDIA, Pretraining Large Language Models with NVFP4 (arXiv
2509.25149).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qlearn.formats.arrays import as_floats, to_numpy
from qlearn.formats.base import Format
from qlearn.formats.fixed_point import MX_INT8
from qlearn.formats.floats import E8M0, FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3FN, FP8_E5M2, FloatFormat

TIES = ("even", "away", "down", "ggml")
AT_A_TIME = 1 << 16  # numbers that are worked on together; a million take 60 ms, or half a second by NVFP4's mse
SMALLEST_TENSOR_SCALE = 2.0**-118  # divided into 1 and by 2**-9, the smallest E4M3, it is 2**127

# When a power-of-two scale is twice that of "floor". amax (m,) float64 = significand * 2**power, significand in [1, 2).
DOUBLED = {
    "floor": lambda amax, significand, power, element: np.zeros(amax.shape, bool),
    "ceil": lambda amax, significand, power, element: significand > 1,
    "even": lambda amax, significand, power, element: significand >= 2 - 2.0 ** -(element.mantissa_bits + 1),
    "rceil": lambda amax, significand, power, element: significand > math.frexp(element.max)[0] * 2,
    "ggml": lambda amax, significand, power, element: np.log2(amax).astype(np.float32) >= power + 1,
}


@dataclass(frozen=True)
class BlockFormat:
    """Elements in blocks with a scale each; the top of this file says how it is found.

    element: the Format of the numbers.  block_size: how many consecutive ones along the last axis share a scale.
    scale: the FloatFormat of the scales. With E8M0 they are powers of two; else there is a scale for the tensor, too.

    >>> NVFP4.bits_per_element, NVFP4.scale_rules, NVFP4.has_tensor_scale
    (4.5, ('nearest', 'mse'), True)
    """

    name: str
    element: Format
    block_size: int = 32
    scale: FloatFormat = E8M0

    @property
    def bits_per_element(self):
        """Bits for each number, its share of the block's scale counted; the 32 bits of a tensor scale are not."""
        return self.element.bits + self.scale.bits / self.block_size

    @property
    def has_tensor_scale(self):
        """Whether there is a float32 for the whole tensor: where the scales are no mere powers of two."""
        return self.scale != E8M0

    @property
    def scale_rules(self):
        """The names of the rules that find a scale, the default first."""
        return ("nearest", "mse") if self.has_tensor_scale else (*DOUBLED, "mse")

    # ---- numbers to codes and back -----------------------------------------------------------------------------------

    @np.errstate(over="ignore")
    def quantize(self, x, scale_rule=None, ties="even", tensor_scale=None):
        """Return the codes of the elements and of the scales.

        x: finite numbers (..., n), n a multiple of the block size; list, NumPy array or torch tensor.
        scale_rule: one of `scale_rules`; None for the first.  ties: "even", "away", "down" or "ggml".
        tensor_scale: a positive number to be used instead of the one that suits x; only where there is one.
        Returns (codes, uint8 of the shape of x; scales, uint8 (..., n / block size)), and with a tensor scale that as
        a third, float32 without dimensions. Unpacked: `element.pack` packs codes, a scale is a byte.
        Raises ValueError for rows that do not divide into blocks, numbers that are not finite, and unknown names.

        >>> codes, scales, tensor_scale = NVFP4.quantize(np.float32([448.0 * 6] * 16 + [3.0] * 16))
        >>> codes[[0, 16]].tolist(), scales.tolist(), float(tensor_scale)
        ([7, 7], [126, 48], 1.0)
        """
        rule = self._check_names(scale_rule, ties)
        array, restore = to_numpy(x)
        blocks = self._blocks(array)
        tensor_scale = self._tensor_scale(blocks, tensor_scale)
        codes = np.empty(blocks.shape, np.uint8)
        scales = np.empty(len(blocks), np.uint8)
        step = AT_A_TIME // self.block_size
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            codes[part], scales[part] = self._search(blocks[part], rule, ties, tensor_scale)
        scales = scales.reshape(*array.shape[:-1], array.shape[-1] // self.block_size)
        found = codes.reshape(array.shape), scales, np.float32(tensor_scale)
        return tuple(restore(part) for part in found[: 2 + self.has_tensor_scale])

    @np.errstate(over="ignore", invalid="ignore")  # of codes that `quantize` does not write
    def dequantize(self, codes, scales, tensor_scale=None):
        """Return the numbers, float32 of the shape of the codes: the inverse of `quantize`; tensors on any device.

        The scale code 255 is NaN, and makes its block NaN. Raises ValueError for codes and scales that do not belong
        together, and for a tensor scale that is missing or not wanted.

        >>> MXINT8.dequantize([64] * 31 + [129], [128])[[0, 31]].tolist()            # 1.0 and -127/64, times 2
        [2.0, -3.96875]
        """
        if (tensor_scale is not None) != self.has_tensor_scale:
            what = "needs the tensor_scale that quantize returned" if self.has_tensor_scale else "has no tensor_scale"
            raise ValueError(f"{self.name} {what}: dequantize(*quantize(x)) gives each what it takes")
        values, steps = self.element.decode(codes), self.scale.decode(scales)
        shape = tuple(np.shape(values))
        if not shape or tuple(np.shape(steps)) != (*shape[:-1], shape[-1] / self.block_size):
            raise ValueError(
                f"codes of shape {shape} and scales of shape {tuple(np.shape(steps))} do not belong together: "
                f"{self.name} has a scale for {self.block_size} codes"
            )
        steps = steps if tensor_scale is None else steps * float(tensor_scale)
        return (values.reshape(*steps.shape, self.block_size) * steps[..., None]).reshape(shape)

    def round(self, x, scale_rule=None, ties="even", tensor_scale=None):
        """Return the numbers that x becomes, float32: dequantize(*quantize(x, ...))."""
        return self.dequantize(*self.quantize(x, scale_rule, ties, tensor_scale))

    # ---- the arithmetic, on NumPy arrays: x float32 or float64 (blocks, block size), scales uint8 (blocks,) ----------

    def _search(self, x, rule, ties, tensor_scale):
        """(codes, scales) of some blocks."""
        scales = self._scales(abs(x).max(-1), rule, tensor_scale)
        codes = self._elements(x, scales, ties, tensor_scale)
        if rule == "mse":
            first, least = scales, self._errors(x, codes, scales, tensor_scale)
            for step in (-2, -1, 1, 2, 3, 4, 5) if self.has_tensor_scale else (-1, 1):
                tried = np.clip(first.astype(int) + step, *self._scale_range).astype(np.uint8)
                elements = self._elements(x, tried, ties, tensor_scale)
                errors = self._errors(x, elements, tried, tensor_scale)
                better = errors < least
                scales, least = np.where(better, tried, scales), np.where(better, errors, least)
                codes = np.where(better[:, None], elements, codes)
        return codes, scales

    @np.errstate(divide="ignore")
    def _scales(self, amax, rule, tensor_scale):
        """The codes of the scales by any rule; by "mse", those that its search begins with."""
        if self.has_tensor_scale:
            wanted = amax / np.float32(self.element.max) / tensor_scale
            return np.clip(self.scale.encode(wanted, overflow="saturate"), *self._scale_range)
        amax = amax.astype(np.float64)
        significand, power = np.frexp(amax)
        significand, power = 2 * significand, np.where(amax > 0, power - 1, -(2**15))
        power = power + DOUBLED["floor" if rule == "mse" else rule](amax, significand, power, self.element)
        return np.clip(power - self._emax + self.scale.bias, *self._scale_range).astype(np.uint8)

    def _elements(self, x, scales, ties, tensor_scale):
        """The codes of the elements."""
        if self.has_tensor_scale:
            x = x * (1 / tensor_scale / self.scale.decode(scales))[:, None]
        else:
            x = np.ldexp(x.astype(np.float64), self.scale.bias - scales[:, None].astype(int))
        return self._nearest(np.clip(x, -self.element.max, self.element.max), ties)

    def _nearest(self, x, ties):
        """The codes of the nearest numbers; x is within the ends of the grid."""
        if ties == "even":
            return self.element.encode(x)
        places = np.searchsorted(self._midpoints, abs(x), side="right" if ties == "away" else "left")
        numbers = np.copysign(self._magnitudes[places], x)
        return self.element.encode(numbers + 0.0 if ties == "ggml" else numbers)  # -0 + 0 is +0

    def _errors(self, x, codes, scales, tensor_scale):
        """The sum of the squared errors of each block, float64 (blocks,)."""
        steps = self.scale.decode(scales).astype(np.float64) * tensor_scale
        return ((self.element.decode(codes) * steps[:, None] - x) ** 2).sum(-1)

    @cached_property
    def _emax(self):
        """The exponent of the largest power of two among the elements."""
        return math.frexp(self.element.max)[1] - 1

    @cached_property
    def _scale_range(self):
        """The codes of the smallest and of the largest scale."""
        return (
            (1, self.scale.encode(self.scale.max)) if self.has_tensor_scale else (0, 2 * self.scale.bias - self._emax)
        )

    @cached_property
    def _magnitudes(self):
        """The numbers of the grid from zero upward, float64."""
        numbers = self.element.decode(np.arange(self.element.count)).astype(np.float64)
        return np.unique(abs(numbers[(numbers >= 0) & (numbers <= self.element.max)]))

    @cached_property
    def _midpoints(self):
        return (self._magnitudes[:-1] + self._magnitudes[1:]) / 2

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _check_names(self, scale_rule, ties):
        """The scale rule."""
        if scale_rule not in (None, *self.scale_rules):
            raise ValueError(
                f"scale_rule {scale_rule!r} is unknown for {self.name}: choose from {', '.join(self.scale_rules)}"
            )
        if ties not in TIES:
            raise ValueError(f"ties {ties!r} is unknown: choose from {', '.join(TIES)}")
        return scale_rule or self.scale_rules[0]

    def _blocks(self, array):
        """Finite numbers (blocks, block size); float32 where there is a tensor scale, else float32 or float64."""
        if array.ndim == 0 or array.shape[-1] % self.block_size:
            raise ValueError(
                f"numbers of shape {array.shape} do not divide into blocks of {self.block_size} along the last axis: "
                "pad them, or choose another format"
            )
        floats = as_floats(array)
        floats = floats.astype(np.float32) if self.has_tensor_scale else floats
        broken = ~np.isfinite(floats)
        if broken.any():
            place = tuple(int(i) for i in np.argwhere(broken)[0])
            raise ValueError(
                f"{int(broken.sum())} of {floats.size} numbers are not finite, first {floats[place]} at {place}: "
                f"{self.name} has no scale for their blocks, mend them first"
            )
        return floats.reshape(-1, self.block_size)

    def _tensor_scale(self, blocks, given):
        """The scale of the tensor, float32; 1 where there is none."""
        if given is None:
            if not self.has_tensor_scale:
                return np.float32(1)
            given = abs(blocks).max(initial=0) / np.float32(self.scale.max * self.element.max)
            return np.float32(given).clip(SMALLEST_TENSOR_SCALE) if blocks.any() else np.float32(1)
        if not self.has_tensor_scale:
            raise ValueError(f"{self.name} has no tensor_scale: leave it out")
        number = to_numpy(given)[0].astype(np.float32)
        if number.ndim or not SMALLEST_TENSOR_SCALE <= number < np.inf:
            raise ValueError(f"tensor_scale {given} is out of range: give a number from 2**-118 up, or None")
        return number[()]


MXFP8_E4M3 = BlockFormat("mxfp8_e4m3", FP8_E4M3FN)
MXFP8_E5M2 = BlockFormat("mxfp8_e5m2", FP8_E5M2)
MXFP6_E3M2 = BlockFormat("mxfp6_e3m2", FP6_E3M2)
MXFP6_E2M3 = BlockFormat("mxfp6_e2m3", FP6_E2M3)
MXFP4 = BlockFormat("mxfp4", FP4_E2M1)
MXINT8 = BlockFormat("mxint8", MX_INT8)
NVFP4 = BlockFormat("nvfp4", FP4_E2M1, block_size=16, scale=FP8_E4M3FN)

BLOCK_FORMATS = {f.name: f for f in (MXFP8_E4M3, MXFP8_E5M2, MXFP6_E3M2, MXFP6_E2M3, MXFP4, MXINT8, NVFP4)}
