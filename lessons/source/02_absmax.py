# %% [markdown]
# # 02 · Absmax: one ruler for many weights
#
# **In 45 minutes** you will know how weights become small integers, why every further bit is worth six decibels, how
# one weight in a thousand spoils all the others, and what a scale costs. You need lesson 01.
#
# **The question.** The first attention matrix of our model holds 65,536 weights. Lay one ruler over all of them,
# fifteen values spread evenly about zero and reaching as far as the largest weight: that is 4 bits a weight. Store each
# weight as the nearest of the fifteen and read it back. How far off is it on average, compared with the average weight?

# %%
import os
import tempfile
import time

import numba
import numpy as np
import torch
from tqdm.auto import tqdm

import qlearn
from qlearn import course

question = "mean error of a weight, in % of the mean weight (both without sign)"
course.predict(question, low=0, high=100, key="absmax-4bit")

# %% [markdown]
# ## By hand
#
# Five weights and three bits. Three bits tell eight integers apart. We use seven of them, −3 to 3, so that the grid is
# **symmetric**: a weight and its negative get codes that are negatives of each other, and zero is a code of its own.
#
# What one step of the code is worth is called the **scale**. **Absmax** chooses it so that the largest magnitude lands
# on the largest code: scale = max|w| / 3. A weight becomes the nearest code, and a code times the scale is what you
# read back.

# %% tags=["nbval-check-output"]
w = np.array([0.9, -0.31, 0.14, -0.02, 0.6])
scale = np.abs(w).max() / 3
codes = np.round(w / scale).astype(int)
assert codes.tolist() == [3, -1, 0, 0, 2]
course.table(original=w, codes=codes, reconstructed=codes * scale)

# %% [markdown]
# Three bits a weight are stored, and one scale for the five, here 0.3. Both 0.14 and −0.02 came back as 0: the step was
# chosen by 0.9, and for 0.9 alone.

# %%
alt = "Seven evenly spaced rulings from −0.9 to 0.9; five weights move to the nearest."
picture, axes = course.plots.figure(8, 1.9, alt=alt)
axes.vlines(np.arange(-3, 4) * scale, -0.5, 0.5, color=course.plots.COLORS["quantized"], label="grid: code × scale")
axes.plot(w, [1] * 5, "o", color=course.plots.COLORS["original"], label="weights")
axes.plot([w, codes * scale], [[1] * 5, [0.5] * 5], color=course.plots.COLORS["faint"])
axes.set(xlabel="value", yticks=[], ylim=(-0.6, 1.4), xticks=np.arange(-3, 4) * scale)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
picture

# %% [markdown]
# No weight had to move further than half a step. That is no luck. Between two rulings, the lines of the grid, the point furthest
# from both lies in the middle, and beyond the last ruling there is nothing, because the last ruling *is* the largest weight. So for
# every absmax quantizer
#
# $$|\text{error}| \le \tfrac{1}{2}\,\text{scale}.$$
#
# All that is left to do is to make the scale small.

# %% tags=["nbval-check-output"]
error = codes * scale - w
assert np.abs(error).max() <= scale / 2
print(f"scale {scale:.2f}   half a step {scale / 2:.2f}   largest error {np.abs(error).max():.2f}")

# %% [markdown]
# ## The package's own
#
# Those three lines are the method. Around them the real function settles who shares a scale (`block`), packs the codes,
# and stores the scale in 16 bits. `limit` is the largest magnitude of each block. What is said there about percentiles
# and clipping waits for lesson 03.

# %%
course.source_of(qlearn.methods.absmax)

# %% [markdown]
# It finds the same codes. Its scale is a little above 0.3: FP16 has no 0.3, and of its two neighbours the package takes
# the upper one. With the lower one the ruler would end just short of the largest weight, and our bound with it.

# %% tags=["nbval-check-output"]
qt = qlearn.quantize(torch.tensor(w)[None], "absmax", bits=3)
print(qt.codes().tolist(), qt.scales.item())
assert qt.codes()[0].tolist() == codes.tolist()
assert scale < qt.scales.item() <= scale * (1 + 2**-10)

# %% [markdown]
# ## The ladder
#
# Now the matrix of the question, three times: as a loop that says what is meant, as one line of torch, and as a loop
# again, which Numba compiles. All of them round a tie, such as 2.5, to the even neighbour, as IEEE 754 does.

# %%
model, tokenizer = qlearn.load_model()
weight = model.model.layers[0].self_attn.q_proj.weight
step = qlearn.quantize(weight, "absmax", bits=4, per="tensor").scales.item()


def by_loop(rows):
    return [[round(x / step) for x in row] for row in rows]


def by_torch(weight):
    return (weight / step).round().to(torch.int8)


# %%
@numba.njit
def by_numba(weight, step):
    codes = np.empty(weight.shape, np.int8)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            codes[i, j] = round(weight[i, j] / step)
    return codes


ours = by_torch(weight)
assert ours.tolist() == by_loop(weight.tolist()) == by_numba(weight.numpy(), np.float32(step)).tolist()
assert torch.equal(ours, qlearn.quantize(weight, "absmax", bits=4, per="tensor").codes())


# %%
def milliseconds(function, *inputs):
    """The best of five calls."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function(*inputs)
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


print(f"Python loop   {milliseconds(by_loop, weight.tolist()):8.3f} ms")
print(f"torch         {milliseconds(by_torch, weight):8.3f} ms")
print(f"Numba         {milliseconds(by_numba, weight.numpy(), np.float32(step)):8.3f} ms")

# %% [markdown]
# ## Parity
#
# torch has a quantizer of its own, made for training with simulated quantization: it returns the numbers that would be
# read back. Given our scales, one for each row this time, it must find our codes. It multiplies by 1/scale where we
# divide by the scale, which can change the last bit of a quotient, so a weight midway between two codes may go the
# other way. Nothing else may differ. And every error is held against the bound.

# %% tags=["nbval-check-output"]
for bits in (8, 4, 2):
    qt = qlearn.quantize(weight, "absmax", bits=bits)
    qmax, zero = 2 ** (bits - 1) - 1, torch.zeros(256, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, qt.scales.flatten().float(), zero, 0, -qmax, qmax)
    quotient = weight.double() / qt.scales.double()
    tie = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    assert torch.equal(theirs[~tie], qt.dequantize()[~tie]) and tie.float().mean() < 0.01
    half_step = qt.scales.float() / 2
    assert ((qt.dequantize() - weight).abs() <= 1.0001 * half_step).all()  # a little more: float32 rounds as well
    differ = theirs != qt.dequantize()
    print(f"{bits} bits: {differ.sum()} of {weight.numel():,} weights differ, {tie.sum()} were midway")

# %% [markdown]
# ## What a bit is worth
#
# Where does a weight lie between two rulings? If the step is small, nowhere in particular: every error from −scale/2 to
# scale/2 is as likely as any other. The mean square of such an error is the integral of e² over that interval, divided
# by its length:
#
# $$\text{noise} = \frac{1}{s}\int_{-s/2}^{s/2} e^2\,de = \frac{s^2}{12}.$$
#
# One more bit halves the step, so the noise falls to a quarter. A mean square is called a **power** (its root, the
# **rms**, is the usual size of something centred on zero), and ratios of power are told in **decibels**, 10 log₁₀ of
# the ratio. Power of the weights over power of the noise is the **SQNR**, the signal-to-quantization-noise ratio.

# %% tags=["nbval-check-output"]
def decibels(ratio):
    return 10 * np.log10(float(ratio))


def sqnr(weight, back):
    return decibels(weight.double().square().mean() / (back.double() - weight.double()).square().mean())


print(f"a bit more, a quarter of the noise: {decibels(4):.2f} dB")

# %% [markdown]
# Theory and measurement, with one scale for the whole matrix. The column "s²/12" needs no quantization at all, only the
# step.

# %% tags=["nbval-check-output"]
measured, foretold = {}, {}
print("bits   s²/12   measured   gain")
for bits in range(2, 9):
    qt = qlearn.quantize(weight, "absmax", bits=bits, per="tensor")
    foretold[bits] = decibels(weight.double().square().mean() / (qt.scales.double() ** 2 / 12))
    measured[bits] = sqnr(weight, qt.dequantize())
    gain = f"{measured[bits] - measured[bits - 1]:7.1f}" if bits > 2 else ""
    print(f"{bits:4} {foretold[bits]:7.1f} {measured[bits]:10.1f} {gain}")
assert all(abs(foretold[b] - measured[b]) < 0.1 for b in range(4, 9)) and foretold[2] < -8 and measured[2] > 0

# %% [markdown]
# From 4 bits up the formula is right to a tenth of a decibel. Yet the gain is 6.02 dB only toward the end, and at 2 and
# 3 bits the formula itself fails. Two different reasons.
#
# **The step more than halves.** It is max|w| divided by 2^(bits−1) − 1, that is by 1, 3, 7, 15 …, and 7 is more than
# twice 3. The code we left unused for the sake of symmetry is one of sixteen at 4 bits, and one of four at 2.

# %% tags=["nbval-check-output"]
for bits in range(3, 9):
    ratio = (2 ** (bits - 1) - 1) / (2 ** (bits - 2) - 1)
    print(f"{bits - 1} -> {bits} bits: the step shrinks by {ratio:.3f}, worth {decibels(ratio**2):.2f} dB")
    assert bits < 5 or abs(decibels(ratio**2) - (measured[bits] - measured[bits - 1])) < 0.1

# %% [markdown]
# **The error is no longer spread evenly.** When nearly all weights fall into the cell around zero, 90 % of them at 3
# bits, the error of such a weight is the weight itself, and small errors are the likeliest. At 4 bits that cell holds
# half of them, and the errors from all other cells still fill the interval. Nor can it get worse: 0 is on the grid, so
# no weight moves further than to 0, and the SQNR never falls below 0 dB. The formula does not know that.

# %%
alt = "Histograms of the error in steps: flat at 4 bits, a broad hill at 3, a narrow peak at 2."
picture, axes = course.plots.figure(9, 2.6, columns=3, sharey=True, alt=alt)
for ax, bits in zip(axes, (4, 3, 2)):
    qt = qlearn.quantize(weight, "absmax", bits=bits, per="tensor")
    error = (qt.dequantize() - weight) / qt.scales.float()
    zeros = (qt.codes() == 0).float().mean().item()
    ax.hist(error.flatten().numpy(), bins=50, range=(-0.5, 0.5), density=True, color=course.plots.COLORS["error"])
    ax.set(title=f"{bits} bits: {zeros:.1%} are stored as 0", xlabel="error, in steps")
axes[0].set_ylabel("density")
picture

# %% [markdown]
# ## Drag it
#
# The same matrix, every bit width, and a menu for who shares a scale. Before you drag: from 8 bits to 7, by which
# factor does the error grow? Why can it hardly grow from 3 bits to 2? And with a scale for each row, does the curve on
# the right get steeper, or does it move? (The grey curves are the other choices in the menu.)

# %%
course.widgets.absmax_explorer(weight, bits=(2, 8), group_size=[None, 128, 64, 32])

# %% [markdown]
# **What you should have seen.** By a factor of two, 2.03 to be exact. With one scale for everyone the error at 3 bits
# is 79 % of the weights already, and 100 % is the end. A scale for each row moves the curve down, and from 4 bits up its
# slope stays the same: at 4 bits from 39 % to 12 %, which would else take a bit and a half. The price is written below
# the picture: 4.062 bits per weight instead of 4.000.

# %% tags=["nbval-check-output"]
def relative(bits, **share):
    return 10 ** (-sqnr(weight, qlearn.quantize(weight, "absmax", bits=bits, **share).dequantize()) / 20)


print(f"8 -> 7 bits: x {relative(7, per='tensor') / relative(8, per='tensor'):.2f}")
print(f"3 bits: {relative(3, per='tensor'):.0%}   4 bits: {relative(4, per='tensor'):.0%}, by rows {relative(4):.0%}")
assert 1.5 < np.log2(relative(4, per="tensor") / relative(4)) < 1.7

# %% [markdown]
# ## One outlier
#
# Here are 64 ordinary weights in a row that share a scale. The first slider makes one of them larger. Before you drag:
# when it grows from 3 to 30 times the usual size, at 6 bits, what happens to the error of the 63 others? Then the same
# at 4 bits. Then tick *groups of 16*.

# %%
course.widgets.outlier_explorer(bits=(2, 8))

# %% [markdown]
# **What you should have seen.** Up to about 2.5, nothing, as another weight is the largest. From there the step grows
# with the outlier, and everyone's error grows with the step: ten times the outlier, ten times the error, at 6 bits from
# 2.9 % to 30.5 %. That is log₂ 10, more than three bits, thrown away. At 4 bits that leaves less than one: 62 of the 63
# others end as 0.
#
# Groups of 16 build a wall. Only the 15 weights beside the outlier pay; the other 48 have finer steps of their own, and the
# error of all 63 falls from 97 % to 45 %. Here is a second explorer, moved by the program.

# %% tags=["nbval-check-output"]
probe = course.widgets.outlier_explorer(bits=(2, 8))
for bits, size, groups in ((6, 3, False), (6, 30, False), (4, 30, False), (4, 30, True)):
    for name, value in (("bits", bits), ("outlier", size), ("groups_of_16", groups)):
        probe.controls[name].value = value
    print(f"{bits} bits, {size:2} x rms, {'groups of 16' if groups else 'one scale'}: {probe.summary.partition('; ')[2]}")

# %% [markdown]
# Is that how real weights are? Sort the matrix of the question by size.

# %% tags=["nbval-check-output"]
sizes = weight.abs().flatten().sort(descending=True).values
rms = weight.square().mean().sqrt()
print(f"the largest weight: {sizes[0] / rms:.1f} times the rms")
print(f"larger than half of it: {(sizes > sizes[0] / 2).sum()} of {len(sizes):,} weights")
assert (sizes > sizes[0] / 2).float().mean() < 0.001

# %% [markdown]
# Half of the ruler's length serves fewer than one weight in a thousand. So this is how far off the 4-bit weights of the
# question are:

# %% tags=["nbval-check-output"]
def mean_error(**share):
    back = qlearn.quantize(weight, "absmax", bits=4, **share).dequantize()
    return 100 * ((back - weight).abs().mean() / weight.abs().mean()).item()


course.reveal("absmax-4bit", round(mean_error(per="tensor"), 1), unit="%")
print(f"a scale for each row: {mean_error():.1f} %   for each 64 weights: {mean_error(group_size=64):.1f} %")

# %% [markdown]
# ## Who shares a scale, and what it costs
#
# Three answers are in use. **Per tensor**: one scale for the matrix. **Per row**, also called per channel: one for each
# output of the layer. **Per group**: one for each *g* consecutive weights of a row, and *g* is the **group size**.
#
# A scale has 16 bits. Shared by *n* weights it costs each of them 16/n bits: nothing worth mentioning for a whole
# matrix, 16/64 = 0.25 for groups of 64, a whole bit for groups of 16. **Bits per weight** in this course means all of
# it.

# %% tags=["nbval-check-output"]
shares = {"whole tensor": {"per": "tensor"}, "rows": {"per": "row"}}
shares |= {f"groups of {size}": {"group_size": size} for size in (128, 64, 32, 16)}
print("4-bit codes       scales   bits/weight   SQNR in dB")
for name, share in shares.items():
    qt = qlearn.quantize(weight, "absmax", bits=4, **share)
    print(f"{name:14} {qt.scales.numel():9,} {qt.bits_per_weight:13.4f} {sqnr(weight, qt.dequantize()):12.1f}")
    assert abs(qt.bits_per_weight - (4 + 16 / (qt.block[0] * qt.block[1]))) < 1e-9

# %% [markdown]
# Smaller groups are always better, if you do not look at the price. Look at it: you have five bits for each weight. Do
# you take 4-bit codes and a scale for every 16 weights, or 5-bit codes and one scale a row? Which leaves the higher
# SQNR, and by how much?

# %%
question = "SQNR of 5 bits by rows, minus that of 4 bits in groups of 16, in dB"
course.predict(question, low=-10, high=10, key="equal-bits")

# %%
found = {}
alt = "SQNR against true bits: rows and groups of 64 on one curve, groups of 16 below it, the whole tensor far below."
picture, axes = course.plots.figure(8, 3.6, alt=alt)
for name, marker in zip(("whole tensor", "rows", "groups of 64", "groups of 16"), "osD^"):
    for bits in range(2, 9):
        qt = qlearn.quantize(weight, "absmax", bits=bits, **shares[name])
        found[name, bits] = qt.bits_per_weight, sqnr(weight, qt.dequantize())
    axes.plot(*zip(*(found[name, bits] for bits in range(2, 9))), marker=marker, label=name)
axes.set(xlabel="true bits per weight", ylabel="SQNR (dB)")
axes.legend()
picture

# %% tags=["nbval-check-output"]
(bits_rows, rows), (bits_groups, groups) = found["rows", 5], found["groups of 16", 4]
course.reveal("equal-bits", round(rows - groups, 1), unit="dB")
extra = bits_rows - bits_groups
print(f"for {extra:.4f} bits more, which are worth {6.02 * extra:.1f} dB by the rule")
assert 3 < rows - groups < 3.6

# %% [markdown]
# The bit was better spent on codes. Rows and groups of 64 lie on almost one curve: what the scales cost, they give back.
# In groups of 16 a whole bit goes into scales, and the scales do not give it back.
#
# To see small differences, subtract what the bits are worth by the rule, 6.02 dB for each true one. What remains says
# how well they were spent; higher is better. Beside our matrix stands one with a larger outlier.

# %% tags=["nbval-check-output"]
def spent(matrix, size):
    qt = qlearn.quantize(matrix, "absmax", bits=4, group_size=size)
    return sqnr(matrix, qt.dequantize()) - 6.02 * qt.bits_per_weight


wilder = model.model.layers[5].self_attn.k_proj.weight
print("4-bit codes       layer 0, q_proj   layer 5, k_proj")
for size in (None, 128, 64, 32, 16):
    name = f"groups of {size}" if size else "rows"
    print(f"{name:13} {spent(weight, size):16.1f} dB {spent(wilder, size):14.1f} dB")
assert spent(weight, 32) < spent(weight, None) < spent(weight, 64) and spent(wilder, 32) > spent(wilder, None)
largest = [matrix.abs().max() / matrix.square().mean().sqrt() for matrix in (weight, wilder)]
print(f"largest weight {largest[0]:12.1f} x rms {largest[1]:11.1f} x rms")

# %% [markdown]
# The wilder the weights, the smaller the groups that pay: 32 are worse than whole rows for the first matrix, and better
# for the second. For both, 64 to 128 is a good place, and that is what many programs use. Formats with smaller groups
# have cheaper scales; they come later.
#
# ## Real bytes
#
# `bits_per_weight` is no formula: it divides the bytes that are held by the number of weights. Codes lie packed in them.
# At 4 bits two share a byte, the first in its lower half, and a negative code is its **two's complement**, cut to four
# bits: −1 is 1111.

# %% tags=["nbval-check-output"]
qt = qlearn.quantize(weight, "absmax", bits=4, group_size=64)
first, second = qt.codes()[0, :2].tolist()
print(f"codes {first} and {second}: bits {first & 15:04b} and {second & 15:04b}, byte {qt.packed[0].item():08b}")
assert qt.packed[0] == (first & 15) | (second & 15) << 4
print(f"{qt.packed.nbytes:,} bytes of codes + {qt.scales.nbytes:,} of scales = {qt.nbytes:,} bytes")
print(f"{qt.bits_per_weight} bits per weight")

# %% tags=["nbval-check-output"]
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "q_proj.safetensors")
    qt.save(path)
    on_disk = os.path.getsize(path)
    same = torch.equal(qlearn.QuantizedTensor.load(path).dequantize(), qt.dequantize())
print(f"the file: {on_disk:,} bytes, of which {on_disk - qt.nbytes} say what is in it; read back unchanged: {same}")
assert same and 0 < on_disk - qt.nbytes < 1024 and 2 * weight.numel() == 131_072

# %% [markdown]
# In 16 bits the matrix takes 131,072 bytes.
#
# ## On the model
#
# Now every linear layer, by rows and in groups of 64, from 8 bits to 2. Only weights are stored like this: a layer
# unpacks its own and computes in floating point, and the embedding keeps its 16 bits.
#
# The figures are those of lesson 00: perplexity, the KL divergence (KLD) from the unquantized model, and how often the
# first choice for the next token flips. They are measured on the first 4,096 tokens of the course's text; a longer part
# would move them a little.

# %%
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
results, models = {}, {}
for name, size in (("rows", None), ("groups of 64", 64)):
    for bits in tqdm((8, 6, 5, 4, 3, 2), desc=name):
        small, _ = qlearn.load_model()
        qlearn.quantize_model(small, "absmax", bits=bits, group_size=size, progress=False)
        results[name, bits] = qlearn.evaluate.report(small, tokenizer, reference, name=f"absmax {bits} bit, {name}")
        models[name, bits] = small

# %%
unquantized = qlearn.evaluate.report(model, tokenizer, reference, name="unquantized")
qlearn.evaluate.table([unquantized, *results.values()])

# %% [markdown]
# At 8 bits nothing is lost that a reader would notice. Each bit less costs more than the one before, and at 2 bits
# nothing is left, in groups or not. For a fifth of a bit, groups of 64 take about half off the divergence at 3 bits,
# and about a third off it at 4.
#
# The law of the layer holds for the model too: at 6, 5 and 4 bits the divergence follows the noise, about four times as
# much for a bit less.

# %% tags=["nbval-check-output"]
kld = {key: row.kl_divergence for key, row in results.items()}
for name in ("rows", "groups of 64"):
    assert all(kld[name, few] > 2 * kld[name, many] for few, many in ((2, 3), (3, 4), (4, 5), (5, 6), (6, 8)))
    assert 3 < kld[name, 5] / kld[name, 6] < 6 and 3 < kld[name, 4] / kld[name, 5] < 6
    assert results[name, 8].flip_rate < 0.03 and results[name, 2].flip_rate > 0.9
assert 1.6 < kld["rows", 3] / kld["groups of 64", 3] < 2.4 and 1.25 < kld["rows", 4] / kld["groups of 64", 4] < 1.75
print("divergence at 5 bits over that at 6:", *(f"{kld[n, 5] / kld[n, 6]:.0f}" for n in ("rows", "groups of 64")))
print("divergence at 4 bits over that at 5:", *(f"{kld[n, 4] / kld[n, 5]:.0f}" for n in ("rows", "groups of 64")))

# %% [markdown]
# And does five bits by rows beat four bits in groups of 16 here as well?

# %%
small, _ = qlearn.load_model()
qlearn.quantize_model(small, "absmax", bits=4, group_size=16, progress=False)
finest = qlearn.evaluate.report(small, tokenizer, reference, name="absmax 4 bit, groups of 16")
assert finest.kl_divergence > 1.3 * kld["rows", 5]
qlearn.evaluate.table([results["rows", 5], finest])

# %% [markdown]
# What it writes, at 8, 4 and 2 bits in groups of 64. Read it next to the column of flips: it always takes the first
# choice (**greedy** decoding), so the text changes at the first flip, and from there on it is another text, not necessarily a worse one.

# %%
prompt = '''def load_config(path):
    """Load a JSON file and return a dict."""'''
for bits in (8, 4, 2):
    text = qlearn.generate(models["groups of 64", bits], tokenizer, prompt, max_new_tokens=40)
    print(f"--- {bits} bits ---\n{prompt}{text}\n")

# %% [markdown]
# ## The board
#
# True bits per weight against loss, for this lesson and all that follow. A point on the **Pareto front** is one that no
# other beats in both. Later methods have to beat these points. We leave out 8 bits, which cost nothing that can be
# seen, and 2 bits, at which there is no model left.

# %%
course.board.add("unquantized", 16, np.log(unquantized.perplexity))
for (name, bits), row in results.items():
    if bits in (3, 4, 5, 6):
        course.board.add(f"absmax {bits} bit, {name}", row.bits_per_weight, np.log(row.perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# Three versions of absmax for 8 bits, with one scale a row. Each runs, and gives weights that look right. One is. You
# see the errors in steps, and only those; the axis is linear between −1 and 1 and logarithmic outside, and counts are
# logarithmic. Which one is right, and what did the others do?

# %%
task = course.tasks.get("absmax.quantize")
suspects = {"A": task.reference, "B": task.mutants[5].function, "C": task.mutants[0].function}
middle = np.linspace(-1.025, 1.025, 42)
edges = np.concatenate([-np.geomspace(300, 1.3, 16), middle, np.geomspace(1.3, 300, 16)])
alt = "Errors of A, B and C in steps: flat from −½ to ½; flat from −1 to 0; as A, and some near −256."
picture, axes = course.plots.figure(9, 2.8, columns=3, sharey=True, alt=alt)
for ax, (name, quantize) in zip(axes, suspects.items()):
    steps = []
    for row in weight:
        codes, scale = quantize(row, 8)
        steps.append((codes * scale - row) / scale)
    steps = torch.cat(steps)
    ax.hist(steps.numpy(), bins=edges, color=course.plots.COLORS["error"])
    ax.set_xscale("symlog", linthresh=1.1, linscale=2)
    ax.set(title=f"{name}: largest {steps.abs().max():.1f} steps", yscale="log", xlabel="error, in steps")
    ax.set_xticks([-100, -1, 0, 1, 100], ["−100", "−1", "0", "1", "100"])
axes[0].set(ylabel="weights", ylim=(5, 10_000))
picture

# %% [markdown]
# <details><summary>How to tell</summary>
#
# A is healthy: flat, from −½ to ½, and nothing outside. B is as flat, but its middle is at −½, and it reaches −1: it
# rounds down. C looks healthy too, until you see the few weights far out on the left. They are off by 256 steps:
# positive ones became the most negative code, so they must have got a code that 8 bits do not have.
#
# </details>
#
# Decided? Here is what `course.check` says to the two others.

# %% tags=["nbval-check-output"]
for name, mutant in (("B", task.mutants[5]), ("C", task.mutants[0])):
    print(f"{name} ({mutant.name}): {mutant.explanation}\n")

# %% [markdown]
# ## What you can now do
#
# - Quantize a matrix by hand, say why no error exceeds half a step, and why its mean square is s²/12.
# - Tell what a bit is worth: 6.02 dB, more where codes are few, nothing certain once most weights become 0.
# - Recognise an outlier by what it does to others, and say what a wall against it costs: 16/n bits.
# - Compare at equal true bits, on a layer and on a model, with bytes on disk.
#
# **Next:** write it yourself in the [exercise](../exercises/02_absmax.ipynb). Then
# [03 · Zero-point](03_zero_point.ipynb): what if weights are not symmetric, and must the largest one fit at all?
