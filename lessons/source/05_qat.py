# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 05 · QAT: a training that sees the rounding
#
# **In 80 minutes** you will know QAT, **quantization-aware training**: how a gradient gets through a function that has none, why a weight in
# such a training never quite settles, how a model learns from its own unrounded self, and what that gives back at 4, 3 and 2 bits. You need
# lessons 02 and 03.
#
# **The question.** Rounded to 2 bits in groups of 32, our model writes nonsense: its perplexity is more than seven times what it was. Now
# it may practise for 30 seconds on this machine, with its rounding switched on. At the end it still has 2 bits per weight. What share of
# the increase will be gone?

# %%
import copy
import math
import time

import numba
import numpy as np
import torch
from IPython.display import display
from torch.func import functional_call

import qlearn
from qlearn import course
from qlearn.bench import results
from qlearn.formats import gguf_blocks
from qlearn.formats.integers import Integers
from qlearn.training import fake_quant, qat
from qlearn.training.fake_quant import fake_quantize, fake_round

course.predict("of the increase in perplexity removed by 30 seconds of training, in %", low=0, high=100, key="qat-30-seconds")

# %%
model, tokenizer = qlearn.load_model()
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)


def measure(trained, name, method="signed_absmax", bits=2):
    """Round a copy of a model in groups of 32, and report."""
    rounded = qlearn.quantize_model(copy.deepcopy(trained), method, bits=bits, group_size=32, progress=False)
    return qlearn.evaluate.report(rounded, tokenizer, reference, name=name)


rows = {"plain 2 bit": measure(model, "plain 2 bit")}
assert rows["plain 2 bit"].perplexity > 7 * reference.perplexity
rows["plain 2 bit"]

# %% [markdown]
# ## By hand: a staircase
#
# The method is `signed_absmax`, the rule of llama.cpp's Q4_0 for any number of bits. Of the 2ᵇ codes, one side of zero gets one more than
# the other; it is the side of the largest weight. At 2 bits that side has two steps, the other one.
#
# Eight weights. The largest is −1, so the **scale** d is −1 / −2 = 0.5, and the grid is −1, −0.5, 0, 0.5.

# %% tags=["nbval-check-output"]
w = torch.tensor([-1.0, -0.6, 0.3, 0.2, 0.85, -0.1, 0.55, -0.3])


def rounded(w):
    """Eight weights as 2 bits bring them back."""
    return qlearn.quantize(w.detach()[None], "signed_absmax", bits=2, group_size=8).dequantize()[0]


codes = torch.tensor([-2, -1, 1, 0, 1, 0, 1, -1])
assert torch.equal(rounded(w), codes * 0.5)
course.table(original=w, codes=codes, reconstructed=rounded(w))

# %% [markdown]
# A layer computes with the lower row. Suppose that 0.2, which counts as 0, should count for more. Push it a little:

# %% tags=["nbval-check-output"]
for push in (0.01, 0.04, 0.06):
    pushed = w.clone()
    pushed[3] += push
    print(f"{pushed[3]:.2f} comes back as {rounded(pushed)[3]:.1f}")

# %% [markdown]
# Nothing, nothing, then a jump. Rounding is a **staircase**: its slope is 0 on every step and does not exist at the edges. Autograd says
# the same, and a training that is told 0 everywhere moves nothing.

# %% tags=["nbval-check-output"]
x = w.clone().requires_grad_()
(torch.round(x / 0.5) * 0.5).sum().backward()
assert not x.grad.any()
print("gradient:", x.grad.tolist())

# %% [markdown]
# ## The straight-through estimator
#
# The way out is a lie that works (Bengio, Léonard and Courville, 2013). Forward, compute with Q(w). Backward, pretend that Q was not there,
# and give the float weight w the gradient that arrived at Q(w). Small steps add up in w, which is called the **latent** weight, until it
# crosses an edge.
#
# In torch it is one line: `detach()` makes a value that autograd takes for a constant.

# %%
def straight_through(x, quantize):
    return x + (quantize(x) - x).detach()


x = w.clone().requires_grad_()
q = straight_through(x, rounded)
assert torch.equal(q, rounded(w))

# %% [markdown]
# Let a layer add the eight up. Its output should be the sum of the float weights, −0.1. The loss is half the squared distance to that.

# %% tags=["nbval-check-output"]
loss = (q.sum() - w.sum()).square() / 2
loss.backward()
x.data -= 0.125 * x.grad  # one step of gradient descent
print(f"output {q.sum():.2f}, after one step {rounded(x).sum():.2f}")
assert abs(rounded(x).sum()) < 1e-3 and torch.allclose(x.grad, torch.tensor(-0.4))
course.table(before=rounded(w), gradient=x.grad, latent=x, after=rounded(x))

# %% [markdown]
# The output was −0.5, too small by 0.4, so all eight were told to grow, and moved by 0.05. Now the output is 0: closer. 0.2 reached 0.25, and
# passed its edge because that had moved, too: the largest weight went from −1 to −0.95, and the grid hangs on it.
#
# That is also why others came back changed without crossing anything. We shall return to it. Rounding forward, and keeping floats behind it, is
# called **fake quantization**. The package's function:

# %%
course.source_of(fake_quantize)

# %%
course.source_of(fake_quant._StraightThrough)

# %% [markdown]
# It rounds with the methods you know, bit for bit, and a class says what happens backward: this one, or for `signed_absmax` one that can do
# a little more. Without its extras, a mask and the gradient of the scale, it does what our line does.

# %% tags=["nbval-check-output"]
y = w[None].clone().requires_grad_()
q = fake_quantize(y, "signed_absmax", bits=2, group_size=8, clip_mask=False)
((q.sum() - w.sum()).square() / 2).backward()
assert torch.equal(q[0], rounded(w)) and torch.equal(y.grad[0], x.grad)
print("values and gradients are ours")

# %% [markdown]
# ## Beyond the end: the clip mask
#
# 0.85 is not rounded to 0.5, it is **cut off**: 0.9 or 0.99 would come back as 0.5, too. To this weight the staircase is flat for good, and
# slope 1 would let it drift ever further out without any effect. So a weight that is more than half a step beyond the end of the grid gets no
# gradient, in either direction. It stays where it is until the grid, which hangs on the largest weight, moves.

# %% tags=["nbval-check-output"]
y = w[None].clone().requires_grad_()
((fake_quantize(y, bits=2, group_size=8).sum() - w.sum()).square() / 2).backward()
assert torch.equal(y.grad[0] == 0, w > 0.75)
course.table(latent=w, reconstructed=rounded(w), gradient=y.grad[0])

# %%
numbers = torch.linspace(-1.6, 1.2, 561)
stairs = fake_round(numbers, Integers(2), scale=0.5)
picture, axes = course.plots.figure(8, 3.2, alt="The staircase of 2 bits, and the straight line whose slope stands in for it, between the ends.")
axes.plot(numbers, stairs, color=course.plots.COLORS["quantized"], label="forward: the staircase")
axes.plot([-1.25, 0.75], [-1.25, 0.75], "--", color=course.plots.COLORS["original"], label="backward: slope 1")
for end in ([-1.6, -1.25], [0.75, 1.2]):
    axes.axvspan(*end, color=course.plots.COLORS["faint"], alpha=0.15, label="backward: slope 0" if end[0] > 0 else None)
axes.set(xlabel="latent weight", ylabel="what the layer sees", xlim=(-1.6, 1.2))
axes.legend(loc="upper left")
picture

# %% [markdown]
# ## The one that carries the scale
#
# The largest weight of a group does two things. It is a weight, and it sets d, on which all others stand. Pulling at it moves the whole
# grid, so it should get the gradient of d as well.
#
# Which is that? Rounding moved each weight by some fraction of a step. Keep that fraction constant, as straight-through does, and let
# autograd do the rest. What is cut off is a whole number of steps, whatever its latent weight.

# %% tags=["nbval-check-output"]
x = w.clone().requires_grad_()
d = x[0] / -2
fraction = (codes - x / d).detach()  # what rounding added, in steps
q = torch.where(x / d < 1.5, d * (x / d + fraction), d * codes)
((q.sum() - w.sum()).square() / 2).backward()

y = w[None].clone().requires_grad_()
((fake_quantize(y, bits=2, group_size=8, scale_gradient=True).sum() - w.sum()).square() / 2).backward()
assert torch.allclose(x.grad, y.grad[0])
course.table(latent=w, gradient=x.grad)

# %% [markdown]
# Only the first differs from before. Its gradient is now a mixture: as a weight it should grow, and so should the step of the grid, which
# means that −1 should move outwards. Together −0.22: it still moves inwards, but about half as fast. Such a gradient is due to LSQ (learned
# step size quantization; Esser and others, 2019), where the scale is a parameter of its own. Whether it helps we shall see in the measurements.
#
# ## Parity
#
# torch has fake quantization with a mask, too. The same grids for 256 rows, 4 bits with a clip, and a random gradient from above:

# %% tags=["nbval-check-output"]
weight = model.model.layers[5].mlp.down_proj.weight
same = {"bits": 4, "clip": "mse", "scale_dtype": torch.float32}
grid = qlearn.quantize(weight, "zero_point", **same)
scales = grid.scales.flatten()
ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
a = fake_quantize(ours, "zero_point", group_size=None, **same)
b = torch.fake_quantize_per_channel_affine(theirs, scales, grid.zero_points().flatten().int(), 0, 0, 15)
above = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
a.backward(above), b.backward(above)
steps = (weight / scales[:, None]).double()
tie = (steps - steps.floor() - 0.5).abs() < 1e-4  # torch multiplies by 1 / scale, as you saw in lesson 03
assert torch.equal(a[~tie], b[~tie]) and torch.equal(ours.grad[~tie], theirs.grad[~tie]) and tie.float().mean() < 0.01
print(f"values and gradients equal; {(ours.grad == 0).float().mean():.1%} of the weights were cut off and get none")

# %% [markdown]
# ## The ladder
#
# A training rounds every matrix at every step, so it had better be fast. Q4_0 as llama.cpp writes it: 32 weights share d, the largest of
# them over −8, and the code is trunc(w · (1 / d) + 8.5), 15 at most. Codes are found with d in float32; what is stored is its float16.

# %%
def loop(row):
    """n weights, as a list of float32 scalars -> what Q4_0 brings back, float32 (n,)."""
    back = []
    for start in range(0, len(row), 32):
        group = row[start : start + 32]
        d = max(group, key=abs) / np.float32(-8)
        inverse = np.float32(1) / d if d else np.float32(0)
        back += [np.float32(min(15, int(w * inverse + np.float32(8.5))) - 8) * np.float32(np.float16(d)) for w in group]
    return torch.tensor(back)


def in_torch(matrix):
    groups = matrix.unflatten(-1, (-1, 32))
    d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    inverse = torch.where(d == 0, 0, 1 / d)
    codes = (groups * inverse + 8.5).trunc().clamp(max=15)
    return ((codes - 8) * d.half().float()).flatten(-2)


# %% [markdown]
# Numba has no float16, so torch rounds the scales for it.

# %%
@numba.njit
def compiled(groups, d, stored):
    back = np.empty_like(groups)
    for g in range(len(groups)):
        inverse = np.float32(1) / d[g] if d[g] != 0 else np.float32(0)
        for j in range(32):
            code = min(15, int(groups[g, j] * inverse + np.float32(8.5)))
            back[g, j] = np.float32(code - 8) * stored[g]
    return back


def in_numba(matrix):
    groups = matrix.reshape(-1, 32)
    d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[:, 0] / -8
    return torch.from_numpy(compiled(groups.numpy(), d.numpy(), d.half().float().numpy())).view_as(matrix)


# %%
matrix = weight.detach()
in_torch(matrix), in_numba(matrix)  # the first call compiles
found = {}
for name, function, argument in (
    ("loop, 1 row", loop, list(matrix[0].numpy())),
    ("torch", in_torch, matrix),
    ("Numba", in_numba, matrix),
):
    began = time.perf_counter()
    found[name] = function(argument)
    print(f"{name:12} {(time.perf_counter() - began) / found[name].numel() * 1e9:8.1f} ns a weight")

# %% [markdown]
# All three, the package's fake quantization, and the bytes that llama.cpp would read, decoded, are the same numbers, **bit for bit**:

# %% tags=["nbval-check-output"]
stored = gguf_blocks.quantize(matrix, "Q4_0")  # 18 bytes for 32 weights
decoded = gguf_blocks.dequantize(stored, "Q4_0")
for name, result in found.items():
    assert torch.equal(result, decoded[0] if name.startswith("loop") else decoded), name
assert torch.equal(fake_quantize(matrix, bits=4, group_size=32), decoded)
print(stored.shape[1], "bytes a row,", 8 * stored.numel() / matrix.numel(), "bits per weight, no difference anywhere")

# %% [markdown]
# That is not pedantry. A model trained under one rounding has learnt that rounding. How much is lost under another you will see below.
#
# ## Drag it: a weight that does not settle
#
# One weight, alone. Its best value, the **target**, lies between two grid points, 0.3 of the way. The loss is ½ · (rounded − target)²; its
# gradient, rounded − target, goes to the latent weight. That starts at the target, and the model sees 0: too small, grow. So it walks up to
# the edge at 0.5. And then?
#
# Before you drag: with a learning rate ten times smaller, how often does the *rounded* weight jump? And what is it on average?

# %%
explorer = course.widgets.settling_explorer()
explorer

# %%
for rate in (1.0, 0.1, 10**-1.75):
    explorer.controls["rate"].value = rate
    print(explorer.summary)

# %% [markdown]
# **What you should have seen.** The latent weight does not come to rest. Below the edge it is told to grow, above it to shrink. Its swing
# is proportional to the learning rate. But what the model sees jumps by a whole step, at any rate, and just as often: in the upper position
# for 30 % of the steps, so that it is 0.3 *on average*, which no single step is.
#
# And if the rate falls to zero along the way?

# %% tags=["nbval-check-output"]
explorer.controls["falling"].value, ends = True, []
for exponent in np.arange(-1.75, 0.1, 0.25):
    explorer.controls["rate"].value = 10**exponent
    ends.append(int(explorer.summary.split()[-4]))
print("where it ends, for the slider's eight rates:", ends)
assert sum(ends) == 1

# %% [markdown]
# The swing dies out, and the weight stays on one side: mostly at 0, where plain rounding had put it, once on the wrong one. A weight by itself
# gains nothing from all this.
#
# ## Sixty-four weights gain
#
# Weights are not alone. Here are 100 rows of 64, whose inputs are mixtures of 16 numbers, as activations are related to one another. Then
# one weight's error can make up for another's: the gradient sees the error of the *output*, and rounding to nearest does not.

# %%
generator = torch.Generator().manual_seed(0)
best = 6 * torch.rand(100, 64, generator=generator) - 3  # in steps of the grid
mixing = torch.randn(16, 64, generator=generator) / 4


def output_errors(weights):
    """Mean squared error of each row's output, for inputs mixing.T @ (16 independent normal numbers)."""
    return ((fake_round(weights, Integers(4)) - best) @ mixing.T).square().sum(1)


def descend(rate, falling, steps=400):
    latent, errors = best.clone().requires_grad_(), []
    for step in range(steps):
        error = output_errors(latent)
        (gradient,) = torch.autograd.grad(error.sum(), latent)
        latent.data -= rate * ((1 + math.cos(math.pi * step / steps)) / 2 if falling else 1) * gradient
        errors.append(error.mean().item())
    return errors


# %%
nearest = output_errors(best).mean().item()
runs = {"rate 0.03": descend(0.03, False), "rate 0.01": descend(0.01, False), "0.03, falling to 0": descend(0.03, True)}
picture, axes = course.plots.figure(8, 3, alt="Output error of 64 weights in training: level at a constant rate, falling steeply at the end of a falling one.")
for (name, errors), color in zip(runs.items(), ("sky", "orange", "vermillion")):
    axes.plot(errors, color=course.plots.PALETTE[color], label=name)
    print(f"{name:20} mean of the last 100 steps {np.mean(errors[-100:]):5.2f}, at the end {errors[-1]:5.2f}")
axes.axhline(nearest, color=course.plots.COLORS["marker"], linestyle="--", label=f"each to nearest, {nearest:.2f}")
axes.set(xlabel="step", ylabel="squared output error", ylim=(0, None))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
assert min(runs["rate 0.03"][-100:]) > nearest > 3 * runs["0.03, falling to 0"][-1]
assert np.mean(runs["rate 0.03"][-100:]) > 1.3 * np.mean(runs["rate 0.01"][-100:])
picture

# %% [markdown]
# At a high constant rate many weights stand at their edges and are pushed over together: worse than nearest. At a third of the rate fewer jump:
# about as good as nearest, no better. (The dip at the start: the first to jump are those that help.) When the rate falls, fewer and fewer jump,
# each correcting what the others left. The error first rises too, then ends at less than a third of nearest, **in the last part of the way**.
# Keep that shape in mind.

# %%
assert abs(np.mean(runs["rate 0.01"][-100:]) / nearest - 1) < 0.1 and all(min(errors[:40]) < 0.9 * nearest for errors in runs.values())

# %% [markdown]
# ## What to learn: the loss by hand
#
# A text says which token came. The unrounded model, now the **teacher**, says how likely every token was. **Distillation** asks the student for
# the same probabilities:
#
# KL(teacher ‖ student) = Σ p_teacher · (log p_teacher − log p_student)
#
# Four tokens, and powers of two, so that in bits all logarithms are whole.

# %% tags=["nbval-check-output"]
teacher = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8])
student = torch.tensor([1 / 8, 1 / 2, 1 / 4, 1 / 8])
terms = teacher * (teacher.log2() - student.log2())
assert terms.tolist() == [1.0, -0.25, -0.125, 0.0] and terms.sum() == 5 / 8
reversed_terms = student * (student.log2() - teacher.log2())
print("KL(teacher || student) =", terms.sum().item(), "bits; the other way round", reversed_terms.sum().item())
loss = qat.distillation_loss(student.log()[None], teacher.log()[None])  # in nats
assert math.isclose(loss.item(), 5 / 8 * math.log(2), rel_tol=1e-6)
course.table(teacher=teacher, student=student, bits=terms, decimals=3)

# %% [markdown]
# 5/8 of a bit, in nats 0.433. Each term is multiplied by the teacher's probability, so tokens it thinks unlikely hardly count. KL the other way
# round multiplies by the student's, and is another measure.
#
# What do the logits feel? Say the text went on with the third token. The **next-token** loss, which models are pretrained
# with, is −log p_student of that one.

# %% tags=["nbval-check-output"]
logits = student.log().requires_grad_()
next_token = torch.nn.functional.cross_entropy(logits[None], torch.tensor([2]))
(pull,) = torch.autograd.grad(next_token, logits)
(distilled,) = torch.autograd.grad(qat.distillation_loss(logits[None], teacher.log()[None]), logits)
(rest,) = torch.autograd.grad(qat.distillation_loss(logits[None], student.log()[None]), logits)
assert torch.allclose(distilled, student - teacher) and rest.abs().max() < 1e-7
course.table(next_token=pull, distillation=distilled, where_both_agree=rest.round(decimals=6), decimals=3)

# %% [markdown]
# Descent subtracts: a negative gradient pushes a token up. The next-token loss pushes the third token up and all others down, among them the
# teacher's favourite; only over much text does that average out. Distillation moves each token to where the teacher has it, and where the two agree it is silent. **Nothing but the damage is
# left to learn.**
#
# ## On the model
#
# One step: teacher and student read 8 windows of 128 tokens from the calibration text, every matrix of the student being rounded on the way, and
# AdamW moves the latent weights. (AdamW is gradient descent that scales each weight's step by its recent gradients.) In the package:

# %%
course.source_of(qat.fake_quantized)

# %%
course.source_of(qat.train)

# %% [markdown]
# The rate rises to 0.001 in 5 steps and falls along a cosine, by the clock. Give it more seconds if you like.

# %%
ids = torch.tensor(tokenizer(qlearn.evaluate.calibration_text(), verbose=False).input_ids)
picture, axes = course.plots.figure(8, 3, alt="The distillation loss in 30 seconds of training at 2 bits: it falls steeply at first, then slowly.")
(line,) = axes.plot([], [], color=course.plots.COLORS["original"])
axes.set(xlabel="seconds", ylabel="KL (nats a token)", xlim=(0, 32), ylim=(0.2, 3), yscale="log")
axes.set_yticks([0.2, 0.5, 1, 2], [0.2, 0.5, 1, 2])
axes.minorticks_off()
shown, seen, began = display(picture, display_id=True), [], time.perf_counter()


def watch(step, loss, student):
    seen.append((time.perf_counter() - began, loss.item()))
    if step % 3 == 0:
        line.set_data(*zip(*seen))
        shown.update(picture)


student, _ = qat.train(
    model, qat.windows(ids, batch=8, length=128), bits=2, group_size=32, seconds=30, lr=1e-3, warmup=5, progress=False, watch=watch
)

# %%
name = "30 seconds, 2 bit"
rows[name] = measure(student, name)
before, after = (rows[label].perplexity - reference.perplexity for label in ("plain 2 bit", name))
course.reveal("qat-30-seconds", 100 * (1 - after / before), unit="%")
assert after < before / 2
qlearn.evaluate.table(rows.values())

# %% [markdown]
# The same bits, the same file size, another model. What happened to the weights?

# %%
def all_codes(trained):
    layers = [layer for name, layer in trained.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    return torch.cat([qlearn.quantize(layer.weight, "signed_absmax", bits=2, group_size=32).codes().flatten() for layer in layers])


moved = (all_codes(student) != all_codes(model)).float().mean()
floats = qlearn.evaluate.report(student, tokenizer, reference, name="its latent weights, not rounded")
print(f"{moved:.1%} of the codes have changed")
print(f"perplexity of the latent weights, not rounded: {floats.perplexity:.2f}, of the original: {reference.perplexity:.2f}")
assert moved < 0.1 and floats.perplexity > reference.perplexity

# %% [markdown]
# Only a few codes in a hundred changed. Scales, norms and embeddings learn, too. And the latent weights have become a *worse* model of floats
# than the original. They are no weights any more; they are a place where steps add up.
#
# ## Another rounding at the end
#
# What the training saw is what is stored, bit for bit. And if the file is made by another rule: in groups of 64 for 32, by zero-point, by absmax? Or
# if the latent weights pass through a file of bfloat16 first? On 1,024 tokens, because there are nine models to measure (the original is in bfloat16 already):

# %%
for layer in student.model.layers:
    matrix = layer.mlp.down_proj.weight
    assert torch.equal(fake_quantize(matrix, bits=2, group_size=32), qlearn.quantize(matrix, "signed_absmax", bits=2, group_size=32).dequantize())


def quick(weights, method="signed_absmax", group_size=32):
    rounded = qlearn.quantize_model(copy.deepcopy(weights), method, bits=2, group_size=group_size, progress=False)
    return qlearn.evaluate.perplexity(rounded, tokenizer, tokens=1024)


in_bf16 = copy.deepcopy(student).bfloat16().float()
exports = {"as trained": {}, "groups of 64": {"group_size": 64}, "zero-point": {"method": "zero_point"}, "absmax": {"method": "absmax"}}
exports = {name: (quick(model, **rule), quick(student, **rule)) for name, rule in exports.items()}
assert all(torch.equal(p.bfloat16().float(), p) for p in model.parameters())  # the original is in bf16 already
exports["by way of bf16"] = exports["as trained"][0], quick(in_bf16)
print("perplexity       original   trained")
for name, (original, trained) in exports.items():
    print(f"{name:14} {original:10.2f} {trained:9.2f}")

# %%
learnt = exports["as trained"][1]
assert all(trained < original / 1.5 for original, trained in exports.values())
assert all(exports[name][1] > 1.05 * learnt for name in ("groups of 64", "zero-point", "absmax"))
assert exports["absmax"][1] > 10 * exports["as trained"][0]
assert all(exports[name][1] < exports[name][0] / 3 for name in ("groups of 64", "zero-point"))
assert abs(exports["by way of bf16"][1] / learnt - 1) < 0.05
print(f"by way of bf16, {(all_codes(in_bf16) != all_codes(student)).float().mean():.2%} of the codes are others")

# %% [markdown]
# In groups of 64 and by zero-point the student is far ahead of the original, but behind itself as trained: some of what it learnt is
# general, some is about this one grid. By absmax both are destroyed. bf16 moves only weights that stand very near an edge, and that hardly matters.
#
# Nothing is lost where the fake quantization *is* the exporter's rounding, as you have seen for Q4_0.
#
# ## With an H200 and five minutes
#
# The same training on the whole corpus that the model comes from. Two texts that it never saw: the course's evaluation text, and twenty modules of
# the standard library. Perplexity in llama.cpp's convention (windows of 512, the second half counts).

# %%
record = results.read("qat")
runs = {run["name"]: run for run in record["runs"]}
print(f"{record['date']}, {record['gpu']}: {record['command']}")
print("evaluation text  bits/weight   float   plain     QAT   removed   on the other text   minutes")
for name in ("4 bit", "3 bit", "2 bit"):
    run = runs[name]
    figures = [run[which]["evaluation"]["perplexity"] for which in ("float", "plain", "trained")]
    removed = [run["removed"][text] for text in ("evaluation", "standard library")]
    print(f"{name:15} {run['bits_per_weight']:12}", *(f"{p:7.3f}" for p in figures), f"{removed[0]:9.1%} {removed[1]:19.1%} {run['seconds'] / 60:9.1f}")
    assert min(removed) > 0.7 and run["steps"] == 3000

# %% [markdown]
# **Removed** is (plain − QAT) / (plain − float): the share of the damage that is gone. The idea is Gemma 3's (2025): a short fine-tuning, about
# 5,000 steps there and 3,000 here, towards the probabilities of the unrounded checkpoint. Google reports 54 % removed for Q4_0 by the same
# measure, on models more than a hundred times larger. Learning rate, optimizer, batch, data and the scale's gradient are ours, so the two
# figures are no race.
#
# Is it the rounding that was learnt, or is it just more training? The controls:

# %%
print(f"{'4 bit, rounded at the end':30} perplexity   removed   KLD to the teacher")
plain4 = runs["4 bit"]["plain"]["evaluation"]
print(f"{'plain':30} {plain4['perplexity']:10.3f} {'':9} {plain4['kl_divergence']:12.4f}")
removed = {}
for name in ("control, next-token loss", "control, distillation", "4 bit, next-token loss", "4 bit, scale without gradient", "4 bit"):
    found, removed[name] = runs[name]["trained"]["evaluation"], runs[name]["removed"]["evaluation"]
    print(f"{name:30} {found['perplexity']:10.3f} {removed[name]:9.1%} {found['kl_divergence']:12.4f}")
assert removed["control, next-token loss"] < 0 and abs(removed["control, distillation"]) < 0.1
assert removed["4 bit"] > removed["4 bit, scale without gradient"] + 0.05 > removed["4 bit, next-token loss"] + 0.05

# %% [markdown]
# The controls train without rounding and are rounded at the end. With the next-token loss it comes out *worse* than plain, probably because the
# model had finished its training and could only be moved about. With distillation next to nothing happens: the loss starts at zero.
#
# Under the rounding, both losses help, distillation more, above all in divergence. And the gradient of the scale pays. Each figure is one run.
#
# How did they get there? Remember the 64 weights.

# %%
picture, (left, right) = course.plots.figure(
    10, 3.6, columns=2, alt="At 4 bits perplexity falls at once by half of the damage, then hardly, and steeply at the end; so do the losses at 4, 3 and 2 bits."
)
colors = {"4 bit": "blue", "control, next-token loss": "orange", "3 bit": "green", "2 bit": "vermillion"}
colors = {name: course.plots.PALETTE[color] for name, color in colors.items()}
for name, marker in (("4 bit", "o-"), ("control, next-token loss", "s-")):
    points = [(p["step"], p["perplexity"]) for p in runs[name]["on_the_way"]]
    left.plot(*zip((0, plain4["perplexity"]), *points), marker, color=colors[name], label=name)
left.axhline(runs["4 bit"]["float"]["evaluation"]["perplexity"], color="black", linestyle="--", label="float")
left.set(title="rounded to 4 bits on the way", xlabel="step", ylabel="perplexity", ylim=(7.8, 8.7))
left.legend(fontsize=10, ncols=3, columnspacing=1)
for name in ("2 bit", "3 bit", "4 bit"):
    right.plot(*zip(*runs[name]["curve"]), color=colors[name], label=name, linewidth=1)
right.set(title="training loss", xlabel="step", ylabel="KL (nats a token)", yscale="log", ylim=(0.01, 3))
right.yaxis.set_major_formatter("{x:g}")
right.legend(fontsize=10, ncols=3)
picture

# %%
ends = runs["4 bit"]["on_the_way"]
damage = plain4["perplexity"] - runs["4 bit"]["float"]["evaluation"]["perplexity"]
for point in (ends[0], ends[-2], ends[-1]):
    print(f"step {point['step']:4}: {(plain4['perplexity'] - point['perplexity']) / damage:4.0%} removed")
assert ends[-2]["perplexity"] - ends[-1]["perplexity"] > 0.15 * damage
rise = {}
for name in ("4 bit", "3 bit", "2 bit"):
    losses = [loss for step, loss in runs[name]["curve"]]  # one in ten steps
    early, middle = min(losses[:20]), np.mean(losses[60:120])
    print(f"loss at {name}: {early:.3f} early on, {middle:.3f} in the middle, {losses[-1]:.3f} at the end")
    rise[name] = middle / early
assert rise["4 bit"] > 1.4 > rise["3 bit"] > 1.1 > 1 > rise["2 bit"]

# %% [markdown]
# The shape of the 64 weights: a quick gain, then a loss that *rises* while the learning rate is high (at 4 bits; less at 3, and not at 2), and
# at 4 bits most of what is left in the last tenth, when the weights come to rest. Who looks early sees little more than half of it.
#
# ## What to hold against it
#
# Two texts, two shares. Why do they differ?

# %%
print("share removed        by perplexity                by divergence")
for name in ("4 bit", "3 bit", "2 bit"):
    shares = []
    for text in ("evaluation", "standard library"):
        plain, trained = runs[name]["plain"][text]["kl_divergence"], runs[name]["trained"][text]["kl_divergence"]
        shares += [runs[name]["removed"][text], (plain - trained) / plain]
    print(f"{name:12} {shares[0]:13.0%} {shares[2]:10.0%} {shares[1]:17.0%} {shares[3]:10.0%}")
    assert abs(shares[1] - shares[3]) < 0.03 and min(shares[0], shares[2]) > max(shares[1], shares[3])
    assert name != "4 bit" or 0.65 < shares[1] < 0.75
assert runs["4 bit"]["removed"]["evaluation"] > runs["4 bit"]["removed"]["standard library"] + 0.1

# %% [markdown]
# By perplexity the first text gains far more than the second at 4 bits. By divergence from the teacher both give the same, and less: not quite three
# quarters. Perplexity can fall because a changed model happens to suit a text. Divergence counts every departure from the teacher, also a lucky one.
#
# Would a longer training, or another learning rate, close the gap? 5,000 steps, as many as Gemma 3 had, at four rates:

# %%
longer = results.read("qat_5000_steps")
print(f"{longer['date']}, {longer['gpu']}: 4 bit, 5,000 steps")
print("learning rate   removed   on the other text   KLD to the teacher")
for run in (*sorted(longer["runs"], key=lambda run: run["lr"]), runs["4 bit"]):
    shares, divergence = run["removed"], run["trained"]["evaluation"]["kl_divergence"]
    print(f"{run['lr']:13} {shares['evaluation']:9.1%} {shares['standard library']:19.1%} {divergence:20.4f}   {run['steps']} steps")
    assert shares["evaluation"] > 0.85 and 0.75 < shares["standard library"] < 0.85 and 0.016 < divergence < 0.022

# %% [markdown]
# No. A rate eight times as high removes nearly the same share, and so does a training of 3,000 steps. From run to run the share moves by six
# points on the first text, and by two on the second: the last digit of such a figure says little.
#
# - QAT needs tuning, data like the model's own, and for larger models GPUs. GPTQ, in the next lesson, needs a page of text and no training.
# - The student imitates its teacher, and becomes no better.
# - It is trained for one format. Another one is another training.
#
# ## What it writes
#
# The trained models ship with the package: codes, scales, and what is not quantized in bf16.

# %%
for bits in (2, 4):
    name = f"QAT {bits} bit"
    trained, _ = qlearn.load_model(qat.checkpoint(bits), progress=False)
    rows[name] = qlearn.evaluate.report(trained, tokenizer, reference, name=name)
    if bits == 2:
        two_bits = trained
rows["plain 4 bit"] = measure(model, "plain 4 bit", bits=4)
assert reference.perplexity < rows["QAT 4 bit"].perplexity < rows["plain 4 bit"].perplexity
assert rows["QAT 2 bit"].perplexity < rows["30 seconds, 2 bit"].perplexity
qlearn.evaluate.table(rows.values())

# %%
trained, plain = rows["QAT 2 bit"], rows["plain 4 bit"]
assert trained.perplexity < 1.01 * plain.perplexity
assert [round(row.kl_divergence, 2) for row in (trained, plain)] == [0.18, 0.06]
assert [round(100 * row.flip_rate) for row in (trained, plain)] == [19, 12]

# %% [markdown]
# By perplexity, 2 trained bits come within 1 % of 4 that were only rounded. By divergence they do not: 0.18 against 0.06, and 19 % of the first
# choices flip instead of 12 %. The beginning of a function, completed at 2 bits without and with training:

# %%
prompt = 'def add(a, b):\n    """Return the sum of a and b."""'
plain2 = qlearn.quantize_model(copy.deepcopy(model), "signed_absmax", bits=2, group_size=32, progress=False)
for name, writer in (("plain", plain2), ("QAT", two_bits)):
    text = qlearn.models.generate(writer, tokenizer, prompt, max_new_tokens=40)
    print(f"--- {name} ---\n{prompt}{text}\n")

# %% [markdown]
# Does Python accept what they write? 16 functions of the evaluation text, greedily continued by 64 tokens, by the unrounded model too:

# %%
headers = qlearn.evaluate.function_headers(count=16)
parsed = {}
for name, writer in (("plain 2 bit", plain2), ("QAT 2 bit", two_bits), ("unrounded", model)):
    parsed[name] = qlearn.evaluate.parse_rate(writer, tokenizer, headers, max_new_tokens=64)
    print(f"{name}: {parsed[name]:.0%} are valid Python")
assert parsed["QAT 2 bit"] > parsed["plain 2 bit"] + 0.2

# %% [markdown]
# Valid is not right: look at the function above once more.
#
# ## The board

# %%
course.board.add("unquantized", 16, math.log(reference.perplexity))
for name, row in rows.items():
    course.board.add(f"{name}, groups of 32", row.bits_per_weight, math.log(row.perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# A colleague's QAT lowers its loss, only more slowly than it should, so nobody worries. The forward pass is right: its values are those of
# `signed_absmax`, but for the rounding of d to float16. Here is the function, and what arrives at the latent weights in the first step.

# %%
def suspect(weight, bits=2):
    groups = weight.unflatten(-1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    d = largest / -(2 ** (bits - 1))
    codes = torch.floor(groups / d + 0.5).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * d).flatten(-2)


def gradients(rounding):
    """The gradients of all matrices, rounded by a function, for one batch."""
    learner = copy.deepcopy(model).requires_grad_(True)
    matrices = {f"{n}.weight": m.weight for n, m in learner.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    batch = ids[:512].view(4, 128)
    parameters = dict(learner.named_parameters()) | {n: rounding(w) for n, w in matrices.items()}
    logits = functional_call(learner, parameters, kwargs={"input_ids": batch}).logits
    qat.distillation_loss(logits, model(batch).logits).backward()
    return torch.cat([w.grad.flatten() for w in matrices.values()])


# %%
found = {"suspect": gradients(suspect), "fake_quantize": gradients(lambda w: fake_quantize(w, bits=2))}
picture, panels = course.plots.figure(9, 2.8, columns=2, alt="Gradients of all weights: the suspect's are zero but for a few, the package's hardly ever.")
for axes, (name, gradient) in zip(panels, found.items()):
    size = gradient.abs().clamp(min=1e-9).log10()
    axes.hist(size, bins=45, range=(-9, 0), color=course.plots.COLORS["error"], weights=torch.full_like(size, 100 / len(size)))
    axes.set(title=name, xlabel="gradient, log10 (−9: zero)")
panels[0].set_ylabel("% of the weights")
picture

# %% tags=["nbval-check-output"]
for name, gradient in found.items():
    print(f"{name}: {(gradient != 0).float().mean():.1%} of the weights get a gradient")
matrices = [m.weight.detach().requires_grad_() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
cut_off = torch.cat([torch.autograd.grad(fake_quantize(w, bits=2).sum(), w)[0].flatten() == 0 for w in matrices])
assert torch.equal(found["fake_quantize"] == 0, cut_off)
print(f"the {cut_off.float().mean():.1%} that fake_quantize leaves out are those that are cut off")

# %% [markdown]
# What share does the suspect reach, as a fraction, and who are they?
#
# <details><summary>The answer</summary>
#
# 3.1 % is 1/32: one weight in each group. `floor` is in the graph and its derivative is 0, so nothing comes back by way of the codes. But `codes * d`
# has a second factor, and d leads back to the largest weight of the group. Those, the norms and the embeddings learn, so the loss falls. 31 of 32
# weights never move.
#
# A `detach` is missing, or rather the whole straight-through estimator: `weight + (q - weight).detach()`. The opposite mistake,
# a loss that falls nicely and a file that is worse, you have met: an export in another rounding.
#
# </details>

# %% tags=["nbval-check-output"]
def mended(weight, bits=2):
    return weight + (suspect(weight, bits) - weight).detach()


tried = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
mended(tried).sum().backward()
assert (tried.grad == 1).all() and torch.allclose(mended(tried), fake_quantize(tried, bits=2), atol=1e-3)
print("all weights get a gradient, even those that are cut off: it still lacks the mask")

# %% [markdown]
# ## What you can now do
#
# - Send a gradient through rounding, with its mask, and check it against torch.
# - Say why weights oscillate in such a training, and why the gain comes when the learning rate falls.
# - Write the distillation loss, and say why it leaves nothing but the damage to learn.
# - Make sure that the exporter rounds as the training did, bit for bit.
# - Read a claim like "54 % removed": by which measure, on which text, against which control?
#
# Now write it yourself: [exercise 05](../exercises/05_qat.ipynb). In its last cells a layer learns with nothing but your own functions. Then
# lesson 06: GPTQ and AWQ, which do without any training. Back to [the map](00_start_here.ipynb).
