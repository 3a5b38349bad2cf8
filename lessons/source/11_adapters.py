# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 11 · Adapters: a small matrix that learns beside a large one
#
# **In 90 minutes** you will know LoRA and QLoRA: how a frozen matrix is changed by two thin ones beside it, what a training holds in
# memory, how much of a change a low rank can hold, and where adapters belong. You need lessons 02, 03, 05, 10.
#
# **The question.** Our model is quantized to 2 bits. Its weights Q stay; beside each matrix a small *adapter* is trained, until
# Q + adapter can do a new task. Then somebody adds it to the float weights W, of which Q was a poor copy. What is the loss of
# W + adapter, in percent of that of Q + adapter?

# %%
import copy
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from safetensors import safe_open

import qlearn
from qlearn import course
from qlearn.bench import results
from qlearn.evaluate.completions import complete
from qlearn.formats.codebooks import NF4
from qlearn.models.layers import linear_layers
from qlearn.models.linear import QuantLinear
from qlearn.training import finetune, lora_files, training_memory
from qlearn.training.adapters_task import pairs
from qlearn.training.loftq import loftq, low_rank
from qlearn.training.lora import LoraLinear, add_lora, count_parameters, lora_layers, remove_lora
from qlearn.training.merging import measure

course.predict("loss of W + adapter, in % of that of Q + adapter", low=0, high=300, key="adapters-merge")

# %% [markdown]
# ## A task that the model cannot do
#
# Our model has read much Python, but few sentences that say exactly what the next line does. These are put together from parts, and for each we
# count one answer as right, character by character:

# %% tags=["nbval-check-output"]
trained, held_out = pairs(2000), pairs(40, held_out=True)
for pair in trained[:3]:
    print(pair.prompt + pair.answer + "\n")
assert not {pair.combination for pair in trained} & {pair.combination for pair in held_out}

# %% [markdown]
# **Held out** are combinations of parts: each part occurs in training, these combinations never do. What does the model make of such a
# sentence? The **loss** is −log p, averaged over the tokens of the right answers; those of the sentence do not count.

# %%
model, tokenizer = qlearn.load_model()
for pair in held_out[:2]:
    written = qlearn.models.generate(model, tokenizer, pair.prompt, max_new_tokens=16)
    print(pair.prompt + written + "\n...\n")
untrained = finetune.held_out_loss(model, held_out, tokenizer)
print(f"loss of the right answers {untrained:.2f}")
assert untrained > 2.5

# %% [markdown]
# ## By hand: a change of rank 1
#
# To teach it, every weight would be moved a little: W becomes W + D, and D has as many numbers as W. **LoRA**, low-rank adaptation (2021), says
# that D need not be just any matrix. Let it be a column times a row, B A:

# %% tags=["nbval-check-output"]
W = torch.tensor([[3, 1, 0, -2], [0, 2, -1, 1], [1, 0, 4, 0], [-1, 2, 0, 3]])
A = torch.tensor([[2, 0, 1, -1]])  # r x in, here r = 1
B = torch.tensor([[1], [-1], [0], [2]])  # out x r
D = B @ A
assert D.tolist() == [[2, 0, 1, -1], [-2, 0, -1, 1], [0, 0, 0, 0], [4, 0, 2, -2]]
course.table(W=W, change=D, sum=W + D)

# %% [markdown]
# Nine numbers have changed, and eight say how; in a larger matrix the two are far apart. The price is that every row of D is a multiple of A, and every column a multiple of B. That is
# **rank 1**. With r rows in A and r columns in B, D is a sum of r such matrices, of rank r at most.
#
# D itself need never be made. W x and B (A x) are added, and A x is a single number here:

# %% tags=["nbval-check-output"]
x = torch.tensor([1, 0, 2, 1])
assert torch.equal(W @ x + B @ (A @ x), (W + D) @ x) and int((D != 0).sum()) == 9
parts = {"A x": A @ x, "W x": W @ x, "B (A x)": B @ (A @ x), "W x + B (A x)": W @ x + B @ (A @ x)}
for name, vector in parts.items():
    print(f"{name:14} {vector.tolist()}")

# %% [markdown]
# What does the pair cost, and what is that beside the matrix?

# %% tags=["nbval-check-output"]
for rows, columns, r in ((4, 4, 1), (256, 768, 16), (8192, 8192, 64)):
    thin, size = r * (rows + columns), rows * columns
    print(f"{rows:4} x {columns:4}: {size:10,} numbers; A and B, r = {r:2}: {thin:9,}, {thin / size:.1%}")

# %% [markdown]
# The larger the matrix, the cheaper. In our small model rank 16 is not so low.
#
# ## Why one of them starts at zero
#
# At first the adapter should change nothing, so B A has to be 0. Which of the two is zero, or both? Let a gradient g arrive at
# y = W x + B (A x). By the chain rule B gets g (A x)ᵀ, and A gets (Bᵀ g) xᵀ. Each one's gradient contains the other:

# %% tags=["nbval-check-output"]
g = torch.tensor([1, 2, 0, -1])
zero_A, zero_B = torch.zeros_like(A), torch.zeros_like(B)
starts = {"B is zero": (A, zero_B), "A is zero": (zero_A, B)}
starts |= {"both are": (zero_A, zero_B), "none is": (A, B)}
print(f"{'':11}gradient of B    gradient of A     change of y")
for name, (a, b) in starts.items():
    of_B, of_A, change = torch.outer(g, a @ x), torch.outer(b.T @ g, x), b @ (a @ x)
    print(f"{name:10} {of_B.flatten().tolist()!s:16} {of_A.flatten().tolist()!s:17} {change.tolist()}")
    assert (name == "both are") == (not of_B.any() and not of_A.any())

# %% [markdown]
# Two zeros never learn anything. With one zero, that one moves in the first step, and both from the second on. Either would do; LoRA draws A at
# random and sets B to zero.
#
# There is one more factor: y = W x + **(alpha / r)** B A x. With r twice as large, twice as many summands change y, and the factor is meant to make
# up for it. (In our trainings alpha is r, so it is 1.) Autograd agrees with the chain rule, for many tokens, whose gradients add up:

# %% tags=["nbval-check-output"]
generator = torch.Generator().manual_seed(0)
layer = LoraLinear(torch.nn.Linear(6, 5, bias=False), r=2, alpha=8)
assert not layer.B.any() and layer.A.any() and layer.scale == 8 / 2
layer.B.data = torch.randn(5, 2, generator=generator)
x, g = torch.randn(7, 6, generator=generator), torch.randn(7, 5, generator=generator)
(layer(x) * g).sum().backward()
torch.testing.assert_close(layer.B.grad, layer.scale * g.T @ (x @ layer.A.T))
torch.testing.assert_close(layer.A.grad, layer.scale * (g @ layer.B).T @ x)
print("the gradients of A and B are those of the formula; that of W:", layer.base.weight.grad)

# %% [markdown]
# ## The ladder
#
# First the definition, as a loop; then the change made as a matrix; then the two thin products; then the package's layer.

# %%
linear = model.model.layers[4].mlp.down_proj  # 768 -> 256
tokens = torch.randn(512, 768, generator=generator)
adapted = LoraLinear(copy.deepcopy(linear), r=16, alpha=16)
adapted.B.data = torch.randn(256, 16, generator=generator) / 16
W, A, B = linear.weight.detach(), adapted.A.detach(), adapted.B.detach()


def loop(x, outputs=4):
    """The first outputs of the first token."""
    dot = lambda row, vector: sum(w * v for w, v in zip(row, vector))
    token = x[0].tolist()
    Ax = [dot(row, token) for row in A.tolist()]
    return torch.tensor([[dot(W[i].tolist(), token) + dot(B[i].tolist(), Ax) for i in range(outputs)]])


# %%
def thick(x):
    return x @ (W + B @ A).T


def thin(x):
    return x @ W.T + x @ A.T @ B.T


found = {}
for name, function in (("loop", loop), ("thick", thick), ("thin", thin), ("package", adapted)):
    with torch.no_grad():
        function(tokens)
        began = time.perf_counter()
        found[name] = function(tokens)
    print(f"{name:8} {1e6 * (time.perf_counter() - began) / found[name].numel():9.3f} µs an output")
for result in found.values():
    expected = found["thick"][: len(result), : result.shape[1]]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)

# %% [markdown]
# All agree, up to the order of their sums. For 512 tokens at once thin or thick is no great matter; for a single one, making D would
# be most of the work. And in training the thick way makes D for each layer
# and each step, and needs a gradient of D's size.
#
# ## What a training holds
#
# For each parameter that learns there is a gradient, and AdamW keeps two numbers more, the means of the gradient and of its square. The QLoRA
# paper's example is a Llama of 65.2 billion parameters, trained in full with 16-bit weights and gradients and 32-bit states, or with adapters of
# rank 64, 0.8 billion parameters:

# %% tags=["nbval-check-output"]
adapters = {"learning": 0.8e9, "learning_bits": 16}
needs = {
    "full": training_memory.by_formula(65.2e9, bits=16),
    "LoRA": training_memory.by_formula(65.2e9, bits=16, **adapters),
    "QLoRA": training_memory.by_formula(65.2e9, bits=4.127, **adapters),  # codes and scales, see below
}
print("GB      weights gradients optimizer  together")
for name, memory in needs.items():
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.total)
    print(f"{name:5}" + "".join(f"{part / 1e9:10.1f}" for part in parts))
assert needs["full"].total == 65.2e9 * (2 + 2 + 8) and needs["QLoRA"].total < 48e9

# %% [markdown]
# With adapters gradients and states nearly vanish, and the frozen weights are what is left. So store *these* in few bits: that is **QLoRA**
# (2023), and it fits on one card of 48 GB. The codes get no gradient
# (lesson 05's way keeps floats beside them), and need none: it only has to pass *through*, to the layers before. (What the formula leaves out,
# **activations**, grows with the texts, and has to fit beside.)
#
# ## NF4
#
# QLoRA's codes are **NF4**, 4-bit NormalFloat: 16 values between −1 and 1, times the largest magnitude of 64 weights. They were chosen so that normally
# distributed weights would use each about equally often. In our model?

# %%
values = torch.tensor(NF4.values)
codes = qlearn.quantize(W, "nf4", bits=4, group_size=64).codes()
uses = torch.bincount(codes.flatten().long(), minlength=16)
alt = "The sixteen values of NF4, dense around zero, and how often each is used in one matrix."
picture, axes = course.plots.figure(8, 2.6, alt=alt)
axes.bar(values, 100 * uses / W.numel(), width=0.02, color=course.plots.COLORS["quantized"])
axes.set(xlabel="value (times the largest of the group)", ylabel="used (%)", xlim=(-1.05, 1.05))
assert uses.max() > 3 * uses.min()
picture

# %% [markdown]
# The outer ones are used less. Each group is divided by its largest weight, and of 64 normally distributed ones the largest lies far out, so few weights
# reach the outer values, whatever the model.
#
# A float32 scale for 64 weights is half a bit a weight. **Double quantization** takes the mean off all scales, and stores each in 8 bits, with one
# float32 step for 256 of them:

# %% tags=["nbval-check-output"]
plain = qlearn.quantize(W, "nf4", bits=4, group_size=64)
double = qlearn.quantize(W, "nf4", bits=4, group_size=64, double_quant=True)
assert plain.bits_per_weight == 4 + 32 / 64
one_mean = 32 / W.numel()
assert math.isclose(double.bits_per_weight, 4 + 8 / 64 + 32 / (64 * 256) + one_mean)
print(f"{plain.bits_per_weight} and {double.bits_per_weight:.4f} bits per weight")

# %% [markdown]
# Are those the best 4 bits? "Equally often" is not "least error". One matrix, its error in % of its size, and true bits:

# %%
errors = {}
for name, options in (("nf4", {"double_quant": True}), ("absmax", {}), ("zero_point", {}), ("sinq", {})):
    qt = qlearn.quantize(W, name, bits=4, group_size=64, **options)
    errors[name] = ((qt.dequantize() - W).norm() / W.norm()).item()
    print(f"{name:11} {qt.bits_per_weight:.3f} bits  {100 * errors[name]:.2f} %")
assert errors["absmax"] > 1.1 * errors["nf4"] and 0.95 < errors["zero_point"] / errors["nf4"] < 1.05

# %% [markdown]
# It takes the fewest bits, thanks to scales of 8 bits. With 16-bit scales, and a little more, lesson 03's zero-point and lesson 10's SINQ err as
# little.
#
# ## What the backward pass keeps
#
# A mistake is easily made by those who write such a layer. The gradient of its input is g W, so autograd keeps W from the forward pass to the backward
# pass. If the layer dequantizes its codes and multiplies, this W is a float matrix, and at the end of a forward pass the floats of *all* layers
# lie in memory. How many bytes does one layer leave behind?

# %% tags=["nbval-check-output"]
quantized = QuantLinear(double)
x = torch.randn(8, 40, 768, requires_grad=True)


def kept(function):
    """Bytes of the tensors that autograd keeps for the backward pass of function(x)."""
    sizes = {}
    remember = lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        function(x)
    return sum(sizes.values())


plainly = kept(lambda x: F.linear(x, quantized.quantized.dequantize()))
stored = sum(buffer.nbytes for buffer in quantized.buffers())
print(f"stored: {stored:,} bytes")
print(f"kept besides: {plainly:,} bytes by a plain product, {kept(quantized)} by the package's")
assert plainly == 4 * W.numel() and kept(quantized) == 0

# %% [markdown]
# The plain product keeps nearly eight times what is stored, the package's keeps nothing: it holds on to the codes, which are there anyway, and
# dequantizes a second time when the gradient arrives. The numbers are the same; it costs some time. (Our counter sees what is handed to autograd,
# and not what hangs on `ctx`. So look yourself:)

# %%
assert 7 < plainly / stored < 8
course.source_of(qlearn.models.product._Product)

# %% [markdown]
# ## Learning
#
# All linear layers in NF4, an adapter of rank 16 beside each:

# %%
student, _ = qlearn.load_model()
qlearn.quantize_model(student, "nf4", bits=4, group_size=64, double_quant=True, progress=False)
torch.manual_seed(0)
add_lora(student, r=16, alpha=16)
learning, every = count_parameters(student)
print(f"{learning:,} of {every:,} parameters learn: {learning / every:.1%}")
in_full = training_memory.by_formula(every - learning, bits=32)
for name, memory in (("QLoRA", training_memory.of_model(student)), ("full, in float32", in_full)):
    weights, everything = memory.weights / 1e6, memory.total / 1e6
    print(f"{name:17} weights {weights:5.1f} MB, with gradients and optimizer {everything:5.1f} MB")

# %% [markdown]
# And 40 steps of 8 pairs. The learning rate is 0.006, found by trying: six times the one that we shall take where all parameters
# learn. Adapters usually want a larger one.

# %%
alt = "The loss of each step of the training: it falls steeply, then slowly."
picture, axes = course.plots.figure(8, 3, alt=alt)
(line,) = axes.plot([], [], color=course.plots.COLORS["original"])
axes.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, 40), ylim=(0.05, 5), yscale="log")
axes.set_yticks([0.1, 0.3, 1, 3], [0.1, 0.3, 1, 3])
axes.minorticks_off()
shown, seen = display(picture, display_id=True), []


def watch(step, loss, student):
    seen.append(loss.item())
    if step % 10 == 9:
        line.set_data(range(len(seen)), seen)
        shown.update(picture)


codes_before = {name: layer.base.packed.clone() for name, layer in lora_layers(student).items()}
settings = finetune.Settings(steps=40, batch=8, lr=6e-3, seconds=60)  # a slow machine does fewer steps
curve = finetune.finetune(student, trained, tokenizer, settings, progress=False, watch=watch)

# %%
after = finetune.held_out_loss(student, held_out, tokenizer)
written = complete(student, tokenizer, [pair.prompt for pair in held_out], max_new_tokens=36)
right = np.mean([text == pair.answer for text, pair in zip(written, held_out)])
print(f"{len(curve)} steps: loss {after:.3f} instead of {untrained:.2f}, {right:.0%} of answers right\n")
by_verdict = sorted(zip(written, held_out), key=lambda both: both[0] != both[1].answer)  # right ones first
for text, pair in by_verdict[:2] + by_verdict[-2:]:
    verdict = "right" if text == pair.answer else f"wrong: {pair.answer.strip()}"
    print(f"{pair.prompt}{text}\n    {verdict}\n")
assert after < untrained / 2
codes_after = {name: layer.base.packed for name, layer in lora_layers(student).items()}
assert all(torch.equal(codes, codes_before[name]) for name, codes in codes_after.items())

# %% [markdown]
# Not one code has moved. The model has learnt the form of the answers, and some are right to the last character.
#
# ## Drag it: how low is the rank of a change?
#
# LoRA assumes that the change of a fine-tuning is nearly of low rank. How is that measured? The **singular value decomposition** writes a matrix
# as a sum of matrices of rank 1, at right angles to each other (the products of their entries add up to 0), the
# largest first; the first r are the best matrix of rank r. Their sizes are the **singular values**. For the change by hand, and for the same with a 3
# where row and column had nothing but 0:

# %% tags=["nbval-check-output"]
disturbed = D.clone()
disturbed[2, 1] = 3
for matrix in (D, disturbed):
    sizes = torch.linalg.svdvals(matrix.double())
    first = sizes[0] ** 2 / (sizes**2).sum()
    print("sizes", [abs(round(v, 6)) for v in sizes.tolist()], f"  the first keeps {first:.0%}")
assert torch.allclose(sizes, torch.tensor([6.0, 3, 0, 0]).double(), atol=1e-6)

# %% [markdown]
# (The share is of the squared size: 36 of 36 + 9.)
#
# Now *all* parameters learn our task, for 10 steps. Beside the change that this makes stand the error of 2 bits, and
# normal random numbers of the same shape. Before you drag the rank: what share of each does 16 keep?

# %%
whole, _ = qlearn.load_model()
whole.requires_grad_(True)
finetune.finetune(whole, trained, tokenizer, steps=10, batch=8, lr=1e-3, warmup=3, progress=False)
changes = {}
for name in ("layers.0.self_attn.q_proj", "layers.4.mlp.down_proj"):
    old = model.model.get_submodule(name).weight.detach()
    rounded = qlearn.quantize(old, "sinq", bits=2, group_size=64).dequantize()
    changes[f"training, {name}"] = whole.model.get_submodule(name).weight.detach() - old
    changes[f"2-bit error, {name}"] = old - rounded
    changes[f"random numbers, {name}"] = torch.randn(old.shape, generator=generator)
explorer = course.widgets.rank_explorer(changes)
explorer

# %%
RANKS, names = (1, 4, 16, 64), list(changes)
share = {name: {r: explorer.kept(name, r) for r in RANKS} for name in names}
print(f"{'share that a rank keeps':42}" + "".join(f"{r:7}" for r in RANKS) + "   size of A, B at 16")
for name, of in share.items():
    numbers = explorer.numbers(name, 16)[1]
    print(f"{name:42}" + "".join(f"{kept_by:7.0%}" for kept_by in of.values()) + f"{numbers:21.0%}")

# %% [markdown]
# **What you should have seen.** The change that training makes leans to a few directions, far more so than a rounding error, which is little
# better than random numbers. But it is *not* of low rank: at 16 a good part of `down_proj`'s change is left out. Is that part needed? Let us cut
# *all* changes to rank 16:

# %%
for name in ("layers.0.self_attn.q_proj", "layers.4.mlp.down_proj"):
    learnt, lost = (share[f"{kind}, {name}"][16] for kind in ("training", "2-bit error"))
    print(f"{name}: rank 16 leaves {1 - learnt:.0%} of the training's change, {1 - lost:.0%} of the error")
    assert learnt > 2 * lost
assert learnt < 0.75

# %%
cut, few = copy.deepcopy(whole), held_out[:20]
with torch.no_grad():
    for name, layer in linear_layers(cut).items():
        old = model.get_submodule(name).weight
        A, B = low_rank(layer.weight - old, r=16)
        layer.weight.copy_(old + B @ A)
losses = {
    name: finetune.held_out_loss(each, few, tokenizer)
    for name, each in (("untrained", model), ("all parameters trained", whole), ("cut to rank 16", cut))
}
for name, loss in losses.items():
    print(f"{name:23} loss {loss:.3f}")
assert losses["cut to rank 16"] - losses["all parameters trained"] < 0.1 * losses["untrained"]

# %% [markdown]
# The part that was left out was hardly needed. "The change of fine-tuning has low rank" and "a change of low rank can do what fine-tuning does" are
# two claims. LoRA needs only the second.
#
# ## Two bits, and a better start
#
# At 2 bits, here by SINQ of lesson 10, which scales rows and columns both, the model is a wreck, and the adapters would have to mend it first.
# **LoftQ** (2023) looks for codes and thin matrices that are W *together*, improving one at a time: Q ← quantize(W − B A), then
# B A ← the best matrix of rank r for W − Q.

# %%
matrix = model.model.layers[4].self_attn.q_proj.weight.detach()


def two_bit(w):
    return qlearn.quantize(w, "sinq", bits=2, group_size=64)


def relative(difference):
    return (difference.norm() / matrix.norm()).item()


change, left = torch.zeros_like(matrix), [relative(matrix - two_bit(matrix).dequantize())]
for _ in range(5):
    Q = two_bit(matrix - change).dequantize()
    A, B = low_rank(matrix - Q, r=16)
    change = B @ A
    left.append(relative(matrix - Q - change))
residuals = loftq(matrix, two_bit, r=16, iterations=5)[3]
np.testing.assert_allclose(left, residuals, rtol=1e-4)
percent = [round(100 * residual, 1) for residual in residuals]
print("left, in % of W, before and after each iteration:", percent)

# %% [markdown]
# The second step can only help. The first need not: a method sets its scales by rules of its own, so what is left may grow again, and the best
# pair is kept. Most of the gain comes at once, and much is left, for a rounding error is nearly noise. (Shares of the size, this time, not of its square.)
#
# How much is left, against the rank, with codes of 2, 3 and 4 bits?

# %%
alt = "What LoftQ leaves of a matrix against the rank: it falls slowly; one bit does more than rank 64."
picture, axes = course.plots.figure(7, 3, alt=alt)
leftover = {}
for bits, color in ((2, "error"), (3, "original"), (4, "other")):
    rounded = lambda w, bits=bits: qlearn.quantize(w, "sinq", bits=bits, group_size=64)
    leftover[bits] = {0: loftq(matrix, rounded, r=1, iterations=1)[3][0]}
    leftover[bits] |= {r: min(loftq(matrix, rounded, r, iterations=2)[3]) for r in (4, 16, 64)}
    percent = [100 * share for share in leftover[bits].values()]
    axes.plot(range(4), percent, "o-", color=course.plots.COLORS[color], label=f"{bits} bits")
axes.set(xlabel="rank", ylabel="left (% of W)", xticks=range(4), xticklabels=leftover[2], ylim=(0, None))
axes.legend()
picture

# %%
for bits, of in leftover.items():
    print(f"{bits} bits:", "   ".join(f"r = {r:2} {share:6.1%}" for r, share in of.items()))
rows, columns = matrix.shape
bits = 32 * 64 * (rows + columns) / (rows * columns)
print(f"A and B of rank 64, in float32: {bits:g} bits per weight")
assert leftover[2][64] > leftover[3][0] and leftover[2][16] < 0.9 * leftover[2][0]

# %% [markdown]
# One more bit leaves less than a rank of 64, which takes 16 bits. To *store* a matrix an adapter is a bad bargain. As the start of something
# that has to be there anyway, it costs no storage more.
#
# ## The trap
#
# Now for the question. All layers in 2 bits, by SINQ, adapters beside them, without LoftQ:

# %%
two_bits, _ = qlearn.load_model()
qlearn.quantize_model(two_bits, "sinq", bits=2, group_size=64, progress=False)
torch.manual_seed(0)
add_lora(two_bits, r=16, alpha=16)
before = finetune.held_out_loss(two_bits, held_out, tokenizer)
finetune.finetune(two_bits, trained, tokenizer, steps=30, batch=8, lr=6e-3, progress=False)
after = finetune.held_out_loss(two_bits, held_out, tokenizer)
print(f"loss {before:.2f} before, {after:.3f} after 30 steps")

# %% [markdown]
# To **merge** is to add the change to a matrix, so that a plain model is left, with nothing to compute beside it. Q + B A are the numbers that
# were trained, but as floats. W + B A is what the question was about.
#
# And who wants few bits again has to round one of the two sums. Which would you round?

# %%
batch = finetune.collate(finetune.encode(held_out, tokenizer))
ways = {way.name: way for way in measure(two_bits, model, [batch], "sinq", bits=2, group_size=64)}
print(f"{'':18}   loss   another first choice   KL divergence     MB")
for name, way in ways.items():
    differs = f"{way.flip_rate:22.0%} {way.kl_divergence:15.2g}"
    print(f"{name:18} {way.loss:6.3f} {differs} {way.nbytes / 1e6:6.1f}")

# %%
loss = {name: way.loss for name, way in ways.items()}
assert math.isclose(loss["Q + BA"], loss["adapters"], rel_tol=1e-4)
assert loss["W + BA"] > 1.2 * loss["Q + BA"]
assert loss["quantize(Q + BA)"] > 2 * loss["quantize(W + BA)"] and loss["quantize(Q + BA)"] > untrained
course.reveal("adapters-merge", 100 * loss["W + BA"] / loss["Q + BA"], unit="%")

# %% [markdown]
# **Right is Q + B A**, the trained numbers up to their last bits. W has no errors, but the adapter was trained beside those of Q and has learnt to
# live with what they do to the outputs; where they are missing, its remedy is an error. Better weights, worse model.
#
# Rounded again, the right sum is a disaster: far worse than the float model before any training, little better than Q was. And the *wrong* sum
# survives! Why? Ten weights, rounded to
# whole numbers, and a change of 0.1 for all of them, which is 1 in total:

# %% tags=["nbval-check-output"]
w = torch.arange(10) / 10 + 0.05
q = w.round()
course.table(**{"w": w, "q": q, "q + 0.1, rounded": (q + 0.1).round(), "w + 0.1, rounded": (w + 0.1).round()})

# %% tags=["nbval-check-output"]
arrived = [int(((start + 0.1).round() - q).sum()) for start in (q, w)]
print("of a change of 1 arrive", arrived[0], "on q and", arrived[1], "on w")
assert arrived == [0, 1]

# %% [markdown]
# q lies on the grid already, so a small change rounds back to where it was. w lies anywhere, and one in ten weights is near enough to an edge to
# be pushed over it, by a whole step: on average, just the change. In the model, with R for what the rounding makes of a sum, what share of
# D = B A has arrived, Σ (R − Q) D / Σ D²? `measure` has found it; and how many codes are others than those of Q, in every fifth layer?

# %%
layers = list(lora_layers(two_bits).items())[::5]
for start in ("Q", "W"):
    moved = []
    for name, layer in layers:
        floats = model.get_submodule(name).weight.detach()
        summed = layer.change() + (layer.base.quantized.dequantize() if start == "Q" else floats)
        moved.append((two_bit(summed).codes() != layer.base.quantized.codes()).float().mean().item())
    way = ways[f"quantize({start} + BA)"]
    print(f"{way.name}: {way.arrived:4.0%} of D arrived, {np.mean(moved):5.1%} of the codes are others")
    assert way.arrived < 0.3 if start == "Q" else 0.8 < way.arrived < 1.2

# %% [markdown]
# So quantize(Q + B A) is nearly Q again, only its scales have moved a little: what was learnt is gone. And quantize(W + B A) makes most of Q's
# errors once more, and lets the change through. Its loss shows that it is not Q + B A, though.
#
# Do not make a rule of it. After LoftQ, B A holds a piece of W − Q from the start, and W lacks nothing. The only sum that is always right is the one
# that was trained.
#
# ## The file
#
# An adapter's file holds of its base only a name: you may well put it on the wrong one. The format is that of the package `peft`:

# %%
with tempfile.TemporaryDirectory() as folder:
    lora_files.save_adapters(student, folder, base="the model in NF4")
    config = json.loads((Path(folder) / lora_files.CONFIG).read_text())
    with safe_open(Path(folder) / lora_files.WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
print({name: config[name] for name in ("peft_type", "r", "lora_alpha", "base_model_name_or_path")})
print(f"{sum(t.nbytes for t in tensors.values()) / 1e6:.2f} MB in {len(tensors)} tensors; the first is")
print(next(iter(tensors)))

# %%
name = "model.layers.4.mlp.down_proj"
A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
layer, x = student.get_submodule(name), torch.randn(3, 768, generator=generator)
with torch.no_grad():
    from_file = config["lora_alpha"] / config["r"] * x @ A.T @ B.T
    torch.testing.assert_close(layer(x) - layer.base(x), from_file, rtol=1e-3, atol=1e-4)

# %% [markdown]
# So the file holds what the layer adds. (The tests of this course load such a folder with `peft` itself, on the float model, and compare the logits.)
#
# ## On a GPU: every way, three ranks
#
# The same task on an H200: 100 steps of 32 pairs out of 20,000. Each way has three learning rates; one was chosen by the loss on 500 held-out pairs
# and measured on 500 others. Full training is in float32; frozen weights are in bfloat16, or quantized, and adapters in float32. How many parameters
# have to learn, and in how many bits may the others be stored?

# %%
record = results.read("adapters")
print(f"{record['date']} · {record['gpu']} · {record['command']}")
print("                       millions   MB of base   loss      loss   exact")
print("                       that learn and adapters before    after  answers")
runs = {run["name"]: run for run in record["runs"]}
for name, run in runs.items():
    sizes = f"{run['parameters'][0] / 1e6:10.2f} {run['memory']['weights'] / 1e6:12.1f}"
    print(f"{name:20} {sizes} {run['before']['loss']:8.2f} {run['after']['loss']:8.4f} {run['after']['exact']:7.1%}")

# %%
FAMILIES = {"LoRA": "original", "QLoRA, nf4": "other", "QLoRA, 2 bit": "error", "LoftQ, 2 bit": "error"}
alt = "Loss against the number of parameters that learn: LoRA and NF4 together, 2 bits above; LoftQ comes down to them."
picture, axes = course.plots.figure(7, 3.4, alt=alt)
losses = {family: [runs[f"{family}, r {r}"]["after"]["loss"] for r in (4, 16, 64)] for family in FAMILIES}
learn = [runs[f"LoRA, r {r}"]["parameters"][0] for r in (4, 16, 64)]
for family, color in FAMILIES.items():
    style = "o--" if "LoftQ" in family else "o-"
    axes.plot(learn, losses[family], style, color=course.plots.COLORS[color], label=family)
full = runs["full"]["after"]["loss"]
every = runs["full"]["parameters"][0]
axes.plot([every], [full], "s", color=course.plots.COLORS["marker"], label="all parameters")
axes.set(xlabel="parameters that learn (millions)", ylabel="loss (nats a token)", xscale="log", ylim=(0, None))
axes.set_xticks([*learn, every], [f"{n / 1e6:.2f}" for n in [*learn, every]])
axes.minorticks_off()
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
picture

# %%
lora, four, two, better = (np.array(losses[family]) for family in FAMILIES)
assert full < 0.5 * lora.min() and (abs(four / lora - 1) < 0.3).all() and (two > 1.5 * lora).all() and two[2] > two[1]
for label, share in (("NF4, times LoRA's loss", four / lora), ("2 bits, times LoRA's loss", two / lora),
                     ("LoftQ's share of the way back", (two - better) / (two - lora))):  # fmt: skip
    print(f"{label:30}" + "".join(f"   r {r:2}: {each:4.2f}" for r, each in zip((4, 16, 64), share)))

# %% [markdown]
# Training all parameters gives the lowest loss. LoRA gets nine answers in ten exactly right with 2 % of the numbers. NF4 beneath it is a little better
# once and a little worse twice; with one run each we call that level. At 2 bits the loss is about twice as high, and rank 64 no better than 16.
# LoftQ's start takes back a quarter of the distance to LoRA at rank 4, and nearly all at 64.
#
# And what the model could do before? The perplexity on plain Python was below 8:

# %%
print(f"untrained: perplexity {record['untrained']['perplexity']:.2f}")
print("perplexity (and loss of the task) after training with a low, middle and high rate; * is the one chosen")
for name, run in runs.items():
    print(f"{name:20}", end="")
    for row in run["rates"]:
        chosen = "*" if row["lr"] == run["lr"] else " "
        print(f"{row['perplexity']:10.0f} ({row['loss']:.4f}){chosen}", end="")
    print()
    forgotten = [row["perplexity"] for row in run["rates"]]
    assert forgotten[1] > 1.7 * forgotten[0] and forgotten[2] > 4 * forgotten[1]
    if "2 bit" not in name:
        assert 25 < forgotten[0] < 30
print("rates: 0.003, 0.006 and 0.012 with adapters, 0.0005, 0.001 and 0.002 where all learn")

# %% [markdown]
# What was **forgotten** depends mostly on the learning rate; that few parameters learn does not prevent it. (At 2 bits much was broken before.) The
# rate was chosen by the task alone, mostly the largest, so a larger one still might have won. For LoftQ of rank 16 two rates have
# the same loss; one leaves a perplexity of 708, the other, chosen, 9,582. Judge a fine-tuning by what else you want of the model, too.
#
# And the trap, in all its forms, on 256 of the pairs:

# %%
names = ("adapters", "Q + BA", "W + BA", "quantize(Q + BA)", "quantize(W + BA)")
print(f"{'loss':22}", *(f"{name:>{len(name) + 2}}" for name in names), "  D arrived: on Q, on W")
merged = {}
for family in ("QLoRA, nf4", "QLoRA, 2 bit", "LoftQ, 2 bit"):
    for r in (4, 16, 64):
        ways = {way["name"]: way for way in runs[f"{family}, r {r}"]["merging"]}
        merged[family, r] = {name: way["loss"] for name, way in ways.items()}
        arrived = [ways[f"quantize({start} + BA)"]["arrived"] for start in "QW"]
        row = [f"{merged[family, r][name]:{len(name) + 2}.3f}" for name in names]
        print(f"{family + f', r {r}':22}", *row, *(f"{share:6.0%}" for share in arrived))

# %%
for (family, r), of in merged.items():
    assert math.isclose(of["Q + BA"], of["adapters"], rel_tol=1e-3)
    if family == "QLoRA, nf4":
        assert max(of.values()) < 1.4 * of["adapters"]
    else:
        assert min(of[name] for name in names[2:]) > 5 * of["adapters"]
    if family == "LoftQ, 2 bit":
        assert of["quantize(W + BA)"] > 2 * of["quantize(Q + BA)"] and of["W + BA"] < of["quantize(Q + BA)"]
    if (family, r) in (("QLoRA, 2 bit", 4), ("QLoRA, 2 bit", 64)):
        assert (of["quantize(W + BA)"] > of["quantize(Q + BA)"]) == (r == 4)
    arrived = {way["name"]: way["arrived"] for way in runs[f"{family}, r {r}"]["merging"]}
    assert arrived["quantize(Q + BA)"] > 0.35

# %% [markdown]
# In NF4 a wrong sum adds at most two fifths to the loss, at 2 bits it multiplies it by more than five. Of the two that are rounded again neither is
# always the worse. After LoftQ it is W's by far: B A and W both hold a piece of W − Q, and more than all of D arrives. (Not the whole story:
# unrounded, W + B A holds it twice as well, and is better.)
#
# Last, the memory, with activations: a step of a Llama of a billion random parameters on 4 texts of 1,024 tokens. **Gradient checkpointing** keeps
# only what goes from layer to layer, and computes the rest again in the backward pass.

# %%
print(f"{'':18} checkpointing  by formula  at the peak  seconds a step")
peaks = {}
for row in record["memory"]["billion"]:
    assert row["formula"] == row["held"]  # to the byte: what we counted is what was there
    formula, peak = sum(row["formula"].values()) / 2**30, row["peak"] / 2**30
    again, peaks[row["job"], row["checkpointing"]] = "yes" if row["checkpointing"] else "no", peak
    print(f"{row['job']:18} {again:>13} {formula:7.2f} GiB {peak:8.2f} GiB {row['seconds']:14.3f}")
assert peaks["QLoRA, nf4, r 16", False] > 0.85 * peaks["LoRA, r 16", False] > 0.85 * 5 * 2.11
assert peaks["QLoRA, nf4, r 16", True] < 0.7 * peaks["LoRA, r 16", True] < 0.3 * peaks["full", True]

# %% [markdown]
# The formula is met to the byte, and yet it is not the peak. Without checkpointing, with adapters, four fifths of the peak or more is not in it, so 4-bit
# weights save little. With it, LoRA needs a fifth of what full training does, and NF4 two thirds of that, for twice the time; 2 bits save little more.
#
# ## The board
#
# The board has the loss on plain Python. What did the task cost there? The fine-tuned model, and the same with its adapters taken off:

# %%
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
weights = sum(layer.in_features * layer.out_features for layer in lora_layers(student).values())
tuned = qlearn.evaluate.report(student, tokenizer, reference, name="NF4, adapters, fine-tuned")
plain = qlearn.evaluate.report(remove_lora(student), tokenizer, reference, name="NF4, adapters taken off")
assert tuned.perplexity > 1.2 * plain.perplexity > 1.2 * reference.perplexity
print(f"unquantized: perplexity {reference.perplexity:.3f}")
print(f"bits per weight with adapters in float32: {plain.bits_per_weight + 32 * learning / weights:.2f}")
qlearn.evaluate.table([tuned, plain])

# %% [markdown]
# For its new task the model has given up much of its Python: that few numbers learn does not keep it from forgetting. But take the adapters
# off, and it is what it was. The next task can have adapters of its own.
#
# The column bits/weight counts codes and scales alone; MB has the adapters in it, at 16 bits. In a small model they are no trifle. On the board goes
# the model without them, as its figures are for plain Python.

# %%
course.board.add("unquantized", 16, math.log(reference.perplexity))
name = "NF4, double quantization, groups of 64"
course.board.add(name, plain.bits_per_weight, math.log(plain.perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# A colleague's LoRA learns, but far too slowly. The forward pass is right, B starts at zero, and as the base is frozen, memory is saved
# there: it needs no gradient. Here is the layer, and what arrives at B in the first step, by the kind of layer.

# %%
class Suspect(LoraLinear):
    def forward(self, x):
        with torch.no_grad():  # the base does not learn
            y = self.base(x)
        return y + F.linear(F.linear(x, self.A), self.B) * self.scale


def first_gradients(kind):
    """Norm of B's gradient, by kind of layer: dict name -> list, one for each block."""
    torch.manual_seed(0)
    learner, found = add_lora(copy.deepcopy(model), r=4), {}
    for layer in lora_layers(learner).values():
        layer.__class__ = kind  # the same parameters, another forward
    finetune.answer_loss(learner, *finetune.collate(finetune.encode(trained[:8], tokenizer))).backward()
    for name, layer in lora_layers(learner).items():
        norm = 0.0 if layer.B.grad is None else layer.B.grad.norm().item()
        found.setdefault(name.rpartition(".")[2], []).append(norm)
    return found


# %%
gradients = {kind.__name__: first_gradients(kind) for kind in (Suspect, LoraLinear)}
alt = "Gradients by kind of layer: the suspect's are zero but for o_proj and down_proj, the other's never."
picture, panels = course.plots.figure(10, 3, columns=2, alt=alt, sharey=True)
for axes, (name, by_kind) in zip(panels, gradients.items()):
    labels = [kind.removesuffix("_proj") for kind in by_kind]
    means = [np.mean(norms) for norms in by_kind.values()]
    axes.bar(range(len(means)), means, color=course.plots.COLORS["error"])
    axes.set(title=name, xticks=range(len(means)), xticklabels=labels)
panels[0].set_ylabel("gradient of B, mean norm")
picture

# %% tags=["nbval-check-output"]
silent = {}
for name, by_kind in gradients.items():
    silent[name] = [kind for kind, norms in by_kind.items() if not any(norms)]
    print(f"{name:10} no gradient in any block: {silent[name]}")
assert not silent["LoraLinear"] and not {"o_proj", "down_proj"} & set(silent["Suspect"])

# %% [markdown]
# Which two kinds do get one, and what lies behind the other five?
#
# <details><summary>The answer</summary>
#
# `o_proj` and `down_proj` add their outputs to the residual stream, which runs through all blocks: a gradient reaches them without passing another
# layer of this kind, though only on that way, hence their smaller bars. Between q, k, v and the loss stands `o_proj`, between gate, up and the loss
# `down_proj`, and nothing gets through those: under `no_grad`, y is a constant in x as well
# as in W. To freeze W, take `requires_grad_(False)`.
#
# After one step B is no longer zero, and a little comes through the adapters. So the loss falls.
#
# </details>

# %% tags=["nbval-check-output"]
x = torch.randn(2, 768, generator=generator).requires_grad_()
for kind in (Suspect, LoraLinear):
    (through,) = torch.autograd.grad(kind(copy.deepcopy(linear), r=4)(x).sum(), x)
    print(f"{kind.__name__:10} lets a gradient through at the start: {bool(through.any())}")

# %% [markdown]
# ## What you can now do
#
# - Put an adapter beside a matrix, say what A and B feel in the first step, and why one of them starts at zero.
# - Count what a training holds, and see what adapters save, what few bits save, and what neither does.
# - Ask of a change how much of it a rank can hold, and keep two claims about low rank apart.
# - Start an adapter with what rounding lost.
# - Merge on the weights that were trained, and say what becomes of a small change that is rounded again.
#
# Now write it yourself: [exercise 11](../exercises/11_adapters.ipynb). In its last cells your own adapter mends a layer of 2 bits. Back to
# [the map](00_start_here.ipynb).
