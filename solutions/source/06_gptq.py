# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 06 · GPTQ and AWQ: the exercise
#
# Six short functions, about 45 minutes: four make up GPTQ, two the scaling step of AWQ. The lesson is
# [06 · GPTQ and AWQ](../lessons/06_gptq.ipynb). In the last cells they work on a layer of the bundled model.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("gptq.hessian")` helps.

# %%
import torch

import qlearn
from qlearn import course
from qlearn.models.calibration import calibration_ids

x = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])  # the four tokens of the lesson

# %% [markdown] qlearn={"card": "gptq.hessian"}
# What GPTQ remembers of a layer's inputs is one matrix, H = (2 / n) Σ x xᵀ, summed over all n tokens. Calibration often comes in windows,
# so the inputs have a shape like (windows, tokens, channels); a window means nothing here, all tokens count alike.


# %% qlearn={"answer": "gptq.hessian"}
def hessian(x):
    """(2 / n) times the sum of x xᵀ over n tokens.

    x: float32 (..., columns): tokens, windows of tokens, or a single vector.
    Returns float32 (columns, columns).

    hessian(torch.tensor([[1.0, 3.0], [1.0, -1.0]]))  is  [[2, 2], [2, 10]]
    """
    ### BEGIN SOLUTION
    x = x.reshape(-1, x.shape[-1])
    return 2 / len(x) * x.T @ x
    ### END SOLUTION


# %% qlearn={"check": "gptq.hessian"}
course.check("gptq.hessian", hessian)

# %% [markdown] qlearn={"card": "gptq.inverse_factor"}
# Three steps. **Damp**: add `percdamp` times the mean of the diagonal to each number of the diagonal. **Invert. Factor**: find the upper
# triangular U with Uᵀ U equal to that inverse. There is another upper triangular matrix whose product with its transpose is the inverse, in the
# other order. GPTQ needs this one.


# %% qlearn={"answer": "gptq.inverse_factor"}
def inverse_factor(hessian, percdamp):
    """The upper Cholesky factor of the inverse of a damped Hessian.

    hessian: float64 (n, n), symmetric; it may be singular.  percdamp: float, a share of the mean of the diagonal.
    Returns U, float64 (n, n), zeros below the diagonal, with U.T @ U the inverse of the damped Hessian.
    Leave `hessian` as it is.

    inverse_factor(torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double(), percdamp=0.0)  is  [[0.5, 0], [0, 1]]
    """
    ### BEGIN SOLUTION
    damping = percdamp * hessian.diagonal().mean()
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ### END SOLUTION


# %% qlearn={"check": "gptq.inverse_factor"}
course.check("gptq.inverse_factor", inverse_factor)

# %% [markdown] qlearn={"card": "gptq.spread_error"}
# The heart of it. Column i has just been rounded. In each row, the columns *behind* it take its error: they are shifted by
#
# − (weight − quantized) / U[i, i] · U[i, i+1:]
#
# and the columns in front of it, which are done, stay as they are.


# %% qlearn={"answer": "gptq.spread_error"}
def spread_error(weight, i, quantized, U):
    """Store a rounded column, and shift the columns behind it.

    weight: float64 (rows, columns).  i: int, the column that was rounded.  quantized: float64 (rows,), what it was rounded to.
    U: float64 (columns, columns), from `inverse_factor`.
    Returns a new matrix (rows, columns): column i is `quantized`, those behind it are shifted. Leave `weight` as it is.

    With the Hessian of the lesson, [[0.3, 0.3, 0.3]] becomes [[0, 0.4, 0.4]] when column 0 is rounded to 0.
    """
    ### BEGIN SOLUTION
    error = (weight[:, i] - quantized) / U[i, i]
    shifted = weight.clone()
    shifted[:, i] = quantized
    shifted[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
    return shifted
    ### END SOLUTION


# %% qlearn={"check": "gptq.spread_error"}
course.check("gptq.spread_error", spread_error)

# %% [markdown]
# Is your shift the best one? Here the output error is drawn for no shift at all, for yours, and for everything between and beyond. The bottom
# of the curve has to be at 1.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(200, 4, generator=generator) @ torch.randn(4, 8, generator=generator) + 0.3 * torch.randn(200, 8, generator=generator)
H, weight = hessian(inputs).double(), torch.randn(5, 8, generator=generator).double()

# %% qlearn={"show": true}
unshifted = weight.clone()
unshifted[:, 2] = weight[:, 2].round()
shift = spread_error(weight, 2, weight[:, 2].round(), inverse_factor(H, 0.0)) - unshifted
times = torch.linspace(-0.5, 2.5, 61).tolist()
errors = [((d := unshifted + t * shift - weight) @ H * d).sum().item() for t in times]

# %% qlearn={"show": true}
picture, axes = course.plots.figure(6, 2.8, alt="Output error against the size of the shift: a parabola.")
axes.plot(times, errors, color=course.plots.COLORS["error"])
axes.axvline(1, color=course.plots.COLORS["marker"], linestyle=":", label="your shift")
axes.set(xlabel="times your shift", ylabel="output error", ylim=(0, None))
axes.legend()
picture

# %% [markdown] qlearn={"card": "gptq.quantize"}
# Put it together: from the first column to the last, round and spread. At the start of each group its grid is fitted anew, to the columns of the
# group as they are *by then*. Two helpers are given. `grid` fits the zero-point grids of some columns, `on_grid` rounds a column.

# %%
def grid(columns, bits):
    """columns: (rows, n).  Returns scale and zero, two tensors (rows,): one grid for each row."""
    fitted = qlearn.quantize(columns, "zero_point", bits=bits)
    return fitted.scales.double()[:, 0], fitted.zero_points().double()[:, 0]


# %%
def on_grid(column, scale, zero, bits):
    """column: (rows,).  Returns the nearest numbers of the grids, (rows,)."""
    codes = (torch.round(column / scale) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


# %% qlearn={"answer": "gptq.quantize"}
def quantize(weight, hessian, bits, group_size):
    """GPTQ, with the columns as they come and a damping of 0.01.

    weight: float64 (rows, columns).  hessian: float64 (columns, columns).  bits: 2 to 4.
    group_size: columns that share the grids; it divides the number of columns.
    Returns the quantized matrix (rows, columns): not codes, but the numbers that they stand for.
    Call your `inverse_factor` and `spread_error`, and `grid` and `on_grid` from above.
    """
    ### BEGIN SOLUTION
    U = inverse_factor(hessian, percdamp=0.01)
    W = weight
    for i in range(W.shape[1]):
        if i % group_size == 0:
            scale, zero = grid(W[:, i : i + group_size], bits)
        W = spread_error(W, i, on_grid(W[:, i], scale, zero, bits), U)
    return W
    ### END SOLUTION


# %% qlearn={"check": "gptq.quantize"}
course.check("gptq.quantize", quantize)

# %% [markdown] qlearn={"card": "gptq.awq_scale"}
# AWQ's candidates. The scale of a channel is the mean of |x| over the tokens, to the power of `ratio`. A channel that is always 0 would get
# 0, so no scale may be below 1e-4. At last all of them are divided by the root of largest times smallest, so that weights and inputs keep
# their size on the whole.


# %% qlearn={"answer": "gptq.awq_scale"}
def awq_scale(x, ratio):
    """One factor for each input channel.

    x: float32 (tokens, columns).  ratio: float, 0 to 1.
    Returns float32 (columns,); the largest and the smallest are each other's inverse.

    awq_scale(torch.tensor([[1.0, -4.0], [-1.0, 4.0]]), ratio=0.5)  is  [0.7071, 1.4142]
    """
    ### BEGIN SOLUTION
    scale = (x.abs().mean(0) ** ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()
    ### END SOLUTION


# %% qlearn={"check": "gptq.awq_scale"}
course.check("gptq.awq_scale", awq_scale)

# %% [markdown] qlearn={"card": "gptq.fold"}
# A norm ends by multiplying each channel with a stored number, and some matrices read what it puts out. Multiply the columns of these matrices
# by the scale and let the norm divide by it: nothing has changed for the model, and it costs nothing. Some models (Gemma) store
# the norm's numbers less 1, so that the norm multiplies by 1 + norm; `offset` says so.


# %% qlearn={"answer": "gptq.fold"}
def fold(norm, weights, scale, offset=0):
    """Move a scale from a norm into the matrices behind it.

    norm: (columns,); the norm multiplies channel j by offset + norm[j].  weights: a list of matrices (rows, columns).
    scale: (columns,).
    Returns the new norm, to be used with the same offset, and the list of new matrices. Leave the arguments as they are.

    fold(torch.tensor([3.0]), [torch.tensor([[5.0]])], torch.tensor([2.0]))  is  ([1.5], [[[10.0]]])
    """
    ### BEGIN SOLUTION
    return (offset + norm) / scale - offset, [weight * scale for weight in weights]
    ### END SOLUTION


# %% qlearn={"check": "gptq.fold"}
course.check("gptq.fold", fold)

# %% [markdown]
# ## On a layer of the model
#
# A projection of the bundled model, 128 × 256, and what it reads while the model goes through the calibration text. What it will be judged by is
# other text.

# %% qlearn={"show": true}
model, tokenizer = qlearn.load_model()
block = model.model.layers[1]


def inputs_of(text):
    """What the attention of block 1 reads, (2048, 256)."""
    kept = []
    hook = block.self_attn.k_proj.register_forward_hook(lambda module, args, output: kept.append(args[0]))
    model.model(calibration_ids(tokenizer, text, tokens=2048))
    hook.remove()
    return kept[0].flatten(0, 1)


# %% qlearn={"show": true}
calibration, other = inputs_of(qlearn.evaluate.calibration_text()), inputs_of(qlearn.evaluate.evaluation_text())

weight = block.self_attn.k_proj.weight
H = hessian(calibration).double()


# %% qlearn={"show": true}
def error(quantized):
    """Of the output on other text, in % of the output."""
    return 100 * (((quantized - weight) @ other.T).square().sum() / (weight @ other.T).square().sum()).item()


# %% qlearn={"show": true}
nearest = qlearn.quantize(weight, "zero_point", bits=3, group_size=64).dequantize()
yours = quantize(weight.double(), H, bits=3, group_size=64).float()
package = qlearn.quantize(weight, "gptq", bits=3, group_size=64, inputs=calibration).dequantize()
print(f"round to nearest {error(nearest):.2f} %, your GPTQ {error(yours):.2f} %, the package's {error(package):.2f} %")
assert error(yours) < 0.5 * error(nearest) and torch.isclose(yours, package, atol=1e-4).float().mean() > 0.95

# %% [markdown]
# Now AWQ's scale, tried on the calibration text for each ratio, and folded into the norm in front.

# %% qlearn={"show": true}
losses = {}
for ratio in [i / 10 for i in range(10)]:
    s = awq_scale(calibration, ratio)
    candidate = qlearn.quantize(weight * s, "zero_point", bits=3, group_size=64).dequantize() / s
    losses[ratio] = ((candidate - weight) @ calibration.T).square().mean().item()
best = min(losses, key=losses.get)

# %% qlearn={"show": true}
s = awq_scale(calibration, best)
norm, (scaled,) = fold(block.input_layernorm.weight, [weight], s)
divided = calibration * norm / block.input_layernorm.weight  # what the new norm would put out
torch.testing.assert_close(divided @ scaled.T, calibration @ weight.T, rtol=1e-4, atol=1e-3)
back = qlearn.quantize(scaled, "zero_point", bits=3, group_size=64).dequantize() / s
print(f"best ratio {best}: {error(back):.2f} % instead of {error(nearest):.2f} %")

# %% [markdown]
# And both: GPTQ on the scaled weights, with the Hessian of the divided inputs.

# %% qlearn={"show": true}
both = quantize(scaled.double(), hessian(divided).double(), bits=3, group_size=64).float() / s
print(f"nearest {error(nearest):.2f} %, scaled {error(back):.2f} %, GPTQ {error(yours):.2f} %, scaled and GPTQ {error(both):.2f} %")

# %% [markdown]
# The scale was made for round-to-nearest. GPTQ sees for itself which columns matter, and in this layer it gains nothing from it.
