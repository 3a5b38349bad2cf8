# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 07 · GGUF to the byte
#
# **In 100 minutes** you will know what each byte of a GGUF file says, the file format of llama.cpp: how a block of weights is packed,
# why K-quants have scales of scales, what a name such as Q4_K_M promises, what an importance matrix buys, and how many layers to put on a
# GPU that is too small. You need lesson 03, and for the importance matrix 06.
#
# **The question.** Our model is written as a file of the kind that most people run at home, **Q4_K_M**. The 4 stands for 4 bits. How many bits do the file's tensors really take for each weight, scales and all, the text in front of them left out?

# %%
import math
import struct
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch

import qlearn
from qlearn import course, evaluate, export
from qlearn.bench import results
from qlearn.export import recipes
from qlearn.export.tensor_types import BY_ID, TENSOR_TYPES
from qlearn.formats import gguf_blocks
from qlearn.formats.gguf_blocks import fits, search
from qlearn.kernels.cpu import gguf as compiled
from qlearn.models import memory
from qlearn.models.calibration import calibration_ids
from qlearn.models.layers import linear_layers

course.predict("bits for each weight in a Q4_K_M file of our model", low=3, high=9, key="gguf-bits")

# %% [markdown]
# ## By hand: 32 numbers in 18 bytes
#
# A GGUF tensor is a row of **blocks**. In the oldest type, **Q4_0**, a block holds 32 weights: one scale d, and a code of 4 bits for each.
# Here are 32, the first 16 above, the others below:

# %%
first = [2.0, 1.75, 0.5, 0.25, 0.0, -0.25, -0.5, -1.0, -1.5, -1.75, -1.9, -2.0, 0.3, 0.375, -0.3, 0.1]
second = [-0.25, 0.0, 0.0, 0.25, 1.0, -1.0, 0.5, -0.5, 0.75, -0.75, 1.25, -1.25, 1.5, -1.5, 0.6, -0.6]
weights = first + second
largest = max(weights, key=abs)  # with its sign; the first, where several are as large
d = largest / -8
print("largest", largest, "  d", d)

# %% [markdown]
# Lesson 02 divided by 7 and used the codes −7 to 7: fifteen of sixteen. Q4_0 uses all, −8 to 7, by a trick: d gets a *sign*, so that the
# largest weight, be it positive or negative, lands on −8 exactly. What is stored is the code plus 8, so 0 to 15.

# %% tags=["nbval-check-output"]
codes = [
    min(15, int(w / d + 8.5)) for w in weights
]  # int cuts off what follows the point: with 0.5 added, it rounds
assert codes[0] == 0 and codes[4] == 8 and max(codes) == 15
course.table(weight=first, code=codes[:16])

# %% [markdown]
# d is negative here, so the codes run downwards. −1.9 and −2.0 share the code 15 with −1.75: their end of the grid is one step short. And
# a half rounds up: 0.375 / −0.25 is −1.5, its code 7.
#
# Now the bytes. d becomes a float16, 1 sign bit, 5 of exponent, 10 of mantissa (lesson 01); its low byte comes first, as everywhere in
# GGUF. Then 16 bytes of two codes each, and these are not neighbours: byte j holds code j in its low half and code j + 16 in its high half.

# %% tags=["nbval-check-output"]
sign, power = 1, -2  # -0.25 is -1 * 2**-2 * (1 + 0/1024)
half = sign << 15 | (power + 15) << 10 | 0
pairs = [codes[j] | codes[j + 16] << 4 for j in range(16)]
block = bytes([half & 255, half >> 8, *pairs])
assert len(block) == 18 and 8 * len(block) / 32 == 4.5
print(block.hex(" "))

# %% [markdown]
# 18 bytes, 4.5 bits per weight. (Halves of a byte are called **nibbles**.) Why j and j + 16? A processor loads 16 bytes into a register,
# and one AND gives it the first 16 codes in order, one shift the others. Back again:

# %% tags=["nbval-check-output"]
(d16,) = struct.unpack("<e", block[:2])  # e: a float16
low, high = [byte & 15 for byte in block[2:]], [byte >> 4 for byte in block[2:]]
assert d16 == -0.25 and low + high == codes
course.table(weight=second, code=high, read_back=[d16 * (code - 8) for code in high])

# %% [markdown]
# ## The ladder
#
# The same for all blocks of a real layer, 196,608 weights. First the loop, in float32 and multiplying by 1 / d, because llama.cpp's C code
# does: a code that is nearly half-way may depend on it.

# %%
model, tokenizer = qlearn.load_model()
up = model.model.layers[2].mlp.up_proj.weight.numpy()  # float32 (768, 256)


# %%
def loop(x):
    out = bytearray()
    for group in x.reshape(-1, 32):
        d = max(group, key=abs) / np.float32(-8)
        inverse = 1 / d if d else np.float32(0)
        codes = [min(15, int(w * inverse + np.float32(8.5))) for w in group]
        out += struct.pack("<e", d) + bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    return np.frombuffer(out, np.uint8)


# %% [markdown]
# NumPy does all blocks at once. (A block of 32 zeros has d = 0; then 0 takes the place of 1 / d, and every code is 8.)


# %%
def vectorized(x):
    groups = x.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)  # (blocks, 1)
    d = largest / np.float32(-8)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d != 0)
    codes = np.minimum(15, (groups * inverse + np.float32(8.5)).astype(np.uint8))
    return np.hstack([d.astype(np.float16).view(np.uint8), codes[:, :16] | codes[:, 16:] << 4]).ravel()


# %%
RUNGS = {
    "loop": loop,
    "NumPy": vectorized,
    "package": gguf_blocks.quantize,
    "package, compiled": compiled.quantize,
}
for encode in RUNGS.values():
    encode(up[:1])  # the first call of the last one loads compiled code
found = {}
for name, encode in RUNGS.items():
    began = time.perf_counter()
    found[name] = encode(up).ravel()
    print(f"{name:18} {1000 * (time.perf_counter() - began):7.1f} ms")
assert all(np.array_equal(found["loop"], other) for other in found.values())

# %% [markdown]
# ## Parity
#
# llama.cpp's authors publish a Python package, `gguf`. It writes the simple types, and reads all. (`_0` has a scale, `_1` a minimum as well; MXFP4 holds small floats, TQ three values a weight.)

# %% tags=["nbval-check-output"]
for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"):
    theirs = gguf.quants.quantize(up, gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, compiled.quantize(up, name))
    print(f"{name:6} {theirs.nbytes:7} bytes, all equal")

# %%
for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
    blocks = compiled.quantize(up, name)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, gguf_blocks.dequantize(blocks, name))

# %% [markdown]
# The K-quants, which come next, it can only read: these bytes were compared with those of llama.cpp's own C code, on 16 million weights
# each. The results file says how many blocks differ, and how fast each is on one thread. ("with": with an importance matrix, of which more below; then the simple types search, too, and are slower.)

# %%
record = results.read("gguf_blocks")
print(record["date"], "·", record["processor"], "·", record["command"])
print("type   importance   blocks  differ    llama.cpp  compiled  readable  (MB of float32 a second)")
for row in record["rows"]:
    speeds = [row["megabytes_per_second"][name] for name in ("ggml", "compiled", "readable")]
    importance = "with" if row["imatrix"] else ""
    differ = sum(row["differing"].values())
    print(
        f"{row['type']:6} {importance:10} {row['blocks']:8} {differ:7}    "
        + "".join(f"{speed:9.0f} " for speed in speeds)
    )
    assert differ == 0

# %%
speed = {row["type"]: row["megabytes_per_second"] for row in record["rows"] if not row["imatrix"]}
assert speed["Q4_0"]["ggml"] > 3 * speed["Q4_0"]["compiled"] and speed["Q4_K"]["compiled"] > 3 * speed["Q4_K"]["ggml"]

# %% [markdown]
# No block differs. In Q4_0, a few operations for each weight, C is more than three times as fast as our compiled code; in Q4_K, where the
# work is a search, it is the other way round. (More of the search below.)
#
# ## Scales of scales
#
# A float16 for each 32 weights is half a bit a weight. Weights that reach further to one side of zero than to the other would like a minimum as well, as in lesson 03, and fewer of them should share it. What would two float16 for each 16 weights cost, and what do two small integers for each 32?

# %% tags=["nbval-check-output"]
print("codes of 4 bits, a float16 for each 32 weights:       ", 4 + 16 / 32)
print("codes of 4 bits, two float16 for each 16 weights:     ", 4 + 2 * 16 / 16)
print("Q4_K: two float16 for 256, two 6-bit numbers for 32:  ", 4 + 2 * 16 / 256 + 2 * 6 / 32)
assert 8 * TENSOR_TYPES["Q4_K"].nbytes / 256 == 4 + 2 * 16 / 256 + 2 * 6 / 32 == 4.5

# %% [markdown]
# **K-quants** quantize the scales too. 256 weights make a **super-block**, cut into **sub-blocks** (eight of 32 in Q4_K). A sub-block's
# scale and minimum are small integers, times two float16 for the whole super-block:
#
# w = d · scale · code − dmin · min
#
# Both integers are at least 0, so the grid begins at zero or below it, never above. For what Q4_0 costs, Q4_K has a minimum as well, and its writer searches (below). What do the two bring together?


# %%
def mean_square(blocks, type):
    return float(((gguf_blocks.dequantize(blocks, type) - up) ** 2).mean())


by_type = {type: mean_square(compiled.quantize(up, type), type) for type in ("Q4_0", "Q4_K")}
print(f"squared error of Q4_K: {by_type['Q4_K'] / by_type['Q4_0']:.2f} of Q4_0's, at 4.5 bits both")
assert 0.6 < by_type["Q4_K"] / by_type["Q4_0"] < 0.8

# %% [markdown]
# ## 144 bytes
#
# | bytes | what |
# |---|---|
# | 0–1, 2–3 | d and dmin, float16 |
# | 4–15 | 8 scales and 8 minimums, 6 bits each |
# | 16–143 | 256 codes of 4 bits |
#
# Sixteen numbers of 6 bits fill 12 bytes exactly. Here they are, of a row of our layer:

# %% tags=["nbval-check-output"]
block = compiled.quantize(up[0], "Q4_K")  # uint8 (144,)
d, dmin = block[:4].view(np.float16).astype(np.float32)
twelve = [int(byte) for byte in block[4:16]]
print("d", d, "  dmin", dmin)
for start in (0, 4, 8):
    print(f"bytes {4 + start:2}-{7 + start:2}  ", *(f"{byte:08b}" for byte in twelve[start : start + 4]))

# %% [markdown]
# The first four scales are the low 6 bits of bytes 4–7, the first four minimums those of bytes 8–11. Two bits are left in each of
# these eight. The other four scales and minimums are cut in two. A scale's low 4 bits lie in the low half of one of bytes 12–15, a minimum's in the high half; the high 2 bits fill what was left, of bytes 4–7 for scales, of 8–11 for minimums. So scale 5 is this:

# %% tags=["nbval-check-output"]
high, low = twelve[1] >> 6, twelve[9] & 15  # bytes 5 and 13 of the block
print(f"scale 5: {high:02b} and {low:04b} make {high << 4 | low:06b}, that is {high << 4 | low}")
a, b, c = twelve[:4], twelve[4:8], twelve[8:]
scales = [byte & 63 for byte in a] + [c[i] & 15 | a[i] >> 6 << 4 for i in range(4)]
mins = [byte & 63 for byte in b] + [c[i] >> 4 | b[i] >> 6 << 4 for i in range(4)]
course.table(scale=scales, minimum=mins)

# %% [markdown]
# The largest of each is 63, for d and dmin were chosen so. The codes: 32 bytes for two sub-blocks, the first in the low halves, the second
# in the high halves.


# %%
def decode(block, six_bits):
    """A Q4_K block -> float32 (8, 32). six_bits: uint8 (12,) -> scales, minimums."""
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    scales, mins = (np.float32(numbers)[:, None] for numbers in six_bits(block[4:16]))
    qs = block[16:].reshape(4, 32)
    codes = np.stack([qs & 15, qs >> 4], axis=1).reshape(8, 32)
    return d * scales * codes - dmin * mins


# %%
def six_bits(twelve):
    a, b, c = twelve[:4], twelve[4:8], twelve[8:]
    return [*(a & 63), *(c & 15 | a >> 6 << 4)], [*(b & 63), *(c >> 4 | b >> 6 << 4)]


assert six_bits(block[4:16]) == (scales, mins)
assert np.array_equal(decode(block, six_bits).ravel(), gguf_blocks.dequantize(block, "Q4_K"))

# %% [markdown]
# That is all of Q4_K. The sisters differ in their numbers: Q6_K has 16 sub-blocks with a scale of 8 bits and no minimum, Q2_K 16, each with a scale and a minimum of 4 bits. A code of Q6_K does not fit into half a byte, so it is spread: 4 bits here, 2 there.
#
# ## Look inside
#
# Before you move the slider: in which bytes is the minimum of sub-block 6? Which weight shares a byte with weight 0? And in Q6_K, how many
# places does a code lie in, and where is d? (Rest the mouse on a byte to see all that lies in it.)

# %%
explorer = course.widgets.hex_view(up[0])
explorer.select("scales[5]")
explorer

# %% tags=["nbval-check-output"]
for type, parts in {"Q4_K": ["mins[6]", "codes[0]", "codes[32]"], "Q6_K": ["codes[0]", "d"]}.items():
    explorer.controls["bytes"].value = type
    for part in parts:
        explorer.select(part)
        print(explorer.summary)

# %% [markdown]
# **What you should have seen.** Minimum 6 is in the high half of byte 14 and the top of byte 10. Weights 0 and 32 share byte 16. A code of Q6_K lies in two places, and d comes last.
#
# ## The search
#
# A reader has no choice, a writer has: which scale, which minimum? The obvious answer is 15 steps from the smallest weight to the largest. For Q4_K llama.cpp tries 21 more, of 14 to 16 steps. Each gives codes, and once the codes are fixed, the best scale and minimum for them are a matter of **least squares**, solving two equations. A sub-block of our layer (`low` is at most 0, because a minimum is only ever subtracted):

# %%
x = up[0, 64:96].astype(float)  # a sub-block
importance = np.sqrt((x**2).mean()) + np.abs(x)  # errors of large weights count more; llama.cpp's choice
low = min(x.min(), 0)


# %%
def attempt(steps):
    """The errors with so many steps from low to the largest weight: of the plain grid, and after the fit."""
    scale = (x.max() - low) / steps
    codes = np.clip(np.round((x - low) / scale), 0, 15)
    A = np.stack([codes, np.ones_like(codes)], axis=1) * np.sqrt(importance)[:, None]
    fit, *_ = np.linalg.lstsq(A, x * np.sqrt(importance))  # scale, minimum
    return [float((importance * (x - s * codes - m) ** 2).sum()) for s, m in ((scale, low), fit)]


# %%
steps = np.linspace(12.5, 17.5, 301)
plain, fitted = np.array([attempt(n) for n in steps]).T
tried = 14 + 0.1 * np.arange(21)
picture, axes = course.plots.figure(
    8,
    3.4,
    alt="Error against the number of steps: a jagged curve for the plain grid, below it a flatter one after least squares, and 21 dots on that between 14 and 16.",
)
axes.plot(steps, plain, color=course.plots.COLORS["faint"], label="the grid as it is")
axes.plot(steps, fitted, color=course.plots.COLORS["original"], label="after least squares")
axes.plot(
    tried,
    [attempt(n)[1] for n in tried],
    "o",
    markersize=5,
    color=course.plots.COLORS["quantized"],
    label="tried",
)
axes.plot(15, attempt(15)[0], "s", color=course.plots.COLORS["marker"], label="from smallest to largest")
axes.set(xlabel="steps from the smallest weight to the largest", ylabel="weighted squared error")
axes.set(xlim=(12.9, 17.1), ylim=(0, 4e-4))
axes.legend(ncols=2, loc="upper left")
picture

# %%
obvious, best = attempt(15)[0], min(attempt(n)[1] for n in tried)
print(
    f"the obvious grid: {obvious:.2e}   the best of those tried: {best:.2e}, {best / obvious:.0%} of it"
)
assert best < 0.9 * obvious

# %% [markdown]
# The blue curve is made of steps: it changes where a code does. No formula finds its lowest point, so trying is the method. Of the real thing three details are missing here: a fitted minimum above zero becomes 0; when an attempt is better, its minimum replaces `low`, and the *next* attempts measure from there; and once scale and minimum are rounded to six bits, the codes are found anew. Leave one out, and your bytes are not llama.cpp's.
#
# What does the search gain in the whole layer, and what does it cost? The package takes other search functions. This one passes −1 as the number of the last attempt, counted from 0, so that there are none:


# %%
def no_attempts(x, w, nmax, first, step, steps, absolute=False):
    return search.fit_scale_min(x, w, nmax, first, step, -1, absolute)


untried = SimpleNamespace(**{**vars(fits), "fit_scale_min": no_attempts})
for type in ("Q5_K", "Q4_K", "Q2_K"):
    seconds = []
    for fit in (untried, fits):
        began = time.perf_counter()
        blocks = gguf_blocks.quantize(up, type, fit=fit)
        seconds.append((time.perf_counter() - began, mean_square(blocks, type)))
    (quick, without), (slow, with_search) = seconds
    print(f"{type}: {with_search / without:.0%} of the squared error, {slow / quick:.1f} times the time")
    assert 0.7 < with_search / without < 0.95

# %% [markdown]
# A tenth to a fifth of the error is gone. The time is spent once, when the file is written; no reader is slower for it.
#
# ## A whole file
#
# Now everything: the model, as Q4_K_M. And we read it with nothing but `struct`. The first 24 bytes are four letters, the version, and two counts:

# %% tags=["nbval-check-output"]
folder = tempfile.TemporaryDirectory()
path = export.write_gguf(model, tokenizer, Path(folder.name) / "model.gguf", "Q4_K_M", progress=False)
data = path.read_bytes()
magic, version, tensor_count, entry_count = struct.unpack_from(
    "<4sIQQ", data
)  # I: 4 bytes, Q: 8, both unsigned
print(data[:24].hex(" "))
print(magic, "version", version, " ", tensor_count, "tensors ", entry_count, "entries of metadata")

# %% [markdown]
# Then come the **metadata**: for each entry a key, the type of its value, the value. A string is its length in 8 bytes and that many bytes of
# UTF-8.

# %%
at = 24


def take(form):
    """Read one number, or with "s" a string, and move on."""
    global at
    if form == "s":
        length = take("Q")
        at += length
        return data[at - length : at].decode()
    (value,) = struct.unpack_from("<" + form, data, at)
    at += struct.calcsize("<" + form)
    return value


# %%
FORMS = {4: "I", 5: "i", 6: "f", 7: "?", 8: "s", 10: "Q"}  # the types that occur here; 9 is an array


def value():
    kind = take("I")
    if kind == 9:
        kind, count = take("I"), take("Q")
        return [take(FORMS[kind]) for _ in range(count)]
    return take(FORMS[kind])


# %%
metadata = {take("s"): value() for _ in range(entry_count)}
for key, entry in metadata.items():
    print(f"{key:42} {entry if not isinstance(entry, list) else f'{len(entry)} elements'}")

# %% [markdown]
# Everything that a program needs to run the model: its sizes, and the whole tokenizer, vocabulary and merges. Hence a single file. Then the
# **tensors**: name, shape, type of block, and where its bytes begin.

# %%
tensors = {}
for _ in range(tensor_count):
    name, dimensions = take("s"), take("I")
    shape = [take("Q") for _ in range(dimensions)]  # the length of a row comes first
    tensors[name] = shape[::-1], BY_ID[take("I")], take("Q")  # shape, type, offset
data_start = -(-at // 32) * 32  # tensors begin at multiples of 32

# %% tags=["nbval-check-output"]
for name in list(tensors)[:4]:
    shape, type, offset = tensors[name]
    print(f"{name:24} {str(shape):12} {type.name:5} at {data_start + offset}")

# %% [markdown]
# Take one, cut out its first block, and decode it with the function from above:

# %% tags=["nbval-check-output"]
shape, type, offset = tensors["blk.2.ffn_up.weight"]
start = data_start + offset
first_block = np.frombuffer(data[start : start + type.nbytes], np.uint8)
read = decode(first_block, six_bits).ravel()
assert type.name == "Q4_K" and np.array_equal(
    read, gguf_blocks.dequantize(compiled.quantize(up[0], "Q4_K"), "Q4_K")
)
course.table(weight=up[0, :8], read=read[:8], decimals=4)

# %% [markdown]
# It is the row of `up_proj` that we took apart. (Rows of q and k are stored in another order, because llama.cpp's rotary position embedding pairs other channels than transformers' does.) The start of the file in the hex view, which works on files too:

# %%
course.widgets.hex_view(path)

# %% [markdown]
# Is this all? The types and shapes promise a size. If each byte has been accounted for, the file is as large as header, metadata, list and
# tensors:

# %% tags=["nbval-check-output"]
promised = {name: type.size(shape) for name, (shape, type, _) in tensors.items()}
assert data_start + sum(promised.values()) == len(data)
count = sum(math.prod(shape) for shape, _, _ in tensors.values())
bits = 8 * sum(promised.values()) / count
print(f"{len(data):,} bytes = {data_start:,} before the tensors + {sum(promised.values()):,} in them")
print(f"{bits:.3f} bits for each of {count:,} weights; with the metadata {8 * len(data) / count:.3f}")

# %%
assert math.isclose(bits, export.inspect(path).bits_per_weight)
course.reveal("gguf-bits", bits, unit="bits")

# %% [markdown]
# ## Why mixes
#
# Five, not four, and not 4.5, what a Q4_K block costs. Q4_K_M is no type of block but a **recipe**: it says which tensor gets which type. The M is for medium; S and L spend less and more. This one's, layer by layer:

# %% tags=["nbval-check-output"]
by_kind = defaultdict(list)
for name, (shape, type, _) in tensors.items():
    if name.startswith("blk.") and len(shape) == 2:
        by_kind[name.split(".")[2]].append(type.name)
print(f"{'layer':12}", *(f"{i:5}" for i in range(8)))
for kind, types in by_kind.items():
    print(f"{kind:12}", *(f"{type:>5}" for type in types))
print(f"{'token_embd':12}", f"{tensors['token_embd.weight'][1].name:>5}", "  (it is the head, too)")

# %% [markdown]
# `attn_v` and `ffn_down`, our `v_proj` and `down_proj`, get Q6_K in half of the layers: the first and the last eighth, and every third between. The head gets it too. Why those matrices? The authors found it by trying. Let us try too:
# everything in Q3_K, then one kind of matrix at a time in Q6_K. By how much does the divergence from the unquantized model shrink, for
# each bit that a weight of the model costs more?

# %%
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
brief = evaluate.Reference(model, tokenizer, tokens=1024)
copy, _ = qlearn.load_model()
originals = {name: layer.weight.numpy() for name, layer in linear_layers(model).items()}


def divergence(types):
    """KLD with the matrices of each kind in a type, and the bits for each of their weights."""
    bytes = 0
    for name, layer in linear_layers(copy).items():
        blocks = compiled.quantize(originals[name], types[name.split(".")[-1]])
        layer.weight.copy_(torch.from_numpy(gguf_blocks.dequantize(blocks, types[name.split(".")[-1]])))
        bytes += blocks.nbytes
    return evaluate.compare(copy, brief).kl_divergence, 8 * bytes / sum(
        w.size for w in originals.values()
    )


# %%
base_kld, base_bits = divergence(dict.fromkeys(KINDS, "Q3_K"))
print(f"all Q3_K: KLD {base_kld:.3f} at {base_bits:.3f} bits.  In Q6_K:")
gain = {}
for kind in KINDS:
    kld, bits = divergence(dict.fromkeys(KINDS, "Q3_K") | {kind: "Q6_K"})
    gain[kind] = (base_kld - kld) / (bits - base_bits)
    print(f"  {kind:10} KLD {kld:.3f}, {bits - base_bits:.3f} more bits: {gain[kind]:.3f} for each bit")

# %%
assert gain["v_proj"] > 2 * sorted(gain.values())[-2]
assert gain["down_proj"] > max(gain["gate_proj"], gain["up_proj"]) and gain["down_proj"] < min(gain["k_proj"], gain["o_proj"])

# %% [markdown]
# The values are worth far more than all others, and they are small: two heads share each. `down_proj` is worth more than its two
# neighbours, as the recipe has it, but not as much as `k_proj` and `o_proj`, which the recipe leaves alone. It was found on other models; a recipe
# found by trying has to be tried again. (`write_gguf(..., types={"blk.*.attn_k.weight": "Q6_K"})` is how.)
#
# ## The schemes
#
# Seven recipes, each written as a file, read back and measured. Bits per weight are those of all tensors, without the metadata; MB is the whole file, and seconds are those of writing it.

# %%
reference = evaluate.Reference(model, tokenizer, tokens=4096)
rows = {"unquantized": replace(evaluate.report(model, tokenizer, reference, name="unquantized"), seconds=0)}
layer_bits = {}


def measure(name, scheme, importance=None):
    began = time.perf_counter()
    export.write_gguf(model, tokenizer, path, scheme, importance, progress=False)
    seconds = time.perf_counter() - began
    row = evaluate.report(export.read_gguf(path)[0], tokenizer, reference, name=name)
    contents = export.inspect(path)
    rows[name] = replace(
        row, bits_per_weight=contents.bits_per_weight, bytes=path.stat().st_size, seconds=seconds
    )
    matrices = [
        t for t in contents.file.tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2
    ]
    layer_bits[name] = 8 * sum(t.nbytes for t in matrices) / sum(math.prod(t.shape) for t in matrices)


# %%
for scheme in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"):
    measure(scheme, scheme)
evaluate.table(rows.values(), seconds=True)

# %%
kld = {name: row.kl_divergence for name, row in rows.items()}
assert (
    kld["Q8_0"] < kld["Q6_K"] < kld["Q5_K_M"] < kld["Q4_K_M"] < kld["Q4_0"] < kld["Q3_K_M"] < kld["Q2_K"]
)
for name in ("Q6_K", "Q5_K_M", "Q4_K_M"):
    print(
        f"{name:7} raises the perplexity by {rows[name].perplexity / rows['unquantized'].perplexity - 1:.1%}"
    )
print(
    f"KLD of Q4_K_M {kld['Q4_K_M'] / kld['Q6_K']:.0f} times that of Q6_K, of Q2_K {kld['Q2_K'] / kld['Q4_K_M']:.0f} times that of Q4_K_M"
)
print(
    f"Q4_0 to Q4_K_M: {rows['Q4_K_M'].bits_per_weight - rows['Q4_0'].bits_per_weight:.2f} more bits, {kld['Q4_K_M'] / kld['Q4_0']:.0%} of the divergence"
)
print(
    f"Q2_K: {TENSOR_TYPES['Q2_K'].bits_per_weight} bits in one of its blocks, {layer_bits['Q2_K']:.2f} in the layers,",
    f"{rows['Q2_K'].bits_per_weight:.2f} in all tensors",
)
assert 3.4 < rows["Q2_K"].bits_per_weight < 3.5 and 2.9 < layer_bits["Q2_K"] < 3
assert rows["Q5_K_M"].perplexity < 1.01 * rows["unquantized"].perplexity
assert kld["Q2_K"] > 10 * kld["Q4_K_M"] and kld["Q4_K_M"] < 0.7 * kld["Q4_0"]

# %% [markdown]
# Down to Q5_K_M perplexity rises by less than a percent. For a quarter of a bit more than Q4_0, Q4_K_M has about half the divergence. And Q2_K is no 2-bit file: its blocks cost more than 2.6 bits, its recipe gives some tensors Q3_K, and the head of a small model, in Q6_K, weighs much.
#
# ## The importance matrix
#
# So far an error counted by the size of its weight alone. Lesson 06 knows better: it counts by the inputs it meets. GPTQ used the whole Hessian; GGUF takes half its diagonal, the mean square of each input channel, called **imatrix**, as a factor in the weight of each error. We collect it from the calibration text:

# %%
importance = export.imatrix(model, tokenizer, tokens=4096)
seen = []
hook = model.model.layers[2].self_attn.k_proj.register_forward_hook(
    lambda module, args, output: seen.append(args[0])
)
model.model(calibration_ids(tokenizer, tokens=4096))
hook.remove()
hessian = 2 * seen[0].flatten(0, 1).T @ seen[0].flatten(0, 1) / 4096
mean_squares = importance["blk.2.attn_k.weight"]
print(
    "imatrix, the largest of 256 channels, in units of the median:",
    [round(float(v)) for v in sorted(mean_squares / np.median(mean_squares))[-3:]],
)
np.testing.assert_allclose(mean_squares, hessian.diagonal() / 2, rtol=1e-3)

# %%
for scheme in ("Q4_K_M", "Q3_K_M", "Q2_K"):
    measure(f"{scheme}, imatrix", scheme, importance)
kld = {name: row.kl_divergence for name, row in rows.items()}
for scheme in ("Q4_K_M", "Q3_K_M", "Q2_K"):
    with_it = rows[f"{scheme}, imatrix"]
    assert (
        with_it.bits_per_weight == rows[scheme].bits_per_weight
        and 0.5 < with_it.kl_divergence / kld[scheme] < 0.9
    )
    print(
        f"{scheme:7} perplexity {rows[scheme].perplexity:6.2f} -> {with_it.perplexity:5.2f}   KLD {kld[scheme]:.3f} -> {with_it.kl_divergence:.3f}, {with_it.kl_divergence / kld[scheme]:.0%} of it"
    )

# %% [markdown]
# One channel stands out by far, as in lesson 06. A fifth to a third of the divergence is gone, and no tensor has grown: only other numbers are in them. No reader need know. But an imatrix makes no more codes than there are.
#
# ## What llama.cpp says
#
# All this is worth little if llama.cpp finds another model in the file. The results file compares, on the whole evaluation text: the perplexity
# that `llama-perplexity` prints for our file, ours for the model read back from it (both count the second half of each 512 tokens only, and the whole text is harder than its first 4,096 tokens), and whether `llama-quantize` makes the same bytes.

# %%
record = results.read("gguf_files")
print(record["date"], "·", record["llama_cpp"], "·", record["command"])
print(f"{'':18}bits per weight    ours  llama.cpp   ratio  same bytes")
for row in record["rows"]:
    if row["name"] == "F32" or row["name"] in rows:
        print(
            f"{row['name']:18}{row['bits_per_weight']:15.3f} {row['perplexity']:7.3f}    {row['llama_perplexity']:7.3f} {row['ratio']:7.4f}  {row.get('same_bytes')}"
        )

# %%
compared = [row for row in record["rows"] if "same_bytes" in row]
highest = max(row["ratio"] for row in compared)
assert all(row["same_bytes"] for row in compared) and highest < 1.006
assert compared[0]["name"] == "F32" and abs(compared[0]["ratio"] - 1) < 1e-5
assert all(row["ratio"] > 1 for row in compared if row["scheme"] not in ("F32", "F16"))
print(f"{len(compared)} files, each with the bytes of llama-quantize;")
print(f"llama.cpp's perplexity is higher by at most {highest - 1:.2%}")

# %% [markdown]
# The bytes are the same, every one. Of the unquantized model both find the same perplexity. Of a quantized one llama.cpp's is a little higher, for it rounds the inputs to 8 bits as well.
#
# ## More than fits: offloading
#
# To write a token, a model reads each of its weights once. So the time for a token is bytes / bandwidth. What does not fit on the GPU stays
# in main memory. Measured, on a model of the shape of Llama-3.1-8B in 16 bits: accelerate copies what is missing for each token anew, over the **bus** between the two memories. Predicted is the sum of two times, the bytes on the GPU by its bandwidth, those left by the bus's.

# %%
record = results.read("offload_h200")
speeds = record["bandwidths"]
print(record["date"], "·", record["gpu"], "·", record["command"])
print(
    f"the GPU reads {speeds['vram_bandwidth'] / 1e9:.0f} GB a second, the bus carries {speeds['bus_bandwidth'] / 1e9:.1f}"
)
for row in record["rows"]:
    if not row["model"].startswith("Llama"):
        continue
    print(
        f"{row['left']:2} of 32 layers left in main memory: {row['predicted']:.3f} s for a token predicted, {row['seconds']:.3f} measured"
    )
    assert row["left"] == 0 or row["predicted"] < row["seconds"] < 2.1 * row["predicted"]
llama = {row["left"]: row for row in record["rows"] if row["model"].startswith("Llama")}
assert llama[1]["seconds"] > 3 * llama[0]["seconds"] and llama[0]["seconds"] > 5 * llama[0]["predicted"]

# %% [markdown]
# A single layer of 32 left behind makes a token more than three times slower. The prediction is a bound: it leaves out what Python needs to start each
# operation, which is most of the time when everything is on the GPU.
#
# llama.cpp does better than copy: it lets the processor compute those layers where they lie. Its knob is `n_gpu_layers`, counted from the end: first the head, then the last
# layer, the one before, and so on. How many fit depends on the scheme. The layers of an 8-billion model, by the recipes:

# %%
SHAPES = {
    "attn_q": (4096, 4096),
    "attn_k": (1024, 4096),
    "attn_v": (1024, 4096),
    "attn_output": (4096, 4096),
    "ffn_gate": (14336, 4096),
    "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
}
shapes = {f"blk.{i}.{kind}.weight": shape for i in range(32) for kind, shape in SHAPES.items()} | {
    "output.weight": (128256, 4096),
    "token_embd.weight": (128256, 4096),
}


def sizes(scheme):
    """Bytes of the 32 layers, and of the head."""
    types = recipes.tensor_types(scheme, shapes, recipes.Dimensions("llama", 32, 32, 8))
    size = {name: TENSOR_TYPES[types[name]].size(shape) for name, shape in shapes.items()}
    layers = [sum(size[f"blk.{i}.{kind}.weight"] for kind in SHAPES) for i in range(32)]
    return layers, size["output.weight"]


# %% [markdown]
# Each layer on the GPU brings its **key-value cache** along, which keeps what attention has to remember of earlier tokens. Suppose a card with 6 GB free that
# reads 300 GB a second, and main memory of 50 GB a second: plausible figures, not measured ones. The cache is that of 4,096 tokens. (Of the
# embedding a token reads one row; it stays in main memory.)

# %%
card = memory.Machine(vram_bandwidth=300e9, ram_bandwidth=50e9, bus_bandwidth=12e9)
config = SimpleNamespace(num_key_value_heads=8, num_attention_heads=32, hidden_size=4096)
cache = 4096 * memory.cache_bytes_per_token(config)
curves = {}
for scheme in ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K"):
    layers, head = sizes(scheme)
    order = np.array([head, *(layer + cache for layer in layers[::-1])])
    on_gpu = np.concatenate([[0], np.cumsum(order)])
    speed = 1 / (on_gpu / card.vram_bandwidth + (on_gpu[-1] - on_gpu) / card.ram_bandwidth)
    n = int((on_gpu[1:] <= 6e9).sum())
    curves[scheme] = speed, n
    print(
        f"{scheme:7} {on_gpu[-1] / 1e9:5.2f} GB to read for a token: n_gpu_layers {n:2} of 33, {speed[n]:5.1f} tokens a second; none {speed[0]:4.1f}, all {speed[-1]:.1f}"
    )
assert (
    curves["Q4_K_M"][1] == 33 > curves["Q6_K"][1]
    and curves["Q4_K_M"][0][33] > 2 * curves["Q6_K"][0][curves["Q6_K"][1]]
)

# %%
picture, axes = course.plots.figure(
    8,
    3.4,
    alt="Tokens a second against the layers on the GPU: flat at first, steep at the end; only the smaller schemes reach the steep part within 6 GB.",
)
for (scheme, (speed, n)), color in zip(curves.items(), ("faint", "other", "original", "quantized")):
    axes.plot(range(n + 1), speed[: n + 1], color=course.plots.COLORS[color], label=scheme)
    axes.plot(range(n, 34), speed[n:], ":", color=course.plots.COLORS[color])
    axes.plot(n, speed[n], "o", color=course.plots.COLORS[color])
axes.set(
    xlabel="n_gpu_layers (dotted: does not fit in 6 GB)",
    ylabel="tokens a second, at most",
    ylim=(0, None),
)
axes.legend(loc="upper left")
picture

# %% [markdown]
# The curves are flat on the left and steep on the right: the last few layers bring most of the speed. So the scheme to look for is the
# largest that fits whole. Here that is Q4_K_M, and it is more than twice as fast as Q6_K, of which a few layers stay outside. Fewer bits
# help twice: there is less to read, and more of it fits. `memory.plan(model, vram, ram)` does this for a model that you have, its real
# tensors counted:

# %% tags=["nbval-check-output"]
plan = memory.plan(model, vram=20e6, ram=1e9, reserve=0)  # reserve: bytes kept free for intermediate results
print(
    f"ours, in float32 with 20 MB of GPU memory: n_gpu_layers {plan.n_gpu_layers} of 9, {plan.gpu_bytes / 1e6:.1f} MB there"
)

# %% [markdown]
# ## The board
#
# The other lessons leave the embedding as it is, and their points count the bits of the layers alone. So do these, to be comparable, though here the embedding is quantized as well, and its small error is in the loss:

# %%
course.board.add("unquantized", 16, math.log(rows["unquantized"].perplexity))
for name in ("Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "Q4_K_M, imatrix", "Q3_K_M, imatrix", "Q2_K, imatrix"):
    course.board.add(f"GGUF {name}", layer_bits[name], math.log(rows[name].perplexity))
course.board.show()

# %% [markdown]
# ## Find the bug
#
# Somebody wrote a reader for Q4_K. Nothing crashes, and many weights come out right. Here is what it makes of one block, less the true
# weights. Do not read the code too closely; look at the picture. Which bytes are misread?


# %%
def suspect(twelve):
    a, b, c = twelve[:4], twelve[4:8], twelve[8:]
    scales = [*(a & 63), *(c & 15 | a >> 6 << 4)]
    mins = [*(b & 63), *(c >> 4 | a >> 6 << 4)]
    return scales, mins


# %%
row = 5
block = compiled.quantize(up[row], "Q4_K")
picture, axes = course.plots.figure(
    8,
    3,
    alt="Errors of 256 weights: small noise in the first half, in the second half whole sub-blocks are shifted up or down.",
)
for read, color, label in ((suspect, "error", "suspect"), (six_bits, "faint", "right")):
    axes.plot(
        decode(block, read).ravel() - up[row], color=course.plots.COLORS[color], linewidth=1, label=label
    )
axes.set(xlabel="weight", ylabel="read, less the weight", xticks=range(0, 257, 32))
axes.legend(loc="lower left")
picture

# %% [markdown]
# Look at two things. *Where*: sub-blocks 0 to 3 are right, some of 4 to 7 are wrong. *How*: each is shifted as a whole, and within it the
# errors are the usual noise. The codes are right, then, and so are the scales, or large weights would be off by more than small ones. A shift is a
# minimum. And what have minimums 4 to 7 that the first four have not?
#
# <details><summary>The bug</summary>
#
# Their two high bits, which lie in bytes of their own. The suspect takes them from `a`, where the scales' are: `c >> 4 | a >> 6 << 4` has to be
# `c >> 4 | b >> 6 << 4`.
# </details>
#
# Other bugs that are often made have other patterns:


# %%
def variant(change):
    """RMS errors of sub-blocks 0-3 and 4-7, the right reader's being 1; the share that is a shift."""
    errors = np.array([change(compiled.quantize(x, "Q4_K")) - x.reshape(8, 32) for x in up[:200]])
    right = np.array(
        [decode(compiled.quantize(x, "Q4_K"), six_bits) - x.reshape(8, 32) for x in up[:200]]
    )
    halves = [
        np.sqrt((errors[:, half] ** 2).mean() / (right[:, half] ** 2).mean())
        for half in (slice(4), slice(4, 8))
    ]
    return *halves, (errors.mean(-1) ** 2).mean() / (errors**2).mean()


def low_bits_only(twelve):
    scales, mins = six_bits(twelve)
    return [*scales[:4], *(twelve[8:] & 15)], [*mins[:4], *(twelve[8:] >> 4)]


# %%
BUGS = {
    "none": lambda block: decode(block, six_bits),
    "the suspect": lambda block: decode(block, suspect),
    "high bits left out": lambda block: decode(block, low_bits_only),
    "nibbles swapped": lambda block: decode(
        np.hstack([block[:16], block[16:] >> 4 | block[16:] << 4]), six_bits
    ),
    "d and dmin exchanged": lambda block: decode(block[[2, 3, 0, 1, *range(4, 144)]], six_bits),
    "minimum left out": lambda block: decode(block, lambda twelve: (six_bits(twelve)[0], [0] * 8)),
}
print(f"{'':22}sub-blocks 0-3    4-7   share of the error that shifts a sub-block")
for name, change in BUGS.items():
    first, last, shift = variant(change)
    print(f"{name:22}{first:14.1f} {last:6.1f} {shift:8.0%}")

# %% [markdown]
# *Where* and *how* tell them apart.

# %% [markdown]
# ## What you can now do
#
# - Pack and unpack a block by hand, and find any number in a K-quant's bytes.
# - Read a GGUF file with `struct`, and account for each of its bytes.
# - Say what Q4_K_M means: a recipe, five bits, more of them where they matter.
# - Explain what the search does, and what an imatrix adds to it.
# - Choose `n_gpu_layers`, and tell how fast it will be before you try.
# - Tell a reader's bug from where the errors are, and of which kind.
#
# Now write it yourself: [exercise 07](../exercises/07_gguf.ipynb). In its last cells your functions read a file.
# Back to [the map](00_start_here.ipynb).

# %%
folder.cleanup()
