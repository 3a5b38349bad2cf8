# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 10 · SINQ: the exercise
#
# Six short functions, about 50 minutes: three find SINQ's two scales, one reads with them, one is a turn of HQQ, and one counts the bits of NF4. The lesson is
# [10 · SINQ](../lessons/10_sinkhorn.ipynb). In the last cells they quantize a layer of the bundled model.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("sinkhorn.imbalance")` helps.

# %%
from itertools import islice

import torch

import qlearn
from qlearn import course
from qlearn.methods.hqq import starting_grid
from qlearn.models.calibration import calibration_ids, walk

# %%
# The matrix of the lesson.
W = torch.tensor([[3.0, -8, 1, -3], [-1, 24, -3, 1], [8, -192, 24, -8], [-3, 8, -1, 3]])

# %% [markdown] qlearn={"card": "sinkhorn.imbalance"}
# Standard deviations, of all rows and of all columns, with n − 1 in the denominator as `std` has it. The imbalance is the largest of all over the smallest of all; a
# row of zeros would have it divide by 0, so the smallest counts as 1e-12 at least.


# %% qlearn={"answer": "sinkhorn.imbalance"}
def imbalance(tile):
    """The largest standard deviation of a row or column over the smallest.

    tile: float32 (rows, columns), two or more of each.
    Returns a number, or a tensor without axes.

    imbalance(torch.tensor([[1.0, -2.0], [-4.0, 8.0]]))  is  4.0
    """
    ### BEGIN SOLUTION
    spread = torch.cat([tile.std(0), tile.std(1)])
    return spread.max() / spread.min().clamp(min=1e-12)
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.imbalance"}
course.check("sinkhorn.imbalance", imbalance)

# %% [markdown] qlearn={"card": "sinkhorn.step"}
# One step, in logarithms. Divide the tile by exp(u1), a number for each column, and by exp(u2), one for each row. Measure the deviations σ of what you get, columns and rows in the same state. Then
#
# u ← u + log clamp(σ / τ, 0.7, 2), and u stays within −0.3 … 10
#
# for the columns, u1, and for the rows, u2.


# %% qlearn={"answer": "sinkhorn.step"}
def step(tile, u1, u2, tau):
    """Move the logarithms of both scales.

    tile: float32 (rows, columns), as it was at first.  tau: float, the target.
    u1: float32 (columns,).  u2: float32 (rows,).
    Returns the new u1 and the new u2. Leave the arguments as they are.

    [[1.0, -2.0], [-4.0, 8.0]] with zeros for u1 and u2 and tau=2.0  gives  [0.5697, 0.6931], [0.0589, 0.6931]
    """
    ### BEGIN SOLUTION
    now = tile / u1.exp() / u2.exp()[:, None]
    new1 = (u1 + (now.std(0) / tau).clamp(0.7, 2).log()).clamp(-0.3, 10)
    new2 = (u2 + (now.std(1) / tau).clamp(0.7, 2).log()).clamp(-0.3, 10)
    return new1, new2
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.step"}
course.check("sinkhorn.step", step)

# %% [markdown] qlearn={"card": "sinkhorn.balance"}
# The loop. At most `order` states are looked at, and the tile itself is the first (u1 and u2 are 0). A state with a larger imbalance than the best so far ends the
# search; any other is the best now, and is remembered. τ is found once: the smallest deviation of all rows and columns of the tile, plus 1e-6.


# %% qlearn={"answer": "sinkhorn.balance"}
def balance(tile, order):
    """SINQ's two scales.

    tile: float32 (rows, columns).  order: int, how many states are looked at, at most.
    Returns mu1, float32 (columns,), and mu2, float32 (rows,): exp of u1 and u2 in the best state.
    Call your `imbalance` and `step`.

    balance(torch.tensor([[1.0, -2.0], [-4.0, 8.0]]), order=3)  is  [1.1667, 2.0000], [0.7408, 2.1333]
    """
    ### BEGIN SOLUTION
    u1, u2, best = torch.zeros(tile.shape[1]), torch.zeros(tile.shape[0]), torch.inf
    tau = torch.cat([tile.std(0), tile.std(1)]).min().item() + 1e-6
    for _ in range(order):
        found = imbalance(tile / u1.exp() / u2.exp()[:, None])
        if found > best:
            break
        best, mu1, mu2 = found, u1.exp(), u2.exp()
        u1, u2 = step(tile, u1, u2, tau)
    return mu1, mu2
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.balance"}
course.check("sinkhorn.balance", balance)

# %% [markdown]
# Your loop at work, on the matrix of the lesson and on larger ones with a large column: imbalance against the number of states that were looked at.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
tiles = {
    "the lesson's": W,
    "16 × 16": torch.randn(16, 16, generator=generator),
    "256 × 64": torch.randn(256, 64, generator=generator),
}
for name, tile in tiles.items():
    tile[:, 1] *= 1 if tile is W else 20

# %% qlearn={"show": true}
picture, axes = course.plots.figure(
    6, 2.8, alt="Imbalance against the number of states for three matrices: it never rises."
)
for (name, tile), color in zip(tiles.items(), ("original", "quantized", "other")):
    both = [balance(tile, order) for order in range(1, 17)]
    curve = [float(imbalance(tile / mu1 / mu2[:, None])) for mu1, mu2 in both]
    axes.semilogy(range(1, 17), curve, "o-", markersize=4, color=course.plots.COLORS[color], label=name)
    assert all(after <= 1.0001 * before for before, after in zip(curve, curve[1:]))
axes.set(
    xlabel="states looked at",
    ylabel="imbalance of the best",
    yticks=(1, 3, 10, 30),
    yticklabels=("1", "3", "10", "30"),
)
axes.minorticks_off()
axes.legend()
picture

# %% [markdown] qlearn={"card": "sinkhorn.dequantize"}
# What a reader does: (code − zero) · scale, where zero and scale are those of the group, and the whole column times its number of μ1. Codes are uint8, and zeros
# may be: how much is 1 − 2 in uint8?


# %% qlearn={"answer": "sinkhorn.dequantize"}
def dequantize(codes, zeros, scales, column_scales):
    """Read a matrix with two scales.

    codes: uint8 (rows, columns).  zeros: uint8 or float32 (rows, groups).
    scales: float32 (rows, groups).
    column_scales: float32 (columns,).  A group is columns / groups neighbours of a row.
    Returns float32 (rows, columns).

    codes [[0, 3]], zeros [[1]], scales [[0.5]], column_scales [1, 4]  give  [[-0.5, 4.0]]
    """
    ### BEGIN SOLUTION
    n = codes.shape[1] // scales.shape[1]
    steps = codes.float() - zeros.float().repeat_interleave(n, 1)
    return steps * scales.repeat_interleave(n, 1) * column_scales
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.dequantize"}
course.check("sinkhorn.dequantize", dequantize)

# %% [markdown] qlearn={"card": "sinkhorn.hqq_turn"}
# One turn, for all groups at once; each is a row, with an s and a zero of its own.
#
# W_q = round(W · s + z), clamped to 0 … qmax
#
# W_e = shrink(W − (W_q − z) / s), with shrink(x) = sign(x) · max(0, |x| − |x|^(p − 1) / β), p = 0.7, β = 10
#
# new z = mean of [W_q − (W − W_e) · s] over the group


# %% qlearn={"answer": "sinkhorn.hqq_turn"}
def hqq_turn(weight, s, zero, qmax):
    """The zeros after one turn of HQQ.

    weight: float32 (groups, n).  s, zero: float32 (groups, 1), one over the scale, and the zero.
    qmax: int, the largest code.
    Returns the new zeros, float32 (groups, 1).

    weight [[0.0, 0.03, 0.13, 0.22, 0.3]], s [[10.0]], zero [[0.0]], qmax 3  give  [[-0.16]]
    """
    ### BEGIN SOLUTION
    codes = (weight * s + zero).round().clamp(0, qmax)
    rest = weight - (codes - zero) / s
    outliers = rest.sign() * (rest.abs() - rest.abs() ** (0.7 - 1) / 10).clamp(min=0)
    return (codes - (weight - outliers) * s).mean(-1, keepdim=True)
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.hqq_turn"}
course.check("sinkhorn.hqq_turn", hqq_turn)

# %% [markdown] qlearn={"card": "sinkhorn.nf4_bits"}
# Everything that NF4 stores, over the number of weights. Codes of 4 bits; blocks of 64 weights, each with a scale, a float32. With double quantization the scales become codes of 8 bits;
# each 256 of them share a float32 (the last ones too, if fewer are left), and one more float32 is the mean that was taken off all of them.


# %% qlearn={"answer": "sinkhorn.nf4_bits"}
def nf4_bits(rows, columns, double_quant):
    """True bits per weight.

    rows, columns: int; 64 divides the columns.  double_quant: bool.
    Returns a float.

    nf4_bits(1, 64, False)  is  4.5
    """
    ### BEGIN SOLUTION
    weights = rows * columns
    blocks = weights // 64
    scales = 8 * blocks + 32 * -(-blocks // 256) + 32 if double_quant else 32 * blocks
    return 4 + scales / weights
    ### END SOLUTION


# %% qlearn={"check": "sinkhorn.nf4_bits"}
course.check("sinkhorn.nf4_bits", nf4_bits)

# %% [markdown]
# ## On a layer of the model
#
# A projection of the bundled model, and what it reads. Your `balance` finds the two scales of each tile of 64 columns; the grids and the codes come from the package's `hqq.starting_grid`,
# with the zero rounded as SINQ has it; your `dequantize` reads them.

# %% qlearn={"show": true}
model, tokenizer = qlearn.load_model()
weight = model.model.layers[1].self_attn.v_proj.weight.detach()
stopped = next(islice(walk(model, calibration_ids(tokenizer, tokens=2048)), 1, None))
name = "self_attn.v_proj"
x = stopped.collect({name: stopped.module.get_submodule(name)}, hessian=False, sample=2048)[name].sample


# %% qlearn={"show": true}
def sinq(weight, turns=0, bits=3, group_size=64):
    """What is read back after balancing, and after so many turns of your HQQ for the zeros."""
    parts = []
    for first in range(0, weight.shape[1], group_size):
        tile = weight[:, first : first + group_size]
        mu1, mu2 = balance(tile, order=16)
        balanced = tile / mu1 / mu2[:, None]
        s, zero = starting_grid(balanced, 2**bits - 1, round_zero=not turns)
        for _ in range(turns):
            zero = hqq_turn(balanced, s, zero, 2**bits - 1)
        codes = (balanced * s + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
        parts.append(dequantize(codes, zero, mu2[:, None] / s, mu1))
    return torch.hstack(parts)


# %% qlearn={"show": true}
def percent(back):
    """Errors of the weights and of the outputs, in % of their size."""
    off = back - weight
    return [100 * (a.norm() / b.norm()).item() for a, b in ((off, weight), (x @ off.T, x @ weight.T))]


# %% qlearn={"show": true}
package = qlearn.quantize(weight, "sinq", bits=3, group_size=64, scale_dtype=torch.float32).dequantize()
rows = {
    "round to nearest": qlearn.quantize(weight, "zero_point", bits=3, group_size=64).dequantize(),
    "your SINQ": sinq(weight),
    "the package's": package,
    "your SINQ, then your HQQ": sinq(weight, turns=20),
}
for name, back in rows.items():
    print(f"{name:26} weights {percent(back)[0]:5.1f} % off, outputs {percent(back)[1]:5.1f} %")

# %% qlearn={"show": true}
same = torch.isclose(rows["your SINQ"], package, atol=1e-4).float().mean()
print(f"{same:.1%} of the weights are those of the package")
assert same > 0.98 and percent(rows["your SINQ"])[1] < percent(rows["round to nearest"])[1]
assert percent(rows["your SINQ, then your HQQ"])[0] < percent(rows["your SINQ"])[0]

# %% [markdown]
# Balancing hardly changes how far off the weights are, and makes the outputs better; the moved zeros make both better. And the price? What SINQ stores beside the codes of 3 bits, against your count for
# NF4 in a matrix of the same shape:

# %% qlearn={"show": true}
beside = {
    "SINQ": qlearn.quantize(weight, "sinq", bits=3, group_size=64).bits_per_weight - 3,
    "NF4": nf4_bits(*weight.shape, False) - 4,
    "NF4 with double quantization": nf4_bits(*weight.shape, True) - 4,
}
for name, bits in beside.items():
    print(f"{name:30} {bits:.4f} bits beside the codes")
