# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 02 · Absmax: the exercise
#
# Five functions, about half an hour: codes and a scale, a scale for each group, decibels, true bits, and packed bytes.
# The lesson is [02 · Absmax](../lessons/02_absmax.ipynb). At the end they store a layer of the bundled model, and the
# file is as long as you said.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("absmax.quantize")` helps.

# %%
import os
import tempfile

import torch
from safetensors import safe_open

import qlearn
from qlearn import course
from qlearn.formats.integers import from_unsigned, unpack

w = torch.tensor([0.9, -0.31, 0.14, -0.02, 0.6])  # the five weights of the lesson

# %% [markdown] qlearn={"card": "absmax.quantize"}
# One ruler for a whole tensor. The largest magnitude gets the largest code of a grid that is symmetric about zero;
# every weight gets the nearest code, a tie the even one. There is one weight tensor for which the scale would be 0, and
# it must come back unharmed.


# %% qlearn={"answer": "absmax.quantize"}
def quantize(weights, bits):
    """Absmax with one scale.

    weights: float32 tensor of any shape.  bits: 2 to 8.
    Returns (codes, scale): int8, shaped as the weights, and a single float32 number. A tensor of zeros gets scale 1.

    quantize(w, bits=3)  is  ([3, -1, 0, 0, 2], 0.3)
    """
    ### BEGIN SOLUTION
    scale = weights.abs().max() / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    return (weights / scale).round().to(torch.int8), scale
    ### END SOLUTION


# %% qlearn={"check": "absmax.quantize"}
course.check("absmax.quantize", quantize)

# %% [markdown]
# The five weights on your grid, at 3 bits and at 4. A line that leads to a ruling which is not the nearest one, or past
# the last one, shows a mistake.

# %% qlearn={"show": true}
alt = "Five weights and the rulings they go to, at 3 bits and at 4."
picture, axes = course.plots.figure(8, 3.2, alt=alt, rows=2, sharex=True)
for ax, bits in zip(axes, (3, 4)):
    codes, scale = quantize(w, bits)
    qmax = 2 ** (bits - 1) - 1
    ax.vlines(torch.arange(-qmax, qmax + 1) * scale, -0.5, 0.5, color=course.plots.COLORS["quantized"])
    ax.plot([w, codes * scale], [[1] * 5, [0.5] * 5], color=course.plots.COLORS["faint"])
    ax.plot(w, [1] * 5, "o", color=course.plots.COLORS["original"])
    ax.set(yticks=[], title=f"{bits} bits: codes {codes.tolist()}, scale {float(scale):.3g}")
axes[1].set_xlabel("value")
picture

# %% [markdown] qlearn={"card": "absmax.grouped"}
# The same, but each `group_size` consecutive weights of a row have a scale of their own. No loop is needed: give the
# matrix a third axis, and work along that.


# %% qlearn={"answer": "absmax.grouped"}
def grouped(weight, bits, group_size):
    """Absmax with a scale for each group.

    weight: float32 (rows, columns).  bits: 2 to 8.  group_size: a divisor of the columns.
    Returns (codes, scales): int8 tensor (rows, columns), and float32 tensor (rows, columns / group_size).
    A group of zeros gets scale 1.

    grouped(torch.tensor([[3.0, 1.0, -0.3, 0.2]]), bits=3, group_size=2)  is  ([[3, 1, -3, 2]], [[1.0, 0.1]])
    """
    ### BEGIN SOLUTION
    groups = weight.reshape(weight.shape[0], -1, group_size)  # (rows, groups, group_size)
    scales = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)  # (rows, groups)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales[..., None]).round().to(torch.int8)
    return codes.reshape(weight.shape), scales
    ### END SOLUTION


# %% qlearn={"check": "absmax.grouped"}
course.check("absmax.grouped", grouped)

# %% [markdown]
# 64 weights in groups of 16, and an outlier in the second group. The steps show half a scale, the limit of your errors.
# Only one group should have to put up with a coarse ruler, and no dot may lie above its step.

# %% qlearn={"show": true}
row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
row[0, 20] = 12.0
codes, scales = grouped(row, bits=4, group_size=16)
error = (codes * scales.repeat_interleave(16, dim=1) - row).abs()

alt = "Errors of 64 weights below the half step of their group; the group with the outlier is coarse."
picture, ax = course.plots.figure(8, 2.6, alt=alt)
ax.stairs(scales[0] / 2, torch.arange(0, 65, 16) - 0.5, color=course.plots.COLORS["marker"], label="half a scale")
ax.plot(error[0], "o", color=course.plots.COLORS["error"], label="error")
ax.set(xlabel="place in the row (the outlier is at 20)", ylabel="error")
ax.legend()
picture

# %% [markdown] qlearn={"card": "absmax.sqnr"}
# The power of the weights over the power of what was lost, in decibels. Power is a mean of squares; in a ratio, sums will do. Do not guard against
# a noise of zero: where nothing was lost the answer is infinite, and torch divides that way.


# %% qlearn={"answer": "absmax.sqnr"}
def sqnr(original, reconstructed):
    """The signal-to-quantization-noise ratio.

    original, reconstructed: float32 tensors of one shape, any shape.  Returns a single number, in dB.

    sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))  is  13.98, ten times the logarithm of 25 / 1
    """
    ### BEGIN SOLUTION
    signal, noise = original.square().sum(), (original - reconstructed).square().sum()
    return 10 * torch.log10(signal / noise)
    ### END SOLUTION


# %% qlearn={"check": "absmax.sqnr"}
course.check("absmax.sqnr", sqnr)

# %% [markdown]
# 4,096 normally distributed numbers on your grid, measured with your decibels. The dashed line gains 6.02 dB with each
# bit; the dots should come close to its slope on the right, and be steeper on the left.

# %% qlearn={"show": true}
normal = torch.randn(4096, generator=torch.Generator().manual_seed(0))
bits = range(2, 9)
found = [float(sqnr(normal, codes * scale)) for codes, scale in (quantize(normal, b) for b in bits)]

picture, ax = course.plots.figure(6, 3, alt="Decibels against bits, close to a line of slope 6.02.")
rule = [found[-1] - 6.02 * (8 - b) for b in bits]
ax.plot(bits, rule, "--", color=course.plots.COLORS["faint"], label="6.02 dB a bit")
ax.plot(bits, found, "o", color=course.plots.COLORS["quantized"], label="yours")
ax.set(xlabel="bits", ylabel="SQNR (dB)")
ax.legend()
picture

# %% [markdown] qlearn={"card": "absmax.bits_per_weight"}
# What a matrix takes when it is stored: all codes as one stream of bits, filled up to a whole byte at its very end, and
# a scale of 16 bits for each group. Everything counts.


# %% qlearn={"answer": "absmax.bits_per_weight"}
def bits_per_weight(rows, columns, bits, group_size=None):
    """True bits for each weight, a float.

    rows, columns: of the matrix.  bits: of a code.
    group_size: weights of a row that share a scale, a divisor of the columns; None gives each row one.

    bits_per_weight(256, 256, 4, 64)  is  4.25, and  bits_per_weight(1, 5, 3)  is  6.4
    """
    ### BEGIN SOLUTION
    weights = rows * columns
    code_bytes = -(-weights * bits // 8)
    scale_bytes = 2 * weights // (group_size or columns)
    return 8 * (code_bytes + scale_bytes) / weights
    ### END SOLUTION


# %% qlearn={"check": "absmax.bits_per_weight"}
course.check("absmax.bits_per_weight", bits_per_weight)

# %% [markdown]
# A nominal number of bits says little. By your count, this is what "4 bits" costs in a matrix of 256 × 768.

# %% qlearn={"show": true}
for size in (768, 256, 128, 64, 32, 16, 8):
    print(f"groups of {size:3}: {bits_per_weight(256, 768, 4, size):.3f} bits per weight")

# %% [markdown] qlearn={"card": "absmax.pack4"}
# Two codes to a byte: the first in the lower four bits, the second in the upper. A negative code is stored as its two's
# complement, of which only the lower four bits are kept: −1 is 1111, −7 is 1001. When one code is left over, the upper
# half of its byte is 0.


# %% qlearn={"answer": "absmax.pack4"}
def pack4(codes):
    """Pack signed 4-bit codes.

    codes: int8 (n,), each -8 to 7.  Returns a uint8 tensor (ceil(n / 2),).

    pack4(torch.tensor([1, 2, -1], dtype=torch.int8))  is  [0x21, 0x0f]
    """
    ### BEGIN SOLUTION
    nibbles = (codes & 15).to(torch.uint8)
    nibbles = torch.cat([nibbles, nibbles.new_zeros(len(nibbles) % 2)])
    return nibbles[::2] | (nibbles[1::2] << 4)
    ### END SOLUTION


# %% qlearn={"check": "absmax.pack4"}
course.check("absmax.pack4", pack4)

# %% [markdown]
# Your bytes, bit by bit. Read each from the right: the first code of the pair, then the second.

# %% qlearn={"show": true}
codes = torch.tensor([1, 2, -1, 5, -7, -3, 7], dtype=torch.int8)
for index, byte in enumerate(pack4(codes).tolist()):
    print(f"{byte >> 4:04b} {byte & 15:04b}   holds {codes[2 * index : 2 * index + 2].tolist()}")

# %% [markdown]
# ## All five together
#
# A layer of the bundled model at 4 bits, with your codes, your scales, your decibels and your bits. How small should
# groups be?

# %% qlearn={"show": true}
with safe_open(qlearn.models.loading.BUNDLED / "model.safetensors", "pt") as file:
    weight = file.get_tensor("model.layers.0.mlp.down_proj.weight").float()

print("group   bits/weight   SQNR in dB")
for size in (768, 128, 64, 32, 16):
    codes, scales = grouped(weight, 4, size)
    quality = float(sqnr(weight, codes * scales.repeat_interleave(size, dim=1)))
    print(f"{size:5} {bits_per_weight(*weight.shape, 4, size):13.3f} {quality:12.1f}")

# %% [markdown]
# And the file. Your packed codes and the scales in FP16, nothing else; the package's `unpack` reads the codes back.

# %% qlearn={"show": true}
codes, scales = grouped(weight, 4, 64)
packed = pack4(codes.flatten())
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "down_proj.bin")
    with open(path, "wb") as file:
        file.write(packed.numpy().tobytes() + scales.half().numpy().tobytes())
    size = os.path.getsize(path)

print(f"{size:,} bytes, {8 * size / weight.numel()} bits per weight")
assert 8 * size / weight.numel() == bits_per_weight(*weight.shape, 4, 64)

# %% qlearn={"show": true}
assert torch.equal(from_unsigned(unpack(packed, 4, codes.numel()), 4), codes.flatten())
assert torch.equal(codes, qlearn.quantize(weight, "absmax", bits=4, group_size=64, scale_dtype=torch.float32).codes())
print("the package reads your codes, and they are its own")

# %% [markdown]
# That is a quantizer, from floats to bytes on a disk. In lesson [03 · Zero-point](../lessons/03_zero_point.ipynb) the
# grid moves to where the weights are.
