"""Observers: choosing the range of a tensor whose values are not there yet.

A weight can be looked at before it is quantized. The inputs of a layer cannot: they come with the text. So a few
batches of typical text are run through the model, an observer watches what passes, and then names one range for all
that will ever pass. Larger values will be clipped to its end. That is *static* quantization; the alternative,
*dynamic*, looks at each input as it comes and pays for it at run time.

All ranges here are symmetric, -limit ... limit, and scale = limit / (2**(bits - 1) - 1). What differs is the limit:

    minmax       the largest magnitude seen. Nothing is clipped, and one giant makes the grid coarse for everyone.
    percentile   the magnitude that 99.99 % of the values do not exceed. The rest is clipped, however large.
    mse          the limit with the smallest squared error, of clipping and rounding together.
    entropy      the limit at which the quantized values are distributed most like the original ones.

The last three work on a histogram (`histogram.py`), so the data need not be kept.

**mse.** A histogram does not know where in its bin a value lies. Taken as spread evenly over [a, b], with both ends
measured in steps of the grid, the mean squared error of a bin is an integral with a closed form:

    (F(b) - F(a)) / (b - a)      with F(t) = n / 12 + (t - n)**3 / 3      and n = min(round(t), qmax)

1/12 is the integral over one step that is rounded; beyond qmax the cube is the clipping. A hundred limits, 100 % to
1 % of the largest value, are tried, as `clip="mse"` of `affine.py` does.

**entropy** is TensorRT's calibration (S. Migacz, "8-bit inference with TensorRT", GTC 2017). For each number of bins i,
from as many as there are levels (128 at 8 bits) up to all that are occupied:

    P    the counts of the first i bins; everything beyond is added to the last of them, as clipping would do
    Q    the counts of the first i bins, cut into 128 levels; each level's sum is spread evenly over its bins, but
         only over those that are not empty, as no value was ever there. What was beyond is missing from Q.
    KL   sum of p log(p / q) after both are divided by their sums

and the i with the smallest divergence wins; the limit is where its last bin ends. The traps:

* Where the i-th bin is empty, clipping puts values where Q has none, and the divergence is infinite: such an i is out.
  (Other programs replace the zeros of Q by a small constant, and then the constant decides.)
* At i = 128 each level is one bin, so rounding seems to cost nothing. The method cannot see into a bin.
* Exact zeros would make the first bin a tower, which a merged level spreads out at great apparent cost. But 0 is on
  every grid. So they are not counted; TensorRT's followers overwrite the first bin instead.
* It asks how *often* values occur, not how large they are. A rare value that carries much of a layer's output counts
  for little. In a network for images that is mostly right; in a language model it is the outliers' undoing.
"""

import math

import torch

from qlearn.methods.affine import FRACTIONS
from qlearn.methods.histogram import Histogram


class Observer:
    """What all observers share: `observe` batches, then ask for the `limit` or the `scale`. This one covers everything.

    >>> observer = MinMax().observe(torch.tensor([0.5, -2.0])).observe(torch.tensor([1.0]))
    >>> observer.limit(), observer.scale(bits=3)
    (2.0, 0.6666666666666666)
    """

    def __init__(self):
        self.histogram = Histogram()

    def observe(self, x):
        """Look at a batch: a floating-point tensor of any shape; an empty one changes nothing.  Returns the observer.

        Raises ValueError for a tensor that is not floating point or holds NaN or infinity.
        """
        if not x.is_floating_point():
            raise ValueError(f"an observer watches floating-point values, not {x.dtype}; show it the layer's inputs")
        self.histogram.add(x)
        return self

    def limit(self, bits=8):
        """The magnitude at which the range ends, a float; 0 when only zeros were seen.

        Raises ValueError when nothing was observed, and for bits other than 2 ... 8.
        """
        if bits not in range(2, 9):
            raise ValueError(f"bits={bits} is out of range; these grids have 2 to 8 bits")
        if not self.histogram.total:
            raise ValueError("nothing was observed yet; run calibration text through the model first")
        return min(self._choose(bits), self.histogram.peak) if self.histogram.peak else 0.0

    def scale(self, bits=8):
        """The distance between two neighbouring values of the grid; 1 when only zeros were seen."""
        return self.limit(bits) / (2 ** (bits - 1) - 1) or 1.0

    def _choose(self, bits):
        raise NotImplementedError


class MinMax(Observer):
    """The largest magnitude."""

    def _choose(self, bits):
        return self.histogram.peak


class Percentile(Observer):
    """The magnitude that `percentile` percent of the values, zeros included, do not exceed; up to one bin more.

    >>> Percentile(90.0).observe(torch.arange(1.0, 101.0)).limit()      # bins of 128 / 2048
    90.0625
    """

    def __init__(self, percentile=99.99):
        super().__init__()
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile} is no percentage; choose from above 0 to 100")
        self.percentile = percentile

    def _choose(self, bits):
        rank = -int(-self.percentile * self.histogram.total // 100) - self.histogram.zeros  # nearest rank
        bins = int(torch.searchsorted(self.histogram.counts.cumsum(0), rank)) + 1
        return bins * self.histogram.width


class MSE(Observer):
    """The limit with the smallest mean squared error.

    >>> normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> round(MSE().observe(normal).limit(bits=4), 1)        # clips at two and a half standard deviations
    2.5
    """

    def _choose(self, bits):
        limits = FRACTIONS.double() * self.histogram.peak
        return limits[histogram_mse(self.histogram, limits, bits).argmin()].item()


class Entropy(Observer):
    """The limit with the smallest Kullback-Leibler divergence, as TensorRT chooses it."""

    def _choose(self, bits):
        levels = 2 ** (bits - 1)
        divergences = histogram_divergences(self.histogram.counts[: self.histogram.occupied], levels)
        return (levels + int(divergences.argmin())) * self.histogram.width


OBSERVERS = {"minmax": MinMax, "percentile": Percentile, "mse": MSE, "entropy": Entropy}


def make_observer(name, **options):
    """A fresh observer by name.  options: its own.  Raises ValueError for an unknown name.

    >>> make_observer("percentile", percentile=99.0).percentile
    99.0
    """
    if name not in OBSERVERS:
        raise ValueError(f"observer {name!r} is unknown; choose from {', '.join(OBSERVERS)}")
    return OBSERVERS[name](**options)


def histogram_mse(histogram, limits, bits):
    """Mean squared error of a symmetric `bits`-bit grid for each limit, values taken as spread evenly in their bins.

    limits: float64 (candidates,), positive.  Returns float64 (candidates,), in the squared unit of the data.
    """
    qmax = 2 ** (bits - 1) - 1
    steps = limits[:, None] / qmax
    edges = torch.arange(histogram.occupied + 1) * histogram.width / steps  # (candidates, bins + 1), in steps
    nearest = edges.round().clamp(max=qmax)
    integral = nearest / 12 + (edges - nearest) ** 3 / 3
    errors = integral.diff(dim=1) / edges[:, 1:2] * steps**2  # edges[:, 1] is the width of a bin
    return (errors * histogram.counts[: histogram.occupied]).sum(1) / histogram.total


def histogram_divergences(counts, levels):
    """KL(P || Q) of the page above for i = levels ... len(counts), in nats; infinite where bin i is empty.

    counts: integers (bins,), the last one not zero, at least `levels` bins.  Returns float64 (bins - levels + 1,).

    Nothing is spread out here. Q is constant on the bins of a level, so its part of the sum needs, for each level,
    only the sum S of the counts and the number N of bins that are not empty:

        sum of P log P  -  sum over levels of S log(S / N)  -  clipped * log(S / N) of the last level

    and sums over ranges of bins are differences of cumulative sums.
    """
    counts = counts.double()
    ends = torch.arange(levels, len(counts) + 1)  # (candidates,)
    borders = -(-torch.arange(levels + 1) * ends[:, None] // levels)  # (candidates, levels + 1), rounded up
    sums = _cumulative(counts)[borders].diff(dim=1)
    occupied = _cumulative((counts > 0).double())[borders].diff(dim=1)
    level_logs = torch.where(sums > 0, sums / occupied.clamp(min=1), 1.0).log()

    total, kept, last = counts.sum(), _cumulative(counts)[ends], counts[ends - 1]
    clipped = total - kept
    p_log_p = _cumulative(torch.xlogy(counts, counts))[ends - 1] + torch.xlogy(last + clipped, last + clipped)
    p_log_q = (sums * level_logs).sum(1) + clipped * level_logs[:, -1]
    divergences = (p_log_p - p_log_q) / total - total.log() + kept.log()
    return torch.where((last == 0) & (clipped > 0), math.inf, divergences)


def _cumulative(values):
    """Sums of the first 0, 1, ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
