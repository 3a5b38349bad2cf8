# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 08 · BitNet: ternary weights
#
# **In 80 minutes** you will know how a network is trained whose weights are −1, 0 or 1, why its matrix products need no multiplication,
# and what it is worth beside other models of the same size in bytes. You need lessons 02, 04 and 05.
#
# **The question.** All methods so far began with a finished model. **BitNet b1.58** (2024) begins with nothing: from the first step on, every
# weight of its linear layers counts as −1, 0 or 1, times one number for the whole matrix. We trained one on the corpus of the course, and its
# twin, the same network with ordinary weights. The twin's perplexity is printed below. What is the ternary one's?

# %%
import math
import time

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import bitnet as theirs

import qlearn
from qlearn import course
from qlearn.bench import results
from qlearn.formats.gguf_blocks import BLOCK_TYPES
from qlearn.formats.integers import pack_trits
from qlearn.kernels.cpu.ternary import by_adding, pack_tiles, ternary_matmul
from qlearn.models.bitlinear import PackedBitLinear, quantize_tokens
from qlearn.training import bitnet
from qlearn.training.bitlinear import BitLinear, straight_through

record = results.read("bitnet")
rows = {row["name"]: row for row in record["rows"]}
print(f"the twin, in bfloat16: perplexity {rows['bf16']['perplexity']:.2f} on the course's text ({record['date']})")
course.predict("perplexity of the model with weights of -1, 0, 1", low=8, high=80, key="bitnet-perplexity")

# %% [markdown]
# ## By hand: twelve weights
#
# The scale is called β, and it is the mean magnitude of *all* weights of the matrix: **absmean**. Divide by it, round, and cut off what
# lies beyond −1 and 1. The result is called V:
#
# β = mean |W|,  V = clip(round(W / β), −1, 1)

# %% tags=["nbval-check-output"]
W = torch.tensor([[0.9, -0.2, 0.4, -0.5], [0.1, 0.6, -0.3, 0.0], [-0.4, 1.6, -0.7, 0.3]])
beta = W.abs().mean()
V = (W / beta).round().clamp(-1, 1)
assert torch.isclose(beta, torch.tensor(0.5)) and V.tolist() == [[1, 0, 1, -1], [0, 1, -1, 0], [-1, 1, -1, 1]]
course.table(original=W, trits=V, reconstructed=beta * V)

# %% [markdown]
# A number of three values is called a **trit**. 1.6 became 0.5, which is far off; a training that sees it can make up for it. What would absmax have done, the
# rule of lesson 02, with the one positive code that there is? Its scale is the largest magnitude, 1.6:

# %% tags=["nbval-check-output"]
largest = W.abs().max()
by_largest = (W / largest).round()
assert by_largest.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]] and int((V == 0).sum()) == 3
course.table(original=W, by_the_largest=by_largest, reconstructed=largest * by_largest)

# %% [markdown]
# Everything below half of the largest is gone: ten of twelve, where absmean lost three. In a real matrix it is worse, since its largest
# weight is further out:

# %%
model, tokenizer = qlearn.load_model()
matrix = model.model.layers[2].mlp.up_proj.weight
shares = {}
for scale in ("absmean", "absmax"):
    codes = qlearn.quantize(matrix, "ternary", bits=1.6, scale=scale).codes()
    shares[scale] = [(codes == trit).float().mean().item() for trit in (-1, 0, 1)]
    print(f"{scale:8}", "   ".join(f"{trit:2}: {share:6.1%}" for trit, share in zip((-1, 0, 1), shares[scale])))
assert max(shares["absmean"]) < 0.4 and shares["absmax"][1] > 0.9

# %% [markdown]
# ## What 1.58 means
#
# To tell three values apart takes log₂ 3 = 1.58 bits, *if all three are equally frequent*. If not, even less would do: Σ −p log₂ p, the
# **entropy**. No byte has 1.58 bits, so how is it stored? Five trits have 3⁵ = 243 states, and a byte has 256. With the digit of a trit
# being trit + 1, five of them are a number in base 3:

# %% tags=["nbval-check-output"]
digits = (V.flatten()[:5] + 1).int().tolist()
byte = sum(digit * 3**place for place, digit in enumerate(digits))
assert pack_trits(V.flatten()[:5].to(torch.int8)).tolist() == [byte]
print("trits", V.flatten()[:5].int().tolist(), "  digits", digits, "  byte", byte)
print(f"log2 3 = {math.log2(3):.4f}, five in a byte: {8 / 5} bits")

# %% [markdown]
# llama.cpp has two formats for trits, in blocks of 256 weights with a scale each; for BitNet all scales of a matrix are β:

# %% tags=["nbval-check-output"]
for name in ("TQ1_0", "TQ2_0"):
    kind = BLOCK_TYPES[name]
    print(f"{name}: {kind.weights} weights in {kind.nbytes} bytes, {8 * kind.nbytes / kind.weights} bits per weight")

# %% [markdown]
# The first packs five to a byte (most of them; 256 is no multiple of five), the second takes two bits for each, which are unpacked faster.
# The trained model ships as TQ1_0; once loaded, β is kept once, so our tables say 1.6 bits. Load it, and look at its trits:

# %%
ternary_model, _ = qlearn.export.read_gguf(bitnet.checkpoint("b158"))
layers = {name: layer for name, layer in ternary_model.named_modules() if isinstance(layer, PackedBitLinear)}
trits = torch.cat([layer.weight_codes().flatten() for layer in layers.values()])
p = torch.stack([(trits == trit).double().mean() for trit in (-1, 0, 1)])
print(f"{len(layers)} layers, {len(trits):,} trits: {p[0]:.1%} are -1, {p[1]:.1%} are 0, {p[2]:.1%} are 1")
megabytes = bitnet.checkpoint("b158").stat().st_size / 1e6
print(f"entropy {-(p * p.log2()).sum():.3f} bits;  {megabytes:.2f} MB on disk, all told")
assert 0.3 < p.min() and p.max() < 0.45 and len(layers) == 56

# %% [markdown]
# Nearly as many bits as there can be: training has used all three values.
#
# ## The ladder: a product without multiplying
#
# Inputs are rounded as well, to 8 bits. Each token has a scale of its own, as in lesson 04: with γ = max |x| of that token,
#
# X = round(127 x / γ),  y = (X Vᵀ) · β · γ / 127
#
# X Vᵀ is a product of whole numbers, and one of the two factors is −1, 0 or 1. So a number is added, subtracted or left out:

# %%
course.source_of(by_adding)

# %% [markdown]
# In NumPy, each row of V picks the columns that it adds and those that it subtracts.

# %%
def in_numpy(X, V):
    X = X.astype(np.int32)
    sums = [X[:, row == 1].sum(1) - X[:, row == -1].sum(1) for row in V]
    return np.stack(sums, axis=1)


generator = np.random.default_rng(0)
V = layers["model.layers.0.mlp.down_proj"].weight_codes().numpy()  # int8 (256, 768)
X = generator.integers(-127, 128, (1, 768), dtype=np.int8)
assert np.array_equal(in_numpy(X, V), by_adding(X, V))

# %% [markdown]
# A processor multiplies as fast as it adds, so leaving out the multiplication does not make this fast. What does is that few different things
# can happen. Five inputs meet one of 243 patterns, a byte, and 256 rows ask 256 times. So make a table of all 243 sums, each by one addition to an earlier one, and then *look up*: one more for five weights, with the byte as the index. For 256 rows the table costs as much as the look-ups; for 4,096, little.

# %%
@numba.njit
def look_up(x, bytes_of_rows):
    """x: int8, a multiple of five long.  bytes_of_rows: uint8 (rows, len(x) / 5), five trits in each."""
    sums, table = np.zeros(len(bytes_of_rows), np.int32), np.empty(243, np.int32)
    for group in range(len(x) // 5):
        table[0], size = -x[5 * group : 5 * group + 5].astype(np.int32).sum(), 1  # all five digits are 0: all subtract
        for place in range(5):
            for c in range(2 * size):  # digit 1 adds x to what digit 0 gave, digit 2 adds it once more
                table[size + c] = table[c] + x[5 * group + place]
            size *= 3
        for row in range(len(sums)):
            sums[row] += table[bytes_of_rows[row, group]]
    return sums


# %%
x5, V5 = np.pad(X[0], (0, 2)), np.pad(V, ((0, 0), (0, 2)))  # 770 is a multiple of five
packed = np.stack([pack_trits(row) for row in V5])
tiles, floats = pack_tiles(V), torch.from_numpy(V).float()
found = {
    "loop": lambda: by_adding(X, V), "NumPy": lambda: in_numpy(X, V), "look-up": lambda: look_up(x5, packed)[None],
    "package": lambda: ternary_matmul(X, tiles), "float32": lambda: F.linear(torch.from_numpy(X).float(), floats).numpy(),
}
for name, function in found.items():
    assert np.array_equal(function(), by_adding(X, V))  # this first call compiles
    times = []
    for _ in range(3 if name == "loop" else 20):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    print(f"{name:8} {1e6 * np.median(times):9.0f} µs")

# %% [markdown]
# All five are equal, to the last integer. `package` is the same idea with more care for memory, which so small a matrix does not need. What is it worth against a float32 product of torch? Measured once, with weights that must come from main memory each time:

# %%
speed = results.read("ternary_cpu")
print(f"{speed['date']} · {speed['processor']} · one thread · {speed['command']}")
print("   in ×   out   tokens   float32 (ms)   1.6 bits (ms)   ratio   2 bits (ms)   ratio")
ratios = []
for row in speed["rows"]:
    if row["threads"] == 1:
        float32, *packed = (1e3 * row["seconds"][name] for name in ("float32", "1.6 bits", "2 bits"))
        ratios.append(float32 / packed[0])
        figures = (f"{ms:15.3f} {float32 / ms:7.2f}" for ms in packed)
        print(f"{row['in']:5} × {row['out']:5} {row['tokens']:8} {float32:14.3f}", *figures)
print(f"a {32 / 1.6:.0f}th of the bytes, {min(ratios):.1f} to {max(ratios):.1f} times the speed of float32")

# %%
for row in speed["models"]:
    float32, packed = (1e3 * row["seconds"][name] for name in ("float32", "packed"))
    if row["threads"] == 1:
        print(f"a whole model of our size, {row['tokens']:2} tokens, {row['behind']:2} in the cache:", end=" ")
        print(f"float32 {float32:.1f} ms, packed {packed:.1f} ms, ratio {float32 / packed:.2f}")
assert all(row["seconds"]["packed"] > row["seconds"]["float32"] for row in speed["models"])

# %% [markdown]
# A ratio above 1 means faster than float32. Two things make it: far fewer bytes come from memory, and one look-up does the work of five
# products. It is one processor and one library, so take the order of magnitude from it. The table has the products alone, and there all sizes
# gain. Yet a whole model of our size is a little *slower*: with such small matrices, what lies around each product (rounding the inputs,
# scaling the outputs, the call from Python) costs more than it saves.
#
# ## Parity
#
# `BitLinear` is the layer that is trained. Its forward pass is what you have seen; by hand it is four lines. transformers has a BitNet as
# well, written by others:

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
layer, x = BitLinear(256, 64), torch.randn(5, 256)
beta = layer.weight.abs().mean()
V = (layer.weight / beta).round().clamp(-1, 1)
scale = 127 / x.abs().amax(-1, keepdim=True)
by_hand = ((x * scale).round() @ V.T) * (beta / scale)
assert torch.allclose(layer(x), by_hand, atol=1e-6)

with torch.compiler.set_stance("force_eager"):  # its functions ask for a compiler
    other = theirs.AutoBitLinear(256, 64, bias=False, online_quant=True)
    other.weight = layer.weight
    assert torch.allclose(layer(x), other(x), atol=1e-6)
    integers, scales = theirs.BitLinear.activation_quant(other, x)
assert torch.equal(integers, quantize_tokens(x)[0]) and torch.equal(scales, quantize_tokens(x)[1])
print("by hand, qlearn and transformers: the same outputs; the integers of x bit for bit")

# %% [markdown]
# ## Drag it
#
# absmean sets two things with one number: all below β/2 becomes 0, and all others come back as β. Drag the threshold (in percent of the mean magnitude, so absmean sits at 50), and choose what the others come back as: the scale, which is twice the threshold, or the mean of what is not 0, the best there is. The error is squared, in percent of the mean square.
#
# Before you drag: is absmean the choice with the smallest error? And what is left of 16,384 normal random numbers at 250, where absmax is?

# %%
explorer = course.widgets.ternary_explorer()
explorer

# %%
for threshold in (0, 50, 75, 250):
    explorer.controls["threshold"].value = threshold
    print(explorer.summary)
explorer.controls["value"].value = "the mean of what is not 0"
explorer.controls["threshold"].value = 0
print(explorer.summary)
assert explorer.least("the scale: twice the threshold")[0] == 75

# %% [markdown]
# **What you should have seen.** absmean is *not* the least error: a scale half as large again would be better. But the weights will be trained under this rule. At absmax one weight in twenty is left. A threshold of 0 with the mean magnitude is one bit,
# of which more below.
#
# ## It learns in front of you
#
# A small model guesses the next character of our calibration text from the eight before. Its two hidden layers are either plain or BitLinear; the last is always plain.
# Backward both roundings are passed **straight through**, as in lesson 05, but without its clip mask: a weight beyond 1.5 β gets its gradient too. β and γ count as constants:

# %%
course.source_of(BitLinear.forward)

# %%
course.source_of(straight_through)

# %%
text = qlearn.evaluate.calibration_text()
characters = sorted(set(text))
windows = torch.tensor([characters.index(c) for c in text]).unfold(0, 9, 1)
held_out, learnt = windows[:4000], windows[4000:]


def make(layer):
    torch.manual_seed(0)
    first, second = layer(128, 256, bias=False), layer(256, 256, bias=False)
    return nn.Sequential(
        nn.Embedding(len(characters), 16), nn.Flatten(), nn.RMSNorm(128), first, nn.ReLU(), nn.RMSNorm(256), second,
        nn.ReLU(), nn.RMSNorm(256), nn.Linear(256, len(characters)),
    )  # fmt: skip


def loss_of(net, batch):
    return F.cross_entropy(net(batch[:, :-1]), batch[:, -1])


# %%
def train(net, steps=300, rate=0.005):
    optimizer, generator, seen = torch.optim.AdamW(net.parameters(), weight_decay=0), torch.Generator().manual_seed(0), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of(net, learnt[torch.randint(len(learnt), (256,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weight = net[6].weight.detach()  # the second hidden layer
        seen.append((loss.item(), weight.flatten()[:400] / weight.abs().mean()))
    return [loss for loss, _ in seen], torch.stack([weights for _, weights in seen])


threads = torch.get_num_threads()
torch.set_num_threads(1)  # such small products are faster on one
plain, bit = make(nn.Linear), make(BitLinear)
curves = {"plain": train(plain), "BitLinear": train(bit)}
torch.set_num_threads(threads)

# %% [markdown]
# And what if the plain one is rounded afterwards? The same layers take its weights:

# %%
rounded = make(BitLinear)
rounded.load_state_dict(plain.state_dict())
with torch.no_grad():
    nets = {"plain": plain, "BitLinear": bit, "plain, rounded": rounded}
    losses = {name: loss_of(net, held_out).item() for name, net in nets.items()}
for name, loss in losses.items():
    print(f"{name:15} loss on held-out text {loss:.2f} nats a character")
assert losses["plain"] < losses["BitLinear"] < losses["plain"] + 0.25 < losses["plain, rounded"]

# %%
alt = "Both losses fall, BitLinear's a little above; float weights wander across the thresholds at plus and minus a half."
picture, (left, right) = course.plots.figure(10, 3.4, columns=2, alt=alt)
for (name, (values, _)), color in zip(curves.items(), ("original", "quantized")):
    left.plot(np.convolve(values, np.ones(15) / 15, "valid"), color=course.plots.COLORS[color], label=name)
left.axhline(losses["plain, rounded"], color=course.plots.COLORS["faint"], linestyle="--", label="plain, rounded")
left.set(title="loss", xlabel="step", ylabel="nats a character", ylim=(1, 4))
left.legend()
traces = curves["BitLinear"][1]
right.plot(traces[:, :14], linewidth=1)
for threshold in (-0.5, 0.5):
    right.axhline(threshold, color="black", linestyle=":")
right.set(title="14 float weights behind the trits", xlabel="step", ylabel="weight / β", ylim=(-2.5, 2.5))
picture

# %%
V = traces.round().clamp(-1, 1)
jumps = (V[1:] != V[:-1]).float()
early, late, others = jumps[:50].mean(), jumps[-50:].mean(), (V[-1] != V[0]).float().mean()
print(f"of 400 trits {others:.0%} end as another one; in a step {early:.2%} jump early on, {late:.2%} at the end")
assert early > 3 * late and others > 0.1

# %% [markdown]
# The lines between the dotted thresholds count as 0. A step of the optimizer changes V only if some line, a **latent** weight of lesson 05, crosses one; otherwise only β moves a little. Small steps do add up, but many are needed. That is why BitNet is given a higher learning rate than a plain model (here both had the same).
#
# ## Rounded afterwards, or trained
#
# Now the language models. First what the earlier lessons would do: take the finished model and round it to trits.

# %%
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
prompt = 'def add(a, b):\n    """Return the sum of a and b."""'
afterwards, _ = qlearn.load_model()
qlearn.quantize_model(afterwards, "ternary", bits=1.6, group_size=None, scale_dtype=torch.float32, progress=False)
afterwards_row = qlearn.evaluate.report(afterwards, tokenizer, reference, name="rounded to trits")
print(f"perplexity {reference.perplexity:.2f} before, {afterwards_row.perplexity:.0f} after, on 4,096 tokens. It writes:")
print(qlearn.generate(afterwards, tokenizer, prompt, max_new_tokens=20))
assert afterwards_row.perplexity > 1000

# %%
trained_row = qlearn.evaluate.report(ternary_model, tokenizer, reference, name="trained as trits")
print(f"trained as trits: perplexity {trained_row.perplexity:.2f}. It writes:")
print(prompt + qlearn.generate(ternary_model, tokenizer, prompt, max_new_tokens=40))
assert trained_row.perplexity < 1.3 * reference.perplexity

# %% [markdown]
# That is no sum, but it is Python. Above, the bundled model was rounded; in the results file, on the whole evaluation text, it is the twin:

# %%
print(f"{record['date']} · {record['command']}")
trained = ("bf16", "b158_2e-2", "b1_1e-2")
rounded = ("trits, one scale", "trits, groups of 64", "trits, one scale from the largest", "signs, one scale")
for name in (*trained, *rounded):
    row, bits = rows[name], f"{rows[name]['bits_per_weight']:7.3f} bits"
    print(f"{row['kind']:8} {name:34} {bits}  perplexity {row['perplexity']:12,.2f}   parses {row['parse_rate']:.0%}")
course.reveal("bitnet-perplexity", rows["b158_2e-2"]["perplexity"])
twin, three, two = (rows[name]["perplexity"] for name in trained)
assert 1.07 * twin < three < 1.15 * twin and three + 1 < two < 1.5 * twin
assert all(rows[name]["perplexity"] > 100 for name in rounded)

# %% [markdown]
# `b158` is the ternary model, `2e-2` its learning rate; `b1` comes below. **Parses** is the share of generated functions that Python accepts.
# On this text ternary has about a tenth more perplexity than the twin, and rounding costs everything. The network has to be one that works with three values.
#
# ## Why 8 bits for the inputs, and why one more norm
#
# In a Llama, q, k, v, gate and up read what a norm puts out; o and down do not. BitNet gives these two a norm as well, **SubLN**. Here is
# what it reads and puts out in block 4, for each token: the size (root mean square), and the largest number in units of it.

# %%
ids = torch.tensor(tokenizer(qlearn.evaluate.evaluation_text(), verbose=False).input_ids[:1024]).view(2, 512)
block, seen = ternary_model.model.layers[4], {}
attention, mlp = block.self_attn, block.mlp
watched = {
    "o, before the norm": attention.attn_sub_norm, "o, after it": attention.o_proj,
    "down, before the norm": mlp.ffn_sub_norm, "down, after it": mlp.down_proj,
}
for name, module in watched.items():
    module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
with torch.no_grad():
    logits = ternary_model(ids).logits


# %%
def error(x, bits):
    """Of rounding each token to so many bits, in % of its size."""
    scale = (2 ** (bits - 1) - 1) / x.abs().amax(-1, keepdim=True)
    return 100 * (((x * scale).round() / scale - x).square().sum() / x.square().sum()).sqrt().item()


# %%
print(f"{'':22} size: median, 1 % and 99 %   largest / size   error at 8 bits   4 bits")
for name, x in seen.items():
    size = x.square().mean(-1).sqrt()
    low, middle, high = size.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    peak = (x.abs().amax(-1) / size).median()
    print(f"{name:22} {middle:8.2f} {low:8.2f} {high:8.2f} {peak:16.1f} {error(x, 8):15.1f} % {error(x, 4):7.0f} %")
    assert error(x, 8) < 5 < 10 < error(x, 4)

# %% [markdown]
# The norm hardly makes the numbers of a token more alike, and size means nothing to a rounding with a scale for each token. What the paper wants is a known spread of the *output* from inputs of a known size. A norm gives that when training begins; then it learns a factor for each channel, and sizes vary again. (We trained none without.) The last columns say why 8 bits: at 4, more than a tenth is error.
#
# ## How it was trained
#
# Eight runs of the same network on an H200, with the same tokens in the same order; three are drawn. Held out are modules that none has seen. *linear*: the learning rate falls on a straight line.

# %%
training = results.read("bitnet_training")
runs = {run["name"]: run for run in training["runs"]}
alt = "Loss of three trainings: bf16 lowest, then ternary, then binary; held-out losses in the same order."
picture, (left, right) = course.plots.figure(10, 3.6, columns=2, alt=alt)
for name, color in (("bf16", "blue"), ("b158_2e-2", "vermillion"), ("b1_1e-2", "green")):
    left.plot(*zip(*runs[name]["curve"]), color=course.plots.PALETTE[color], linewidth=1, label=name)
    right.plot(*zip(*runs[name]["held_out_curve"]), "o-", markersize=4, color=course.plots.PALETTE[color], label=name)
left.set(title="training loss", xlabel="step", ylabel="nats a token", ylim=(1, 4))
right.set(title="on held-out modules", xlabel="step", ylabel="nats a token", ylim=(1.8, 3.2))
left.legend()
right.legend()
picture

# %%
tokens = f"{training['steps']} steps, {training['tokens_seen'] / 1e9:.2f} billion tokens each"
print(f"{training['gpu']}, {training['date']}, {tokens}")
print("run                 schedule    peak rate   perplexity held out   on the evaluation text   minutes")
for name, run in sorted(runs.items(), key=lambda item: item[1]["held_out"]["perplexity"]):
    text = f"{rows[name]['perplexity']:22.2f}"
    held = f"{run['held_out']['perplexity']:18.2f} {text} {run['seconds'] / 60:12.1f}"
    print(f"{name:19} {run['schedule']:10} {run['learning_rate']:10} {held}")
of = {name: run["held_out"]["perplexity"] for name, run in runs.items()}
assert of["b158_linear"] > of["b158_linear_6e-3"] and of["b158"] > of["b158_1e-2"] > of["b158_2e-2"]
assert of["b158"] > of["b158_linear_6e-3"]
assert abs(rows["b158"]["perplexity"] - rows["b158_linear_6e-3"]["perplexity"]) < 0.02

# %% [markdown]
# BitNet's authors advise a much higher learning rate than for floats, and **two stages**: in the second the rate drops, and weight decay, which
# pulls each weight towards 0, ends. The first advice holds here: with either schedule the higher peak won. The second does not: at 0.006, the one rate that both schedules had, two stages were a little worse here, and level on the evaluation text. Each is one run, and the twin had its usual rate only.
#
# ## The first BitNet: one bit
#
# A few months earlier (2023) BitNet had two values. The mean is taken off, and the sign is kept; the scale is the mean magnitude, as before. On our twelve weights:

# %% tags=["nbval-check-output"]
beta = W.abs().mean()
signs = torch.where(W > W.mean(), 1, -1)
assert torch.equal(qlearn.quantize(W, "binary", bits=1).dequantize(), 0.5 * signs)
assert rows["b1_1e-2"]["perplexity"] > rows["b158_2e-2"]["perplexity"] + 1 and rows["b1_1e-2"]["bits_per_weight"] < 1.01
course.table(original=W, signs=signs, reconstructed=beta * signs)

# %% [markdown]
# The mean is 0.15, so 0.1 counts as negative. It and the 0 in its row count as much as −0.7 does: with two values there is no way to say *this input does not matter*. That is what the third
# value bought. In the table above `b1` is the worse by more than a point of perplexity, and takes 0.6 bits less.
#
# ## At equal bytes
#
# So is it a bargain? Compare with models of somewhat more bytes, everything counted. (The embedding has 16 bits in all of these figures; in
# the file that ships it has 8.) Rounding (zero-point with a clip, lesson 03) and GPTQ, both in groups of 64, are applied to the twin:

# %%
small = ("b158_2e-2", "b1_1e-2", "2 bits, clipping", "2 bits, GPTQ", "3 bits, GPTQ", "bundled, QAT, 2 bits")
for name in ("bf16", "bundled", *small):
    row, price = rows[name], f"{rows[name]['bits_per_weight']:7.3f} bits {rows[name]['bytes'] / 1e6:7.2f} MB"
    print(f"{name:22} {price}   perplexity {row['perplexity']:8.2f}   parses {row['parse_rate']:.0%}")
embedding, of = 2 * model.model.embed_tokens.weight.numel(), rows["b158_2e-2"]
print(f"of the ternary model's {of['bytes'] / 1e6:.2f} MB the embedding takes {embedding / 1e6:.2f}")

# %%
for name in ("2 bits, GPTQ", "3 bits, GPTQ", "bundled, QAT, 2 bits"):
    more, worse = (rows[name][key] / of[key] - 1 for key in ("bytes", "perplexity"))
    print(f"{name:20} against the ternary model: {more:+.0%} bytes, {worse:+.0%} perplexity")
    assert more > 0.1 and (worse > 0) == ("GPTQ" in name)
assert rows["bundled"]["perplexity"] > rows["bf16"]["perplexity"]
assert 0.15 < rows["bundled, QAT, 2 bits"]["bytes"] / of["bytes"] - 1 < 0.25

# %% [markdown]
# GPTQ (lesson 06) takes more bytes, at 2 bits and at 3, and is worse, at 3 bits by little: there BitNet wins. But look at the last row. The bundled model, as floats no
# better than the twin, and then trained under the rounding for five minutes on an H200 (lesson 05), comes out slightly ahead, at 2.5 bits for each weight and for
# a fifth more bytes. So neither beats the other. But whoever has a good float model need not begin with nothing.
#
# And a float model of as many bytes? With our eight layers it would have to be this narrow:

# %%
budget = rows["b158_2e-2"]["bytes"] / 2  # parameters of 16 bits
width = max(d for d in range(4, 256, 4) if 8 * 12 * d**2 + 4096 * d <= budget)  # a block has 12 d² weights
assert 8 * 12 * 256**2 == sum(layer.quantized.shape[0] * layer.quantized.shape[1] for layer in layers.values())
narrow = 8 * 12 * width**2 / 1e6
print(f"width {width} in place of 256, {narrow:.1f} million weights in its layers in place of {len(trits) / 1e6:.1f}")

# %% [markdown]
# We have not trained that one. The authors report that BitNet equals a float model of its own *number of weights* from 3 billion on. Ours, which
# is far smaller, does not.
#
# ## The board

# %%
course.board.add("unquantized", 16, math.log(reference.perplexity))
course.board.add("rounded to trits", afterwards_row.bits_per_weight, math.log(afterwards_row.perplexity))
course.board.add("BitNet, trained as trits", trained_row.bits_per_weight, math.log(trained_row.perplexity))
course.board.show()

# %% [markdown]
# The zero line is the bundled model, which is not BitNet's twin; their architectures differ by two norms in a block.
#
# ## Find the bug
#
# A colleague reads our file, where the weights come out as the floats β · V, and packs them anew by this function. *Every trit is right*. And yet the
# model is bad. Here are the errors of the weights of one layer. What do they tell?

# %%
def suspect(weight):
    """Weights that are -β, 0 or β -> trits and their scale."""
    beta = weight.abs().mean()
    return (weight / beta).round().clamp(-1, 1), beta


weight = layers["model.layers.4.mlp.up_proj"].quantized.dequantize()
V, beta = suspect(weight)
assert torch.equal(V.to(torch.int8), layers["model.layers.4.mlp.up_proj"].weight_codes())
off = (beta * V - weight).flatten() / weight.abs().max()
picture, axes = course.plots.figure(7, 2.8, alt="Errors of the weights: three spikes, one at zero and two beside it.")
axes.hist(off, bins=81, range=(-0.5, 0.5), color=course.plots.COLORS["error"])
axes.set(xlabel="error (in units of the file's β)", ylabel="weights")
picture

# %%
damaged, _ = qlearn.export.read_gguf(bitnet.checkpoint("b158"))
for layer in damaged.modules():
    if isinstance(layer, PackedBitLinear):
        layer.scales.copy_(suspect(layer.quantized.dequantize())[1])
with torch.no_grad():
    bad = damaged(ids).logits
for name, values in (("the file", logits), ("the suspect's", bad)):
    perplexity = F.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
    print(f"{name:14} perplexity {perplexity:.1f} on 1,024 tokens")
assert beta < 0.67 * weight.abs().max() and torch.isclose(beta, weight.abs().max() * (V != 0).float().mean())

# %% [markdown]
# <details><summary>The answer</summary>
#
# Three spikes: the zeros are right, and all others are too small by one and the same share, more than a third. That is no rounding error but a wrong
# scale. absmean was applied a second time, to weights that are rounded already, and their mean magnitude is β times the share that is not 0. For these
# the *largest* magnitude is right, which is what llama.cpp's TQ1_0 takes.
#
# Integers that are all correct prove nothing about the scales beside them.
#
# </details>

# %% tags=["nbval-check-output"]
again = qlearn.quantize(weight, "ternary", bits=1.6, scale="absmax", scale_dtype=torch.float32)
assert torch.equal(again.dequantize(), weight)
print("by the largest magnitude: the same weights, bit for bit")

# %% [markdown]
# ## What you can now do
#
# - Round a matrix to trits by absmean, and say why not by absmax, and why the least error is not the point.
# - Pack five trits into a byte, and multiply by them with a table and additions.
# - Write BitLinear forward and backward, with its two scales in the right places.
# - Say what BitNet wins and what it does not: against rounding, against QAT, at equal bytes.
# - Tell a wrong scale from a wrong code by the errors' histogram.
#
# Now write it yourself: [exercise 08](../exercises/08_bitnet.ipynb). In its last cells a layer learns with nothing but your own functions.
# Back to [the map](00_start_here.ipynb).
