# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 04 · Whole models: the weights, and what flows past them
#
# **In 80 minutes** you will know what a model weighs, to the byte; how a whole one is quantized, saved and loaded again; at how many bits
# it stops writing Python; and why the numbers that flow through a model are harder to quantize than those it is made of. You need lesson
# 03.
#
# **The question.** With its weights in 8 bits our model is as good as before. Now the inputs of every layer get 8 bits as well: one grid
# for each layer, wide enough for everything that a calibration text brought along. By how many percent does the perplexity rise?

# %%
import copy
import math
import os
import tempfile
import time

import numba
import numpy as np
import torch
import transformers

import qlearn
from qlearn import course, evaluate
from qlearn.bench import results
from qlearn.methods.observers import make_observer
from qlearn.models import QuantLinear, int8, outliers, quantize_w8a8, smoothquant
from qlearn.models.calibration import calibration_ids
from qlearn.models.layers import linear_layers

transformers.utils.logging.disable_progress_bar()

course.predict("rise of the perplexity with 8-bit inputs, in %", low=0, high=50, key="w8a8-static")

# %% [markdown]
# ## A whole model
#
# **Post-training quantization**, PTQ for short, takes a model that someone has trained and rounds it. Nothing is learnt. Find every
# linear layer, quantize its matrix, and put a layer that holds the codes in its place: that is a loop of three lines.

# %%
model, tokenizer = qlearn.load_model()
by_hand, _ = qlearn.load_model()
embedding = by_hand.get_input_embeddings().weight
for name, layer in list(by_hand.named_modules()):
    if isinstance(layer, torch.nn.Linear) and layer.weight is not embedding:
        by_hand.set_submodule(name, QuantLinear(qlearn.quantize(layer.weight, "absmax", bits=4, group_size=64)))

# %% [markdown]
# `quantize_model` does the same, once it has checked everything that could go wrong. To the last bit:

# %%
small, _ = qlearn.load_model()
qlearn.quantize_model(small, "absmax", bits=4, group_size=64, progress=False)
ids = tokenizer(evaluate.calibration_text()[:1500], return_tensors="pt").input_ids
assert torch.equal(small(ids).logits, by_hand(ids).logits)
print(small.model.layers[0])

# %% [markdown]
# Seven layers in each block are quantized. What is left as it was?

# %% tags=["nbval-check-output"]
for name, parameter in small.named_parameters():
    if "layers" not in name or "layers.0" in name:
        print(f"{name:42} {tuple(parameter.shape)}")
print("lm_head's matrix is the embedding's:", small.lm_head.weight is small.model.embed_tokens.weight)
assert small.lm_head.weight is small.model.embed_tokens.weight

# %% [markdown]
# - **Norms** are vectors, too small to matter.
# - **The embedding** is a table at the input: each token looks up its row, and nothing is multiplied. It could be quantized, and in many
#   published files it is.
# - **`lm_head`**, the last layer, gives each token of the vocabulary its score. Here it is *tied*: it is the embedding's own matrix,
#   which must be kept anyway, so a quantized copy would only be stored on top of it. Where it is not tied it is usually skipped as well:
#   no later layer evens out its errors.
#
# And what does a quantized layer hold, and do?

# %% tags=["nbval-check-output"]
layer = small.model.layers[0].mlp.down_proj
for name, buffer in layer.named_buffers():
    print(f"{name:7} {str(buffer.dtype):14} {tuple(buffer.shape)!s:10} {buffer.nbytes:7,} bytes")
assert layer.packed.nbytes == 256 * 768 // 2 and layer.scales.nbytes == 2 * 256 * 768 // 64

# %%
course.source_of(QuantLinear.forward)

# %% [markdown]
# The matrix is unpacked for each product and dropped after it. So this saves memory, and costs time.
#
# ## The memory, by hand
#
# Five numbers describe our model: vectors of 256; MLPs of 768; keys and values of 128 (2 heads of 64, each shared by two of the 4 heads of
# q); 8 blocks; 4,096 tokens in the vocabulary. Count the parameters first, then multiply by the bits.

# %% tags=["nbval-check-output"]
hidden, mlp, kv, blocks, vocabulary = 256, 768, 2 * 64, 8, 4096
linear = blocks * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp)  # q, o | k, v | gate, up, down
others = vocabulary * hidden + (2 * blocks + 1) * hidden  # the embedding | the norms
print(f"{linear:,} weights in linear layers + {others:,} others = {linear + others:,}")
assert linear + others == sum(parameter.numel() for parameter in model.parameters())

whole = 2 * (linear + others)
codes, scales, rest = linear * 4 // 8, 2 * linear // 64, 2 * others
print(f"16 bits:                {whole:10,} bytes")
print(f"4 bits, groups of 64:   {codes:10,} codes + {scales:,} scales + {rest:,} others = {codes + scales + rest:,}")
assert evaluate.model_bytes(model) == whole and evaluate.model_bytes(small) == codes + scales + rest

# %% tags=["nbval-check-output"]
print(f"the others: {others / (linear + others):.0%} of the parameters, {rest / (codes + scales + rest):.0%} of the bytes")
print(f"{evaluate.bits_per_weight(small)} bits per quantized weight, {evaluate.bits_per_weight(small, whole=True):.2f} over the whole model")
assert 0.13 < others / (linear + others) < 0.15 and 0.37 < rest / (codes + scales + rest) < 0.4

# %% [markdown]
# A 4-bit model is not a quarter of a 16-bit one. In a small model with a large vocabulary, much of it is what was not quantized.
#
# There is one more thing in memory. While a model writes, it keeps a key and a value for each token it has seen, in each block: the **KV
# cache**. How many bytes for one token? And for the 1,024 tokens that our model can read?

# %% tags=["nbval-check-output"]
per_token = 2 * blocks * kv * 2  # key and value | blocks | numbers in each | bytes
cache = model(ids[:, :100]).past_key_values
held = sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))
assert held * 2 == 100 * per_token
print(f"{per_token:,} bytes a token, {1024 * per_token:,} for 1,024 tokens: {1024 * per_token / evaluate.model_bytes(small):.0%} of the small model")

# %% [markdown]
# ## Does the arithmetic hold elsewhere?
#
# The report on Gemma 3 (arXiv 2503.19786, Table 3) gives the sizes of its four models in GB. Here they are, quoted, next to parameters ×
# bits: 4 bits with a scale for each row, which cost next to nothing; 4 bits with a 16-bit scale for each 32 weights, so 4.5; and 8-bit
# floats.

# %% tags=["nbval-check-output"]
published = {1: (2.0, 0.5, 0.7, 1.0), 4: (8.0, 2.6, 2.9, 4.4), 12: (24.0, 6.6, 7.1, 12.4), 27: (54.0, 14.1, 15.3, 27.4)}
widths = {"bf16": 16, "int4, rows": 4, "int4, 32": 4.5, "fp8": 8}
print("published / computed  " + "".join(f"{name:>16}" for name in widths))
for billions, sizes in published.items():
    cells = [f"{size:5.1f} / {billions * bits / 8:5.2f}" for size, bits in zip(sizes, widths.values())]
    print(f"{billions:3} billion parameters  " + "".join(f"{cell:>16}" for cell in cells))

# %% [markdown]
# The first column is exact. In the second and the fourth, the three larger models are too heavy, all by the same: 0.6 GB and 0.4 GB. What
# is the same in a model of 4 billion and in one of 27? They see: each has the same vision encoder, of 0.4 billion parameters, and the
# smallest has none. Suppose that the encoder keeps its 16 bits. (The report does not say so. We infer it.)

# %% tags=["nbval-check-output"]
for billions, sizes in published.items():
    vision = 0.4 if billions > 1 else 0.0
    inferred = [(billions - vision) * bits / 8 + 2 * vision for bits in widths.values()]
    print(f"{billions:3} billion:", "".join(f"{size:7.1f} / {gb:5.2f}" for size, gb in zip(sizes, inferred)))
    assert all(abs(inferred[i] - sizes[i]) < 0.051 for i in (0, 1, 3))

# %% [markdown]
# Now three columns agree to the last digit printed. The third does not, in either direction: 0.7 for 0.56, 15.3 for 15.8. Something is
# stored in another way there than we think, and we could not find out what. Such a check takes minutes, and shows what a headline leaves
# out.
#
# The same table says 72.7 GB for the largest model with a cache of 32,768 tokens in bf16, and 32.8 in int4.

# %% tags=["nbval-check-output"]
print(f"cache: {72.7 - 54.0:.1f} GB in bf16, {32.8 - 14.1:.1f} GB in int4")
assert round(72.7 - 54.0, 1) == round(32.8 - 14.1, 1) > 14.1

# %% [markdown]
# It is the same in both: the cache was not quantized, and it is now larger than the weights.
#
# ## Save it, load it
#
# `save_pretrained` writes the packed tensors, and says in `config.json` how to read them. Whoever loads them needs `import
# qlearn.models`, which tells transformers of the format; you have it.

# %%
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    on_disk = os.path.getsize(os.path.join(folder, "model.safetensors"))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
same = torch.equal(again(ids).logits, small(ids).logits)
float32_others = 2 * rest  # we loaded the model in float32, and so the rest is saved
print(f"{codes + scales + float32_others:,} bytes of tensors + {on_disk - codes - scales - float32_others:,} that say what they are")
print("the same logits, bit for bit:", same)
assert same and 0 < on_disk - codes - scales - float32_others < 30_000

# %% [markdown]
# A model can also be quantized while it is loaded, matrix by matrix, so that a large one never has to be in memory in floats:

# %% tags=["nbval-check-output"]
config = qlearn.QuantizationConfig("absmax", bits=4, group_size=64)
loaded = transformers.AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32, quantization_config=config)
assert torch.equal(loaded(ids).logits, small(ids).logits)
print(type(loaded.model.layers[3].self_attn.q_proj).__name__, "and again the same logits")

# %% [markdown]
# ## At how many bits does it stop writing Python?
#
# Code is unforgiving: one bracket too many, and nothing runs. So give the model the
# header of a function and let Python's own parser judge the body. The **parse rate** is the share of 48 such headers whose completion is
# valid Python.
#
# Of large models, such as Qwen2.5-32B, it is reported that 16, 8 and 4 bits score alike, and that 2 bits fall apart. Is ours the same?
# One header first, and 40 tokens of its body. (A last statement that is cut off does not count. The weights are unpacked once, so
# that writing is quick.)

# %%
prompt = evaluate.parse.function_headers()[11]
print(prompt)
for bits in (16, 4, 3, 2):
    candidate, _ = qlearn.load_model()
    for layer in linear_layers(candidate).values() if bits < 16 else ():
        layer.weight.copy_(qlearn.quantize(layer.weight, "absmax", bits=bits, group_size=64).dequantize())
    body = evaluate.completions.complete(candidate, tokenizer, [prompt], max_new_tokens=40)[0]
    print(f"\n--- {bits} bits; parses: {evaluate.parse.parses(prompt, body)} ---{body}")

# %% [markdown]
# All 48, at all widths, take minutes, so they were measured once:

# %%
rtn = results.read("rtn")
print(f"measured on {rtn['date']} ({rtn['machine']}) by: {rtn['command']}")
rates = {row["name"]: row["parse_rate"] for row in rtn["rows"]}
alt = "Parse rate against bits: level from 16 down to 5, about as high at 4, much lower at 3, and 0 at 2."
picture, axes = course.plots.figure(8, 3.2, alt=alt)
for shift, method in ((-0.05, "absmax"), (0.05, "zero_point")):
    bits = np.array([2, 3, 4, 5, 6, 8])
    p = np.array([rates[f"{method} {b} bit"] for b in bits])
    axes.errorbar(bits + shift, 100 * p, 100 * np.sqrt(p * (1 - p) / 48), fmt="o-", capsize=3, label=method)
axes.axhline(100 * rates["unquantized"], color=course.plots.COLORS["marker"], linestyle="--", label="16 bits")
axes.set(xlabel="bits of a code, groups of 64", ylabel="parse rate (%)", ylim=(-4, 100))
axes.legend(loc="lower right")
picture

# %% [markdown]
# The bars are one standard error, √(p (1 − p) / 48). With 48 functions that is 6 or 7 points, so from 16 down to 4 bits nothing can be
# told apart.

# %% tags=["nbval-check-output"]
for method in ("absmax", "zero_point"):
    print(f"{method:10} 16 bits: {rates['unquantized']:.0%} ", *(f" {b}: {rates[f'{method} {b} bit']:.0%} " for b in (8, 4, 3, 2)))
    assert all(abs(rates[f"{method} {b} bit"] - rates["unquantized"]) < 0.14 for b in (8, 6, 5, 4))
    assert 0.15 < rates[f"{method} 3 bit"] < 0.5 and rates[f"{method} 2 bit"] == 0

# %% [markdown]
# 16, 8 and 4 bits alike, within what 48 functions can tell, and nothing at 2. But ours loses about half of its functions already at 3
# bits: a model of seven million parameters has little to spare.
#
# ## The other half of a product
#
# So far only weights were codes; a layer unpacked them and multiplied floats. To multiply integers, which hardware can do faster, its
# inputs must be codes as well. That is **W8A8**: 8 bits for weights, 8 for **activations**, the numbers that flow from layer to layer. A
# weight is known beforehand; an activation comes with the text.
#
# Two tokens, three channels, two outputs; a scale for each token, and for each row of the weight:

# %% tags=["nbval-check-output"]
x = torch.tensor([[0.501, -1.27, 0.246], [2.54, 0.29, -1.01]])  # (2 tokens, 3 channels)
w = torch.tensor([[1.27, 0.102, -0.397], [-0.635, 0.201, 0.498]])  # (2 outputs, 3 channels)
sx, sw = x.abs().amax(1) / 127, w.abs().amax(1) / 127
X, W = torch.round(x / sx[:, None]).int(), torch.round(w / sw[:, None]).int()
sums = X @ W.T
assert X.tolist() == [[50, -127, 25], [127, 14, -50]] and W.tolist() == [[127, 10, -40], [-127, 40, 100]]
assert sums.tolist() == [[4080, -8930], [18269, -20569]]
course.table(in_floats=x @ w.T, sums=sums, times_both_scales=sums * sx[:, None] * sw)

# %% [markdown]
# Why a scale for each token and each output, and not for each channel? Because of the sum:
#
# yᵢⱼ = Σₖ xᵢₖ wⱼₖ ≈ Σₖ (sᵢ Xᵢₖ) (tⱼ Wⱼₖ) = sᵢ tⱼ Σₖ Xᵢₖ Wⱼₖ
#
# A factor that depends on the token i, or on the output j, comes out of the sum. One that depended on the channel k would not, and what
# is left inside would be no product of integers. **Keep this in mind: activations cannot have a scale for each channel.**
#
# The package's layer:

# %%
course.source_of(int8.int8_linear)

# %% tags=["nbval-check-output"]
codes, scale = int8.quantize_tokens(x)
assert torch.equal(codes.int(), X) and torch.equal(scale[:, 0], sx)
y = int8.int8_linear(x, W.to(torch.int8), sw)
assert torch.equal(y, sums * sx[:, None] * sw)
print(codes.dtype, "codes and", int8.int8_matmul(codes, W.to(torch.int8)).dtype, "sums")

# %% [markdown]
# ## The ladder
#
# The sums of a real layer: a loop over Python's integers, torch with 32-bit integers, Numba, and torch's own product of 8-bit integers,
# `torch._int_mm`, which uses the instructions that processors have for this, if yours has them. Last, for comparison, the same product in
# floats.

# %%
def loop(X, W):
    """(tokens, in) and (out, in), lists of integers -> (tokens, out)."""
    return [[sum(a * b for a, b in zip(token, row)) for row in W] for token in X]


@numba.njit
def compiled(X, W):
    sums = np.zeros((len(X), len(W)), np.int32)
    for i in range(len(X)):
        for j in range(len(W)):
            for k in range(X.shape[1]):
                sums[i, j] += np.int32(X[i, k]) * np.int32(W[j, k])
    return sums


# %%
weight = model.model.layers[5].mlp.gate_proj.weight  # (768, 256)
W = qlearn.quantize(weight, "absmax", bits=8).codes()
X, _ = int8.quantize_tokens(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)))
sums = {}
for name, function, *arguments in (
    ("loop, 1 token", loop, X[:1].tolist(), W.tolist()),
    ("torch, 32 bits", lambda X, W: X.int() @ W.int().T, X, W),
    ("Numba", compiled, X.numpy(), W.numpy()),
    ("torch._int_mm", torch._int_mm, X, W.T),
    ("float32", torch.matmul, X.float(), W.T.float()),
):
    function(*arguments)  # the first call compiles, or wakes up threads
    began = time.perf_counter()
    sums[name] = torch.as_tensor(function(*arguments))
    seconds = time.perf_counter() - began
    print(f"{name:15} {seconds / sums[name].numel() / 256 * 1e9:8.3f} ns a product")

# %% [markdown]
# ## Parity
#
# As a rule 32-bit integers are slower than floats, for which torch has its fastest code. 8-bit integers are quicker on a processor with
# instructions for them, and may be the slowest on another; there the package multiplies floats. Is that exact? Compare all results with 64-bit
# integers. (Sums of 256 products stay below 2²⁴, up to where float32 holds every integer. Longer ones are split.)

# %% tags=["nbval-check-output"]
exact = X.long() @ W.long().T
assert torch.equal(sums["loop, 1 token"], exact[:1])
assert all(torch.equal(sums[name].long(), exact) for name in sums if name != "loop, 1 token")
assert 256 * 127**2 < 2**24 and int8.MAX_IN_FEATURES * 128**2 < 2**31
print("all equal; int32 is enough for", f"{int8.MAX_IN_FEATURES:,} channels")

# %% [markdown]
# ## Dynamic or static?
#
# The scale of a token can be found when it comes: **dynamic** quantization. It always fits, and costs a pass over the inputs each time.
# Or the layer has one scale for all tokens, found beforehand: **static**. While the model reads a calibration text, an
# **observer** watches a layer's inputs, then names the range:
#
# - **min-max**: up to the largest magnitude seen;
# - **percentile**: up to what 99.99 % of the numbers do not exceed;
# - **mse**: where rounding and clipping together cost least, as in lesson 03;
# - **entropy**: where a histogram of the codes resembles that of the numbers most, by KL divergence.
#
# Here is a quiet layer. A range that reaches further clips less, and has coarser steps.

# %%
calibration = calibration_ids(tokenizer, tokens=1024, window=256)  # 4 windows of 256 tokens
read = {}
quiet, loud = "model.layers.5.mlp.gate_proj", "model.layers.2.mlp.down_proj"
normed = "model.layers.5.self_attn.q_proj"
hooks = [
    model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: read.update({name: args[0].flatten(0, 1)}))
    for name in (quiet, loud, normed)
]
model(calibration)
for hook in hooks:
    hook.remove()

# %%
for name in ("minmax", "percentile", "mse", "entropy"):
    limit = make_observer(name).observe(read[quiet]).limit()
    print(f"{name:10} up to {limit:.1f}, clips {(read[quiet].abs() > limit).sum()} of {read[quiet].numel():,} numbers")

# %% [markdown]
# ## On the model
#
# All 56 linear layers, weights with a scale for each row, on the first 4,096 tokens of the course's text. First the weights alone, then
# W8A8.

# %%
reference = evaluate.Reference(model, tokenizer, tokens=4096)
rows = {"unquantized": evaluate.report(model, tokenizer, reference, name="unquantized")}
weights_only, _ = qlearn.load_model()
qlearn.quantize_model(weights_only, "absmax", bits=8, group_size=None, progress=False)
rows["W8"] = evaluate.report(weights_only, tokenizer, reference, name="W8, inputs in floats")


def w8a8(name, source=model, **options):
    """Quantize a copy of a model to W8A8, measure it, and keep the row."""
    quantized = quantize_w8a8(copy.deepcopy(source), calibration=calibration, progress=False, **options)
    rows[name] = evaluate.report(quantized, tokenizer, reference, name=f"W8A8 {name}")


# %%
w8a8("dynamic")
for observer in ("minmax", "percentile", "mse", "entropy"):
    w8a8(f"static, {observer}", activations="static", observer=observer)
evaluate.table(rows.values())

# %%
rise = {name: 100 * (row.perplexity / rows["unquantized"].perplexity - 1) for name, row in rows.items()}
kld = {name: row.kl_divergence for name, row in rows.items()}
course.reveal("w8a8-static", rise["static, minmax"], unit="%")
assert abs(rise["W8"]) < 0.2 and rise["dynamic"] < 1 and rise["static, minmax"] > 8
assert kld["W8"] < kld["dynamic"] < kld["static, percentile"] / 3 < kld["static, minmax"] / 12
assert kld["static, percentile"] < kld["static, mse"] < kld["static, entropy"] < kld["static, minmax"]

# %% [markdown]
# Quantizing the weights costs nothing that can be seen, and inputs with a scale for each token cost little. One scale for each layer costs a
# lot if its grid reaches up to the largest number, and much less if it ends at a percentile. So the 8 bits are not to blame: something makes
# the ranges too wide.
#
# ## Who did it?
#
# `outliers` notes the largest magnitude of each channel that a layer reads, and compares the largest of all with the median channel.

# %% tags=["nbval-check-output"]
found = outliers.outliers(model, calibration, progress=False)
for name in sorted(found, key=lambda name: -found[name].largest)[:4]:
    print(f"{name:31} channel {found[name].channel} reaches {found[name].largest:.0f}, {found[name].ratio:.0f} × the median")
print(f"{'the median of all 56 layers':31} {np.median([f.ratio for f in found.values()]):.0f} × the median")

# %% [markdown]
# Three layers stand out, and all three are `down_proj`. Look closer at the first, and at a layer behind a norm: the largest magnitude of
# each channel, and its *typical* one, the median over the tokens.

# %%
alt = "Two layers, channel by channel: in the first one channel's largest magnitude stands out and no median, in the second both do."
picture, axes = course.plots.figure(10, 3.2, columns=2, alt=alt)
for axis, name in zip(axes, (loud, normed)):
    magnitudes = read[name].abs()
    axis.plot(magnitudes.amax(0), color=course.plots.COLORS["original"], linewidth=1, label="largest")
    axis.plot(magnitudes.median(0).values, color=course.plots.COLORS["quantized"], linewidth=1, label="median token")
    axis.set(title=name.removeprefix("model."), xlabel="channel", ylabel="magnitude", yscale="log", ylim=(0.01, 400))
axes[0].legend(loc="upper right", ncols=2)
picture

# %% tags=["nbval-check-output"]
for name in (loud, normed):
    magnitudes, channel = read[name].abs(), found[name].channel
    print(f"{name}, channel {channel}: largest {magnitudes[:, channel].max():.0f}, median token {magnitudes[:, channel].median():.1f}")
largest = read[loud].abs().amax(1)  # of each token
fourth, fifth = largest.topk(5).values[3:].tolist()
print("the four largest tokens:", sorted(largest.topk(4).indices.tolist()), f"reach {fourth:.0f} or more, the fifth {fifth:.0f}")
assert fourth > 2 * fifth
assert sorted(largest.topk(4).indices.tolist()) == [256 * i for i in range(4)]

# %% [markdown]
# Two kinds of outliers, and they are not alike.
#
# - Behind the norm **one channel is large in every token**. This is what is reported of large language models (LLM.int8(), arXiv
#   2208.07339).
# - In front of `down_proj` **a few tokens are giants**, in a channel that is ordinary otherwise: the first token of each window, whatever
#   it says. Large models have these as well ("massive activations", arXiv 2402.17762). The usual explanation: the shares of attention
#   add up to 1, so a head that has nothing to look for needs a token to look at, and takes the first.
#
# A static grid that reaches the giants leaves little for all others:

# %% tags=["nbval-check-output"]
step = read[loud].abs().max() / 127
zeros = (torch.round(read[loud] / step) == 0).float().mean()
print(f"one step is {step:.1f}; {zeros:.0%} of the codes are 0")
assert step > 0.5 and zeros > 0.9

# %% [markdown]
# Is that the whole story? Leave just these three layers in floats, and see.

# %%
w8a8("static, minmax, without the three", activations="static", skip=("lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in (2, 3, 7))))
kld = {name: row.kl_divergence for name, row in rows.items()}
assert kld["static, minmax, without the three"] < kld["static, minmax"] / 5
rows["static, minmax, without the three"]

# %% [markdown]
# Three layers of 56 did most of it; and in the one that we looked at, four tokens of a thousand.
#
# ## Drag it
#
# A layer's inputs, 64 tokens and 256 channels, and an outlier that you can make: one number in one token, or one channel in all of them.
# (When the channel grows, the column of the weight that reads it shrinks, so the layer computes the same.) The dotted lines, "smoothed", are
# explained in the next section: each channel is divided by a factor of its own, and its column of the weight multiplied. Before you drag: against which of the two outliers does a grid for each token help? And smoothing?

# %%
few = read["model.layers.5.mlp.gate_proj"][64:128]
explorer = course.widgets.activation_explorer(few, model.get_submodule(quiet).weight)
explorer

# %%
for grows in ("one number", "a channel"):
    for size in (1, 64, 256):
        explorer.controls["grows"].value, explorer.controls["size"].value = grows, size
        print(explorer.summary)

# %% [markdown]
# **What you should have seen.** One number spoils the static grid, for all tokens; with a grid for each token only its own token pays. A channel spoils both. There smoothing repairs everything, whatever the size: the
# dotted lines are level. Against one number it helps the static grid, but not a grid for each token: the weight's
# larger column harms all tokens.
#
# A percentile clips the one number, and can do nothing about the channel:

# %%
explorer.controls["observer"].value, explorer.controls["size"].value = "percentile", 256
for grows in ("one number", "a channel"):
    explorer.controls["grows"].value = grows
    print(explorer.summary)

# %% [markdown]
# ## SmoothQuant
#
# A scale for each channel does not come out of the sum. But it can move to the other factor, before anything is rounded:
#
# X Wᵀ = (X / s) (W · s)ᵀ, with sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 − α)
#
# Channel j of the inputs is divided by sⱼ, and column j of the weight, which reads it, multiplied. With α = ½ both end up with the same
# maximum. Two tokens, two channels, one of them large, and a static grid of 4 bits:

# %% tags=["nbval-check-output"]
x = torch.tensor([[1.0, 16.0], [-0.5, 12.0]])
w = torch.tensor([[1.0, 0.5], [0.25, -1.0]])  # (outputs, channels)
s = x.abs().amax(0) ** 0.5 / w.abs().amax(0) ** 0.5
assert s.tolist() == [1, 4] and torch.equal((x / s) @ (w * s).T, x @ w.T)
assert torch.equal(s, smoothquant.smoothing_factors(x.abs().amax(0), [w], alpha=0.5))


def static(x):
    return qlearn.quantize(x, "absmax", bits=4, per="tensor").dequantize()


course.table(exact=x @ w.T, plain=static(x) @ w.T, smoothed=static(x / s) @ (w * s).T)

# %% tags=["nbval-check-output"]
course.table(x=x, plain=static(x), smoothed=static(x / s) * s)

# %% [markdown]
# Plain, the small channel has become 0. Smoothed, it has codes of its own, and the large one is no worse off. In return the weight has a
# larger column. It can bear that: each row has its own scale, and its numbers were of similar size before.
#
# Who divides the inputs? Whatever comes in front of the layer. A norm multiplies each channel by a weight anyway; that weight is divided once,
# and at run time nothing is left to do. The paper (SmoothQuant, arXiv 2211.10438) takes norms only. Our giants are in front of `down_proj`,
# where the rows of `up_proj` can be divided instead. `smooth` tries the operations in front of a layer until one fits.

# %%
smoothed = copy.deepcopy(model)
factors = smoothquant.smooth(smoothed, alpha=0.5, calibration=calibration, progress=False)
with torch.no_grad():
    difference = (smoothed(ids).logits - model(ids).logits).abs().max()
print(f"{len(factors)} layers smoothed; largest change of a logit: {difference:.0e}")
print("not smoothed:", {name.rpartition(".")[2] for name in found if name not in factors})
assert difference < 1e-3 and len(factors) == 48

# %% [markdown]
# `o_proj` is left as it is: two heads of q share one head of v, so a single channel of its inputs cannot be divided in front of it.

# %%
norms_only = copy.deepcopy(model)
smoothquant.smooth(norms_only, alpha=0.5, calibration=calibration, norms_only=True, progress=False)
w8a8("static, minmax, norms smoothed", norms_only, activations="static")
w8a8("static, minmax, smoothed", smoothed, activations="static")
w8a8("dynamic, smoothed", smoothed)
names = ("static, minmax", "static, minmax, norms smoothed", "static, minmax, smoothed", "static, percentile", "dynamic", "dynamic, smoothed")
evaluate.table([rows[name] for name in names])

# %%
kld = {name: row.kl_divergence for name, row in rows.items()}
assert kld["static, minmax, smoothed"] < kld["static, minmax"] / 3
assert 0.85 < kld["static, minmax, norms smoothed"] / kld["static, minmax"] < 1.1
assert kld["dynamic, smoothed"] < 0.85 * kld["dynamic"]
assert 0.7 < kld["static, minmax, smoothed"] / kld["static, percentile"] < 2

# %% [markdown]
# Smoothing removes most of the damage, and helps dynamic a little. But behind norms only, as in the paper, it does next to nothing
# here: our giants are elsewhere. And clipping them with a percentile, which costs nothing, does about as well. Our giants are
# single tokens; SmoothQuant was not made for those.
#
# ## What it was made for
#
# Channel 37 is large in every token, but less so than those of large models. So make some that are. `add_outlier` does what smoothing does, backwards:
# one channel of a norm is multiplied by 64, and the columns that read it are divided by 64. As 64 is a power of two, not a bit of the
# outputs changes.

# %%
wild = copy.deepcopy(model)
for i in range(8):
    for layer in ("self_attn.q_proj", "mlp.up_proj"):
        outliers.add_outlier(wild, f"model.layers.{i}.{layer}", channel=7, factor=64)
with torch.no_grad():
    assert torch.equal(wild(ids).logits, model(ids).logits)
print(outliers.outliers(wild, calibration[:1], progress=False)["model.layers.4.mlp.up_proj"])

# %%
w8a8("wild, dynamic", wild)
w8a8("wild, static, minmax", wild, activations="static")
evaluate.table([rows["dynamic"], rows["wild, dynamic"], rows["static, minmax"], rows["wild, static, minmax"]])

# %% [markdown]
# In floats it is the same function. In W8A8 it suffers even with a grid for each token, and with a static one its perplexity is more than
# three times what it was. Now smooth it. What do you expect: as good as the original unsmoothed, as good as the original smoothed, or in between?

# %% tags=["nbval-check-output"]
assert rows["wild, dynamic"].kl_divergence > 10 * rows["dynamic"].kl_divergence
assert rows["wild, static, minmax"].perplexity > 3 * rows["static, minmax"].perplexity
smoothquant.smooth(wild, alpha=0.5, calibration=calibration, progress=False)
pairs = list(zip(wild.parameters(), smoothed.parameters()))
same = sum(torch.equal(a, b) for a, b in pairs)
print(f"{same} of {len(pairs)} parameters are those of the original model, smoothed, to the last bit")
assert same == len(pairs)

# %% [markdown]
# It is the same model. If a channel is f times as large and its column f times as small, then s is f times as large, for any
# α, and takes the f out again. Smoothing cannot see an outlier that was merely moved from weight to activation.
#
# ## Two to four times as fast?
#
# That is the usual claim for 8-bit integers, and it is about the multiplying units. A layer must also quantize its
# inputs and scale its outputs. Here is the whole static layer: against float32 on two CPUs, one without and one with instructions that
# multiply and add 8-bit integers, and against bfloat16 on an H200, each in its fastest variant (compiled, as a CUDA graph).

# %%
records = {name: results.read(f"int8_{name}") for name in ("cpu_avx2", "cpu_vnni", "h200")}
for record in records.values():
    print(f"{record['date']} · {record['gpu'] if record['device'] == 'cuda' else record['processor']} · {record['command']}")
    print("   ", ", ".join(record["instructions"]) if record["device"] == "cpu" else f"torch {record['torch']}")


def times_as_fast(row, variant):
    """The layer in floats, as many times as long as this variant."""
    best = lambda start: min(s for name, s in row["seconds"].items() if name.startswith(start))
    return best(("float32", "bfloat16")) / best(variant)


# %%
columns = {name: [times_as_fast(row, "static") for row in record["rows"]] for name, record in records.items()}
columns["product"] = [times_as_fast(row, "product") for row in records["h200"]["rows"]]
print("times as fast:                 CPU without   CPU with    H200   H200, bare product")
for i, row in enumerate(records["h200"]["rows"]):
    size = f"{row['in']} × {row['out']}, {row['tokens']} tokens"
    print(f"{size:30} {columns['cpu_avx2'][i]:11.1f} {columns['cpu_vnni'][i]:10.1f} {columns['h200'][i]:7.1f} {columns['product'][i]:20.1f}")

# %%
without, with_them, h200 = (np.array(columns[name]) for name in records)
print(f"CPU without: at most {max(without):.2f}, median {np.median(without):.2f}")
print(f"CPU with: median {np.median(with_them[:4]):.1f} for our matrices, {np.median(with_them[4:]):.1f} for the large ones, the least of those {min(with_them[4:]):.1f}")
print(f"H200: at most {max(h200):.1f}, median {np.median(h200):.1f}; the bare product at most {max(columns['product']):.1f}, median {np.median(columns['product']):.1f}")
assert not records["cpu_avx2"]["integers"] and max(without) < 1
assert records["cpu_vnni"]["integers"] and min(with_them[4:]) > 2 > np.median(with_them[:4])
assert max(h200) < 2 and np.median(h200) < np.median(columns["product"])
assert all(row["tokens"] <= 16 for row, times in zip(records["h200"]["rows"], h200) if times > 1.2)

# %% [markdown]
# With the instructions, the claim comes true for every large matrix; our small ones gain less. Without them, every layer loses:
# `int8_matmul` tries torch's integer product once, and where that is slower than floats, or not exact, it uses floats. On the H200 no
# layer is twice as fast. Where more than a fifth is gained, the tokens are few, and the time goes into fetching a large
# weight. Programs that serve models bring kernels of their own; the claim is about those.
#
# ## The board
#
# It counts the bits of weights: 8, and a scale for each row. Activations are not stored.

# %%
course.board.add("unquantized", 16, math.log(rows["unquantized"].perplexity))
for name in ("W8", "dynamic", "static, minmax", "static, percentile", "static, minmax, smoothed"):
    course.board.add(rows[name].name, rows[name].bits_per_weight, math.log(rows[name].perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# Four W8A8 layers with the same weight and the same 256 tokens, and the errors of their outputs, in percent of the rms output. One is
# right. One keeps its sums in 16 bits. One lays the scales of the tokens along the outputs, which torch does not notice, because there
# are 256 of both. One is static, and was calibrated on a batch of padding, all zeros. Which is which? Mind the numbers on the axes.

# %%
task = course.tasks.get("ptq.int8_linear")
x, w = read[normed][256:512], model.get_submodule(normed).weight  # 256 tokens, 256 outputs
w8 = qlearn.quantize(w, "absmax", bits=8)
layer = (*int8.quantize_tokens(x), w8.codes(), w8.scales.flatten().float())
padding = torch.tensor(make_observer("minmax").observe(torch.zeros(256)).scale())
suspects = {"A": task.mutants[10].function(*layer), "B": task.reference(*layer)}
suspects |= {"C": int8.int8_linear(x, *layer[2:], padding), "D": task.mutants[2].function(*layer)}
exact = x @ w.T
errors = {name: 100 * (y - exact) / exact.square().mean().sqrt() for name, y in suspects.items()}
alt = "Errors of four layers: a sharp peak with wide tails; a narrow bell; a bell ten times as wide; a needle with an island on each side."
picture, axes = course.plots.figure(10, 2.6, columns=4, sharey=True, alt=alt)
for axis, name in zip(axes, "ABCD"):
    axis.hist(errors[name].flatten().numpy(), bins=81, color=course.plots.COLORS["error"])
    axis.set(title=name, yscale="log", xlabel="error (%)")
axes[0].set(ylabel="outputs")
picture

# %% [markdown]
# <details><summary>How to tell</summary>
#
# B is right: a narrow bell. D is right for most outputs, and far off for the rest, with nothing in between: their sums wrapped around in
# 16 bits, and came back 65,536 steps away. C is a bell like B's, only ten times as wide. Nothing was computed wrongly; its grid is too
# coarse. An observer that has seen nothing but zeros has no range to name, and falls back on the scale 1. A is neither: a sharp peak, as
# outputs near 0 are hardly wrong, and wide tails, as large ones are. Such an error is a factor: each output was multiplied with
# another token's scale.
#
# </details>
#
# What gives each of them away:

# %% tags=["nbval-check-output"]
same = torch.isclose(suspects["D"], suspects["B"]).float().mean()
print(f"D: {same:.0%} of the outputs are those of B")
print(f"C: the scale of padding is {padding:.0f}, that of the real inputs {make_observer('minmax').observe(x).scale():.2f}")
scales = layer[1].flatten()
i, j = scales.argmin(), scales.argmax()
factor = (suspects["A"] / suspects["B"])[i, j]
print(f"A: output {j} of token {i} is {factor:.2f} times too large; scale of token {j} / scale of token {i}: {scales[j] / scales[i]:.2f}")
assert 0.9 < same < 1 and torch.isclose(factor, scales[j] / scales[i]) and 7 < errors["C"].std() / errors["B"].std() < 14

# %% [markdown]
# ## What you can now do
#
# - Say what a model weighs before you load it, and find out what a published figure leaves out.
# - Quantize any model, save it, load it, and know what stayed as it was, and why.
# - Compute a layer with integers, and say which scales come out of the sum and which cannot.
# - Tell an outlier of one token from one of a channel, and what helps against each: a grid for each token, clipping, smoothing.
# - Calibrate with suspicion: what an observer has not seen, or has seen only once, decides the grid.
#
# Now write it yourself: [exercise 04](../exercises/04_ptq.ipynb). Then [05 · QAT](05_qat.ipynb): what if the model may learn to live with
# its grid? Back to [the map](00_start_here.ipynb).
