# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 04 · Whole models: the exercise
#
# Five functions, about 50 minutes: what a model weighs, and then the parts of a layer that multiplies integers: a scale for each token,
# the product, a scale chosen beforehand, and smoothing. The lesson is [04 · Whole models](../lessons/04_ptq.ipynb). In the last cells
# your functions carry the layer of the bundled model that is hardest to quantize.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("ptq.megabytes")` helps.

# %%
import math

import torch

import qlearn
from qlearn import course

# %% [markdown] qlearn={"card": "ptq.megabytes"}
# Before you load a model you want to know whether it fits. Its linear layers are quantized: `bits` for each code, packed, and a 16-bit
# scale for each group of weights, or for each row where there are no groups. All other parameters keep 16 bits.


# %% qlearn={"answer": "ptq.megabytes"}
def megabytes(matrices, others, bits, group_size=None):
    """What a quantized model weighs, in megabytes (10**6 bytes).

    matrices: a list of (rows, columns), the quantized ones.  others: how many parameters are not quantized.
    bits: 2 to 8.  group_size: how many weights of a row share a scale; it divides the columns. None: the whole row does.
    The codes of a matrix are packed one after another, across its rows. If its last byte is not full, it counts as a whole one.
    Returns a float.

    megabytes([(256, 256)], others=1000, bits=4, group_size=64) == 0.036816       # 32,768 + 2,048 + 2,000 bytes
    """
    ### BEGIN SOLUTION
    total = 2 * others
    for rows, columns in matrices:
        codes = math.ceil(rows * columns * bits / 8)
        scales = rows * columns // (group_size or columns)
        total += codes + 2 * scales
    return total / 10**6
    ### END SOLUTION


# %% qlearn={"check": "ptq.megabytes"}
course.check("ptq.megabytes", megabytes)

# %% [markdown]
# Your function on the bundled model, beside the bytes that are really held. What weighs most at 2 bits?

# %% qlearn={"show": true}
model, tokenizer = qlearn.load_model()
layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
shapes = [tuple(layer.weight.shape) for layer in layers.values()]
others = sum(p.numel() for p in model.parameters()) - sum(rows * columns for rows, columns in shapes)
for bits in (8, 4, 2):
    stored = qlearn.quantize_model(qlearn.load_model()[0], "absmax", bits=bits, group_size=64, progress=False)
    held, rest = qlearn.evaluate.model_bytes(stored) / 1e6, megabytes([], others, bits)
    print(f"{bits} bits: {megabytes(shapes, others, bits, 64):.3f} MB by your function, {held:.3f} MB held; {rest:.3f} MB not quantized")

# %% [markdown] qlearn={"card": "ptq.quantize_tokens"}
# Inputs come with the text, so their scales can only be found when they come. Each token, a row of `x`, gets a grid of its own: its
# largest magnitude becomes the code 127 or −127.


# %% qlearn={"answer": "ptq.quantize_tokens"}
def quantize_tokens(x):
    """Codes and scales of a layer's inputs, one scale for each token.

    x: float32 (tokens, channels).
    Returns the codes, int8 (tokens, channels), each -127 to 127, and the scales, float32 (tokens, 1). Halfway between two codes, the even
    one is taken. A token of zeros gets scale 1.

    quantize_tokens(torch.tensor([[0.5, -1.27], [0.0, 0.0]]))  is  [[50, -127], [0, 0]] and [[0.01], [1.0]]
    """
    ### BEGIN SOLUTION
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round(x / scale).to(torch.int8), scale
    ### END SOLUTION


# %% qlearn={"check": "ptq.quantize_tokens"}
course.check("ptq.quantize_tokens", quantize_tokens)

# %% [markdown]
# What your codes give back, for four tokens of very different size. Every row should look like the one on its left.

# %% qlearn={"show": true}
four = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[100.0], [1.0], [10.0], [0.1]])
codes, scale = quantize_tokens(four)
course.table(x=four, back=codes * scale)

# %% [markdown] qlearn={"card": "ptq.int8_linear"}
# Two matrices of codes, and the scales of both. Multiply the codes as integers, exactly, and bring in the scales at the end. Mind how
# large a product of two codes is, and a sum of a thousand of them; and which axis each of the scales belongs to.


# %% qlearn={"answer": "ptq.int8_linear"}
def int8_linear(x_codes, x_scale, w_codes, w_scale):
    """The outputs of a linear layer from 8-bit codes.

    x_codes: int8 (tokens, in).  x_scale: float32 (tokens, 1).  w_codes: int8 (out, in).  w_scale: float32 (out,).
    Returns float32 (tokens, out). The sums of the codes are exact, as long as they fit into 32 bits.

    int8_linear(torch.tensor([[100, 50]], dtype=torch.int8), torch.tensor([[0.01]]), torch.tensor([[2, -1]], dtype=torch.int8),
                torch.tensor([0.5]))  is  [[0.75]]
    """
    ### BEGIN SOLUTION
    sums = x_codes.int() @ w_codes.int().T
    return sums.float() * x_scale * w_scale
    ### END SOLUTION


# %% qlearn={"check": "ptq.int8_linear"}
course.check("ptq.int8_linear", int8_linear)

# %% [markdown]
# Your outputs against those in floats, for random inputs. A right layer gives a thin line. What would an overflow look like, and what a
# scale on the wrong axis?

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
x, w = torch.randn(64, 256, generator=generator), torch.randn(64, 256, generator=generator)
w_codes, w_scale = quantize_tokens(w)  # a row of a weight is treated as a token is
outputs = int8_linear(*quantize_tokens(x), w_codes, w_scale[:, 0])

picture, axes = course.plots.figure(5, 3.4, alt="Outputs of the integer layer against those in floats.")
axes.plot((x @ w.T).flatten(), outputs.flatten(), ".", markersize=3, color=course.plots.COLORS["quantized"])
axes.set(xlabel="output in floats", ylabel="output in integers")
picture

# %% [markdown] qlearn={"card": "ptq.static_scale"}
# A layer that has no time to measure its inputs needs one scale for all of them, chosen beforehand. An observer has kept a few batches of
# typical ones. Let the grid end at a **percentile** of the magnitudes: the smallest one that at least `percentile` percent of all numbers
# do not exceed. Sorted, it is the one of rank ceil(percentile / 100 · count).


# %% qlearn={"answer": "ptq.static_scale"}
def static_scale(batches, percentile):
    """The scale of an 8-bit grid that ends at a percentile of the magnitudes.

    batches: a list of float32 tensors of any shapes and sizes.  percentile: above 0, to 100.
    Returns a Python float: the limit / 127, or 1.0 where the limit is 0.

    static_scale([torch.tensor([1.0, -4.0]), torch.tensor([2.0, 100.0])], percentile=75) == 4 / 127
    """
    ### BEGIN SOLUTION
    magnitudes = torch.cat([batch.flatten() for batch in batches]).abs().sort().values
    rank = math.ceil(percentile * len(magnitudes) / 100)
    limit = magnitudes[rank - 1].item()
    return limit / 127 if limit else 1.0
    ### END SOLUTION


# %% qlearn={"check": "ptq.static_scale"}
course.check("ptq.static_scale", static_scale)

# %% [markdown]
# Your scale beside that of the package's observer, for numbers with a giant among them. It works on a histogram, as it cannot keep what
# it sees, so it may say up to one bin more.

# %% qlearn={"show": true}
numbers = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
numbers[123] = 90.0
for percentile in (90, 99, 99.9, 99.99, 100):
    observer = qlearn.methods.observers.Percentile(percentile).observe(numbers)
    print(f"{percentile:6} %: yours {static_scale([numbers], percentile):.4f}, the package's {observer.scale():.4f}, a bin {observer.histogram.width / 127:.4f}")

# %% [markdown] qlearn={"card": "ptq.smooth"}
# Some channels of `x` are much larger than others, and a scale for each channel would not come out of the sum. But a factor for each
# channel can move to the weight: divide channel j of the inputs by sⱼ, and multiply column j of the weight, with
#
# sⱼ = max|xⱼ|^alpha / max|wⱼ|^(1 − alpha)


# %% qlearn={"answer": "ptq.smooth"}
def smooth(x, weight, alpha):
    """Inputs and weight of a layer with the large channels moved from the one to the other.

    x: float32 (tokens, channels).  weight: float32 (out, channels).  alpha: 0 to 1, how much of the difficulty goes into the weight.
    Returns the two, smoothed: their product, smoothed_x @ smoothed_weight.T, is what it was. A channel that is 0 in all tokens, or
    whose column of the weight is 0, keeps the factor 1, for any alpha.

    smooth(torch.tensor([[1.0, 16.0]]), torch.tensor([[1.0, 1.0]]), alpha=0.5)  is  [[1, 4]] and [[1, 4]]
    """
    ### BEGIN SOLUTION
    x_max, w_max = x.abs().amax(0), weight.abs().amax(0)
    s = x_max**alpha / w_max ** (1 - alpha)
    s = torch.where((x_max > 0) & (w_max > 0), s, 1.0)
    return x / s, weight * s
    ### END SOLUTION


# %% qlearn={"check": "ptq.smooth"}
course.check("ptq.smooth", smooth)

# %% [markdown]
# The largest magnitude of each channel, before and after, with alpha = 0.5. Afterwards both sides should lie on one line.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
x, w = torch.randn(50, 24, generator=generator), 0.1 * torch.randn(32, 24, generator=generator)
x[:, 9] *= 60
before, after = (x, w), smooth(x, w, alpha=0.5)

picture, axes = course.plots.figure(9, 3, columns=2, sharey=True, alt="Largest magnitudes by channel: far apart before smoothing, together after it.")
for axis, title, pair in zip(axes, ("before", "after"), (before, after)):
    for name, tensor, marker in zip(("inputs", "weight"), pair, "os"):
        axis.plot(tensor.abs().amax(0), marker, label=name, fillstyle="none")
    axis.set(title=title, xlabel="channel", yscale="log")
axes[0].set_ylabel("largest magnitude")
axes[0].legend()
picture

# %% [markdown]
# ## All together
#
# The input of one layer of the bundled model, `down_proj` in block 2, in front of which the first token of a text is a giant. The model
# reads a calibration text for your observer, and then another text to be measured on.

# %% qlearn={"show": true}
layer = layers["model.layers.2.mlp.down_proj"]
texts = qlearn.evaluate.calibration_text()[:2500], qlearn.evaluate.evaluation_text()[:1500]
read = []
hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
for text in texts:
    model(tokenizer(text, return_tensors="pt").input_ids)
hook.remove()
seen, x = read
exact = x @ layer.weight.T
print(f"calibrated on {len(seen)} tokens, measured on {len(x)}; the largest number of a token: {seen.abs().amax(1).max():.0f}, in the median {seen.abs().amax(1).median():.1f}")

# %% qlearn={"show": true}
def error(x, weight, scale=None):
    """The outputs of your integer layer, in % of each token off, the mean over tokens; scale: static, or None for a scale for each token."""
    if scale is None:
        codes, scales = quantize_tokens(x)
    else:
        codes, scales = torch.round(x / scale).clamp(-127, 127).to(torch.int8), torch.full((len(x), 1), scale)
    w_codes, w_scale = quantize_tokens(weight)
    outputs = int8_linear(codes, scales, w_codes, w_scale[:, 0])
    return 100 * ((outputs - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()


# %% qlearn={"show": true}
found = {
    "static, up to the largest": error(x, layer.weight, static_scale([seen], 100)),
    "static, 99.99 %": error(x, layer.weight, static_scale([seen], 99.99)),
    "a scale for each token": error(x, layer.weight),
}
smoothed, weight = smooth(seen, layer.weight, alpha=0.5)
s = weight.abs().amax(0) / layer.weight.abs().amax(0)  # the factors, read off the weight
found["static, up to the largest, smoothed"] = error(x / s, weight, static_scale([smoothed], 100))
for name, value in found.items():
    print(f"{name:36} {value:5.1f} % off")

# %% [markdown]
# One token among hundreds decides how well a static grid serves all others. You have three remedies now, and know what each of them
# costs: a pass over the inputs, a giant that is clipped, a weight with larger columns.

# %% qlearn={"show": true}
assert found["a scale for each token"] < found["static, 99.99 %"] < found["static, up to the largest"] / 3
assert found["static, up to the largest, smoothed"] < found["static, up to the largest"] / 1.5
