# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 06 · GPTQ and AWQ: round with the inputs in view
#
# **In 100 minutes** you will know how one weight makes up for the error of another, what calibration text teaches a quantizer and how it
# misleads it, what to do about "not positive-definite", and how AWQ gets far without this. You need lesson 03.
#
# **The question.** Round-to-nearest, RTN, gives each weight the nearest number of its grid. No other choice on that grid has
# smaller errors. Take a layer of our model, 3 bits in groups of 64, keep the grids, and let GPTQ choose other codes, in view of some
# calibration text. Of RTN's squared error of the *output*, W x, on that text, what share is left?

# %%
import math
import time
import warnings
from fractions import Fraction
from itertools import islice, product

import numpy as np
import torch

import qlearn
from qlearn import course
from qlearn.bench import results
from qlearn.methods.awq import search_scale
from qlearn.methods.gptq import gptq_steps
from qlearn.methods.statistics import InputStatistics
from qlearn.models.calibration import calibration_ids, walk
from qlearn.models.folding import fold

course.predict("squared output error that is left, in % of round-to-nearest's", low=0, high=100, key="gptq-left")

# %% [markdown]
# ## By hand
#
# Three weights, all 0.3, are to be stored as whole numbers. Their layer reads the four inputs below and adds up w·x. From the inputs
# comes one matrix, the **Hessian** H = (2 / n) Σ x xᵀ: on the diagonal how large each input channel is (it meets one column of W), elsewhere
# how far two of them go together. (Tokens are the rows of `x` here, so the sum is `x.T @ x`.)

# %% tags=["nbval-check-output"]
x = np.array([[1, 2, 1], [1, 0, 1], [1, 0, 1], [1, 0, -1]])  # four tokens, three channels
H = 2 * x.T @ x // len(x)
assert (len(x) * H == 2 * x.T @ x).all()
print("H =", H.tolist())

# %% [markdown]
# Let Δ be what is stored, less w. The outputs are off by Δ·x. The square of that is Δ x xᵀ Δᵀ, so twice the mean of the squares is
# Δ H Δᵀ. That is the error to be made small. Nearest is 0, 0, 0:

# %% tags=["nbval-check-output"]
w = [Fraction(3, 10)] * 3


def error(stored):
    """Δ H Δᵀ, exactly."""
    delta = np.array([q - v for q, v in zip(stored, w)])
    return delta @ H @ delta


off = x @ np.array([0 - v for v in w])
assert error([0, 0, 0]) == Fraction(2, 4) * sum(off**2) == Fraction(108, 100)
print("off by", [float(v) for v in off], "  error", float(error([0, 0, 0])))

# %% [markdown]
# Now one weight at a time. The first becomes 0: Δ₁ = −0.3. The other two are still free to be any number. Which is best? With Δ₁ fixed,
# the error is least where its slopes in Δ₂ and Δ₃ are 0. The slope in Δ₂ is twice row 2 of H times Δ, and so for Δ₃:
#
# Δ₁ + 2Δ₂ + Δ₃ = 0,  Δ₁ + Δ₂ + 2Δ₃ = 0
#
# So Δ₂ = Δ₃ = 0.1, and both weights go to 0.4. The second becomes 0 too: Δ₂ = −0.3. One equation is left, Δ₁ + Δ₂ + 2Δ₃ = 0, which makes
# Δ₃ = 0.3: the third weight goes to 0.6, and its nearest whole number is 1.

# %% tags=["nbval-check-output"]
assert not (H @ [Fraction(-3, 10), Fraction(1, 10), Fraction(1, 10)])[1:].any()
assert not (H @ [Fraction(-3, 10), Fraction(-3, 10), Fraction(3, 10)])[2:].any()
nearest, spread = np.zeros(3), np.array([0, 0, 1])
assert error(spread) == Fraction(68, 100)
assert 2.4 < ((spread - 0.3) ** 2).sum() / ((nearest - 0.3) ** 2).sum() < 2.5
course.table(outputs=x @ np.full(3, 0.3), nearest=x @ nearest, spread=x @ spread)

# %% [markdown]
# 0, 0, 1 has an error of 0.68 where nearest has 1.08, and yet the third weight, 0.3, was stored as 1! What does that do to the errors of the
# weights themselves?

# %% tags=["nbval-check-output"]
for name, stored in (("nearest", nearest), ("spread", spread)):
    print(f"{name:8} squared errors of the weights {((stored - 0.3) ** 2).sum():.2f}, of the output {float(error(stored.astype(int).tolist())):.2f}")

# %% [markdown]
# They have grown two and a half times, and the output is better for it.
#
# ## The same, with the inverse
#
# Inverses spare us the equations. Let H_F be H for the columns F that are left, i and those behind it. All their slopes are 0 before i is set
# to q, and after it all but i's. So the shift d has H_F d = (c, 0, …, 0): it is c times the first row of H_F⁻¹, that of i. With the c that makes
# d_i = q − w_i:
#
# w_F  ←  w_F − (w_i − q) / [H_F⁻¹]_ii · (row i of H_F⁻¹)
#
# and the error grows by (w_i − q)² / [H_F⁻¹]_ii.

# %% tags=["nbval-check-output"]
inverses = [([[3, -1, -1], [-1, 3, -1], [-1, -1, 3]], 4), ([[2, -1], [-1, 2]], 3), ([[1]], 2)]  # each to be divided
now, growth = np.array(w), []
for i, (inverse, divisor) in enumerate(inverses):
    assert (H[i:, i:] @ inverse == divisor * np.eye(3 - i)).all()
    row = np.array([Fraction(v, divisor) for v in inverse[0]])
    e = now[i] - round(now[i])
    growth.append(e**2 / row[0])
    now[i:] = now[i:] - e / row[0] * row
    print(f"column {i}:  weights", *(f"{float(v):.1f}" for v in now), f"  error grows by {float(growth[-1]):.2f}")
assert now.tolist() == [0, 0, 1] and sum(growth) == error(now) == Fraction(68, 100)

# %% [markdown]
# This is Optimal Brain Surgeon (1993), which removed weights. **OBQ**, Optimal Brain Quantization (2022), rounds by it, each row in an order of
# its own. **GPTQ**, later that year, takes one order for all rows.
#
# Watch what this is not. Nobody has searched all the combinations; each column is rounded once, to nearest, and never looked at again.
# How far from the best is that? Here are 400 random rows of six weights at 2 bits, and all 4⁶ ways to store each. How often is
# nearest the best of them? How often is GPTQ, and can it even lose against nearest?

# %%
generator = torch.Generator().manual_seed(0)
x6 = torch.randn(64, 3, generator=generator) @ torch.randn(3, 6, generator=generator) + 0.5 * torch.randn(64, 6, generator=generator)
rows, H6 = torch.randn(400, 6, generator=generator), 2 / 64 * x6.T @ x6


def errors(stored):
    """Δ H Δᵀ of each row."""
    return ((stored - rows) @ H6 * (stored - rows)).sum(-1)


nearest = qlearn.quantize(rows, "zero_point", bits=2)
codes = torch.tensor(list(product(range(4), repeat=6)))[:, None]
every = (codes - nearest.zero_points()) * nearest.scales.float()  # (4096, 400, 6)
least, rtn, gptq = errors(every).amin(0), errors(nearest.dequantize()), errors(qlearn.quantize(rows, "gptq", bits=2, inputs=x6).dequantize())

# %%
for name, e in (("nearest", rtn), ("GPTQ", gptq)):
    print(f"{name:8} the best of all: {(e < 1.001 * least).float().mean():4.0%}   mean error {e.mean() / least.mean():.2f} times the least")
print(f"GPTQ is better than nearest in {(gptq < 0.999 * rtn).float().mean():.0%} and worse in {(gptq > 1.001 * rtn).float().mean():.0%}")
assert gptq.mean() < 0.75 * rtn.mean() and gptq.mean() > 1.15 * least.mean() and (gptq > 1.001 * rtn).any()

# %% [markdown]
# Often best, sometimes worse than nearest, and much better on the whole.
#
# ## A real layer
#
# Calibration sends text through the model and lets each layer remember its inputs. `walk` goes through the blocks of a model and stops in
# front of each; `collect` gathers what its layers read. We stop at block 2, with 4,096 tokens of the calibration text, and do the same with
# the evaluation text, to judge by, and with tokens drawn at random.

# %%
LAYERS = ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
model, tokenizer = qlearn.load_model()
weights = {name: model.model.layers[2].get_submodule(name).weight for name in LAYERS}


def inputs_of(ids):
    """InputStatistics of the layers of block 2: the Hessian, and all 4,096 inputs as `sample`."""
    block = next(islice(walk(model, ids), 2, None))
    return block.collect({name: block.module.get_submodule(name) for name in LAYERS}, sample=4096)


calibration = calibration_ids(tokenizer, tokens=4096)  # (8, 512)
evaluation = calibration_ids(tokenizer, qlearn.evaluate.evaluation_text(), tokens=4096)
random_tokens = torch.randint(1, 4096, (8, 512), generator=torch.Generator().manual_seed(0))
seen, held_out, noise = (inputs_of(ids) for ids in (calibration, evaluation, random_tokens))

# %% [markdown]
# For a matrix the error is that of all its rows, added up: tr (Δ H Δᵀ), where tr is the sum of the diagonal. GPTQ sets the grid of a group
# when it gets there, from weights that are shifted already; `static_groups` keeps the grids that RTN has.

# %%
weight, statistics = weights["self_attn.k_proj"], seen["self_attn.k_proj"]


def output_error(weight, qt, statistics):
    """tr (Δ H Δᵀ): twice the mean square of all outputs' errors, over the inputs the statistics have seen."""
    delta = (qt.dequantize() - weight).double()
    return (delta @ statistics.hessian.double() * delta).sum().item()


rtn = qlearn.quantize(weight, "zero_point", bits=3, group_size=64)
gptq = qlearn.quantize(weight, "gptq", bits=3, group_size=64, inputs=statistics, static_groups=True)
by_inputs = 2 * ((rtn.dequantize() - weight) @ statistics.sample.T).square().sum(0).mean().item()
assert math.isclose(output_error(weight, rtn, statistics), by_inputs, rel_tol=1e-3)

# %%
left = output_error(weight, gptq, statistics) / output_error(weight, rtn, statistics)
grown = ((gptq.dequantize() - weight).square().sum() / (rtn.dequantize() - weight).square().sum()).item()
changed = (gptq.codes() != rtn.codes()).float().mean()
print(f"codes that are not the nearest: {changed:.0%};  squared errors of the weights: {grown:.2f} times RTN's")
assert torch.equal(gptq.scales, rtn.scales) and left < 0.25 and grown > 1.5 and 0.1 < changed < 0.3
course.reveal("gptq-left", 100 * left, unit="%")

# %% [markdown]
# One code in five is not the nearest, the weights are further off than before, and about a fifth of the output's error is left.
#
# Why does this work so well? Rounding one weight and leaving all others alone adds e² H_ii to the error. If all others could make up for
# it, e² / [H⁻¹]_ii would remain. So 1 / (H_ii · [H⁻¹]_ii) is the share of the error that stays: the part of a channel that all others
# together cannot stand in for.

# %%
hessian = statistics.hessian
own = 1 / (hessian.diagonal() * torch.linalg.inv(hessian.double()).diagonal())
size = (hessian.diagonal() / 2).sqrt()
picture, axes = course.plots.figure(9, 3.2, columns=2, alt="Most channels keep less than a quarter for themselves; one channel is far larger than all others.")
axes[0].hist(100 * own, bins=30, color=course.plots.COLORS["original"])
axes[0].set(title="what is a channel's own", xlabel="share that no other can stand in for (%)", ylabel="channels", xlim=(0, 40))
axes[1].semilogy(size, color=course.plots.COLORS["original"], linewidth=1)
axes[1].set(title="how large each one is", xlabel="channel", ylabel="root mean square input")
picture

# %%
print(f"a channel's own: {own.median():.0%} in the median;  the largest channel, {int(size.argmax())}, is {size.max() / size.median():.0f} times the median")
assert own.median() < 0.25 and size.max() > 10 * size.median()

# %% [markdown]
# For half of the channels all but that share can be made up for by the others. (Keep the largest channel in mind, it comes back.)
#
# ## The ladder
#
# First the definition: at each column, invert what is left of H. (A hundredth of the mean diagonal is added first; why comes below.)
# All rows are treated at once. One grid for each row, 3 bits.

# %%
damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(256).double()
grid = qlearn.quantize(weight, "zero_point", bits=3)
scale, zero = grid.scales[:, 0].double(), grid.zero_points()[:, 0].double()


def on_grid(w):
    return (((w / scale).round() + zero).clamp(0, 7) - zero) * scale


def definition(W, H):
    W = W.double().clone()
    for i in range(len(H)):
        inverse = torch.linalg.inv(H[i:, i:])
        q = on_grid(W[:, i])
        W[:, i:] -= torch.outer((W[:, i] - q) / inverse[0, 0], inverse[0])
        W[:, i] = q  # it is that already, up to the last bits
    return W


# %% [markdown]
# That is one inversion a column. But write H⁻¹ = Uᵀ U, with U zero below its diagonal: U is the upper triangular **Cholesky factor**. Its first
# row u has to be the first row of H⁻¹, divided by the root of its first entry. Take that row's share, uᵀ u, out of H⁻¹, and what remains is the
# inverse of H without its first column (above: 3/4 − 1/12 = 2/3). The next row of U does the same with that, and so on. So U holds the rows of
# all the inverses, each divided by a number, if all rows of W take the columns in one order. That order, and this, are what GPTQ added:

# %% tags=["nbval-check-output"]
U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
for i in (0, 1, 100, 254):
    row = torch.linalg.inv(damped[i:, i:])[0]
    torch.testing.assert_close(U[i, i:], row / row[0].sqrt())
print("rows of U are rows of the inverses, divided by a number")

# %% [markdown]
# In the update the number cancels: (w − q) / U[i, i] · U[i] is the same shift as before. So:

# %%
def with_cholesky(W, H):
    W, U = W.double().clone(), torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for i in range(len(H)):
        q = on_grid(W[:, i])
        W[:, i:] -= torch.outer((W[:, i] - q) / U[i, i], U[i, i:])
        W[:, i] = q
    return W


def package(W, H):
    return qlearn.quantize(W, "gptq", bits=3, inputs=statistics).dequantize().double()


found = {}
for function in (definition, with_cholesky, package):
    began = time.perf_counter()
    found[function.__name__] = function(weight, damped)
    print(f"{function.__name__:14} {1000 * (time.perf_counter() - began):8.1f} ms")

# %%
assert torch.equal(found["definition"], found["with_cholesky"])
same = torch.isclose(found["definition"], found["package"], atol=1e-5).all(1)
print(f"rows that are the same in all three: {same.float().mean():.0%}")
assert same.float().mean() > 0.95  # a tie that float32 breaks otherwise would change the rest of its row

# %% [markdown]
# The package computes in float32 and in **blocks** of 128 columns: within a block each column updates the rest of the block only, and one
# matrix product brings all errors of the block to the columns behind it. The result is the same, and most of the work has become matrix
# products, which is what a GPU is fast at. What does it gain on your CPU, for a layer of only 768 columns?

# %%
down, down_statistics = weights["mlp.down_proj"], seen["mlp.down_proj"]
blocks = {}
for blocksize in (1, 128, 768):
    began = time.perf_counter()
    blocks[blocksize] = qlearn.quantize(down, "gptq", bits=3, inputs=down_statistics, blocksize=blocksize).codes()
    print(f"blocks of {blocksize:3}: {1000 * (time.perf_counter() - began):6.1f} ms")
assert all((codes == blocks[128]).float().mean() > 0.99 for codes in blocks.values())

# %% [markdown]
# ## Drag it
#
# The plain form is in the package too, as a generator that shows its work:

# %%
course.source_of(gptq_steps)

# %% [markdown]
# `Hinv -= ...` takes column i out of the inverse, the step by which U was found: its row becomes 0, so finished columns are shifted no more.
# (`damped_cholesky` is called only to damp H.) `late` is about groups: a group's grid is set when its first column's turn comes, from the weights as they are by then, shifted by all
# errors before.
#
# Before you drag: where on the way from left to right does the error grow, and where does GPTQ have its advantage? The matrix is made up,
# 16 columns, the last two reading inputs that are three times as large. What if they went first?

# %%
explorer = course.widgets.column_explorer()
explorer

# %%
for method in ("round to nearest", "GPTQ", "GPTQ, largest input first"):
    explorer.controls["method"].value = method
    for rounded in (8, 14, 16):
        explorer.controls["rounded"].value = rounded
        print(explorer.summary)

# %% [markdown]
# **What you should have seen.** Half way GPTQ has less than a fifth of RTN's error: enough columns are left. Their shifts grow to
# half a step. The last two columns bring most of the error, as their inputs are large and nobody is left to help.
#
# Begin with those two, and the error is larger half way and far smaller at the end. At 2 bits and at 4 it is the same story (the next
# cell): the order is worth a factor of two and more *here*, where the matrix was made for it.
#
# ## The order
#
# `act_order="static"` sorts the columns by the diagonal of H, largest first. (Other programs have nearly the same as `desc_act`.)

# %%
for bits in (2, 3, 4):
    came, sorted_first = (explorer.output_errors(method, bits) for method in ("GPTQ", "GPTQ, largest input first"))
    print(f"{bits} bits: error half way {came[8]:.3f} % and {sorted_first[8]:.3f} % with the order, at the end {came[16]:.3f} % and {sorted_first[16]:.3f} %")
    assert sorted_first[8] > came[8] and sorted_first[16] < came[16] / 2
print("the first columns would be", hessian.diagonal().argsort(descending=True)[:6].tolist())

# %% [markdown]
# What is it worth in our layers, on text that GPTQ has not seen?

# %%
ORDERS = {"as they come": {}, "grids set first": {"static_groups": True}, "largest first": {"act_order": "static"}, "in groups": {"act_order": "group"}}
print("error left, in % of RTN's, 3 bits in groups of 64, on the evaluation text")
print(f"{'':18}" + "".join(f"{name:>17}" for name in ORDERS))
left = {}
for name in LAYERS:
    rtn = output_error(weights[name], qlearn.quantize(weights[name], "zero_point", bits=3, group_size=64), held_out[name])
    for order, options in ORDERS.items():
        qt = qlearn.quantize(weights[name], "gptq", bits=3, group_size=64, inputs=seen[name], **options)
        left[name, order] = output_error(weights[name], qt, held_out[name]) / rtn
    print(f"{name:18}" + "".join(f"{100 * left[name, order]:17.0f}" for order in ORDERS))
assert all(left[name, "largest first"] < 1.05 * left[name, "as they come"] for name in LAYERS)
assert left["self_attn.k_proj", "as they come"] < 0.35 and 0.65 < left["mlp.down_proj", "as they come"] < 0.85

# %% [markdown]
# It helps, a little: some percent of what is left, more in one layer. Codes are stored in the original order, so it costs nothing when the
# model runs. The columns of a group are then rounded at different times, so its grid has to be set first, from the original weights; the second
# column says that this hardly matters here. (`"group"` sorts groups, and columns within each, so that grids can be set late.)
#
# And look at the last row. In `k_proj` three quarters of the error are gone, in `down_proj` one quarter. What is the matter there?
#
# ## It can learn by heart
#
# The layer has 768 columns, and H was made from 4,096 tokens. Fewer tokens first:

# %%
def error_left(name, statistics, judged_by, **options):
    """GPTQ's output error in % of RTN's, 3 bits in groups of 64."""
    w = weights[name]
    qt = qlearn.quantize(w, "gptq", bits=3, group_size=64, inputs=statistics, **options)
    return 100 * output_error(w, qt, judged_by) / output_error(w, qlearn.quantize(w, "zero_point", bits=3, group_size=64), judged_by)


inputs = down_statistics.sample  # (4096, 768)
by_tokens = {}
for tokens in (256, 512, 1024, 2048, 4096):
    few = InputStatistics.from_inputs(inputs[:tokens])
    by_tokens[tokens] = [error_left("mlp.down_proj", few, judge) for judge in (few, held_out["mlp.down_proj"])]
    seen_directions = torch.linalg.matrix_rank(inputs[:tokens].double())
    print(f"{tokens:5} tokens, {seen_directions:3} directions: {by_tokens[tokens][0]:4.0f} % of RTN's error is left on these tokens, {by_tokens[tokens][1]:4.0f} % on other text")
    assert seen_directions == min(tokens, 768)
assert by_tokens[256][0] < 30 and by_tokens[256][1] > 110 and by_tokens[4096][1] < by_tokens[256][1] / 1.5

# %% [markdown]
# With 256 tokens GPTQ looks brilliant on these tokens, and is worse than RTN on other text. An H from 256 tokens has nothing to say about
# most of the 768 directions, the independent combinations of channels, so errors are pushed to where the tokens happen not to look. 1,024 tokens
# see them all, but too seldom. At 4,096 the gap is still there: that is the matter with `down_proj`. Whoever measures on the calibration text
# will not notice.
#
# **Which text?** With as many random tokens in place of text:

# %%
for name in LAYERS:
    print(f"{name:18} calibrated on text {error_left(name, seen[name], held_out[name]):4.0f} %, on random tokens {error_left(name, noise[name], held_out[name]):4.0f} %")
assert error_left("self_attn.k_proj", noise["self_attn.k_proj"], held_out["self_attn.k_proj"]) > 1.5 * error_left("self_attn.k_proj", seen["self_attn.k_proj"], held_out["self_attn.k_proj"])

# %% [markdown]
# Random tokens make the channels go together in other ways than text does. We shall see what that does to the model.
#
# ## Not positive-definite
#
# H is **positive-definite** if Δ H Δᵀ is above 0 for every Δ but 0: no error goes unseen. With fewer tokens than columns some do. H is
# **singular**, it has no inverse, and the Cholesky factorization of H, by which programs get to the inverse, stops with the message that fills
# the issue trackers of GPTQ's programs:

# %%
few = InputStatistics.from_inputs(inputs[:100])
try:
    torch.linalg.cholesky(few.hessian)
except torch.linalg.LinAlgError as problem:
    print(problem)
print(f"{torch.linalg.matrix_rank(few.sample).item()} of {len(few.hessian)} directions were seen")

# %% [markdown]
# It also happens with many tokens, when channels are copies of each other, or a few are enormous. The remedy is **damping**: `percdamp`
# times the mean of the diagonal is added to the diagonal, as if every channel carried a little noise of its own. 0.01 is customary, and
# the default here, which is why 256 tokens got through above.
# (Other programs call it `damp_percent` or `dampening_frac`.) Where that is not enough, ours adds more by itself, and says so:

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    qlearn.quantize(down, "gptq", bits=3, group_size=64, inputs=few, percdamp=0)
print(caught[0].message)
assert "raised from 0 to 0.01" in str(caught[0].message)

# %% [markdown]
# So damping is a repair? Then it should be as small as possible. Without any, each shift is the best one for the calibration inputs; with very
# much, H looks like a diagonal matrix, nothing is spread, and GPTQ becomes RTN. Where would you set it, for all 4,096 tokens?

# %%
dampings = (1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)
picture, axes = course.plots.figure(9, 3.2, columns=2, alt="Error left against damping: on the calibration text least at the left, on other text flat up to 0.1 for k_proj, least at 1 for down_proj.", sharey=True)
best = {}
for axis, name in zip(axes, ("self_attn.k_proj", "mlp.down_proj")):
    curves = {text: [error_left(name, seen[name], judge[name], percdamp=d) for d in dampings] for text, judge in (("calibration text", seen), ("other text", held_out))}
    for (text, curve), line, color in zip(curves.items(), ("--", "-"), ("faint", "quantized")):
        axis.semilogx(dampings, curve, line, marker="o", color=course.plots.COLORS[color], label=text)
    axis.set(title=name, xlabel="percdamp", ylim=(0, 110))
    best[name] = curves["other text"]
axes[0].set_ylabel("error left (% of RTN's)")
axes[0].legend()
picture

# %% [markdown]
# Not only a repair. For `k_proj`, 0.01 is as good as any. For `down_proj`, with three times as many columns, a hundred times as much is
# better on text that was not seen, and nothing on the calibration text would tell you. What damping suppresses are shifts along directions in
# which the inputs hardly vary, and those are the ones that a few thousand tokens get wrong. Statisticians call it ridge regression. Calibrate with more tokens if you
# can; if not, damp more.

# %%
for name, curve in best.items():
    print(f"{name:18} on other text: {curve[2]:.0f} % with 0.01, least {min(curve):.0f} % with {dampings[int(np.argmin(curve))]:g}")
assert min(best["mlp.down_proj"]) < 0.9 * best["mlp.down_proj"][2]

# %% [markdown]
# ## AWQ: another idea
#
# GPTQ lets rounding hurt, and makes up for it in other weights. **AWQ**, activation-aware weight quantization, makes rounding hurt less where it
# matters. An error in a weight reaches the output
# multiplied by its input, and a few channels are much larger than all others. So multiply the columns that read them by s, and divide the
# channels by the same s: W x = (W · s) (x / s), column j times s_j, channel j divided by it. A 2×4 matrix, its second channel ten times as large as the others:

# %% tags=["nbval-check-output"]
w = torch.tensor([[1.0, 0.1, -0.75, 0.4], [-0.75, 0.15, 1.0, -0.2]])
x = torch.tensor([1.0, 10.0, 1.0, 1.0])
s = torch.tensor([1.0, 4.0, 1.0, 1.0])
assert torch.equal((w * s) @ (x / s), w @ x)
course.table(weight=w, scaled=w * s)

# %% [markdown]
# Nothing has changed, but what is rounded now is W · s, and its error is divided by s afterwards. At 3 bits:

# %% tags=["nbval-check-output"]
plain, scaled = (qlearn.quantize(m, "zero_point", bits=3) for m in (w, w * s))
assert plain.scales.unique().tolist() == scaled.scales.unique().tolist() == [0.25]
course.table(nearest=plain.dequantize(), scaled_rounded=scaled.dequantize(), divided_again=scaled.dequantize() / s)

# %% [markdown]
# Both grids have the step 0.25. The weights of the second column, 0.1 and 0.15, were rounded to 0 and 0.25. Four times as large, both go to
# 0.5, and back to 0.125 (the table rounds it): a quarter of the error. But do not overdo it:

# %% tags=["nbval-check-output"]
for factor in (1, 2, 4, 8, 16, 32):
    s = torch.tensor([1.0, factor, 1.0, 1.0])
    qt = qlearn.quantize(w * s, "zero_point", bits=3)
    off = (qt.dequantize() / s - w) @ x
    print(f"s = {factor:2}: steps {[round(v, 2) for v in qt.scales[:, 0].tolist()]}  outputs off by {[round(v, 2) for v in off.tolist()]}")

# %% [markdown]
# From s = 8 on the second column has the largest weight of a row, and stretches its grid. At 32 the first output is worse again: the other
# columns of its row pay. (With so few weights luck plays in: 2 does as well as 4.)
#
# So AWQ tries. Its candidates are s = mean |x| to the power of a **ratio**: 0 scales nothing, 1 would make all channels equally large.
# The best of twenty is kept, by the error of the output. No Hessian, no inverse, one number fitted for a layer. On ours:

# %%
picture, axes = course.plots.figure(7, 3.2, alt="Output error against the ratio for 2, 3 and 4 bits: a shallow minimum between 0.1 and 0.5, then a steep rise.")
found = {}
for bits, color in ((2, "quantized"), (3, "original"), (4, "other")):
    found[bits] = search_scale(weight, bits, 64, inputs=statistics)
    ratios, losses = zip(*found[bits].losses.items())
    axes.plot(ratios, [loss / losses[0] for loss in losses], "o-", markersize=4, color=course.plots.COLORS[color], label=f"{bits} bits")
axes.set(xlabel="ratio", ylabel="output error (1: not scaled)", ylim=(0, 2))
axes.legend()
picture

# %%
for bits, search in found.items():
    print(f"{bits} bits: best ratio {search.ratio}, {search.losses[search.ratio] / search.losses[0]:.2f} of the error; scales from {search.scale.min():.2f} to {search.scale.max():.2f}")
    assert 0 < search.ratio < 0.7 and search.losses[search.ratio] < 0.85 * search.losses[0]

# %% [markdown]
# A fifth or more of the error is gone, in a layer with a large outlier. The dip is shallow, but it cost one fitted number, and one number can
# hardly learn a text by heart. (The clip, which comes next, fits more.)
#
# ## The clip
#
# AWQ has a second step. As in lesson 03, a grid may end before its largest weight; but here each group of each row asks what its own cut
# does to the *output*. How much do the two steps bring, on the evaluation text?

# %%
print("error left, in % of RTN's, 3 bits in groups of 64" + "".join(f"{title:>12}" for title in ("scale", "clip", "both", "GPTQ")))
for name in LAYERS:
    rtn = qlearn.quantize(weights[name], "zero_point", bits=3, group_size=64)
    found = [
        output_error(weights[name], qlearn.quantize(weights[name], method, bits=3, group_size=64, inputs=seen[name], **options), held_out[name])
        for method, options in (("awq", {"clip": False}), ("awq", {"scale": 1}), ("awq", {}), ("gptq", {}))
    ]
    print(f"{name:49}" + "".join(f"{100 * value / output_error(weights[name], rtn, held_out[name]):12.0f}" for value in found))
    assert found[1] < found[0] < output_error(weights[name], rtn, held_out[name])

# %% [markdown]
# In all four the clip does more than the scale AWQ is known for. In `k_proj` both are worse than the clip alone: the scale was searched
# before anything was clipped. GPTQ leaves least, but not in `down_proj`, where it has learnt by heart. That is the view of a single matrix; in a model AWQ judges the scale for q, k and v by
# what the whole attention puts out.
#
# ## Fold it away
#
# Who divides x by s when the model runs? Nobody, if the operation in front can: a norm ends with a multiplication by its weight, and
# weight / s costs nothing. `fold` looks for such an operation, for each group of layers that read the same tensor.

# %%
copy, _ = qlearn.load_model()
block = next(islice(walk(copy, calibration[:1, :128]), 2, None))
layers = {name: module for name, module in block.module.named_modules() if isinstance(module, torch.nn.Linear)}
before, norm = block.run()[0], block.module.input_layernorm.weight.clone()
for group in block.groups(layers):
    s = torch.rand(layers[group[0]].in_features, generator=torch.Generator().manual_seed(0)) + 0.5
    names = ", ".join(name.split(".")[1] for name in group)
    print(f"{names:24} folded: {fold(block, group, s)}")
difference = (block.run()[0] - before).abs().max() / before.abs().max()
print(f"the norm has changed: {not torch.equal(block.module.input_layernorm.weight, norm)}; the block's output: {difference:.0e}")
assert difference < 1e-4

# %% [markdown]
# Three groups fold: two into a norm, `down_proj` into the rows of `up_proj`. `o_proj` does not. With **grouped-query attention** four query
# heads share two value heads, so one channel of v becomes two channels of x, and these want different s. There our AWQ stores 1/s with the
# matrix, 16 bits a column, and the layer multiplies its input when it runs. It is small, but it is not free, and we count it:

# %% tags=["nbval-check-output"]
o_proj = weights["self_attn.o_proj"]
for method in ("zero_point", "awq"):
    options = {"inputs": seen["self_attn.o_proj"]} if method == "awq" else {}
    print(f"{method:11} {qlearn.quantize(o_proj, method, bits=3, group_size=64, **options).bits_per_weight:.4f} bits per weight")
assert 16 * o_proj.shape[1] / o_proj.numel() == 0.0625

# %% [markdown]
# ## On the model
#
# All layers now, 3 bits in groups of 64. Each block is calibrated on what the blocks before it, already quantized, hand over: H
# describes the inputs that the layer will really get. What those blocks got wrong is not made up for: the layer is to
# give W x for the inputs it gets, not what the original model gave. For the sake of your time we calibrate on 2,048 tokens, an eighth of the package's default, and AWQ
# tries four ratios in place of twenty.

# %%
few_tokens = calibration[:4]  # (4, 512)
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
rows = {"unquantized": qlearn.evaluate.report(model, tokenizer, reference, name="unquantized")}


def measure(name, method, ids=few_tokens, **options):
    quantized, _ = qlearn.load_model()
    qlearn.quantize_model(quantized, method, bits=3, group_size=64, calibration=ids, **options)
    rows[name] = qlearn.evaluate.report(quantized, tokenizer, reference, name=name)


measure("RTN", "zero_point")

# %%
measure("AWQ", "awq", n_grid=4)
measure("GPTQ", "gptq")
qlearn.evaluate.table(rows.values())

# %% [markdown]
# AWQ and GPTQ are close. Do not read much into the last digits: another number of threads changes the last bits of H, then one code, and
# every column behind depends on it.
#
# Two questions are open. What do random tokens do to GPTQ, will it still beat RTN? And AWQ has a clip while GPTQ took its grids as they came.
# What if it gets the clip of lesson 03 (which makes the error of the *weights* small), and the order?

# %%
measure("GPTQ, random tokens", "gptq", ids=random_tokens[:4])
measure("GPTQ, order, clip", "gptq", act_order="static", clip="mse")
qlearn.evaluate.table(rows.values())

# %%
kld = {name: row.kl_divergence for name, row in rows.items()}
assert kld["RTN"] > 1.3 * max(kld["AWQ"], kld["GPTQ"]) and kld["GPTQ, order, clip"] < 0.95 * kld["GPTQ"]
assert kld["GPTQ, random tokens"] > 1.3 * kld["GPTQ"]
for name in ("AWQ", "GPTQ", "GPTQ, random tokens", "GPTQ, order, clip"):
    print(f"{name:20} leaves {kld[name] / kld['RTN']:.0%} of RTN's divergence, with {rows[name].bits_per_weight - rows['RTN'].bits_per_weight:.4f} more bits per weight")

# %% [markdown]
# Calibrated on random tokens GPTQ loses most of what it had gained. The text must be of the kind that the model will read.
#
# And the best row is GPTQ with the order and a clip. Where a grid ends and which codes are chosen on it are two questions, and an answer to one can
# be joined with an answer to the other. (How much of the gain is the order's, the row does not say.)
#
# ## The board
#
# Where two points nearly cover each other, their difference is less than 4,096 tokens can tell.

# %%
course.board.add("unquantized", 16, math.log(rows["unquantized"].perplexity))
for name in ("RTN", "AWQ", "GPTQ", "GPTQ, order, clip"):
    course.board.add(f"{name}, 3 bit, groups of 64", rows[name].bits_per_weight, math.log(rows[name].perplexity))
course.board.show()

# %% [markdown]
# ## 4, 3 and 2 bits
#
# The same at three widths, on the whole evaluation text, with the full calibration and with the share of 48 generated pieces of Python that
# parse (one of them is two points: a coarse measure), measured on a GPU. QAT, lesson 05, trains the weights, and is there to compare with.

# %%
ptq = results.read("ptq")
print(ptq["date"], "·", ptq["gpu"], "·", ptq["command"])
METHODS = ("RTN", "RTN with clipping", "AWQ", "GPTQ", "GPTQ with order and clipping", "QAT")
fields = qlearn.evaluate.Row.__dataclass_fields__
table = {row["name"]: qlearn.evaluate.Row(**{key: row[key] for key in fields}) for row in ptq["rows"]}
names = [f"{method}, {bits} bit" for bits in (4, 3, 2) for method in METHODS]
qlearn.evaluate.table([table["unquantized"], *(table[name] for name in names if name in table)])

# %%
for bits in (4, 3, 2):
    of = {method: table[f"{method}, {bits} bit"].kl_divergence for method in METHODS[:5]}
    assert min(of, key=of.get) == "GPTQ with order and clipping" and max(of, key=of.get) == "RTN"
    assert min(METHODS[:5], key=lambda method: table[f"{method}, {bits} bit"].perplexity) == "GPTQ with order and clipping"
two = {method: table[f"{method}, 2 bit"] for method in METHODS}
assert two["GPTQ"].kl_divergence > two["RTN with clipping"].kl_divergence and 0.15 < two["QAT"].kl_divergence / two["GPTQ with order and clipping"].kl_divergence < 0.25
print(f"2 bits, KLD: RTN with clipping {two['RTN with clipping'].kl_divergence:.2f}, GPTQ {two['GPTQ'].kl_divergence:.2f}, GPTQ with order and clipping {two['GPTQ with order and clipping'].kl_divergence:.2f}")

# %% [markdown]
# Of the first five, GPTQ with order and clip has the least perplexity and divergence at every width. At 2 bits GPTQ alone is no better than RTN with a clip: four rulings
# from the smallest weight to the largest are a bad grid, and no choice of codes mends it. But none of the five is usable at 2 bits. QAT,
# lesson 05, has about a fifth of the best one's divergence (at 2.5 bits, groups of 32, and after training on a GPU).
#
# What does it cost for a model that people use? One block of Llama-3.1-8B's shape, 218 million random weights, 4 bits in groups of 128:

# %%
seconds = {}
for name in ("llama_block_cpu", "llama_block_h200"):
    record = results.read(name)
    print(f"{record['date']} · {record['gpu'] or record['machine']} · {record['tokens']:,} tokens · {record['command']}")
    for row in record["rows"]:
        print(f"    {row['method']:10} {row['bits_per_weight']:.3f} bits  {row['seconds']:6.2f} s  {row['peak_bytes'] / 2**30:5.2f} GiB over the model at the peak")
        seconds[name[12:], row["method"]] = row["seconds"]
print(f"32 blocks on the GPU: GPTQ {32 * seconds['h200', 'gptq'] / 60:.1f} minutes, AWQ {32 * seconds['h200', 'awq'] / 60:.1f} minutes")
print(f"the Hessian of down_proj alone, 14336 x 14336 in float32: {4 * 14336**2 / 2**30:.2f} GiB")
assert seconds["h200", "gptq"] > seconds["h200", "awq"] > 10 * seconds["h200", "zero_point"]
assert seconds["cpu", "awq"] > seconds["cpu", "gptq"] > 10 * seconds["cpu", "zero_point"]

# %% [markdown]
# RTN is done at once. On the GPU AWQ takes less than a minute for 32 such blocks and GPTQ four, and GPTQ needs the memory of
# some very large matrices. On the CPU it is the other way round: AWQ is slower, since it runs the MLP anew for each scale that it tries.
#
# ## Find the bug
#
# Somebody wrote a GPTQ, and it is *worse* than round-to-nearest. Here is the error after each column. Where does it go wrong: early, late,
# more and more? What does that say about the line to look for?

# %%
def suspect(weight, x, percdamp=0.01):
    H = (2 / len(x) * x.T @ x).double()
    H += percdamp * H.diagonal().mean() * torch.eye(len(H))
    L = torch.linalg.cholesky(H)
    U = torch.linalg.inv(L).T  # upper triangular
    W = weight.double().clone()
    for i in range(len(H)):
        q = on_grid(W[:, i])
        error = (W[:, i] - q) / U[i, i]
        W[:, i + 1 :] -= torch.outer(error, U[i, i + 1 :])
        W[:, i] = q
        yield W


# %%
def error_of(W):
    return ((W - weight) @ hessian.double() * (W - weight)).sum().item()


curve = [error_of(W) for W in suspect(weight, statistics.sample)]
right = [step.loss for step in gptq_steps(weight, hessian, bits=3)]
nearest = [error_of(torch.hstack([grid.dequantize()[:, : i + 1], weight[:, i + 1 :]]).double()) for i in range(256)]
picture, axes = course.plots.figure(7, 3.2, alt="The suspect's error is above round-to-nearest's from the first column on; the right one stays far below both.")
for values, label, color, line in ((curve, "suspect", "error", "-"), (nearest, "round to nearest", "faint", "--"), (right, "GPTQ", "other", ":")):
    axes.semilogy(range(1, 257), values, line, color=course.plots.COLORS[color], label=label)
axes.set(xlabel="columns rounded", ylabel="output error")
axes.legend()
picture

# %%
print("after one column, in units of RTN's:", *(f"{name} {values[0] / nearest[0]:.2f}" for name, values in (("suspect", curve), ("GPTQ", right))))
assert curve[0] > 1.5 * nearest[0] > 1.5 * right[0] and curve[-1] > nearest[-1]

# %% [markdown]
# It is worse after the very first column. So it is nothing that builds up, no order, no damping that is a little off: already the first
# shift is wrong. The sign and the division are as they should be. What about U? It is upper triangular, as it should be. Which product is H⁻¹,
# Uᵀ U or U Uᵀ?

# %% tags=["nbval-check-output"]
wrong = torch.linalg.inv(torch.linalg.cholesky(damped)).T
for name, matrix in (("Uᵀ U", wrong.T @ wrong), ("U Uᵀ", wrong @ wrong.T)):
    print(f"the suspect's {name} times H is the identity: {torch.allclose(matrix @ damped, torch.eye(256).double(), atol=1e-6)}")

# %% [markdown]
# <details><summary>The bug</summary>
#
# From H = L Lᵀ follows H⁻¹ = L⁻ᵀ L⁻¹ (L⁻ᵀ is L inverted and transposed). With U = L⁻ᵀ that is U Uᵀ, but GPTQ needs Uᵀ U. Both factors are upper triangular, and they are
# different. First invert, then factor: `torch.linalg.cholesky(torch.linalg.inv(H), upper=True)`. (The package gets the same from L without
# inverting H: it factors H with its columns in reverse order.)
# </details>
#
# Here are other bugs that are often made, and what their curves would show:

# %%
U, inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), torch.linalg.inv(damped)
bugs = {
    "none": lambda i: U[i] / U[i, i],
    "sign": lambda i: -U[i] / U[i, i],
    "H for its inverse": lambda i: damped[i] / damped[i, i],
    "not divided": lambda i: U[i],
    "the inverse of all columns, always": lambda i: inverse[i] / inverse[i, i],
}
print(f"error in units of RTN's{'':14}after 1 column   after 32   at the end")
for name, row in bugs.items():
    W, curve = weight.double().clone(), []
    for i in range(256):
        q = on_grid(W[:, i])
        W[:, i + 1 :] -= torch.outer(W[:, i] - q, row(i)[i + 1 :])
        W[:, i] = q
        if i in (0, 31, 255):
            curve.append(error_of(W) / nearest[i])
    print(f"{name:37}" + "".join(f"{value:12.2f}" for value in curve))
    assert curve[-1] < 0.8 if name in ("none", "not divided", "the inverse of all columns, always") else curve[-1] > 2

# %% [markdown]
# At the end the last two still beat round-to-nearest. A test that asks for no more than that lets them pass. Compare with the definition.

# %% [markdown]
# ## What you can now do
#
# - Round a row by hand so that its errors cancel, and say why the output counts and not the weights.
# - Write GPTQ in ten lines, and know what its Cholesky factor is for.
# - Choose calibration text, judge on other text, and answer "not positive-definite" with more tokens or more damping.
# - Scale columns before rounding, fold the inverse into a norm, and see where it has to be paid for.
# - Keep apart what is often mixed up: where a grid ends, and which codes are chosen on it.
#
# Now write it yourself: [exercise 06](../exercises/06_gptq.ipynb). In its last cells a layer of the model is quantized by your own GPTQ.
# Back to [the map](00_start_here.ipynb).
