# %% [markdown]
# # 01 · Bits: the exercise
#
# **About 50 minutes.** You take floating-point numbers apart, put them together, round to them in two ways, and at the end repeat
# the long sum of [lesson 01](../lessons/01_bits.ipynb) with nothing but your own functions.
#
# Write your code where it says so and run the cell below it: `course.check` tries your function on cases that were chosen to find mistakes.
# `course.hint("bits.fields")` gives a hint, and a second one when you ask again.

# %%
import numpy as np

from qlearn import course
from qlearn.formats.floats import BF16, FP4_E2M1, FP6_E2M3, FP8_E4M3FN, FP8_E5M2

FP8_E4M3FN

# %% [markdown]
# That is a format: the widths of its fields, its bias, and what the top codes mean. `fmt.bits`, `fmt.exponent_bits`, `fmt.mantissa_bits`,
# `fmt.bias`, `fmt.max`, `fmt.smallest_normal` and `fmt.ulp(x)` are yours to use below.

# %% [markdown] qlearn={"card": "bits.fields"}
# A code is an integer. From its highest bit downward it holds the sign, the exponent and the mantissa.

# %% qlearn={"answer": "bits.fields"}
def fields(code, fmt):
    """Take a code apart.

    code: an int, or an array of them.  fmt: its format; E8M0, which has no sign bit, gives sign 0.
    Returns (sign, exponent, mantissa) as they are stored, whole numbers, each of the shape of code.

    fields(0b0_1001_101, FP8_E4M3FN) is (0, 9, 5).
    """
    ### BEGIN SOLUTION
    mantissa = code & (2**fmt.mantissa_bits - 1)
    exponent = (code >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1)
    sign = code >> (fmt.exponent_bits + fmt.mantissa_bits)
    return sign, exponent, mantissa
    ### END SOLUTION


# %% qlearn={"check": "bits.fields"}
course.check("bits.fields", fields)

# %% [markdown] qlearn={"card": "bits.decode"}
# Now the value formula, both lines of it. Leave infinity and NaN aside: only codes of finite numbers will come.
#
# Use `np.where(condition, a, b)`, so that it works on whole arrays, and `2.0 **` rather than `2 **`: NumPy refuses negative powers of
# integers.

# %% qlearn={"answer": "bits.decode"}
def decode(sign, exponent, mantissa, fmt):
    """The number that three fields stand for.

    sign, exponent, mantissa: as `fields` returns them, ints or int64 arrays of one shape.  fmt: any format but E8M0.
    Returns the value, a float, or an array of that shape. Sign 1 makes -0.0 of zero.

    decode(0, 9, 5, FP8_E4M3FN) is 6.5; decode(0, 0, 1, FP8_E4M3FN), the smallest subnormal number, is 2.0**-9.
    """
    ### BEGIN SOLUTION
    fraction = mantissa / 2**fmt.mantissa_bits
    normal = 2.0 ** (exponent - fmt.bias) * (1 + fraction)
    subnormal = 2.0 ** (1 - fmt.bias) * fraction
    return (-1.0) ** sign * np.where(exponent > 0, normal, subnormal)
    ### END SOLUTION


# %% qlearn={"check": "bits.decode"}
course.check("bits.decode", decode)

# %% [markdown]
# The bits below are decoded by *your* functions, and the format watches: where it disagrees, the last line says so. E4M3 has one pair of
# codes on which a right answer disagrees with it. Which one, and what does the formula say there?

# %% qlearn={"show": true}
course.widgets.BitExplorer(
    FP8_E4M3FN, "0.3", decode=lambda code: decode(*(np.int64(part) for part in fields(code, FP8_E4M3FN)), FP8_E4M3FN)
)

# %% [markdown]
# **What you should have seen.** All ones, with either sign: the formula says 480, and E4M3 keeps that code for NaN.

# %% [markdown] qlearn={"card": "bits.encode"}
# The way back. Codes of positive numbers, read as integers, are in the order of the numbers: a code counts steps from zero. So find
# the step at this number, round to a whole number of steps, and add the steps in all binades below.
#
# Round to the nearest, ties to even, as `np.round` does. What is too large, infinity included, **saturates**: it becomes the largest number. NaN
# will not come.

# %% qlearn={"answer": "bits.encode"}
def encode(x, fmt):
    """The code of the nearest number of a format; ties to even, saturating.

    x: a float, or a float array, without NaN.  fmt: a format with a sign bit.
    Returns whole numbers of the shape of x, the sign in the top bit, for -0.0 too.

    encode(0.3, FP8_E4M3FN) is 0b0_0101_010 = 42, and encode(-1000.0, FP8_E4M3FN) is 0b1_1111_110 = 254.
    """
    ### BEGIN SOLUTION
    magnitude = np.minimum(np.abs(x), fmt.max)
    step = fmt.ulp(magnitude)
    power = np.log2(step) + fmt.mantissa_bits
    code = np.round(magnitude / step) + (power - (1 - fmt.bias)) * 2**fmt.mantissa_bits
    return code.astype(np.int64) + np.signbit(x) * 2 ** (fmt.bits - 1)
    ### END SOLUTION


# %% qlearn={"check": "bits.encode"}
course.check("bits.encode", encode)

# %% [markdown]
# Type numbers into your own encoder. Below it, its errors on ten thousand numbers. An encoder that rounds to the nearest has none
# beyond half an ulp, and is about as often too large as too small.

# %% qlearn={"show": true}
course.widgets.BitExplorer(FP6_E2M3, "1.3", encode=lambda x: encode(np.float64(x), FP6_E2M3))

# %% qlearn={"show": true}
x = np.random.default_rng(0).normal(0, 0.05, 10_000)
error = (np.abs(FP8_E5M2.decode(encode(x, FP8_E5M2))) - np.abs(x)) / FP8_E5M2.ulp(x)
picture, axes = course.plots.figure(8, 2.6, alt="Histogram of the errors of your encoder, in ulps, with lines at one half.")
axes.hist(np.clip(error, -1.5, 1.5), bins=np.arange(-1.5, 1.51, 0.05))
axes.axvline(-0.5, color=course.plots.COLORS["marker"])
axes.axvline(0.5, color=course.plots.COLORS["marker"])
axes.set(xlabel="error of the magnitude, ulp of E5M2", ylabel="numbers")
picture

# %% [markdown] qlearn={"card": "bits.bf16"}
# BF16 is the upper half of a float32, *rounded*. Hardware does it with one addition: add just under half of what the lowest kept bit
# is worth, and one more where that bit is 1, then clear what is below. The carry does the rest, into the exponent and up to infinity.
#
# Only NaN needs care: it has to stay NaN. `x.view(np.uint32)` gives the bits of `x`, and `.view(np.float32)` turns them back.

# %% qlearn={"answer": "bits.bf16"}
def bf16(x):
    """Round to BF16 by integer arithmetic.

    x: float32 array; it must not be changed.
    Returns a float32 array of the same shape in which every number is the nearest one of BF16, ties to even; NaN stays NaN.

    bf16(np.float32([0.1, 1.00390625])) is [0.10009765625, 1.0]: the second one is a tie.
    """
    ### BEGIN SOLUTION
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return np.where(np.isnan(x), x, rounded.view(np.float32))
    ### END SOLUTION


# %% qlearn={"check": "bits.bf16"}
course.check("bits.bf16", bf16)

# %% [markdown] qlearn={"card": "bits.stochastic"}
# Stochastic rounding: down to the value below or up to the next, the chance of up being the fraction of the step. The random
# numbers are given, so that your result can be compared: go up where `u < fraction`.
#
# Round the magnitude and give the sign back, so that a number and its negative are treated alike.

# %% qlearn={"answer": "bits.stochastic"}
def stochastic(x, fmt, u):
    """Round by chance, so that the mean of many roundings is the number itself.

    x: float array, within the range of the format.  u: random numbers in [0, 1), of the shape of x.
    Returns the values (not the codes), a float array of that shape.

    stochastic(np.array([2.25]), FP4_E2M1, np.array([0.2])) is [3.0]: 2.25 is a quarter of the way from 2 to 3, and 0.2 < 0.25.
    """
    ### BEGIN SOLUTION
    step = fmt.ulp(x)
    steps = np.abs(x) / step
    down = np.floor(steps)
    return np.copysign((down + (u < steps - down)) * step, x)
    ### END SOLUTION


# %% qlearn={"check": "bits.stochastic"}
course.check("bits.stochastic", stochastic)

# %% [markdown]
# ## All together: the long sum
#
# 0.01, added ten thousand times, by your `bf16` and by your `stochastic` with BF16. The exact sum is 100. The first should stop
# at 4; of the second there are twenty, each with a luck of its own.

# %% qlearn={"show": true}
random = np.random.default_rng(0)
nearest, chance = [np.zeros(1, np.float32)], [np.zeros(20)]
for _ in range(10_000):
    nearest.append(bf16(nearest[-1] + np.float32(0.01)))
    chance.append(stochastic(chance[-1] + 0.01, BF16, random.random(20)))

picture, axes = course.plots.figure(8, 3.2, alt="Your running sums: to the nearest it stops at 4, by chance the sums reach about 100.")
axes.plot(chance, color=course.plots.PALETTE["sky"], linewidth=0.7)
axes.plot(nearest, color=course.plots.PALETTE["vermillion"], label="your bf16")
axes.plot([], color=course.plots.PALETTE["sky"], label="your stochastic, 20 sums")
axes.plot([0, 10_000], [0, 100], "--", color=course.plots.COLORS["marker"], label="exact")
axes.set(xlabel="additions of 0.01", ylabel="sum kept in BF16")
axes.legend()
picture

# %% [markdown]
# Why 4? There the step of BF16 is 1/32, and 0.01 is less than half of it. And why do the stochastic sums fan out? Each goes up in steps
# of its own luck; none of them is exact, only their mean is.
#
# When all five checks pass, go on to [lesson 02](../lessons/02_absmax.ipynb). In a terminal, `qlearn grade exercises/01_bits.ipynb` gives
# your points.
