# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 03 · Zero-point: a ruler that starts where the numbers do
#
# **In 55 minutes** you will know how to lay a grid over lopsided numbers, how a matrix product is computed from 8-bit codes without any
# error, where a grid should end, and when asymmetry is worth its price. You need lesson 02.
#
# **The question.** In every MLP of our model half of the activations pass through SiLU, x / (1 + e⁻ˣ), a smooth cousin of ReLU. Its
# output is never below −0.28. Store it in 8 bits with absmax, and there are 255 codes, −127 to 127. What share of them can never occur?

# %%
import math
import time

import numba
import numpy as np
import torch

import qlearn
from qlearn import course

course.predict("codes that never occur, in % of the 255", low=0, high=100, key="silu-idle-codes")

# %% [markdown]
# A **hook** is a function that torch calls when a module has run. These keep what SiLU puts out, and what enters the layer behind it,
# while the model reads the beginning of a text.

# %%
model, tokenizer = qlearn.load_model()
tokens = tokenizer(qlearn.evaluate.calibration_text()[:1500], return_tensors="pt").input_ids
after_silu, into_down = {}, {}
hooks = []
for i, layer in enumerate(model.model.layers):
    hooks.append(layer.mlp.act_fn.register_forward_hook(lambda module, args, out, i=i: after_silu.update({i: out[0]})))
    hooks.append(layer.mlp.down_proj.register_forward_hook(lambda module, args, out, i=i: into_down.update({i: args[0][0]})))
model(tokens)
for hook in hooks:
    hook.remove()

# %%
activations = after_silu[5]  # (tokens, 768)
codes = qlearn.quantize(activations, "absmax", bits=8, per="tensor").codes().int()  # in int8, 127 − (−8) would wrap
print(f"numbers from {activations.min():.2f} to {activations.max():.2f}, codes from {codes.min()} to {codes.max()}")
assert activations.min() > -0.2785 and codes.max() == 127
course.reveal("silu-idle-codes", 100 * (1 - (codes.max() - codes.min() + 1).item() / 255), unit="%")

# %% [markdown]
# Almost half of the codes lie idle, because absmax insists on a grid that is symmetric about 0.
#
# ## By hand
#
# Let the grid run from the smallest number to the largest. With b bits it has 2ᵇ rulings, so 2ᵇ − 1 steps between them: that fixes the
# **scale**. Codes are unsigned, 0 to 2ᵇ − 1. The code that stands for the number 0 is the **zero point**, `zero` for short:
#
# scale = (max − min) / (2ᵇ − 1),  zero = round(−min / scale)
#
# code = round(x / scale) + zero,  x′ = (code − zero) · scale
#
# Here are six numbers and 3 bits.

# %% tags=["nbval-check-output"]
x = torch.tensor([-0.37, 0.0, 0.22, 0.58, 0.79, 1.03])
scale = (x.max() - x.min()).item() / (2**3 - 1)
zero = round(-x.min().item() / scale)
codes = torch.round(x / scale) + zero
assert round(scale, 6) == 0.2 and round(-x.min().item() / scale, 2) == 1.85 and zero == 2
assert codes.tolist() == [0, 2, 3, 5, 6, 7]
course.table(original=x, codes=codes, reconstructed=(codes - zero) * scale)

# %% [markdown]
# All eight codes are in reach. −min / scale is 1.85, and it was rounded to 2: the whole grid moved by 0.15 steps, so that one ruling
# stands exactly on 0. Absmax has seven codes, −3 to 3, and with these numbers −3 and −2 cannot occur:

# %% tags=["nbval-check-output"]
symmetric = qlearn.quantize(x[None], "absmax", bits=3)
lopsided = qlearn.quantize(x[None], "zero_point", bits=3)
squares = [(qt.dequantize() - x).square().sum().item() for qt in (symmetric, lopsided)]
assert symmetric.codes().tolist() == [[-1, 0, 1, 2, 2, 3]] and squares[0] > 10 * squares[1]
course.table(original=x, absmax=symmetric.dequantize()[0], zero_point=lopsided.dequantize()[0])

# %% [markdown]
# ## Why 0 must have a ruling
#
# Why not let the grid begin exactly at min? Because 0 is no number like the others: padding is 0, a ReLU's output is 0 half of the
# time, a pruned weight is 0. All zeros get the same error, so errors do not cancel: they add up.
#
# Here is a row of 768 weights of which 8 have survived pruning, on both kinds of grid.

# %% tags=["nbval-check-output"]
pruned = torch.zeros(1, 768)
pruned[0, :8] = torch.linspace(-0.5, 0.3, 8)
step = (pruned.max() - pruned.min()) / 15
from_min = torch.round((pruned - pruned.min()) / step) * step + pruned.min()
on_zero = qlearn.quantize(pruned, "zero_point", bits=4).dequantize()
for name, back in (("grid from min", from_min), ("zero on the grid", on_zero)):
    print(f"{name:17} a pruned weight is {back[0, 100]:6.3f}, the row sums to {back.sum():6.2f}")
assert on_zero[0, 100] == 0 and pruned.sum().abs() < 1

# %% [markdown]
# The row should sum to −0.80. An error of 0.02 in every pruned weight has buried what the others say.
#
# There is one more condition. If all numbers are positive, 0 lies outside the interval and has no code at all. So the interval is
# **widened to include 0**, and then `zero` is always one of the codes. Here is the real thing.

# %%
course.source_of(qlearn.methods.zero_point)

# %% [markdown]
# `low` and `high` are clamped to include 0: that is the widening. `fit` is what you did by hand, for each block of weights that share a
# scale; `_search` is for later. The result is that of the lines above. Only the scale differs a little, as it is stored in 16 bits, so
# here we ask for 32.

# %% tags=["nbval-check-output"]
exact = qlearn.quantize(x[None], "zero_point", bits=3, scale_dtype=torch.float32)
assert exact.codes()[0].tolist() == codes.tolist() and exact.zero_points().item() == zero
positive = qlearn.quantize(torch.tensor([[10.0, 11.0, 12.0]]), "zero_point", bits=8)
print("zero", int(positive.zero_points()), " codes", positive.codes()[0].tolist(), " back", [round(v, 1) for v in positive.dequantize()[0].tolist()])

# %% [markdown]
# ## Drag it
#
# Before you do: shift the numbers until the last of them is above 0. How many times as large as that of the zero-point grid does the error
# of absmax become on the way? And with no shift at all, are the two alike?

# %%
explorer = course.widgets.zero_point_explorer()
explorer

# %%
for bits, shift in ((4, 0.0), (4, 2.0), (4, 4.0), (8, 0.0), (2, 0.0)):
    explorer.controls["bits"].value, explorer.controls["shift"].value = bits, shift
    print(explorer.summary)

# %% [markdown]
# **What you should have seen.** The zero-point grid moves with the numbers: its error stays, and only the code of zero goes down to 0. The
# grid of absmax grows as far below 0 as above it, until half of its codes stand where nothing is: about twice the error, one bit.
#
# With no shift zero-point is ahead as well, a little at 8 bits, by a third at 2. Why, on symmetric numbers? Keep that question.
#
# ## The order of four operations
#
# Round, add the zero, clamp, cast. It is tempting to cast to 8 bits as soon as the number is whole. A grid from −1 to 3, with the cast
# last and with the cast first:

# %% tags=["nbval-check-output"]
scale, zero = 4 / 255, 64


def cast_last(x):
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)


def cast_first(x):
    steps = torch.round(x / scale).int().to(torch.int8)  # by way of int32, so that every machine wraps alike
    return (steps.int() + zero).clamp(0, 255).to(torch.uint8)


x = torch.tensor([0.5, 1.9, 2.5, 4.0, 9.0])
right, wrong = ((cast(x).float() - zero) * scale for cast in (cast_last, cast_first))
assert right.max() < 3 and wrong[2] < -1 and wrong[4] < 1
course.table(original=x, cast_last=right, cast_first=wrong)

# %% [markdown]
# Cast last, 4 and 9 **saturate**: they end where the grid ends. Cast first, 2.5, a number well inside, comes back as −1. It is 159 steps
# from 0, int8 ends at 127, and the cast made −97 of it. No clamp can repair that: −97 looks like any other number. With few bits,
# numbers inside the grid do not wrap, so a test at 2 bits sees nothing.

# %% tags=["nbval-check-output"]
print("2.5 is", round(2.5 / scale), "steps from 0; in int8 that is", torch.tensor(round(2.5 / scale)).to(torch.int8).item())

# %% [markdown]
# ## A matrix product of codes
#
# Hardware multiplies 8-bit integers faster than floats. But a code is off by its zero. Let qx be the codes of k inputs with scale sx and
# zero zx, and qw, sw, zw those of one row of weights. Then x ≈ sx (qx − zx) and w ≈ sw (qw − zw), and Σ x·w ≈ sx·sw times
#
# Σ (qx − zx)(qw − zw) = Σ qx·qw − zx Σ qw − zw Σ qx + k·zx·zw

# %% tags=["nbval-check-output"]
qx, zx = np.array([0, 2, 3, 5, 6, 7]), 2  # the six numbers from above
qw, zw = np.array([5, 2, 3, 6, 0, 7]), 3  # six weights with scale 0.25: 0.5, -0.25, 0, 0.75, -0.75, 1
terms = [(qx * qw).sum(), -zx * qw.sum(), -zw * qx.sum(), 6 * zx * zw]
print(" + ".join(f"({term})" for term in terms), "=", sum(terms))
assert sum(terms) == ((qx - zx) * (qw - zw)).sum() == 13 and terms == [92, -46, -69, 36]
print(f"times both scales: {13 * 0.2 * 0.25:.2f}, in floats: {np.dot([-0.37, 0, 0.22, 0.58, 0.79, 1.03], [0.5, -0.25, 0, 0.75, -0.75, 1]):.2f}")

# %% [markdown]
# Only the first term is a matrix product, of the codes as they are. Σ qw belongs to the weights and is computed once, when they are
# quantized. Σ qx is one sum for each input, and the last term is a constant. With symmetric weights, zw = 0, the third and the fourth vanish;
# that is why many engines pair symmetric weights with asymmetric activations.
#
# ## The ladder
#
# The layer behind the SiLU, with weights and inputs in 8 bits. First the definition, as a loop.

# %%
inputs, weight = into_down[5][:16], model.model.layers[5].mlp.down_proj.weight
x8 = qlearn.quantize(inputs, "zero_point", bits=8, per="tensor")
w8 = qlearn.quantize(weight, "zero_point", bits=8)
qx, zx = x8.codes(), int(x8.zero_points())
qw, zw = w8.codes(), w8.zero_points().flatten().int()
w_sums = qw.sum(1, dtype=torch.int32)


def loop(qx, zx, qw, zw):
    """(m, k) and (n, k) codes -> (m, n), one product of two differences at a time; lists of Python integers."""
    return [[sum((a - zx) * (b - z) for a, b in zip(x, w)) for w, z in zip(qw, zw)] for x in qx]


# %% [markdown]
# Then the four terms in torch, and in Numba, where the loop is back but compiled: 8-bit codes in, sums in 32 bits.

# %%
def four_terms(qx, zx, qw, zw, w_sums):
    product = qx.int() @ qw.int().T
    x_sums = qx.sum(1, dtype=torch.int32)
    return product - zx * w_sums - x_sums[:, None] * zw + qx.shape[1] * zx * zw


@numba.njit
def compiled(qx, zx, qw, zw, w_sums):
    out = np.zeros((len(qx), len(qw)), np.int32)
    for i in range(len(qx)):
        x_sum = qx[i].astype(np.int32).sum()
        for j in range(len(qw)):
            for t in range(qx.shape[1]):
                out[i, j] += np.int32(qx[i, t]) * np.int32(qw[j, t])
            out[i, j] += qx.shape[1] * zx * zw[j] - zx * w_sums[j] - x_sum * zw[j]
    return out


# %%
arrays = (qx.numpy(), zx, qw.numpy(), zw.numpy(), w_sums.numpy())
compiled(*arrays)  # the first call compiles
results = {}
for name, function, arguments in (
    ("loop, 1 input", loop, (qx[:1].tolist(), zx, qw.tolist(), zw.tolist())),
    ("torch, 16 inputs", four_terms, (qx, zx, qw, zw, w_sums)),
    ("Numba, 16 inputs", compiled, arrays),
):
    began = time.perf_counter()
    results[name] = torch.as_tensor(function(*arguments))
    seconds = time.perf_counter() - began
    print(f"{name:17} {seconds / results[name].numel() / qx.shape[1] * 1e9:8.2f} ns a product")

# %% [markdown]
# All must agree, to the last integer, with the differences multiplied in 64 bits, as integers and as floats (float64 holds every integer
# below 2⁵³).

# %% tags=["nbval-check-output"]
exact = (qx.long() - zx) @ (qw.long() - zw[:, None]).T
as_floats = (qx.double() - zx) @ (qw.double() - zw[:, None]).T
assert torch.equal(results["loop, 1 input"], exact[:1]) and torch.equal(as_floats.long(), exact)
assert all(torch.equal(results[name].long(), exact) for name in ("torch, 16 inputs", "Numba, 16 inputs"))
print(results["Numba, 16 inputs"].dtype, tuple(exact.shape), "all equal")

# %% [markdown]
# The scales come in last, once for each output, and give the same as a product of dequantized floats, up to the rounding of floats.

# %%
outputs = results["torch, 16 inputs"] * x8.scales.float() * w8.scales.float().T
torch.testing.assert_close(outputs, x8.dequantize() @ w8.dequantize().T, rtol=1e-4, atol=1e-4)
relative = (outputs - inputs @ weight.T).norm() / (inputs @ weight.T).norm()
print(f"against the layer in floats: {relative:.1%} off")

# %% [markdown]
# **Does it fit?** A product of two codes is at most 255², an int32 holds 2³¹ − 1, so this many terms can be added without fear. The wanted
# sum lies within ±k · 255² too, so the corrections may pass the end on the way: int32 wraps around, and where the result fits it comes out
# right. A result that does not fit stays wrong:

# %% tags=["nbval-check-output"]
longest = (2**31 - 1) // 255**2
print("longest sum:", longest, "  in our model:", max(layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)))
assert longest == 33025
full = torch.full((longest + 1,), 255, dtype=torch.int32)
print("one term more:", (full * full).sum(dtype=torch.int32).item())

# %% [markdown]
# ## Parity
#
# torch quantizes to 8 unsigned bits with a zero point, too. Given our scales and zeros, its numbers have to be ours. It multiplies by
# 1 / scale where we divide, so a number within a hair of a tie may go the other way.

# %% tags=["nbval-check-output"]
ours = qlearn.quantize(weight, "zero_point", bits=8, scale_dtype=torch.float32)
scales = ours.scales.flatten()
theirs = torch.fake_quantize_per_channel_affine(weight, scales, ours.zero_points().flatten().int(), 0, 0, 255)
steps = (weight / scales[:, None]).double()
tie = (steps - steps.floor() - 0.5).abs() < 1e-4
assert torch.equal(ours.dequantize()[~tie], theirs[~tie]) and tie.float().mean() < 0.01
print(f"{(~tie).sum():,} of {weight.numel():,} weights equal to the last bit; {tie.sum():,} lie within a hair of a tie")

# %% [markdown]
# ## Where should the grid end?
#
# So far it reached the largest number. It need not. End it earlier, at the **clip**, and whoever is outside is rounded to the end, a large
# error for a few; all others get a finer ruler. The error has two parts:
#
# - **rounding**, inside: spread evenly over a step, step² / 12 on average, and the step grows with the clip;
# - **clipping**, outside: the square of what sticks out, which shrinks as the clip grows.
#
# Where is their sum least at 8 bits, at 4, at 2: all the way out, or further in?

# %%
explorer = course.widgets.clip_explorer()  # 16,384 normal random numbers, one symmetric grid
explorer

# %%
for bits in (8, 4, 2):
    explorer.controls["bits"].value = bits
    print(explorer.summary)

# %% [markdown]
# **What you should have seen.** As the clip moves in, the rounding error falls with its square, while the clipping error is nothing for long
# and then rises steeply, so the sum has one minimum. At 8 bits it is almost at the end of the range and gains next to nothing. At 4 bits it
# lies near 60 % of the largest number, and halves the error. At 2 bits it is near 30 %, and leaves less than a quarter. The fewer
# the bits, the earlier a grid should end.
#
# For a normal distribution all this can be computed. Here, on a fine grid of x, for a symmetric ruler with its end at the clip:

# %%
x = np.linspace(0, 7, 3501)  # one side is enough: the other is its mirror image
density = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()


def normal_error(clip, bits):
    """Mean squared error of a normal distribution with standard deviation 1, for a symmetric grid that ends at the clip."""
    step = clip / (2 ** (bits - 1) - 1)
    back = np.minimum(np.round(x / step) * step, clip)
    return np.sum(density * (x - back) ** 2)


clips = np.arange(0.8, 5, 0.01).tolist()
best = {bits: min(clips, key=lambda clip: normal_error(clip, bits)) for bits in range(2, 9)}
assert all(best[bits] < best[bits + 1] for bits in range(2, 8))

# %% [markdown]
# The minimum lies where one part grows as fast as the other falls. Let φ be the normal density, Q(c) the share of numbers above the clip c,
# and n = 2ᵇ⁻¹ − 1 the steps on each side. Rounding costs c² / (12 n²). Clipping costs twice the integral of (x − c)² φ(x) beyond c,
# which is 2 [(1 + c²) Q(c) − c φ(c)]. Setting the slopes equal:
#
# c / (6 n²) = 4 [φ(c) − c Q(c)]
#
# One more bit makes the left side four times smaller, and as the right side
# falls off like e^(−c²/2), a small step outwards is enough. Does a real layer do the same?

# %%
def slopes(c, bits):
    """How fast the rounding error grows with the clip, and how fast the clipping error falls."""
    phi, above = math.exp(-c * c / 2) / math.sqrt(2 * math.pi), math.erfc(c / math.sqrt(2)) / 2
    return c / (6 * (2 ** (bits - 1) - 1) ** 2), 4 * (phi - c * above)


predicted = {bits: min(clips, key=lambda c: abs(math.log(np.divide(*slopes(c, bits))))) for bits in best}
print("bits  normal, measured  by the formula  this layer   (in standard deviations)")
for bits in (2, 3, 4, 6, 8):
    qt = qlearn.quantize(weight, "absmax", bits=bits, per="tensor", clip="mse")
    layer_clip = qt.scales.item() * (2 ** (bits - 1) - 1) / weight.std()
    print(f"{bits:4}  {best[bits]:16.2f}  {predicted[bits]:14.2f}  {layer_clip:10.2f}")
assert all(abs(best[bits] / predicted[bits] - 1) < 0.03 for bits in best)

# %% [markdown]
# From 3 bits on, each bit moves the best clip outwards by about half a standard deviation, or less. The formula is right within 3 %, even at
# 2 bits. The layer agrees while bits are few. With many bits its grid ends further out: it has more large weights than a normal
# distribution, and there are codes to spare for them.
#
# ## Three ways to choose the end
#
# **Min-max** clips nobody; **percentile** covers, say, 99.9 % of the numbers of a block; **mse** tries a hundred fractions of the interval.

# %%
print("SQNR in dB at 4 bits       minmax   99.9 %     99 %      mse")
for name, layout in (("one grid for all", {"per": "tensor"}), ("one for each row", {"per": "row"}), ("groups of 64", {"group_size": 64})):
    found = []
    for options in ({}, {"clip": "percentile", "percentile": 99.9}, {"clip": "percentile", "percentile": 99.0}, {"clip": "mse"}):
        back = qlearn.quantize(weight, "zero_point", bits=4, **layout, **options).dequantize()
        found.append(10 * math.log10(weight.square().sum() / (weight - back).square().sum()))
    print(f"{name:22}", *(f"{value:8.2f}" for value in found))
    assert found[3] > found[0] and found[3] > found[2] - 0.1
assert found[0] == found[1] == found[2] and found[3] - found[0] < 1  # groups of 64

# %% [markdown]
# 99 % is as good as mse with one grid for all, but nobody knew that before: 99.9 % gives a decibel less. mse finds the place by itself, for
# each block. In groups of 64 a percentile of 99 cuts nobody, since 1 % of 64 is less than one weight, and there is little left to gain.
#
# ## When does asymmetry pay?
#
# A zero point is stored with b bits in each group, so the two methods never have the same size. A fair comparison is at **equal true
# bits**: what would absmax do with the bits that the zeros take? It could have smaller groups.

# %%
weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def sqnr(weight, method, bits, group_size):
    """Ratio of signal to quantization noise, in dB."""
    back = qlearn.quantize(weight, method, bits=bits, group_size=group_size).dequantize()
    return 10 * math.log10(weight.square().sum() / (weight - back).square().sum())


picture, axes = course.plots.figure(8, 3.6, alt="SQNR against true bits per weight: zero-point lies above absmax, most of all at 2 bits.")
for method, color in (("absmax", "original"), ("zero_point", "quantized")):
    for bits in (2, 3, 4):
        points = [(bits + (16 + bits * (method == "zero_point")) / size, sqnr(weight, method, bits, size)) for size in (256, 128, 64, 32, 16)]
        axes.plot(*zip(*points), "o-", color=course.plots.COLORS[color], label=method if bits == 2 else None)
axes.set(xlabel="true bits per weight", ylabel="SQNR (dB)")
axes.legend()
picture

# %% [markdown]
# Each line is one width of code, from groups of 256 on the left to groups of 16 on the right.
#
# Now all 56 layers, in groups of 64. **gain** is what zero-point is better by; part of it comes from the **unused code** of absmax. The
# **price** is what absmax would gain with the bits of the zeros: they would buy a part of the way from groups of 64 to groups of 32. (Each
# halving doubles what the scales cost and gains about as much as the one before, so the way is measured on a logarithmic axis.) The rest
# is the gain at equal bits. How much will it be at 4 bits? At 2?

# %%
print("bits      gain   unused code   price   at equal bits   the least of 56   layers that gain")
net = {}
for bits in (8, 4, 3, 2):
    rows = []
    for w in weights.values():
        coarse, fine, lopsided = sqnr(w, "absmax", bits, 64), sqnr(w, "absmax", bits, 32), sqnr(w, "zero_point", bits, 64)
        price = math.log2((16 + bits) / 16) * (fine - coarse)
        rows.append((lopsided - coarse, price, lopsided - coarse - price))
    gain, price, net[bits] = np.mean(rows, axis=0)
    equal = [row[2] for row in rows]
    code = 20 * math.log10((2**bits - 1) / (2**bits - 2))
    print(f"{bits:4} {gain:6.2f} dB {code:10.2f} dB {price:7.2f} {net[bits]:12.2f} dB {min(equal):14.2f} dB {sum(e > 0 for e in equal):18}")
    assert 0 < gain - code < 1, "what is left is about 1 dB"
assert net[2] > net[3] > net[4] > net[8] > 0

# %% [markdown]
# It pays in every layer, but look where the gain comes from: that answers the question you kept. Zero-point has 2ᵇ codes, absmax 2ᵇ − 1. At 2
# bits, four against three, this is most of the gain, and it has nothing to do with asymmetry. (The column is an estimate: it takes s²/12
# for granted, which lesson 02 found wrong at 2 bits.) llama.cpp's Q4_0 gets the code back without a zero point: the sign of its scale says
# which side is longer. Lopsidedness brings the rest, about 1 dB: the weights are symmetric, the few in a group are not, by chance.
#
# At 8 bits what remains is worth less than a tenth of a bit.

# %% tags=["nbval-check-output"]
for bits in (2, 3, 4, 8):
    print(f"{bits} bits: {2**bits} codes against {2**bits - 1} are worth {20 * math.log10((2**bits - 1) / (2**bits - 2)):.2f} dB")
assert net[8] / 6.02 < 0.1

# %% [markdown]
# ## Activations
#
# Now back to SiLU, where the grid was half empty. One grid for all tokens, 8 bits: the zeros cost nothing worth counting. If one side is
# empty, the step halves, which is one bit, 6.02 dB. How much does the next matrix product gain?

# %%
def gain(x):
    """dB that one zero-point grid is better than one absmax grid, at 8 bits."""
    errors = [(qlearn.quantize(x, method, bits=8, per="tensor").dequantize() - x).square().sum() for method in ("absmax", "zero_point")]
    return 10 * math.log10(errors[0] / errors[1])


gains = [(gain(after_silu[i]), gain(into_down[i])) for i in range(8)]
for i, (silu, down) in enumerate(gains):
    print(f"layer {i}: what leaves SiLU {silu:5.2f} dB, what enters down_proj {down:5.2f} dB")
assert min(silu for silu, down in gains) > 4 and np.median(gains, axis=0)[1] < 2
assert all(0.4 < (down < 0).float().mean() < 0.6 for down in into_down.values())

# %% [markdown]
# Nearly a whole bit, and no matrix product sees it. In a Llama MLP SiLU's output is first multiplied by another projection, whose sign is
# as often minus as plus, and only this product enters `down_proj`. What gains there is chance: which side the largest outlier is on.
# In networks with a plain ReLU or GELU in front of a matrix product the bit is real.
#
# So look at the tensor that is multiplied, not at the one with the famous shape.
#
# ## On the model
#
# Groups of 64, the first 4,096 tokens of the evaluation text.

# %%
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
rows = {"unquantized": qlearn.evaluate.report(model, tokenizer, reference, name="unquantized")}
plain, mse = {"clip": "minmax"}, {"clip": "mse"}
for bits in (4, 3, 2):
    for name, method, options in (("absmax", "absmax", plain), ("zero-point", "zero_point", plain), ("zero-point, mse clip", "zero_point", mse)):
        quantized, _ = qlearn.load_model()
        qlearn.quantize_model(quantized, method, bits=bits, group_size=64, progress=False, **options)
        label = f"{name} {bits} bit"
        rows[label] = qlearn.evaluate.report(quantized, tokenizer, reference, name=label)
qlearn.evaluate.table(rows.values())

# %%
kld = {label: row.kl_divergence for label, row in rows.items()}
assert all(kld[f"zero-point {bits} bit"] < 0.85 * kld[f"absmax {bits} bit"] for bits in (4, 3, 2))
assert all(kld[f"zero-point, mse clip {bits} bit"] < 0.9 * kld[f"zero-point {bits} bit"] for bits in (3, 2))
assert kld["zero-point 3 bit"] < 0.65 * kld["absmax 3 bit"]
assert rows["zero-point, mse clip 2 bit"].perplexity > 4 * rows["unquantized"].perplexity
for bits in (4, 3, 2):
    print(f"{bits} bits: {rows[f'absmax {bits} bit'].bits_per_weight:.4f} or {rows[f'zero-point {bits} bit'].bits_per_weight:.4f} bits per weight")

# %% [markdown]
# At 4 bits the zeros help and the clip hardly matters: its perplexity and its divergence disagree on whether it helps. At 3 bits the zeros take away almost half of the divergence, and the clip another part
# of what is left. (Much of what the zeros do, you know now, is the unused code.) At 2 bits the two together turn a model that says nothing
# into one that says little: still not usable.
#
# ## The board
#
# Where two points nearly cover each other, their difference is less than 4,096 tokens can tell.

# %%
course.board.add("unquantized", 16, math.log(rows["unquantized"].perplexity))
for label, row in rows.items():
    if label.endswith(("4 bit", "3 bit")):
        course.board.add(f"{label}, groups of 64", row.bits_per_weight, math.log(row.perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# This quantizer passes a test with a matrix of weights: no error above half a step. Then someone ran it over the whole model, norms
# included, and got noise. On the left its errors on weights, on the right those on the weights of a norm.

# %%
def suspect(x, bits=8):
    scale = (x.max() - x.min()) / (2**bits - 1)
    zero = torch.round(-x.min() / scale).clamp(0, 2**bits - 1)
    codes = (torch.round(x / scale) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


norm = model.model.layers[4].input_layernorm.weight
picture, axes = course.plots.figure(8, 2.8, columns=2, alt="Errors of a broken quantizer: small and even on weights, all far below zero on a norm.")
for axis, (name, tensor) in zip(axes, (("weights", weight), ("norm", norm))):
    axis.hist((suspect(tensor) - tensor).flatten(), bins=40, color=course.plots.COLORS["error"])
    axis.set(title=name, xlabel="error", yticks=[])
axes[1].set_xticks([-0.9, -0.75, -0.6])
picture

# %% [markdown]
# Every error on the right is negative, and large. What comes back? Try a tensor small enough to read. Which line is wrong, and which one
# hides it?

# %% tags=["nbval-check-output"]
print("[10, 11, 12] comes back as", suspect(torch.tensor([10.0, 11.0, 12.0])).tolist())
print("distinct values in the norm:", norm.unique().numel(), " after this:", suspect(norm).unique().numel())
assert suspect(torch.tensor([10.0, 11.0, 12.0])).allclose(torch.tensor(2.0)) and norm.min() > 0
assert (suspect(weight) - weight).abs().max() < 0.501 * (weight.max() - weight.min()) / 255  # the test it passed

# %% [markdown]
# The first line forgets to widen the interval. All numbers are positive, so `zero` comes out below 0, no code at all. The second line
# *clamps* it into the range, which silences the symptom: now scale and zero belong to different grids, every number lies beyond the last
# ruling, and that is what comes back, max − min, 2 for our three. Weights are centred on 0; norms, and
# constants, are not.

# %% tags=["nbval-check-output"]
back = qlearn.quantize(norm[None], "zero_point", bits=8)
assert back.zero_points().item() == 0 and (back.dequantize() - norm).abs().max() <= back.scales.item() / 2
print("widened: zero", int(back.zero_points()), "and no error above half a step")

# %% [markdown]
# ## What you can now do
#
# - Lay a grid over any interval, with 0 on it, and say why 0 must be on it.
# - Get from numbers to codes in the right order, and recognise a cast that came too early.
# - Compute a matrix product of codes exactly in integers, with four terms, and say how long it may be.
# - Choose where a grid ends, and know that fewer bits want it to end earlier.
# - Count what a zero point costs, and look where its gain comes from before you pay.
#
# Now write it yourself: [exercise 03](../exercises/03_zero_point.ipynb). In its last cell a layer runs on nothing but your own integers.
# Back to [the map](00_start_here.ipynb).
