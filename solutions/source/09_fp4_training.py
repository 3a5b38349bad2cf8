# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 09 · Training with sixteen numbers: the exercise
#
# Six short functions, about 50 minutes: the two roundings of FP4 training, its rotation, its two scales, and the one number that says what it costs.
# The lesson is [09 · Training with sixteen numbers](../lessons/09_fp4_training.ipynb). In the last cells a layer learns with them.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("fp4_training.round_e2m1")` helps.

# %%
import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from qlearn import course
from qlearn.training import scaling_law

g = torch.tensor([5.5, -0.2, 0.2, 0.2, -2.8, 1.2, 0.1, 0.2])  # the eight gradients of the lesson

# %% [markdown] qlearn={"card": "fp4_training.round_e2m1"}
# The numbers of FP4 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign. Up to 2 they stand 0.5 apart, up to 4 they stand 1 apart, then 2. A tie goes to the even
# multiple of the step, as `torch.round` has it. What lies beyond 6 becomes 6.


# %% qlearn={"answer": "fp4_training.round_e2m1"}
def round_e2m1(x):
    """Each number as the nearest of FP4's.

    x: float32, any shape; none is infinite or NaN.
    Returns float32 of that shape.

    round_e2m1(torch.tensor([0.3, -0.75, 2.5, 5.0, 5.1, 100.0]))  is  [0.5, -1, 2, 4, 6, 6]
    """
    ### BEGIN SOLUTION
    a = x.abs().clamp(max=6)
    s = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign((a / s).round() * s, x)
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.round_e2m1"}
course.check("fp4_training.round_e2m1", round_e2m1)

# %% [markdown] qlearn={"card": "fp4_training.stochastic"}
# The same numbers and the same steps. But a magnitude a with the step s becomes s · ⌊a / s + u⌋, with a random number u in [0, 1) for each, which is given, so
# that your answer can be checked. The sign stays, and what lies beyond 6 becomes 6.


# %% qlearn={"answer": "fp4_training.stochastic"}
def stochastic(x, random):
    """Each number as one of its two neighbours in FP4, right on average.

    x: float32, any shape; none is infinite or NaN.  random: float32 in [0, 1) of that shape.
    Returns float32 of that shape.

    stochastic(torch.tensor([0.2, 0.2, -2.8]), torch.tensor([0.5, 0.7, 0.3]))  is  [0, 0.5, -3]
    """
    ### BEGIN SOLUTION
    a = x.abs().clamp(max=6)
    s = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign((a / s + random).floor() * s, x)
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.stochastic"}
course.check("fp4_training.stochastic", stochastic)

# %% [markdown]
# Are they what the lesson said? 1,000 times each of the eight, added up: what should come, what nearest brings, and what yours does.

# %% qlearn={"show": true}
many = g.expand(1000, 8)
draws = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
to_nearest, drawn = round_e2m1(many).sum(0), stochastic(many, draws).sum(0)
course.table(expected=1000 * g, to_nearest=to_nearest, stochastic=drawn, decimals=1)

# %% [markdown] qlearn={"card": "fp4_training.hadamard"}
# The fast way, without a matrix. For the distances 1, 2, 4 and so on, up to half of the length: the last axis falls into stretches of two times the distance. In each, the first half becomes
# first + second, the second half first − second. At the end divide by the root of the length.


# %% qlearn={"answer": "fp4_training.hadamard"}
def hadamard(x):
    """Rotate each row by the normalized Hadamard matrix.

    x: float32 (..., n); n is a power of two, and may be 1.
    Returns float32 (..., n). Applied twice, it gives x back. Leave x as it is.

    hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))  is  [[5, -1, -2, 0]]
    """
    ### BEGIN SOLUTION
    y, distance = x, 1
    while distance < x.shape[-1]:
        first, second = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        distance *= 2
    return y / math.sqrt(x.shape[-1])
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.hadamard"}
course.check("fp4_training.hadamard", hadamard)

# %% [markdown] qlearn={"card": "fp4_training.mx_scale"}
# The scale of MXFP4, as its specification has it: 2 to the power of ⌊log₂ max⌋ − 2, where max is the largest magnitude of the group. The largest number then lies between 4 and 8 scales.


# %% qlearn={"answer": "fp4_training.mx_scale"}
def mx_scale(groups):
    """The scale of each group, a power of two.

    groups: float32 (..., n): each row of the last axis is a group, none of them all zeros.
    Returns float32 (..., 1), so that groups / mx_scale(groups) works.

    mx_scale(torch.tensor([[0.1, 0.2, -0.3, 0.75]]))  is  [[0.125]]
    """
    ### BEGIN SOLUTION
    return torch.exp2(groups.abs().amax(-1, keepdim=True).log2().floor() - 2)
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.mx_scale"}
course.check("fp4_training.mx_scale", mx_scale)

# %% [markdown] qlearn={"card": "fp4_training.quest"}
# QuEST. The grid ends at `CLIP` standard deviations of the group (about its mean, divided by n: `correction=0`), which is 6 scales. So the scale is CLIP · σ / 6, plus 1e-8, so that a group of
# zeros is divided by something; and of that the *nearest* power of two, 2 to the power of round(log₂). Trusted is what lies below 6 scales in size.

# %%
CLIP = 2.92247856


# %% qlearn={"answer": "fp4_training.quest"}
def quest(groups):
    """Round groups to FP4, and say which numbers were not cut off.

    groups: float32 (..., n): each row of the last axis is a group.
    Returns what comes back, float32 (..., n), and the trust mask, bool (..., n). Call your `round_e2m1`.
    """
    ### BEGIN SOLUTION
    wanted = groups.std(-1, keepdim=True, correction=0) * CLIP / 6 + 1e-8
    scale = torch.exp2(wanted.log2().round())
    return round_e2m1(groups / scale) * scale, (groups / scale).abs() < 6
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.quest"}
course.check("fp4_training.quest", quest)

# %% [markdown] qlearn={"card": "fp4_training.efficiency"}
# A scaling law says which loss a training reaches, and a scheme that rounds behaves as if the model had eff_N · N parameters. Find eff_N: the number between 0.05 and 2 for which the sum of Huber's
# losses of log(law's loss / measured loss) is least. Two helpers are given; `minimize_scalar` of scipy searches (`method="bounded"`, and ask for `options={"xatol": 1e-7}`).

# %%
def law_loss(law, N, D):
    """The law's loss in nats, for N parameters and D tokens (numbers or arrays)."""
    return (law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]) ** law["gamma"] + law["E"]


def huber(errors, delta=1e-4):
    """Of each error: half its square within delta, beyond that a straight line."""
    size = np.abs(errors)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


# %% qlearn={"answer": "fp4_training.efficiency"}
def efficiency(law, N, D, loss):
    """The eff_N with which the law meets these losses best.

    law: a dict with A, alpha, B, beta, gamma, E.
    N, D, loss: float64 arrays (runs,): parameters, tokens, nats a token.
    Returns a float.
    """
    ### BEGIN SOLUTION
    def misfit(eff_N):
        return huber(np.log(law_loss(law, eff_N * N, D) / loss)).sum()

    return minimize_scalar(misfit, bounds=(0.05, 2), method="bounded", options={"xatol": 1e-7}).x
    ### END SOLUTION


# %% qlearn={"check": "fp4_training.efficiency"}
course.check("fp4_training.efficiency", efficiency)

# %% [markdown]
# On the losses that Quartet's authors published: what is a model worth whose forward pass is in FP4?

# %% qlearn={"show": true}
law = scaling_law.fit(scaling_law.published("bf16"))
rows = scaling_law.published("forward_quest")
N, D, loss = np.array([[row["params"], row["tokens"], row["loss"]] for row in rows]).T
yours = efficiency({name: getattr(law, name) for name in scaling_law.PARAMETERS}, N, D, loss)
print(f"a million parameters are worth {1000 * yours:.0f} thousand")
assert abs(yours - scaling_law.fit_efficiency(law, rows, ("N",)).N) < 1e-3

# %% [markdown]
# ## A layer that learns
#
# 64 inputs, one of them larger than the rest, and 32 outputs. The layer is to find the matrix that made y. Forward it sees its input and its weights through your rotation and your QuEST; backward, the
# gradient and the input are rotated by random signs and your Hadamard, scaled by your scale, and rounded by your stochastic rounding of three quarters.

# %% qlearn={"show": true}
def in_groups(x):
    return x.unflatten(-1, (-1, 32))


def forward(x):
    values, mask = quest(hadamard(in_groups(x)))
    return values.flatten(-2), mask.flatten(-2)


def backward(x, signs):
    groups = hadamard(in_groups(x) * signs)
    scale = mx_scale(groups)
    return (stochastic(0.75 * groups / scale, torch.rand(groups.shape)) * scale / 0.75).flatten(-2)


# %% qlearn={"show": true}
torch.manual_seed(0)
x = torch.randn(128, 64)
x[:, 5] *= 4
y = x @ (torch.randn(32, 64) / 8).T


def learn(fp4, steps=150):
    torch.manual_seed(1)
    weight, losses = torch.zeros(32, 64), []
    for step in range(steps):
        (X, _), (W, trusted) = (forward(x), forward(weight)) if fp4 else ((x, None), (weight, None))
        off = X @ W.T - y
        losses.append((off.square().sum() / y.square().sum()).item())
        E = off / len(x) / 64  # the gradient, up to a factor
        gradient = E.T @ x
        if fp4:
            signs = torch.randint(0, 2, (32,)) * 2.0 - 1
            rotated = backward(E.T.contiguous(), signs) @ backward(X.T.contiguous(), signs).T
            gradient = hadamard(in_groups(rotated * trusted)).flatten(-2)  # back from the rotated space
        weight = weight - 3 * (1 - step / steps) * gradient
    return losses


# %% qlearn={"show": true}
curves = {"float32": learn(False), "FP4": learn(True)}
alt = "Error of a layer that learns, in float32 and in FP4: both fall, FP4 stays above."
picture, axes = course.plots.figure(7, 3, alt=alt)
for (name, losses), color in zip(curves.items(), ("original", "quantized")):
    axes.semilogy(losses, color=course.plots.COLORS[color], label=name)
axes.set(xlabel="step", ylabel="squared error (1: all of y)")
axes.legend()
picture

# %% qlearn={"show": true}
for name, losses in curves.items():
    print(f"{name:8} {100 * losses[-1]:.1f} % of the square of y is left")
assert curves["float32"][-1] < curves["FP4"][-1] < 0.1

# %% [markdown]
# It learns, and ends above float32. Part of that no training takes away: forward, even the best matrix is seen through sixteen numbers.
