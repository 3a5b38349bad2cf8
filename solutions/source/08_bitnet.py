# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 08 · BitNet: the exercise
#
# Six short functions, about 50 minutes: BitNet's two roundings, the layer made of them, forward and backward, and what it takes to store and
# use it without multiplying. The lesson is [08 · BitNet](../lessons/08_bitnet.ipynb). In the last cells a layer learns with them.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("bitnet.absmean")` helps.

# %%
import torch

import qlearn
from qlearn import course
from qlearn.models.bitlinear import PackedBitLinear

# the twelve weights of the lesson
W = torch.tensor([[0.9, -0.2, 0.4, -0.5], [0.1, 0.6, -0.3, 0.0], [-0.4, 1.6, -0.7, 0.3]])

# %% [markdown] qlearn={"card": "bitnet.absmean"}
# β = mean |W|, one number for the whole matrix, and 1e-5 at least, so that a matrix of zeros is divided by something. V = clip(round(W / β), −1, 1).


# %% qlearn={"answer": "bitnet.absmean"}
def absmean(weight):
    """Round a matrix to trits.

    weight: float32 (out, in).
    Returns V, float32 of -1, 0, 1 in the shape of the weight, and beta, a float32 tensor without axes (or a number).

    absmean(torch.tensor([[0.9, -0.2, 0.1, -0.8]]))  is  [[1, 0, 0, -1]], 0.5
    """
    ### BEGIN SOLUTION
    beta = weight.abs().mean().clamp(min=1e-5)
    return (weight / beta).round().clamp(-1, 1), beta
    ### END SOLUTION


# %% qlearn={"check": "bitnet.absmean"}
course.check("bitnet.absmean", absmean)

# %% [markdown] qlearn={"card": "bitnet.quantize_tokens"}
# The inputs. Each token, which is each row of the last axis, has its own scale, 127 / max |x|. The largest magnitude counts as 1e-5 at least.
# X = round(x · scale), in int8.


# %% qlearn={"answer": "bitnet.quantize_tokens"}
def quantize_tokens(x):
    """Round each token to 8 bits.

    x: float32 (..., tokens, in).
    Returns X, int8 in the shape of x, and the scales, float32 (..., tokens, 1).

    quantize_tokens(torch.tensor([[0.5, -1.0, 0.25]]))  is  [[64, -127, 32]], [[127.0]]
    """
    ### BEGIN SOLUTION
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().to(torch.int8), scale
    ### END SOLUTION


# %% qlearn={"check": "bitnet.quantize_tokens"}
course.check("bitnet.quantize_tokens", quantize_tokens)

# %% [markdown] qlearn={"card": "bitnet.bitlinear"}
# The layer: a product of the two, as whole numbers, and the scales at the end. Two warnings: which way do the scales go? And torch multiplies
# int8 with int8 into int8.


# %% qlearn={"answer": "bitnet.bitlinear"}
def bitlinear(x, weight):
    """What a BitLinear layer puts out.

    x: float32 (tokens, in).  weight: float32 (out, in), the float weight behind the trits.
    Returns float32 (tokens, out).
    Call your `absmean` and `quantize_tokens`.

    bitlinear(torch.tensor([[127.0, 1.0, 2.0, 3.4]]), torch.tensor([[0.9, -0.2, 0.1, -0.8]]))  is  [[62.0]]
    """
    ### BEGIN SOLUTION
    V, beta = absmean(weight)
    X, scale = quantize_tokens(x)
    return X.float() @ V.T * beta / scale
    ### END SOLUTION


# %% qlearn={"check": "bitnet.bitlinear"}
course.check("bitnet.bitlinear", bitlinear)

# %% [markdown] qlearn={"card": "bitnet.gradients"}
# Backward, by hand and without autograd. Both roundings are passed straight through, also where V was cut off, and scales count as constants. So it is the backward
# pass of a plain layer y = x Wᵀ that was given what the rounded numbers stand for.


# %% qlearn={"answer": "bitnet.gradients"}
def gradients(x, weight, above):
    """The backward pass of a BitLinear layer.

    x: float32 (tokens, in).  weight: float32 (out, in).  above: float32 (tokens, out), the gradient of the output.
    Returns the gradient of x, (tokens, in), and that of the weight, (out, in).
    Call your `absmean` and `quantize_tokens`.
    """
    ### BEGIN SOLUTION
    V, beta = absmean(weight)
    X, scale = quantize_tokens(x)
    return above @ (beta * V), above.T @ (X / scale)
    ### END SOLUTION


# %% qlearn={"check": "bitnet.gradients"}
course.check("bitnet.gradients", gradients)

# %% [markdown] qlearn={"card": "bitnet.pack_trits"}
# A trit's digit is trit + 1. Five neighbours make a byte: the first digit counts 1, the second 3, then 9, 27, 81. If the number of
# trits is no multiple of five, digits of 0 fill the last byte.


# %% qlearn={"answer": "bitnet.pack_trits"}
def pack_trits(trits):
    """Pack five trits into each byte.

    trits: int8 (n,) of -1, 0, 1.
    Returns uint8, n / 5 bytes rounded up.

    pack_trits(torch.tensor([1, 0, -1, -1, -1, 1], dtype=torch.int8))  is  [5, 2]
    """
    ### BEGIN SOLUTION
    digits = torch.nn.functional.pad(trits.int() + 1, (0, -len(trits) % 5)).view(-1, 5)
    return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(-1).to(torch.uint8)
    ### END SOLUTION


# %% qlearn={"check": "bitnet.pack_trits"}
course.check("bitnet.pack_trits", pack_trits)

# %% [markdown] qlearn={"card": "bitnet.matvec"}
# A matrix of trits times a vector, in plain Python: for each row one sum. Some of the numbers that you will be given refuse to be multiplied.


# %% qlearn={"answer": "bitnet.matvec"}
def matvec(V, x):
    """A matrix of trits times a vector, by adding and subtracting.

    V: a list of rows, each a list of -1, 0, 1.  x: a list of whole numbers, as long as a row.
    Returns a list of whole numbers, one for each row.

    matvec([[1, 0, -1], [1, 1, 1]], [3, -4, 5])  is  [-2, 4]
    """
    ### BEGIN SOLUTION
    sums = []
    for row in V:
        total = 0
        for trit, number in zip(row, x):
            if trit == 1:
                total += number
            elif trit == -1:
                total -= number
        sums.append(total)
    return sums
    ### END SOLUTION


# %% qlearn={"check": "bitnet.matvec"}
course.check("bitnet.matvec", matvec)

# %% [markdown]
# ## A layer learns
#
# Somewhere there is a hidden matrix of trits. You see what it makes of inputs, and nothing else. A layer that begins with random
# weights is to find it, by your forward and your backward pass.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
hidden = torch.randint(-1, 2, (32, 64), generator=generator).float()
weight = torch.randn(32, 64, generator=generator)
losses, right = [], []
for step in range(400):
    x = torch.randn(128, 64, generator=generator)
    off = bitlinear(x, weight) - x @ hidden.T
    weight = weight - 0.2 * (1 - step / 400) * gradients(x, weight, off / len(x))[1]
    losses.append(off.square().mean().item())
    right.append((absmean(weight)[0] == hidden).float().mean().item())

# %% qlearn={"show": true}
alt = "The error falls, and the share of trits that equal the hidden ones rises to nearly all."
picture, axes = course.plots.figure(8, 2.8, columns=2, alt=alt)
axes[0].semilogy(losses, color=course.plots.COLORS["error"])
axes[0].set(xlabel="step", ylabel="squared error")
axes[1].plot([100 * share for share in right], color=course.plots.COLORS["other"])
axes[1].set(xlabel="step", ylabel="trits found (%)", ylim=(0, 103))
picture

# %% [markdown]
# Then it is written down: five trits in a byte, and the float weights are let go. The package packs the same bytes, and its layer agrees with your `matvec`.

# %% qlearn={"show": true}
V, beta = absmean(weight)
packed = pack_trits(V.flatten().to(torch.int8))
quantized = qlearn.quantize(weight, "ternary", bits=1.6, scale_dtype=torch.float32)
assert torch.equal(packed, quantized.packed.flatten())
print(f"{right[-1]:.1%} of the trits found, {len(packed)} bytes for {V.numel()} weights")
print(f"squared error {losses[0]:.0f} at first, {losses[-1]:.3f} at the end")
assert right[-1] > 0.95 > 0.6 > right[0]

# %% qlearn={"show": true}
X, scale = quantize_tokens(x[:1])
sums = torch.tensor(matvec(V.int().tolist(), X[0].tolist()))
torch.testing.assert_close(sums * beta / scale[0], PackedBitLinear(quantized)(x[:1])[0])
torch.testing.assert_close(sums * beta / scale[0], bitlinear(x[:1], weight)[0])
print("additions alone give what both layers give")
