# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 03 · Zero-point: the exercise
#
# Four functions, about 45 minutes: the grid, the codes on it, a matrix product of codes, and where the grid should end. The lesson is
# [03 · Zero-point](../lessons/03_zero_point.ipynb). In the last cell your four functions carry a layer of the bundled model.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("zero_point.parameters")` helps.

# %%
import torch

import qlearn
from qlearn import course

x = torch.tensor([-0.37, 0.0, 0.22, 0.58, 0.79, 1.03])  # the six numbers of the lesson

# %% [markdown] qlearn={"card": "zero_point.parameters"}
# A grid for the numbers in `x`: `2**bits` rulings, evenly spaced, and one of them exactly on 0. It reaches from the smallest number to
# the largest one, and it is widened to reach 0 where it does not. Where −low / scale is no whole number, round it: the whole grid moves
# by a part of a step.


# %% qlearn={"answer": "zero_point.parameters"}
def parameters(x, bits):
    """The grid that covers a tensor.

    x: float32 tensor of any shape.  bits: 2 to 8.
    Returns (scale, zero): the distance between two rulings, a Python float, and the code of the number 0, a Python int.
    A tensor of zeros gets scale 1.0 and zero 0.

    parameters(torch.tensor([0.0, 0.5, 1.0, 1.5]), bits=2) == (0.5, 0)
    """
    ### BEGIN SOLUTION
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        scale = 1.0
    return scale, round(-low / scale)
    ### END SOLUTION


# %% qlearn={"check": "zero_point.parameters"}
course.check("zero_point.parameters", parameters)

# %% [markdown]
# Your grid at 3 bits, for the six numbers and for three that are far from 0. Every number should have a ruling within half a step,
# and one ruling should stand on 0.

# %% qlearn={"show": true}
picture, axes = course.plots.figure(8, 3.2, alt="Numbers and the rulings of the grid made for them, twice.", rows=2)
for axis, numbers in zip(axes, (x, torch.tensor([10.0, 11.0, 12.0])), strict=True):
    scale, zero = parameters(numbers, bits=3)
    axis.vlines((torch.arange(8) - zero) * scale, 0, 1, color=course.plots.COLORS["quantized"], label="rulings")
    axis.plot(numbers, torch.full(numbers.shape, 0.5), "o", color=course.plots.COLORS["original"], label="numbers")
    axis.axvline(0, color=course.plots.COLORS["marker"], linestyle=":", label="0")
    axis.set(yticks=[], title=f"scale {scale:.3g}, zero {zero}")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
picture

# %% [markdown] qlearn={"card": "zero_point.quantize"}
# Now the codes. Four operations, **round, add the zero, clamp, cast**, and only one order is right. What lies outside the grid
# has to end at the nearest end of it: that is called saturating.


# %% qlearn={"answer": "zero_point.quantize"}
def quantize(x, scale, zero, bits):
    """The code of each number on a grid that is given.

    x: float tensor of any shape.  scale: float.  zero: int, the code of 0.  bits: 2 to 8.
    Returns the codes, uint8, shaped as x, each 0 to 2**bits - 1. Halfway between two rulings, x / scale goes to the even integer.

    quantize(torch.tensor([-1.0, 0.0, 0.7, 9.0]), scale=0.5, zero=1, bits=3)  is  [0, 1, 2, 7]
    """
    ### BEGIN SOLUTION
    codes = torch.round(x / scale) + zero
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)
    ### END SOLUTION


# %% qlearn={"check": "zero_point.quantize"}
course.check("zero_point.quantize", quantize)

# %% [markdown]
# What comes back, for every number that might go in. It should be a staircase that is flat at both ends. A sawtooth means that a cast
# came too early.

# %% qlearn={"show": true}
scale, zero = parameters(torch.tensor([-1.0, 3.0]), bits=8)
numbers = torch.linspace(-4, 8, 1201)
back = (quantize(numbers, scale, zero, bits=8).float() - zero) * scale

picture, axes = course.plots.figure(8, 3, alt="What comes back against what went in: a line, flat beyond both ends of the grid.")
axes.plot(numbers, back, color=course.plots.COLORS["quantized"])
axes.axvspan(-1, 3, color=course.plots.COLORS["faint"], alpha=0.15, label="the grid, −1 to 3")
axes.set(xlabel="number that goes in", ylabel="number that comes back")
axes.legend()
picture

# %% [markdown] qlearn={"card": "zero_point.integer_matmul"}
# The machine has multiplied the codes as they are, because that is what it is fast at: `product[i, j]` is the sum of
# `qx[i, t] * qw[j, t]` over `t`. What is wanted is the same sum of `(qx[i, t] - zx) * (qw[j, t] - zw[j])`. Multiply it out on paper.
# You get four terms, and everything they need is among the arguments. Use integers only: the result is exact.


# %% qlearn={"answer": "zero_point.integer_matmul"}
def integer_matmul(product, x_sums, w_sums, zx, zw, k):
    """Take the zeros out of a matrix product of codes.

    product: int32 (m, n), the product of the codes.  k: int, how many products are in each sum.
    x_sums: int32 (m,), the sum of the codes of each input.  w_sums: int32 (n,), the sum of the codes of each row of weights.
    zx: int, the zero of the inputs.  zw: int32 (n,), the zero of each row of weights.
    Returns int32 (m, n).
    """
    ### BEGIN SOLUTION
    return product - zx * w_sums - x_sums[:, None] * zw + k * zx * zw
    ### END SOLUTION


# %% qlearn={"check": "zero_point.integer_matmul"}
course.check("zero_point.integer_matmul", integer_matmul)

# %% [markdown]
# Your correction on random codes, against the sum itself in 64 bits. A right one makes this table all zeros; in a wrong one look for
# what the errors of a row, or of a column, have in common.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
qx, qw = (torch.randint(0, 256, (rows, 40), generator=generator).int() for rows in (3, 5))
zx, zw = 100, torch.tensor([120, 128, 130, 127, 90]).int()

expected = (qx.long() - zx) @ (qw.long() - zw[:, None]).T
got = integer_matmul(qx @ qw.T, qx.sum(1).int(), qw.sum(1).int(), zx, zw, 40)
course.table(expected=expected, difference=got - expected)

# %% [markdown] qlearn={"card": "zero_point.best_clip"}
# A grid need not reach the largest number. Shrink the interval, and those outside are clipped, while all others get a
# finer ruler. Find the fraction of the interval, among 1.00, 0.99 … 0.01, that makes the sum of squared errors least, over all
# numbers and against x itself.
#
# When an interval shrinks by a factor, its scale shrinks by the same one, and its zero stays what it was.


# %% qlearn={"answer": "zero_point.best_clip"}
def best_clip(x, bits):
    """The fraction of the interval with the least squared error.

    x: float32 tensor of any shape.  bits: 2 to 8.
    Returns one of 1.0, 0.99 ... 0.01, a Python float; of fractions that are equally good, the largest.
    You may call your `parameters` and `quantize`.
    """
    ### BEGIN SOLUTION
    scale, zero = parameters(x, bits)
    best, least = None, float("inf")
    for percent in range(100, 0, -1):
        step = scale * percent / 100
        codes = quantize(x, step, zero, bits)
        error = ((codes.float() - zero) * step - x).square().sum().item()
        if error < least:
            best, least = percent / 100, error
    return best
    ### END SOLUTION


# %% qlearn={"check": "zero_point.best_clip"}
course.check("zero_point.best_clip", best_clip)

# %% [markdown]
# What your function finds for normally distributed numbers. With fewer bits more should be cut off.

# %% qlearn={"show": true}
normal = torch.randn(2000, generator=torch.Generator().manual_seed(0))
for bits in (8, 6, 4, 3, 2):
    print(f"{bits} bits: the best grid covers {best_clip(normal, bits):.0%} of the interval")

# %% [markdown]
# ## All four together
#
# A layer of the bundled model, its weights at 8 bits with a grid for each row, and made-up inputs that are lopsided, as they leave a SiLU.
# (In the model another projection multiplies them before they get here; such inputs stand for a network with a plain ReLU or GELU.) The
# product below multiplies integers only. The scales come in once, at the end.

# %% qlearn={"show": true}
from safetensors import safe_open

with safe_open(qlearn.models.loading.BUNDLED / "model.safetensors", "pt") as file:
    weight = file.get_tensor("model.layers.0.mlp.down_proj.weight").float()
inputs = torch.nn.functional.silu(torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(1)))

# %% qlearn={"show": true}
sx, zx = parameters(inputs, bits=8)
sw, zw = (torch.tensor(values) for values in zip(*(parameters(row, bits=8) for row in weight), strict=True))
qx = quantize(inputs, sx, zx, bits=8).int()
qw = torch.stack([quantize(row, *grid, bits=8) for row, *grid in zip(weight, sw.tolist(), zw.tolist())]).int()

whole = integer_matmul(qx @ qw.T, qx.sum(1).int(), qw.sum(1).int(), zx, zw.int(), weight.shape[1])
output = whole * sx * sw

package = qlearn.quantize(weight, "zero_point", bits=8, scale_dtype=torch.float32)
print(f"rows whose codes are the package's: {(qw == package.codes()).all(1).sum()} of {len(qw)}")

# %% [markdown]
# A row may differ: where the smallest and the largest weight differ only by their sign, −low / scale is 127.5, a tie, and 32 and 64 bits may
# round it differently. Both grids are right.

# %% qlearn={"show": true}
exact = inputs @ weight.T
relative = ((output - exact).square().sum() / exact.square().sum()).sqrt()
print(f"8-bit integers instead of floats: {relative:.2%} off")
assert relative < 0.02

# %% [markdown]
# That is a quantized layer whose arithmetic is quantized too. In the course the next lessons keep the weights in few bits and compute in
# floating point, which is what language models mostly do.
