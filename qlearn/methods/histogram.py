"""How often each magnitude occurs: a histogram that need not know its range in advance.

Calibration sees a layer's inputs batch by batch and cannot keep them all. A histogram of their magnitudes is small,
and most questions about a range can be put to it afterwards. But its bins have to be laid out before the data are
known, and the next batch may hold a value beyond the last bin.

So the range is a power of two, and **it doubles** when a larger value arrives: two neighbouring bins become one, which
makes room for as many again.

    range 4      | 3 | 0 | 7 | 1 |                     bins one wide
    range 8      |   3   |   8   |   0   |   0   |     bins two wide: nothing seen so far reaches them

This loses nothing that a histogram of the final range would have known. A value in bin k of the narrow one belongs to
bin k // 2 of the wide one, and because the width of a bin is a power of two, value / width is computed without any
rounding. So the counts are exactly those that one pass over everything would give, in whatever order the batches came.

The range is the smallest power of two above the largest magnitude, which therefore lies in the upper half: of 2,048
bins at least 1,024 are within reach of the data. A single giant among small numbers widens the bins all the same, and
then the small ones share a few. That is a limit of every histogram with bins of one width.
"""

import math

import torch


class Histogram:
    """Counts of magnitudes |x|, in `bins` bins of one width between 0 and a power of two.

    counts: int64 (bins,); bin k counts k * width <= |x| < (k + 1) * width, but for exact zeros.
    zeros: how many were exactly 0; they are on every grid that is symmetric, so no choice of a range affects them.
    peak: the largest magnitude, exactly.  width: of a bin; None before anything but zeros was added.

    >>> histogram = Histogram(bins=4)
    >>> histogram.add(torch.tensor([0.5, -0.7, 2.5, 3.0])), histogram.counts.tolist(), histogram.width
    (None, [2, 0, 1, 1], 1.0)
    >>> histogram.add(torch.tensor([-5.0, 0.0])), histogram.counts.tolist(), histogram.width, histogram.peak
    (None, [2, 2, 1, 0], 2.0, 5.0)
    """

    def __init__(self, bins=2048):
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"bins={bins} is no power of two, which merging in pairs needs; choose 2048")
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.zeros = 0
        self.peak = 0.0
        self._exponent = None  # the range is 2 ** exponent

    def add(self, x):
        """Count the elements of a floating-point tensor of any shape.

        Raises ValueError for one that holds NaN or infinity; it is not counted then.
        """
        magnitudes = x.detach().flatten().float().abs()
        peak = magnitudes.max().item() if len(magnitudes) else 0.0
        if not math.isfinite(peak):
            broken = int((~torch.isfinite(magnitudes)).sum())
            raise ValueError(f"{broken} of {x.numel()} values are NaN or infinite; find the layer that made them first")
        zeros = len(magnitudes) - int(magnitudes.count_nonzero())
        self.zeros += zeros
        if peak:
            self._widen_for(peak)
            self.peak = max(self.peak, peak)
            self.counts += torch.bincount(self._bins_of(magnitudes), minlength=len(self.counts)).cpu()
            self.counts[0] -= zeros

    @property
    def width(self):
        """The width of a bin, a power of two."""
        return None if self._exponent is None else math.ldexp(1 / len(self.counts), self._exponent)

    @property
    def total(self):
        """How many elements were added, zeros included."""
        return self.zeros + int(self.counts.sum())

    @property
    def occupied(self):
        """How many bins there are up to the last one that is not empty."""
        return int(self.counts.nonzero().max()) + 1 if self.counts.any() else 0

    def _bins_of(self, magnitudes):
        """Magnitudes / width, rounded down. In two steps, as one power of two may be beyond float32."""
        power = -round(math.log2(self.width))
        return (magnitudes * 2.0 ** (power // 2)).mul_(2.0 ** (power - power // 2)).int()

    def _widen_for(self, peak):
        """Merge bins until the range is beyond `peak`."""
        exponent = math.frexp(peak)[1]  # the smallest with peak < 2 ** exponent
        if self._exponent is None:
            self._exponent = exponent
        if exponent > self._exponent:
            together = min(2 ** (exponent - self._exponent), len(self.counts))
            merged = self.counts.view(-1, together).sum(1)
            self.counts = torch.cat([merged, merged.new_zeros(len(self.counts) - len(merged))])
            self._exponent = exponent
