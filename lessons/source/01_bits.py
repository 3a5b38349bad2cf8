# %% [markdown]
# # 01 · Bits: what a float can say
#
# **In 60 minutes** you will know what every bit of a floating-point number is for, from 32 bits down to 4, how a number is rounded
# to one, what that does to long sums, and which of these formats our model survives. You need lesson 00.
#
# **The question.** Start at 0 and add 0.01, ten thousand times. After each addition the sum is stored in BF16, the 16-bit format in
# which most language models are kept. The exact sum is 100. What does yours say at the end? Commit to a number before you go on.

# %%
import time

import ml_dtypes
import numba
import numpy as np
import torch

import qlearn
from qlearn import course
from qlearn.formats.floats import BF16, E8M0, FORMATS, FP4_E2M1, FP8_E4M3FN, FP8_E5M2, FP16

course.predict("0.01 added ten thousand times, the sum kept in BF16", low=0, high=120, key="bf16-sum")

# %% [markdown]
# ## By hand
#
# Write 6.5 in binary: 110.1. Move the point until one digit stands before it: 1.101 × 2². Every number but zero can be written like
# this, so three things are worth storing, each in a **field** of its own:
#
# - the **sign**, 1 bit: 0 for plus;
# - the **exponent**, here 2, stored as 2 + **bias**, so that negative exponents need no sign;
# - the **mantissa**, the digits after the point, 101. The 1 in front is always there, so it is not stored: the **hidden 1**.
#
# FP16 has 5 bits of exponent, with bias 15, and 10 bits of mantissa.

# %% tags=["nbval-check-output"]
def bits_of(code, fmt):
    """The bits of a code, a space between the fields."""
    text = f"{code:0{fmt.bits}b}"
    return " ".join([text[0], text[1 : 1 + fmt.exponent_bits], text[1 + fmt.exponent_bits :]])


print("FP16  ", bits_of(FP16.encode(6.5), FP16), "  exponent field", 0b10001, "= 2 +", FP16.bias)
print("E4M3  ", bits_of(FP8_E4M3FN.encode(6.5), FP8_E4M3FN), "         exponent field", 0b1001, "= 2 +", FP8_E4M3FN.bias)
assert bits_of(FP16.encode(6.5), FP16) == "0 10001 1010000000" and bits_of(FP8_E4M3FN.encode(6.5), FP8_E4M3FN) == "0 1001 101"

# %% [markdown]
# The second line is an 8-bit float: 4 bits of exponent, 3 of mantissa, hence its name, **E4M3**. The same number, the same fields,
# only narrower; 101 just fits.
#
# Most numbers do not fit. 0.3 is 1.2 × 2⁻². Three mantissa bits count eighths, 0.2 is 1.6 eighths, and the nearest whole number
# of them is 2. So 0.3 becomes (1 + 2/8) × 2⁻² = 0.3125, and its code is 0 0101 010.

# %% tags=["nbval-check-output"]
x = np.array([6.5, 0.3, -0.3, 100.0, 0.01])
codes = FP8_E4M3FN.encode(x)
assert bits_of(codes[1], FP8_E4M3FN) == "0 0101 010" and FP8_E4M3FN.decode(codes[1]) == 0.3125
course.table(original=x, codes=codes, reconstructed=FP8_E4M3FN.decode(codes), decimals=4)

# %% [markdown]
# 6.5 is exact, 0.3 is rounded, and so is −0.3, whose code differs by 128, the sign bit. 100 lies halfway between 96 and 104; such a
# **tie** goes to the even code, here that of 96. And 0.01 needs a rule of its own.
#
# With a hidden 1 in front, nothing could be zero. So exponent field 0 is special: there the hidden digit is 0, and the power is that of
# exponent field 1. Such numbers are called **subnormal**. 0.01 is one: 5.12 eighths of 2⁻⁶, so its code is 5.

# %% tags=["nbval-check-output"]
print("0.01 in eighths of 2⁻⁶:", round(0.01 * 2**6 * 8, 2), "  code", codes[4])
assert codes[4] == 5 and FP8_E4M3FN.decode(codes[3]) == 96

# %% [markdown]
# Below, *exponent* and *mantissa* are the fields, read as whole numbers, and m is the number of mantissa bits.
#
# | exponent field | value |
# |---|---|
# | above 0: **normal** | (−1)^sign × 2^(exponent − bias) × (1 + mantissa / 2^m) |
# | 0: zero or **subnormal** | (−1)^sign × 2^(1 − bias) × (0 + mantissa / 2^m) |

# %% tags=["nbval-check-output"]
def decode_one(code, fmt):
    """The value formula, for one code of a format without infinity and NaN."""
    sign, exponent = code >> (fmt.bits - 1), code >> fmt.mantissa_bits & 2**fmt.exponent_bits - 1
    fraction = code % 2**fmt.mantissa_bits / 2**fmt.mantissa_bits
    power, hidden = (exponent, 1) if exponent > 0 else (1, 0)
    return (-1.0) ** sign * 2.0 ** (power - fmt.bias) * (hidden + fraction)


values = [decode_one(code, FP4_E2M1) for code in range(16)]
print(values)
assert values == FP4_E2M1.decode(range(16)).tolist()

# %% [markdown]
# That is a whole format: **E2M1**, four bits, sixteen codes. Two codes are subnormal, ±0.5, and one is **−0.0**. It
# equals 0.0 and still has a sign, because the sign is a bit of its own.
#
# ## What the top codes mean
#
# The last codes of a format are a matter of agreement. Here are the eight topmost positive ones of three formats.

# %% tags=["nbval-check-output"]
for fmt in (FP8_E5M2, FP8_E4M3FN, FP4_E2M1):
    top = 2 ** (fmt.bits - 1)
    print(f"{fmt.name:10}", *(f"{value:>6g}" for value in fmt.decode(np.arange(top - 8, top))))

assert FP8_E5M2.max == 57344 == 1.75 * 2**15 and FP8_E4M3FN.max == 448 == 1.75 * 2**8
assert -0.0 == 0.0 and float("nan") != float("nan")

# %% [markdown]
# IEEE 754 reserves the highest exponent: with mantissa 0 it is **infinity**, the result of what is too large, else **NaN**, "not a
# number", the result of 0/0, which does not even equal itself. FP32, FP16, BF16 and E5M2 follow it.
#
# In E4M3 that would be expensive: eight positive codes lost, and an end at 240. So its makers kept a single code for NaN (two, with
# the sign), gave up infinity, and the rest of the top **binade** (the numbers from one power of two to the next) holds numbers, up to 448. The full
# name E4M3FN says it: finite, with NaN. In 4 and 6 bits nothing at all is reserved.

# %% tags=["nbval-check-output"]
ieee_top = FP8_E4M3FN.decode(0b0_1110_111)  # the largest number if exponent field 1111 were reserved
assert ieee_top == 240
print(f"kept for NaN: {np.isnan(FP8_E4M3FN.decode(FP8_E4M3FN.codes)).sum()} of 256 codes; won: {ieee_top:g} -> {FP8_E4M3FN.max:g}")

# %% [markdown]
# ## Drag it: every bit a button
#
# Click the bits. Three questions before you do: what does it do to a normal number to raise the exponent field by one? To flip the
# lowest bit of the mantissa? And in BF16, how far away from 2.0 can a single bit take you? (For that one, choose bf16 and type 2.)

# %%
explorer = course.widgets.BitExplorer("fp8_e4m3fn", "0.3")
explorer

# %% [markdown]
# **What you should have seen.** One more in the exponent field doubles the number. The lowest bit of the mantissa moves it by one **ulp**,
# the unit in the last place: the step to the neighbour, shown below the formula. And the exponent does the travelling: from 2.0 in
# BF16, one of its bits takes you to 2⁶⁵ and another to 0, while no bit of the mantissa takes you further than to 3 (the sign bit only
# mirrors it, to −2).

# %% tags=["nbval-check-output"]
code = FP8_E4M3FN.encode(0.3)
assert FP8_E4M3FN.decode(code + 8) == 2 * FP8_E4M3FN.decode(code)
assert FP8_E4M3FN.decode(code ^ 1) - FP8_E4M3FN.decode(code) == FP8_E4M3FN.ulp(0.3)
flipped = [BF16.decode(BF16.encode(2.0) ^ 1 << bit) for bit in range(15)]
print("mantissa bits:", *(f"{value:.6g}" for value in flipped[:7]))
print("exponent bits:", *(f"{value:.3g}" for value in flipped[7:]))
assert max(flipped[:7]) == 3 and max(flipped) == 2.0**65 and min(flipped) == 0

# %% [markdown]
# ## The number line
#
# Integers are spaced evenly. Floats are not: each binade holds the same number of values, whether it is between 2 and 4 or between
# 1/2 and 1, so they crowd around zero. Here are the positive numbers of three formats, up to 8, powers of two with taller ticks. INT4, the whole
# numbers up to 7, is for comparison.

# %%
course.widgets.number_line("fp4_e2m1", "fp6_e2m3", "fp8_e4m3fn", "int4", negative=False, limit=8)

# %% tags=["nbval-check-output"]
finite = FP8_E4M3FN.decode(FP8_E4M3FN.codes)
finite = finite[np.isfinite(finite)]
share = np.mean(np.abs(finite) <= 1)
print(f"{share:.0%} of E4M3's codes lie between -1 and 1, though it reaches to {finite.max():g}")

# %% [markdown]
# The price of that is the ulp: it doubles with every binade. Below, ulp against magnitude. All staircases have the same slope,
# because the *relative* precision is the same everywhere, down to the subnormals, where the step stops shrinking. One more bit of
# mantissa halves every step of the staircase; one more bit of exponent doubles the length of it (BF16's goes on far beyond both ends of the
# picture). INT8 with scale 1/127, whole numbers divided by 127, has the same step everywhere.

# %%
picture, axes = course.plots.figure(
    8, 3.6, alt="Ulp against magnitude: staircases for FP16, BF16, E4M3 and E5M2, and a flat line for INT8 with scale 1/127."
)
x = np.exp2(np.linspace(-20, 17, 4000))
for fmt, label in ((BF16, "BF16"), (FP16, "FP16"), (FP8_E4M3FN, "E4M3"), (FP8_E5M2, "E5M2")):
    inside = x[(x >= fmt.smallest_subnormal) & (x <= fmt.max)]
    axes.loglog(inside, fmt.ulp(inside), base=2, label=label)
axes.loglog([1 / 127, 1], [1 / 127, 1 / 127], base=2, label="INT8, scale 1/127")
axes.set(xlabel="magnitude of the number", ylabel="ulp: step to the next")
axes.legend(ncols=2)
picture

# %% [markdown]
# ## The ladder
#
# Encoding, the other way round, means: find the code whose value is nearest, and of two that are equally near take the even one.
# As a program that is one line, and it compares every number with all values of E4M3.

# %%
magnitudes = FP8_E4M3FN.decode(np.arange(127)).tolist()  # code 127 is NaN


def encode_loop(x):
    """The definition, for positive numbers."""
    return [min(range(127), key=lambda code: (abs(magnitudes[code] - value), code % 2)) for value in x.tolist()]


weights = np.abs(np.random.default_rng(0).normal(0, 0.07, 1000)).astype(np.float32)
encode_loop(weights[:8])

# %% [markdown]
# NumPy can do it without a search. A float32 already has the right shape: a sign, an exponent, and 23 bits of mantissa, where E4M3 has 3.
# So drop 20 bits; more for subnormals. To round and not cut, first add just under half of what is dropped, and one more if
# the last bit that stays is a 1: then a tie goes to the even neighbour. A carry out of the mantissa runs into the exponent,
# where it belongs.

# %%
def encode_bits(x):
    """float32 (finite) -> E4M3 codes by integer arithmetic; saturates."""
    bits = x.view(np.uint32).astype(np.int64)
    exponent = (bits >> 23 & 0xFF) - 127
    significand = bits & 0x7FFFFF | 0x800000  # 24 bits, the hidden 1 on top
    drop = 20 + np.clip(-6 - exponent, 0, 11)  # below 2**-6 lie the subnormals
    last = significand >> drop & 1
    kept = significand + (1 << drop - 1) - 1 + last >> drop
    code = kept + (np.maximum(exponent, -6) + 6 << 3)
    return (np.minimum(code, 126) | bits >> 31 << 7).astype(np.uint8)


assert encode_bits(weights).tolist() == encode_loop(weights)

# %% [markdown]
# Each of these lines makes an array as long as the input. Numba compiles the same arithmetic into one pass over the numbers.

# %%
@numba.njit
def encode_numba(x):
    codes = np.empty(x.size, np.uint8)
    for i, bits in enumerate(x.view(np.uint32)):
        exponent = np.int64(bits >> 23 & 0xFF) - 127
        significand = np.int64(bits & 0x7FFFFF | 0x800000)
        drop = 20 + min(max(-6 - exponent, 0), 11)
        kept = (significand + (1 << (drop - 1)) - 1 + (significand >> drop & 1)) >> drop
        codes[i] = min(kept + ((max(exponent, -6) + 6) << 3), 126) | (bits >> 31 << 7)
    return codes


many = np.random.default_rng(1).normal(0, 0.07, 500_000).astype(np.float32)
assert np.array_equal(encode_numba(many), encode_bits(many))


# %% [markdown]
# And back? Eight bits have only 256 codes, so decoding needs no arithmetic at all: it is a table. How fast is each rung?

# %%
table = FP8_E4M3FN.decode(np.arange(256))
assert np.array_equal(table[encode_numba(many)], FP8_E4M3FN.round(many))


def timed(function, x):
    began = time.perf_counter()
    function(x)
    return 1e9 * (time.perf_counter() - began) / x.size


for function, x in ((encode_loop, weights), (encode_bits, many), (encode_numba, many), (FP8_E4M3FN.encode, many)):
    print(f"{function.__name__:14} {timed(function, x):10.1f} ns a number")

# %% [markdown]
# The package's own `encode`, the last line, serves every format from FP32 to E2M1, so it counts in steps rather than in bits: divide
# by the ulp, round to a whole number, add the steps of all binades below. That works because the codes of positive floats, read as
# integers, are in the order of the numbers.

# %%
assert np.array_equal(FP8_E4M3FN.encode(many), encode_bits(many))
course.source_of(FP8_E4M3FN._encode)

# %% [markdown]
# ## Parity
#
# `ml_dtypes`, from the authors of JAX, gives NumPy its small floats; we had no hand in it. All codes of seven formats
# must decode to the same numbers, and every finite FP16 number must get the same code.

# %% tags=["nbval-check-output"]
peers = {"bf16": "bfloat16", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp6_e3m2": "float6_e3m2fn"}
peers |= {"fp6_e2m3": "float6_e2m3fn", "fp4_e2m1": "float4_e2m1fn", "e8m0": "float8_e8m0fnu"}
every = FP16.decode(FP16.codes)
every = every[np.isfinite(every)]
for name, peer in peers.items():
    fmt, dtype = FORMATS[name], getattr(ml_dtypes, peer)
    assert np.array_equal(fmt.decode(fmt.codes), fmt.codes.view(dtype).astype(np.float32), equal_nan=True)
    assert np.array_equal(fmt.encode(every), every.astype(dtype).view(fmt.codes.dtype))
    print(f"{name:11} {fmt.codes.size:6,} codes decoded, {every.size:,} numbers encoded: equal bit for bit")

# %% [markdown]
# ## Three ways to round
#
# To the **nearest** value; a tie goes to the even code. Toward **zero**: cut off. **Stochastic**: up or down by chance, and the
# nearer a value, the likelier. Why should ties be even? If they always went up, a long column of halves would come out too
# large. To the even neighbour, half of them go up and half down.

# %% tags=["nbval-check-output"]
half_numbers = np.arange(10_000) + 0.5
print("mean error, ties up:     ", np.mean(np.floor(half_numbers + 0.5) - half_numbers))
print("mean error, ties to even:", np.mean(np.round(half_numbers) - half_numbers))

# %% [markdown]
# Drag x along the numbers of E2M1, in each of the three modes. Before you do: rounding to the nearest, at which x does the result jump
# from 2 to 3, and at which from 4 to 6? And by chance, how often does a number go up that lies a quarter of the way from 2 to 3?

# %%
line = course.widgets.number_line_explorer("fp4_e2m1")
line

# %% [markdown]
# **What you should have seen.** It jumps halfway, at 2.5 and at 5; the shaded cell, all that goes to the same value, ends there. Toward
# zero, the cell lies on the outer side of its value, and every number in it loses. By chance, a number a quarter of the way
# up goes up in one of four cases, so that on average it stays where it was.
#
# The jumps themselves, 2.5 and 5, are ties. They go to the even code:

# %% tags=["nbval-check-output"]
for tie, below, above in ((2.5, 2.0, 3.0), (5.0, 4.0, 6.0)):
    codes = FP4_E2M1.encode([below, above]).tolist()
    print(f"{tie} lies between {below} (code {codes[0]}) and {above} (code {codes[1]}) and goes to {FP4_E2M1.round(tie)}")

for mode in ("nearest", "zero", "stochastic"):
    rounded = FP4_E2M1.round(np.full(100_000, 2.25), mode=mode, seed=0)
    print(f"{mode:10} 2.25 becomes on average {rounded.mean():.2f}")

# %% [markdown]
# ## The long sum
#
# Now your question. Each line adds 0.01 ten thousand times and stores the sum after every addition. The stochastic one does it a hundred
# times over, side by side.

# %%
def running_sum(fmt, mode, sums=1):
    """The sum after each of 10,000 additions of 0.01: (10000, sums)."""
    generator, total, path = np.random.default_rng(0), np.zeros(sums), []
    for _ in range(10_000):
        total = fmt.round(total + 0.01, mode=mode, seed=generator)
        path.append(total)
    return np.stack(path)


paths = {mode: running_sum(BF16, mode) for mode in ("nearest", "zero")} | {"stochastic": running_sum(BF16, "stochastic", 100)}
course.reveal("bf16-sum", paths["nearest"][-1, 0])

# %% tags=["nbval-check-output"]
assert paths["nearest"][-1] == 4 and paths["zero"][-1] == 2
assert BF16.ulp(4.0) == 1 / 32 and BF16.ulp(3.9) / 2 < 0.01 < BF16.ulp(4.0) / 2 and BF16.ulp(1.9) < 0.01 < BF16.ulp(2.0)
print(f"nearest 4, toward zero 2, stochastic {paths['stochastic'][-1].mean():.0f} on average of 100 sums; exact 100")

# %% [markdown]
# At 4 the ulp of BF16 is 1/32. Adding 0.01 is less than half of that, so the sum rounds back to 4, every time, for ever. Toward zero it
# ends even earlier, at 2, where 0.01 is less than one whole ulp: the bias of cutting off has eaten a part of every addition.
# Stochastic rounding loses nothing *on average*: at 4, one addition in three succeeds, and then it adds a whole step.
#
# This is why a training step in BF16 keeps its weights or its sums in FP32, or rounds them stochastically.

# %%
picture, axes = course.plots.figure(
    8, 3.4, alt="Running sums of 0.01 in BF16: nearest stops at 4, toward zero at 2, stochastic sums follow the exact line to 100."
)
axes.plot(paths["stochastic"][:, :20], color=course.plots.PALETTE["sky"], linewidth=0.7)
axes.plot([], color=course.plots.PALETTE["sky"], label="stochastic, 20 sums")
axes.plot([0, 10_000], [0, 100], "--", color=course.plots.COLORS["marker"], label="exact")
axes.plot(paths["nearest"], color=course.plots.PALETTE["vermillion"], label="nearest")
axes.plot(paths["zero"], color=course.plots.PALETTE["purple"], label="toward zero")
axes.set(xlabel="additions of 0.01", ylabel="sum kept in BF16")
axes.legend()
picture

# %% [markdown]
# ## Rounding twice
#
# Is a detour harmless, from FP32 to FP16 and from there to E4M3? Take a number a hair above a tie. The direct way goes up. In FP16
# the hair is lost, the tie is exact, and it goes to the even neighbour below. Two correct roundings make one wrong one.

# %% tags=["nbval-check-output"]
x = 1 + 1 / 16 + 1 / 4096  # 1 and 1.125 are neighbours in E4M3
print("directly:", FP8_E4M3FN.round(x), "  by way of FP16:", FP8_E4M3FN.round(float(FP16.round(x))))
wrong = np.mean(FP8_E4M3FN.round(BF16.round(many)) != FP8_E4M3FN.round(many))
print(f"by way of BF16, {wrong:.1%} of normally distributed numbers end up elsewhere")

# %% [markdown]
# ## BF16 and FP16
#
# Both have 16 bits. BF16 is FP32 with the lower 16 bits gone: all of its range, 8 bits of exponent, but only 7 of mantissa. FP16 has 10
# of mantissa, eight times finer, and 5 of exponent: it ends at 65,504.
#
# "Gone" is not the right word: to cut the bits off is to round toward zero. In units of the ulp:

# %% tags=["nbval-check-output"]
magnitude = np.abs(many)
cut = (magnitude.view(np.uint32) >> 16 << 16).view(np.float32)
assert BF16.ulp(1.0) == 8 * FP16.ulp(1.0) and FP16.max == 65504
assert np.array_equal(cut, BF16.round(magnitude, mode="zero"))
for name, rounded in (("cut off", cut), ("to nearest", BF16.round(magnitude))):
    error = (rounded - magnitude) / BF16.ulp(magnitude)
    print(f"{name:11} mean error {round(float(error.mean()), 2) + 0.0:5.2f} ulp, largest {np.abs(error).max():.2f} ulp")

# %% [markdown]
# ## On the model: what it holds
#
# Which of the two suits our model? Collect three kinds of numbers: its **weights**; the **activations** that enter its linear layers; and
# the **gradients** that come back to their outputs when it is trained, here on 128 tokens. A hook is a function that torch calls
# with what passes through a layer.

# %%
from qlearn.models.quantize import linear_layers

model, tokenizer = qlearn.load_model()
layers = linear_layers(model)
numbers = {"weights": [layer.weight for layer in layers.values()], "activations": [], "gradients": []}


def listen(layer, inputs, output):
    numbers["activations"].append(inputs[0])
    output.register_hook(numbers["gradients"].append)


hooks = [layer.register_forward_hook(listen) for layer in layers.values()]
model.get_input_embeddings().requires_grad_()
ids = tokenizer(qlearn.evaluate.evaluation_text()[:2000], return_tensors="pt").input_ids[:, :128]
model(ids, labels=ids).loss.backward()
for hook in hooks:
    hook.remove()
numbers = {kind: torch.cat([t.detach().flatten() for t in tensors]) for kind, tensors in numbers.items()}

# %% [markdown]
# Each curve below says how many of the numbers lie in each binade. The bars under them are the formats' ranges: black where numbers have
# full precision, grey the subnormals.

# %%
picture, axes = course.plots.figure(
    8, 4.2, alt="Shares of weights, activations and gradients by power of two, above bars with the ranges of four formats."
)
edges = np.arange(-40, 19)
for kind, x in numbers.items():
    axes.stairs(np.histogram(x[x != 0].abs().log2(), edges)[0] * 100 / x.numel(), edges, label=kind, linewidth=2)
for row, (fmt, label) in enumerate(((BF16, "BF16"), (FP16, "FP16"), (FP8_E4M3FN, "E4M3"), (FP8_E5M2, "E5M2"))):
    low, normal, high = np.clip(np.log2([fmt.smallest_subnormal, fmt.smallest_normal, fmt.max]), -40, 18)
    axes.hlines(-3 - 2.5 * row, normal, high, color=course.plots.COLORS["marker"], linewidth=5)
    axes.hlines(-3 - 2.5 * row, low, normal, color="#AAAAAA", linewidth=5)
    axes.text(18.5, -3 - 2.5 * row, label, va="center")
axes.set(xlabel="magnitude, as a power of two", ylabel="share of the numbers, %", xlim=(-40, 18), yticks=[0, 10, 20, 30])
axes.legend(loc="upper left")
picture

# %% [markdown]
# Weights sit in a narrow hill around 2⁻⁴; FP16 covers nearly all of it. Our model is stored in BF16, so BF16 changes nothing.

# %% tags=["nbval-check-output"]
w = numbers["weights"]
for fmt in (BF16, FP16):
    rounded = fmt.round(w)
    zeros, infinite = (rounded == 0).sum(), torch.isinf(rounded).sum()
    print(f"{fmt.name}: of {w.numel():,} weights {(rounded != w).sum()} change, {zeros} become 0, {infinite} become infinite")

# %% [markdown]
# No weight is too large, a few hundred lose bits to the subnormals, and a handful vanish. So FP16 is safe? Look inside. The **residual
# stream** is the vector that each layer adds to; every layer begins with a normalization (RMSNorm) that squares it. And at the
# first token of a text a few of its entries are huge, in this model as in large ones (Sun et al., *Massive Activations in Large
# Language Models*, 2024).

# %% tags=["nbval-check-output"]
ids = tokenizer('"""Count the words of a text."""', return_tensors="pt").input_ids
with torch.no_grad():
    residual = torch.stack(model(ids, output_hidden_states=True).hidden_states)
largest = residual.abs().max().item()
print("largest entry at each token:", *(f"{x:.0f}" for x in residual.abs().amax((0, 1, 3))))
print(f"largest entry {largest:.0f}; its square {largest**2:,.0f}; largest number of FP16 {FP16.max:,.0f}")
print("the square in FP16:", (residual.half() ** 2).max().item(), "  in BF16:", (residual.bfloat16() ** 2).max().item())
assert largest < FP16.max < largest**2

# %% [markdown]
# The entry fits, its square does not. That is why implementations of RMSNorm convert to FP32 first. A model that was trained in BF16
# can fail in FP16 although all of its weights fit: what is computed from them may not.
#
# ## Why FP8 has two layouts
#
# Now look at the green hill, the gradients: it lies far to the left, and it is wide. How much of it would become zero?

# %%
flushed = {}
for fmt in (FP16, FP8_E5M2, FP8_E4M3FN):
    x = numbers["gradients"]
    x = x[x != 0]
    scale = x.abs().max() / fmt.max  # one for all of them
    flushed[fmt] = [(fmt.round(x / s) == 0).float().mean().item() for s in (1, scale)]
    print(f"{fmt.name:11} gradients that become zero: {flushed[fmt][0]:6.1%} as they are, {flushed[fmt][1]:6.2%} with a scale")
assert flushed[FP8_E4M3FN][0] > 0.9 and flushed[FP8_E4M3FN][1] > 5 * flushed[FP8_E5M2][1]

# %% [markdown]
# As they are, E4M3 loses nearly all of them. A **scale** helps: divide by it before encoding and multiply by it after decoding, so that the
# largest gradient becomes the largest number of the format. Even so, E4M3 spans too few binades for the whole hill; E5M2, with one more
# bit of exponent, spans nearly twice as many, and pays with a mantissa bit.
#
# So the usual division of labour is E4M3 for weights and activations, whose hills are narrow, and E5M2 for gradients. It
# is a compromise, not a law: with a scale for each small group of numbers, DeepSeek-V3 used E4M3 for all of its FP8 matrix products, those
# of the gradients too.

# %% tags=["nbval-check-output"]
for fmt in (FP8_E4M3FN, FP8_E5M2):
    binades = np.log2(fmt.max / fmt.smallest_subnormal)
    x = numbers["weights"]
    error = ((fmt.round(x) - x) / x).abs().median().item()
    print(f"{fmt.name:11} {binades:4.1f} binades from the smallest number to the largest; median error of a weight {error:.1%}")

# %% [markdown]
# ## The scale is a number too
#
# The shorter the range, the more a format needs a scale. Unscaled, this share of our weights becomes exactly zero:

# %% tags=["nbval-check-output"]
w = numbers["weights"]
for name in ("fp8_e5m2", "fp8_e4m3fn", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"):
    fmt = FORMATS[name]
    print(f"{name:11} {(fmt.round(w) == 0).float().mean().item():6.1%}   smallest number {fmt.smallest_subnormal:g}")

# %% [markdown]
# A scale has to be stored as well. There is a format for nothing but that: **E8M0**, eight bits of exponent and no others. It has no
# sign, no mantissa, not even a zero, only powers of two. Multiplying by a power of two is exact: it moves the exponent and leaves the mantissa
# alone. Later lessons give every 32 weights such a scale. Here, a 16-bit scale for each row of a matrix is enough.

# %% tags=["nbval-check-output"]
print([E8M0.decode(code) for code in (126, 127, 128, 129)], "  3.3 becomes", E8M0.round(3.3))
assert np.array_equal(E8M0.decode(np.arange(255)), np.exp2(np.arange(255) - 127.0).astype(np.float32))

# %% [markdown]
# ## On the model: which casts survive?
#
# `store` puts a matrix into a format: codes packed to their true width, one scale for each row so that its largest weight becomes the
# format's largest number. What comes out is a `QuantizedTensor`, which lesson 02 opens.

# %%
from qlearn.models import QuantLinear
from qlearn.tensor import QuantizedTensor


def store(weight, fmt, scaled=True):
    rows, columns = weight.shape
    scale = (weight.abs().amax(1, keepdim=True) / fmt.max).half() if scaled else torch.ones(1, 1).half()
    codes = fmt.encode(weight / scale, overflow="saturate")
    return QuantizedTensor.from_codes(codes, scale, fmt, block=(rows // len(scale), columns))


def cast(fmt, scaled=True):
    """The model with every linear layer in a format. 16-bit ones are simulated: rounded, but kept in float32."""
    model, _ = qlearn.load_model()
    for name, layer in linear_layers(model).items():
        if fmt.bits == 16:
            layer.weight.data = fmt.round(layer.weight)
        else:
            model.set_submodule(name, QuantLinear(store(layer.weight, fmt, scaled)))
    return model

# %% [markdown]
# Predict before you run it. Two of the candidates are E5M2, with eight bits, and E2M3, with six. Which of them stays
# closer to the original model?

# %%
model, tokenizer = qlearn.load_model()
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)

# %%
rows = {}
for name in ("fp16", "fp8_e4m3fn", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"):
    scaled = name != "fp8_e5m2"  # E5M2 reaches far enough, and its scale would be subnormal in 16 bits
    rows[name] = qlearn.evaluate.report(cast(FORMATS[name], scaled), tokenizer, reference, name=name)
assert numbers["weights"].abs().max() / FP8_E5M2.max < FP16.smallest_normal
qlearn.evaluate.table(rows.values())

# %% [markdown]
# This is a part of the evaluation text, 4,096 tokens: too few for small differences in perplexity to mean much, enough for the
# divergence. BF16 is not in the table because the model is stored in it: the cast would change no weight.

# %% tags=["nbval-check-output"]
kld = {name: row.kl_divergence for name, row in rows.items()}
assert kld["fp16"] < 1e-4 and kld["fp6_e2m3"] < kld["fp8_e5m2"] / 2
for mantissa_bits in (10, 3, 2, 1):
    found = (f"{name} {round(kld[name], 4):.1g}" for name in kld if FORMATS[name].mantissa_bits == mantissa_bits)
    print(f"{mantissa_bits:2} bits of mantissa:", *found)
three, two, one = ([kld[n] for n in kld if FORMATS[n].mantissa_bits == m] for m in (3, 2, 1))
assert 2 * max(three) < min(two) and 3 * max(two) < min(one)
assert all(row.perplexity < 1.2 * reference.perplexity for row in rows.values())

# %% [markdown]
# None of them breaks the model. And the divergence sorts them **by bits of mantissa**, not by bits: E2M3 with six bits is well ahead of
# E5M2 with eight. Within a row, most weights span few binades. Once a scale has put them in the right place, more exponent
# bits buy little, while every mantissa bit halves the error, which takes the divergence to between a third and a sixth.
#
# And without the scale?

# %%
unscaled = qlearn.evaluate.report(cast(FORMATS["fp6_e2m3"], scaled=False), tokenizer, reference, name="fp6_e2m3, no scale")
assert unscaled.kl_divergence > 100 * kld["fp6_e2m3"]
unscaled

# %% [markdown]
# ## The board
#
# Bits per weight count the scale of each row: 16 bits shared by 256 weights or more.

# %%
course.board.add("unquantized", 16, np.log(reference.perplexity))
for name, row in rows.items():
    course.board.add(f"{name} cast", row.bits_per_weight, np.log(row.perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# Three encoders for E4M3 were handed in, each with one bug. You do not get the code, only the errors they make on the weights of our
# model: by how much each **magnitude** came out too large or too small, in ulps. On the left, how it should be.

# %%
wrong = [course.tasks.get("bits.encode").mutants[i] for i in (1, 3, 0)]
encoders = {"right": lambda x, fmt: fmt.encode(x), "A": wrong[0].function, "B": wrong[1].function, "C": wrong[2].function}
sample = numbers["weights"][::100].numpy()
errors = {}
picture, axes = course.plots.figure(9, 3, columns=4, sharey=True, alt="Histograms of the errors of four encoders, in ulps.")
for ax, (name, encode) in zip(axes, encoders.items()):
    decoded = FP8_E4M3FN.decode(encode(sample.astype(np.float64), FP8_E4M3FN))
    errors[name] = (np.abs(decoded) - np.abs(sample)) / FP8_E4M3FN.ulp(sample)
    ax.hist(errors[name], np.arange(-1.5, 1.1, 1 / 16) - 1 / 32, weights=np.full(sample.size, 100 / sample.size))
    ax.set(title=name, xlabel="error, ulp", xticks=[-1, 0, 1])
axes[0].set_ylabel("share of weights, %")
picture

# %% [markdown]
# Decide first: which one cuts off, which forgot about small numbers, and what do the outermost bars of the third say?
#
# <details><summary>How to tell</summary>
#
# **C** cuts off: no magnitude came out larger. **B** has a lower middle and a thin tail: every subnormal became 0, most of them
# further left than the picture goes, as far as −8. **A** has a full bar at +½ and hardly any at −½, where
# the right encoder has two of half the height: its ties all go away from zero. Ties are not rare here: our weights have 7 bits of
# mantissa, E4M3 keeps 3, and one of the 16 patterns of the 4 dropped bits is a tie.
#
# </details>

# %% tags=["nbval-check-output"]
for letter, mutant in zip("ABC", wrong):
    print(f"{letter}: {mutant.name}")
assert errors["C"].max() == 0 and errors["B"].min() < -1 and abs(np.mean(np.abs(errors["right"]) == 0.5) - 1 / 16) < 0.01
assert np.mean(errors["A"] == 0.5) > 0.05 and np.mean(errors["A"] == -0.5) == 0

# %% [markdown]
# ## What you can now do
#
# - Read any float, 32 bits or 4: sign, exponent, mantissa, hidden 1, subnormals, and what the top codes mean.
# - Say how large the step is at a number, and foresee when a long sum stops growing.
# - Round to the nearest even, toward zero and by chance, and say what each does to a long sum.
# - Choose: BF16 for range, FP16 for precision; E5M2 for range, E4M3 for precision; a scale first, then mantissa bits.
#
# Now write it yourself: [exercise 01](../exercises/01_bits.ipynb). Your own encoder will drive the buttons. After that,
# [lesson 02](02_absmax.ipynb) drops the exponent altogether: integers, and a scale that does all the travelling.
