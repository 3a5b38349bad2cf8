"""GGUF blocks from compiled loops: the same bytes as `qlearn.formats.gguf_blocks`, several times as fast.

    quantize(x, "Q4_K")        as gguf_blocks.quantize, with the searches of this file

Only the searches are here: what the functions of `formats/gguf_blocks/search.py` compute with NumPy's operations, these
compute in one pass. How codes are laid into bytes takes little time and is not repeated.

ggml's own loops run through the weights of one sub-block, and since float32 sums must be formed in order, each addition
waits for the one before; the processor's vector units idle. Here LANES sub-blocks walk side by side: weight i of all of
them, then weight i + 1. Each lane adds in exactly ggml's order, and the compiler turns a line over the lanes into a few
vector instructions. So the numbers lie "weights first", x[i, lane], as in the readable version, and every loop over
lanes is written without branches: a better attempt is taken over by choosing between two values.
"""

import sys

import numpy as np
from numba import njit

from qlearn.formats import gguf_blocks
from qlearn.formats.gguf_blocks.mxfp4 import DOUBLED
from qlearn.formats.gguf_blocks.search import ROUNDING, TINY

LANES = 64  # with 16 the compiler unrolls the loops over lanes instead of vectorizing them: half as fast
SMALLEST = np.finfo(np.float32).tiny
ZERO, ONE, HALF, TENTH = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.1)
compiled = njit(cache=True, nogil=True, error_model="numpy")  # as in C, dividing by zero gives infinity


def quantize(x, block_type="Q4_0", imatrix=None):
    """`gguf_blocks.quantize` with compiled searches: the same arguments, the same bytes, the same errors.

    >>> x = np.sin(np.arange(512, dtype=np.float32))
    >>> np.array_equal(quantize(x, "Q4_K"), gguf_blocks.quantize(x, "Q4_K"))
    True
    """
    return gguf_blocks.quantize(x, block_type, imatrix, fit=sys.modules[__name__])


# ---- searches: the interface of gguf_blocks.fits ---------------------------------------------------------------------


def fit_scale(x, w, nmax):
    """See `search.fit_scale`."""
    return _fit_scale(np.ascontiguousarray(x), np.ascontiguousarray(w), np.float32(nmax))


def fit_scale_min(x, w, nmax, first, step, steps, absolute=False):
    """See `search.fit_scale_min`."""
    x, w = np.ascontiguousarray(x), np.ascontiguousarray(w)
    return _fit_scale_min(x, w, np.float32(nmax), np.float32(first), np.float32(step), steps, absolute)


def fit_stepwise(x, nmax):
    """See `search.fit_stepwise`."""
    return _fit_stepwise(np.ascontiguousarray(x), np.float32(nmax))


def fit_positive(x, w, nmax):
    """See `search.fit_positive`."""
    return _fit_positive(np.ascontiguousarray(x), np.ascontiguousarray(w), np.float32(nmax))


def round_again(x, codes, scale, minimum, low, high):
    """See `search.round_again`."""
    return _round_again(np.ascontiguousarray(x), codes, scale, minimum, np.int32(low), np.int32(high))


def signed_max(x, bits):
    """See `signed_max.signed_max`; d is not rounded to float16 yet."""
    codes, d = _signed_max(np.ascontiguousarray(x), np.float32(2 ** (bits - 1)))
    return codes, d[:, None]


def min_max(x, largest_code):
    """See `simple.min_max`."""
    return _min_max(np.ascontiguousarray(x), np.float32(largest_code))


def absmax_8(x):
    """See `simple.absmax_8`."""
    return _absmax_8(np.ascontiguousarray(x))


def nearest_e2m1(x, half):
    """See `mxfp4.nearest_e2m1`."""
    return _nearest_e2m1(np.ascontiguousarray(x), half, (DOUBLED[1:8] + DOUBLED[:7]) / 2)


# ---- the loops -------------------------------------------------------------------------------------------------------


@compiled
def _nearest(x):
    """`search.nearest` of a number that is small enough, as float32."""
    return (x + ROUNDING) - ROUNDING


@compiled
def _within(x, low, high):
    return min(max(x, low), high)


@compiled
def _fit_scale(x, w, nmax):
    m, n = x.shape
    codes, scales = np.empty((m, n), np.uint8), np.empty(m, np.float32)
    xs, ws, chosen = _lanes(n), _lanes(n), _lanes(n)
    largest, inverse, scale, best, sum_xl, sum_l2 = _lane(), _lane(), _lane(), _lane(), _lane(), _lane()
    for first in range(0, m, LANES):
        _load(x, first, xs)
        _load(w, first, ws)
        _largest(xs, largest)
        for attempt in range(19):  # the obvious scale, then 9 on either side of it
            step = 0 if attempt == 0 else attempt - 10 if attempt < 10 else attempt - 9
            for lane in range(LANES):
                inverse[lane] = -(nmax + TENTH * np.float32(step)) / largest[lane]
                sum_xl[lane] = ZERO
                sum_l2[lane] = ZERO
            for i in range(n):
                for lane in range(LANES):
                    l = _within(_nearest(inverse[lane] * xs[i, lane]), -nmax, nmax - ONE)
                    sum_xl[lane] += ws[i, lane] * xs[i, lane] * l
                    sum_l2[lane] += ws[i, lane] * l * l
            for lane in range(LANES):
                fitted = sum_xl[lane] / sum_l2[lane] if sum_l2[lane] > ZERO else ZERO
                better = sum_l2[lane] > ZERO and sum_xl[lane] * sum_xl[lane] > best[lane] * sum_l2[lane]
                if attempt == 0 or better:
                    scale[lane], best[lane] = fitted, fitted * sum_xl[lane]
                    for i in range(n):
                        chosen[i, lane] = nmax + _within(_nearest(inverse[lane] * xs[i, lane]), -nmax, nmax - ONE)
        _clear_small(largest, scale, chosen)
        _store(chosen, scale, first, codes, scales)
    return codes, scales


@compiled
def _fit_scale_min(x, w, nmax, first_step, step, steps, absolute):
    m, n = x.shape
    codes, scales, minima = np.empty((m, n), np.uint8), np.empty(m, np.float32), np.empty(m, np.float32)
    xs, ws, ls, chosen = _lanes(n), _lanes(n), _lanes(n), _lanes(n)
    low, high, smallest, inverse, scale, best = _lane(), _lane(), _lane(), _lane(), _lane(), _lane()
    sum_w, sum_x, sum_l, sum_l2, sum_xl = _lane(), _lane(), _lane(), _lane(), _lane()
    new_scale, new_low, error = _lane(), _lane(), _lane()
    for first in range(0, m, LANES):
        _load(x, first, xs)
        _load(w, first, ws)
        for lane in range(LANES):
            smallest[lane], high[lane] = xs[0, lane], xs[0, lane]
            sum_w[lane], sum_x[lane] = ZERO, ZERO
        for i in range(n):
            for lane in range(LANES):
                smallest[lane] = min(smallest[lane], xs[i, lane])
                high[lane] = max(high[lane], xs[i, lane])
                sum_w[lane] += ws[i, lane]
                sum_x[lane] += ws[i, lane] * xs[i, lane]
        for lane in range(LANES):
            low[lane] = min(smallest[lane], ZERO)
            inverse[lane] = nmax / (high[lane] - low[lane])
            scale[lane] = ONE / inverse[lane]
        for i in range(n):
            for lane in range(LANES):
                chosen[i, lane] = _within(_nearest(inverse[lane] * (xs[i, lane] - low[lane])), ZERO, nmax)
        _error(xs, ws, chosen, scale, low, absolute, best)
        for attempt in range(steps + 1):
            steps_here = first_step + step * np.float32(attempt) + nmax
            for lane in range(LANES):
                inverse[lane] = steps_here / (high[lane] - low[lane])
                sum_l[lane], sum_l2[lane], sum_xl[lane] = ZERO, ZERO, ZERO
            for i in range(n):
                for lane in range(LANES):
                    l = _within(_nearest(inverse[lane] * (xs[i, lane] - low[lane])), ZERO, nmax)
                    wl = ws[i, lane] * l
                    ls[i, lane] = l
                    sum_l[lane] += wl
                    sum_l2[lane] += wl * l
                    sum_xl[lane] += wl * xs[i, lane]
            for lane in range(LANES):
                determinant = sum_w[lane] * sum_l2[lane] - sum_l[lane] * sum_l[lane]
                fitted = (sum_w[lane] * sum_xl[lane] - sum_x[lane] * sum_l[lane]) / determinant
                fitted_low = (sum_l2[lane] * sum_x[lane] - sum_l[lane] * sum_xl[lane]) / determinant
                above = fitted_low > ZERO
                new_scale[lane] = sum_xl[lane] / sum_l2[lane] if above else fitted
                new_low[lane] = ZERO if above else fitted_low
                if not determinant > ZERO:
                    new_low[lane] = np.float32(np.nan)  # an error that is no number is never smaller
            _error(xs, ws, ls, new_scale, new_low, absolute, error)
            for lane in range(LANES):
                if error[lane] < best[lane]:
                    best[lane], scale[lane], low[lane] = error[lane], new_scale[lane], new_low[lane]
                    for i in range(n):
                        chosen[i, lane] = ls[i, lane]
        for lane in range(LANES):
            if high[lane] == min(smallest[lane], ZERO):
                scale[lane], low[lane] = ZERO, smallest[lane]
                for i in range(n):
                    chosen[i, lane] = ZERO
        _store(chosen, scale, first, codes, scales)
        for lane in range(min(LANES, m - first)):
            minima[first + lane] = -low[lane]
    return codes, scales, minima


@compiled
def _error(xs, ws, ls, scale, low, absolute, error):
    """The weighted error of the codes ls in each lane."""
    for lane in range(LANES):
        error[lane] = ZERO
    if absolute:
        for i in range(len(xs)):
            for lane in range(LANES):
                error[lane] += ws[i, lane] * abs(scale[lane] * ls[i, lane] + low[lane] - xs[i, lane])
    else:
        for i in range(len(xs)):
            for lane in range(LANES):
                difference = scale[lane] * ls[i, lane] + low[lane] - xs[i, lane]
                error[lane] += ws[i, lane] * (difference * difference)


@compiled
def _fit_stepwise(x, nmax):
    m, n = x.shape
    codes, scales = np.empty((m, n), np.uint8), np.empty(m, np.float32)
    xs, ws, ls = _lanes(n), _lanes(n), _lanes(n)
    largest, scale, sum_xl, sum_l2 = _lane(), _lane(), _lane(), _lane()
    for first in range(0, m, LANES):
        _load(x, first, xs)
        _largest(xs, largest)
        for lane in range(LANES):
            sum_xl[lane], sum_l2[lane] = ZERO, ZERO
        for i in range(n):
            for lane in range(LANES):
                l = _within(_nearest(-nmax / largest[lane] * xs[i, lane]), -nmax, nmax - ONE)
                w = xs[i, lane] * xs[i, lane]
                ws[i, lane], ls[i, lane] = w, l
                sum_xl[lane] += w * xs[i, lane] * l
                sum_l2[lane] += w * l * l
        _improve(xs, ws, ls, sum_xl, sum_l2, -nmax, nmax - ONE, True)
        for lane in range(LANES):
            scale[lane] = sum_xl[lane] / sum_l2[lane] if sum_l2[lane] > ZERO else ZERO
            for i in range(n):
                ls[i, lane] += nmax
        _clear_small(largest, scale, ls)
        _store(ls, scale, first, codes, scales)
    return codes, scales


@compiled
def _fit_positive(x, w, nmax):
    m, n = x.shape
    codes, scales = np.empty((m, n), np.uint8), np.empty(m, np.float32)
    xs, ws, ls = _lanes(n), _lanes(n), _lanes(n)
    high, inverse, trial, scale, best, error, zero, sum_xl, sum_l2 = (
        _lane(), _lane(), _lane(), _lane(), _lane(), _lane(), _lane(), _lane(), _lane()
    )  # fmt: skip
    zero[:] = ZERO
    for first in range(0, m, LANES):
        _load(x, first, xs)
        _load(w, first, ws)
        high[:] = ZERO
        for i in range(n):
            for lane in range(LANES):
                high[lane] = max(high[lane], xs[i, lane])
        for attempt in range(9):  # the obvious scale, then 4 on either side of it
            step = 0 if attempt == 0 else attempt - 5 if attempt < 5 else attempt - 4
            for lane in range(LANES):
                trial[lane] = (TENTH * np.float32(step) + nmax) / high[lane]
                scale[lane] = ONE / trial[lane]
            for i in range(n):
                for lane in range(LANES):
                    ls[i, lane] = min(_nearest(trial[lane] * xs[i, lane]), nmax)
            _error(xs, ws, ls, scale, zero, False, error)
            for lane in range(LANES):
                if attempt == 0 or error[lane] < best[lane]:
                    best[lane], inverse[lane] = error[lane], trial[lane]
        sum_xl[:] = ZERO
        sum_l2[:] = ZERO
        for i in range(n):
            for lane in range(LANES):
                l = min(_nearest(inverse[lane] * xs[i, lane]), nmax)
                ls[i, lane] = l
                sum_xl[lane] += ws[i, lane] * xs[i, lane] * l
                sum_l2[lane] += ws[i, lane] * l * l
        _improve(xs, ws, ls, sum_xl, sum_l2, np.float32(-np.inf), nmax, False)
        for lane in range(LANES):
            scale[lane] = sum_xl[lane] / sum_l2[lane] if sum_l2[lane] > ZERO else ZERO
        _clear_small(high, scale, ls)
        _store(ls, scale, first, codes, scales)
    return codes, scales


@compiled
def _improve(xs, ws, ls, sum_xl, sum_l2, lowest, highest, signed):
    """Five passes of changing one code at a time where least squares gains by it.

    signed: the others may all be zero, if only the changed code is not; else they must not be.
    """
    for _ in range(5):
        for i in range(len(xs)):
            for lane in range(LANES):
                x, w, old = xs[i, lane], ws[i, lane], ls[i, lane]
                without_xl = sum_xl[lane] - w * x * old
                without_l2 = sum_l2[lane] - w * old * old
                possible = without_xl > ZERO and (signed or without_l2 > ZERO)
                l = _within(_nearest(x * without_l2 / without_xl), lowest, highest)
                new_xl, new_l2 = without_xl + w * x * l, without_l2 + w * l * l
                gains = new_xl * new_xl * sum_l2[lane] > sum_xl[lane] * sum_xl[lane] * new_l2
                better = possible and l != old and (new_l2 > ZERO or not signed) and gains
                ls[i, lane] = l if better else old
                sum_xl[lane] = new_xl if better else sum_xl[lane]
                sum_l2[lane] = new_l2 if better else sum_l2[lane]


@compiled
def _round_again(x, codes, scale, minimum, low, high):
    m, n = x.shape
    result = np.empty((m, n), np.uint8)
    for row in range(m):
        if scale[row] == ZERO:
            result[row] = codes[row]
            continue
        for i in range(n):
            shifted = (x[row, i] + minimum[row]) / scale[row] + ROUNDING
            l = (np.float32(shifted).view(np.int32) & np.int32(0x7FFFFF)) - np.int32(0x400000)
            result[row, i] = np.uint8(min(max(l, low), high) - low)
    return result


@compiled
def _signed_max(x, half):
    m, n = x.shape
    codes, d = np.empty((m, n), np.uint8), np.empty(m, np.float32)
    for row in range(m):
        magnitude = ZERO
        for i in range(n):
            magnitude = max(magnitude, abs(x[row, i]))
        largest = ZERO
        for i in range(n - 1, -1, -1):  # backwards: the first of equal magnitudes decides
            largest = x[row, i] if abs(x[row, i]) == magnitude else largest
        d[row] = (largest + ZERO) / -half  # + 0: of a block of zeros the sign is lost
        inverse = ONE / d[row] if abs(d[row]) >= SMALLEST else ZERO
        for i in range(n):
            codes[row, i] = np.uint8(np.int32(min(x[row, i] * inverse + (half + HALF), half + half - ONE)))
    return codes, d


@compiled
def _min_max(x, largest_code):
    m, n = x.shape
    codes, d, low = np.empty((m, n), np.uint8), np.empty(m, np.float32), np.empty(m, np.float32)
    for row in range(m):
        smallest, high = x[row, 0], x[row, 0]
        for i in range(n):
            smallest, high = min(smallest, x[row, i]), max(high, x[row, i])
        d[row], low[row] = (high - smallest) / largest_code, smallest
        inverse = ONE / d[row] if d[row] >= SMALLEST else ZERO
        for i in range(n):
            codes[row, i] = np.uint8(np.int32(min((x[row, i] - smallest) * inverse + HALF, largest_code)))
    return codes, d, low


@compiled
def _absmax_8(x):
    m, n = x.shape
    codes, d = np.empty((m, n), np.int8), np.empty(m, np.float32)
    for row in range(m):
        largest = ZERO
        for i in range(n):
            largest = max(largest, abs(x[row, i]))
        d[row] = largest / np.float32(127)
        inverse = ONE / d[row] if d[row] >= SMALLEST else ZERO
        for i in range(n):
            scaled = x[row, i] * inverse
            whole = np.int32(scaled)  # cuts off what follows the point
            rest = scaled - np.float32(whole)
            away = np.int32(rest >= HALF) - np.int32(rest <= -HALF)
            codes[row, i] = np.int8(whole + away)
    return codes, d


@compiled
def _nearest_e2m1(x, half, midpoints):
    m, n = x.shape
    codes = np.empty((m, n), np.uint8)
    for row in range(m):
        for i in range(n):
            code = np.int32(0)
            for k in range(7):  # as many midpoints between neighbours as lie strictly below
                code += np.int32(abs(x[row, i]) > midpoints[k] * half[row])
            codes[row, i] = np.uint8(code + 8 if x[row, i] < ZERO and code > 0 else code)
    return codes


# ---- lanes -----------------------------------------------------------------------------------------------------------


@compiled
def _lane():
    """A number for each lane."""
    return np.empty(LANES, np.float32)


@compiled
def _lanes(n):
    """n numbers for each lane."""
    return np.empty((n, LANES), np.float32)


@compiled
def _load(x, first, lanes):
    """lanes[i, lane] = x[first + lane, i]; the last sub-block stands in for those beyond the end."""
    for lane in range(LANES):
        row = min(first + lane, len(x) - 1)
        for i in range(x.shape[1]):
            lanes[i, lane] = x[row, i]


@compiled
def _store(lanes, scale, first, codes, scales):
    """codes[first + lane, i] = lanes[i, lane] and scales[first + lane] = scale[lane], nothing beyond the end."""
    for lane in range(min(LANES, len(codes) - first)):
        scales[first + lane] = scale[lane]
        for i in range(codes.shape[1]):
            codes[first + lane, i] = np.uint8(np.int32(lanes[i, lane]))


@compiled
def _largest(xs, largest):
    """The number with the largest magnitude of each lane, with its sign; the first among equals."""
    for lane in range(LANES):
        largest[lane] = ZERO
    for i in range(len(xs)):
        for lane in range(LANES):
            largest[lane] = xs[i, lane] if abs(xs[i, lane]) > abs(largest[lane]) else largest[lane]


@compiled
def _clear_small(largest, scale, chosen):
    """Scale 0 and codes 0 where a sub-block counts as zero."""
    for lane in range(LANES):
        if abs(largest[lane]) < TINY:
            scale[lane] = ZERO
            for i in range(len(chosen)):
                chosen[i, lane] = ZERO
