"""How ggml finds the scale of a few weights: the readable version.

With the scale s given, the best integer codes l are simply the nearest. With the codes given, the best scale is the one
of least squares. So ggml tries some twenty scales around the obvious one, rounds to the codes of each, lets least
squares say what scale those codes would like to have, and keeps the pair with the smallest error. Errors are weighted:
a weight w says how much an error of x matters.

    fit_scale        w' = s l          s = sum(w x l) / sum(w l l)                                Q3_K, Q6_K, Q4_0, Q5_0
    fit_scale_min    w' = s l - m      two unknowns, two normal equations             Q2_K, Q4_K, Q5_K, Q4_1, Q5_1
    fit_stepwise     w' = s l          from the nearest codes on, change one code at a time if it helps            Q3_K
    fit_positive     w' = s l, x >= 0  the scales of sub-blocks, which become small integers themselves
    round_again      the codes once more, now that the scale has been rounded to what the file can hold

The results are byte for byte those of ggml, and float32 remembers the order in which it is added. So the sums here run
from the first weight to the last, one float32 addition after the other, as ggml's loops do; `np.sum` adds in pairs and
gets other last bits, which now and then tip a comparison. Rounding goes through `nearest`, which is ggml's as well.

Every function takes all sub-blocks at once, (m, n): m sub-blocks of n weights. The loops run over the n weights, and
each of their lines computes m sub-blocks together. A compiled twin of these functions is `qlearn.kernels.cpu.gguf`.

Source: make_qx_quants, make_qkx2_quants, make_qkx3_quants, make_q3_quants, make_qp_quants in ggml/src/ggml-quants.c.
"""

import numpy as np

TINY = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a sub-block whose largest weight is smaller counts as zero
ROUNDING = np.float32(12582912)  # 1.5 * 2**23
OVERFLOWING = np.errstate(over="ignore")  # the product of three sums may; infinity loses every comparison, as in C


def nearest(x):
    """Round float32 to the nearest integer, ties to even, as ggml does: int32 of the same shape.

    Adding 1.5 * 2**23 pushes the fraction off the end of the float32, which rounds it; what is left in the low 23 bits
    is the integer plus 2**22. Beyond +-2**22 the result is nonsense, the same nonsense as ggml's.

    >>> nearest(np.float32([0.5, 1.5, -2.6])).tolist()
    [0, 2, -3]
    """
    shifted = np.asarray(x, dtype=np.float32) + ROUNDING
    return (shifted.view(np.int32) & 0x7FFFFF) - 0x400000


def running_sum(terms):
    """Add the rows of float32 (n, m) one after the other: (m,). See the top of the file for why this is no np.sum."""
    total = np.zeros(terms.shape[1:], np.float32)
    for row in terms:
        total += row
    return total


@OVERFLOWING
def fit_scale(x, w, nmax):
    """Codes and scale of weights that are symmetric about zero: x' = scale * (code - nmax).

    x: float32 (m, n).  w: float32 (m, n), the weights of the errors.  nmax: half the number of codes.
    Returns (codes uint8 (m, n) in 0 ... 2 * nmax - 1, scale float32 (m,)). The codes of a sub-block of zeros are 0, not
    nmax: nothing is stored for it but the scale 0.

    >>> codes, scale = fit_scale(np.float32([[-4, 1, 2, 3]]), np.ones((1, 4), np.float32), nmax=4)
    >>> codes.tolist(), scale.tolist()
    ([[0, 5, 6, 7]], [1.0])
    """
    x, w = np.ascontiguousarray(x.T), np.ascontiguousarray(w.T)
    largest = _largest(x)
    usable = abs(largest) >= TINY
    largest = np.where(usable, largest, np.float32(1))
    wx = w * x

    def attempt(steps):
        """Codes for the scale largest / -steps, and the two sums of least squares."""
        inverse = -steps / largest
        l = nearest(inverse * x).clip(-nmax, nmax - 1).astype(np.float32)
        return l, running_sum(wx * l), running_sum(w * l * l)

    codes, sum_xl, sum_l2 = attempt(np.float32(nmax))
    scale = _divide(sum_xl, sum_l2)
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        l, sum_xl, sum_l2 = attempt(np.float32(nmax) + np.float32(0.1) * np.float32(step))
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        codes = np.where(better, l, codes)
        scale = np.where(better, _divide(sum_xl, sum_l2), scale)
        best = np.where(better, scale * sum_xl, best)
    codes = np.where(usable, codes + nmax, 0)
    return codes.T.astype(np.uint8), np.where(usable, scale, np.float32(0))


@OVERFLOWING
def fit_scale_min(x, w, nmax, first, step, steps, absolute=False):
    """Codes, scale and minimum of weights that lie anywhere: x' = scale * code - minimum.

    x, w: float32 (m, n).  nmax: the largest code.  The scales tried are (max - min) / (nmax + first + step * i) for
    i = 0 ... steps; the min moves along when a better fit is found.  absolute: measure |error| instead of its square.
    Returns (codes uint8 (m, n), scale float32 (m,), minimum float32 (m,), at least 0).

    >>> codes, scale, minimum = fit_scale_min(np.float32([[-1, 0, 1, 2]]), np.ones((1, 4), np.float32), 3, -1, 0.1, 20)
    >>> codes.tolist(), scale.tolist(), minimum.tolist()
    ([[0, 1, 2, 3]], [1.0], [1.0])
    """
    x, w = np.ascontiguousarray(x.T), np.ascontiguousarray(w.T)
    low, high = np.minimum(x.min(0), np.float32(0)), x.max(0)  # zero is always within reach
    constant = high == low  # all zero, or all the same negative number: the minimum alone says it
    sum_w, sum_x = running_sum(w), running_sum(w * x)

    def error(l, scale, low):
        difference = scale * l + low - x
        return running_sum(w * (abs(difference) if absolute else difference * difference))

    def round_to(steps, low):
        inverse = steps / np.where(high == low, np.float32(1), high - low)
        return inverse, nearest(inverse * (x - low)).clip(0, nmax).astype(np.float32)

    inverse, codes = round_to(np.float32(nmax), low)
    scale = 1 / inverse
    best = error(codes, scale, low)
    for i in range(steps + 1):
        _, l = round_to(np.float32(first) + np.float32(step) * np.float32(i) + np.float32(nmax), low)
        wl = w * l
        sum_l, sum_l2, sum_xl = running_sum(wl), running_sum(wl * l), running_sum(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        solvable = determinant > 0
        new_scale = _divide(sum_w * sum_xl - sum_x * sum_l, determinant, solvable)
        new_low = _divide(sum_l2 * sum_x - sum_l * sum_xl, determinant, solvable)
        above = new_low > 0  # a minimum above zero cannot be stored: keep it at zero and fit the scale alone
        new_scale = np.where(above, _divide(sum_xl, sum_l2), new_scale)
        new_low = np.where(above, np.float32(0), new_low)
        new_error = error(l, new_scale, new_low)
        better = solvable & (new_error < best)
        codes = np.where(better, l, codes)
        best = np.where(better, new_error, best)
        scale = np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)  # used by the next attempt: its range is measured from here
    codes = np.where(constant, np.float32(0), codes)
    low = np.where(constant, x.min(0), low)
    return codes.T.astype(np.uint8), np.where(constant, np.float32(0), scale), -low


@OVERFLOWING
def fit_stepwise(x, nmax):
    """As `fit_scale` with the errors weighted by x * x, but by changing one code at a time, in five passes.

    x: float32 (m, n).  Returns (codes uint8 (m, n) in 0 ... 2 * nmax - 1, scale float32 (m,)).
    """
    x = np.ascontiguousarray(x.T)
    largest = _largest(x)
    usable = abs(largest) >= TINY
    inverse = -np.float32(nmax) / np.where(usable, largest, np.float32(1))
    codes = nearest(inverse * x).clip(-nmax, nmax - 1).astype(np.float32)
    w = x * x
    wx = w * x
    sum_xl, sum_l2 = running_sum(wx * codes), running_sum(w * codes * codes)
    for _ in range(5):
        for i in range(len(x)):
            without_xl = sum_xl - wx[i] * codes[i]
            without_l2 = sum_l2 - w[i] * codes[i] * codes[i]
            possible = without_xl > 0
            l = nearest(_divide(x[i] * without_l2, without_xl, possible)).clip(-nmax, nmax - 1).astype(np.float32)
            new_xl, new_l2 = without_xl + wx[i] * l, without_l2 + w[i] * l * l
            better = possible & (l != codes[i]) & (new_l2 > 0) & (
                new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            )  # fmt: skip
            codes[i] = np.where(better, l, codes[i])
            sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
    codes = np.where(usable, codes + nmax, 0)
    return codes.T.astype(np.uint8), np.where(usable, _divide(sum_xl, sum_l2), np.float32(0))


@OVERFLOWING
def fit_positive(x, w, nmax):
    """Codes 0 ... nmax and one scale for numbers that are not negative: x' = scale * code.

    x, w: float32 (m, n), here the scales (or minima) of the n sub-blocks of a super-block.
    Returns (codes uint8 (m, n), scale float32 (m,)).

    >>> codes, scale = fit_positive(np.float32([[1, 2, 4]]), np.ones((1, 3), np.float32), nmax=4)
    >>> codes.tolist(), scale.tolist()
    ([[1, 2, 4]], [1.0])
    """
    x, w = np.ascontiguousarray(x.T), np.ascontiguousarray(w.T)
    high = x.max(0)
    usable = high >= TINY
    high = np.where(usable, high, np.float32(1))

    def error(inverse):
        difference = x - 1 / inverse * nearest(inverse * x).clip(max=nmax).astype(np.float32)
        return running_sum(w * difference * difference)

    inverse = np.float32(nmax) / high
    best = error(inverse)
    for step in (*range(-4, 0), *range(1, 5)):
        attempt = (np.float32(0.1) * np.float32(step) + np.float32(nmax)) / high
        new_error = error(attempt)
        inverse = np.where(new_error < best, attempt, inverse)
        best = np.minimum(best, new_error)
    codes = nearest(inverse * x).clip(max=nmax).astype(np.float32)
    wx = w * x
    sum_xl, sum_l2 = running_sum(wx * codes), running_sum(w * codes * codes)
    for _ in range(5):
        for i in range(len(x)):
            without_xl = sum_xl - wx[i] * codes[i]
            without_l2 = sum_l2 - w[i] * codes[i] * codes[i]
            possible = (without_xl > 0) & (without_l2 > 0)
            l = nearest(_divide(x[i] * without_l2, without_xl, possible)).clip(max=nmax).astype(np.float32)
            new_xl, new_l2 = without_xl + wx[i] * l, without_l2 + w[i] * l * l
            better = possible & (l != codes[i]) & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            codes[i] = np.where(better, l, codes[i])
            sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
    codes = np.where(usable, codes, 0)
    return codes.T.astype(np.uint8), np.where(usable, _divide(sum_xl, sum_l2), np.float32(0))


def round_again(x, codes, scale, minimum, low, high):
    """The codes for the scale that the file holds: nearest((x + minimum) / scale), kept within low ... high, minus low.

    x: float32 (m, n).  codes: uint8 (m, n) from the search; a sub-block whose stored scale is 0 keeps them.
    scale, minimum: float32 (m,).  Returns uint8 (m, n) in 0 ... high - low.

    >>> round_again(np.float32([[1, 2], [3, 4]]), np.uint8([[7, 7], [7, 7]]), np.float32([0.5, 0]), np.float32([0, 0]),
    ...             low=0, high=15).tolist()
    [[2, 4], [7, 7]]
    """
    kept = scale == 0
    divisor = np.where(kept, np.float32(1), scale)[:, None]
    fresh = nearest((x + minimum[:, None]) / divisor).clip(low, high) - low
    return np.where(kept[:, None], codes, fresh.astype(np.uint8))


def error_weights(x, importance, mean):
    """How much an error of each weight matters, given the importance of its column: importance * sqrt(mean + x * x).

    x: float32 (rows, blocks, n).  importance: float32 (blocks, n).  mean: of x * x, of what is near, broadcast to x.
    """
    return importance * np.sqrt(mean + x * x)


def _largest(x):
    """Of each column of (n, m), the number with the largest magnitude, with its sign; the first among equals."""
    return np.take_along_axis(x, abs(x).argmax(0)[None], 0)[0]


def _divide(numerator, denominator, where=None):
    """numerator / denominator, and 0 where that is not asked for (where the denominator is 0, if nothing is said)."""
    where = denominator != 0 if where is None else where
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=where)
