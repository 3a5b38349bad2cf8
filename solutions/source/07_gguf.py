# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 07 · GGUF to the byte: the exercise
#
# Six short functions, about 55 minutes: you pack a block, unpack another, read a file's header, search for a scale, and decide which layers
# go to the GPU. The lesson is [07 · GGUF to the byte](../lessons/07_gguf.ipynb). In the last cells your functions open a real file, and
# a layer in it is decoded by nobody but you.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("gguf.pack_q4_0")` helps.

# %%
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np

import qlearn
from qlearn import course, export

# %% [markdown] qlearn={"card": "gguf.pack_q4_0"}
# The 18 bytes of Q4_0. d is the weight with the largest magnitude (the first of them, if there are several), with its sign, divided by −8.
# The code of w is w / d + 8.5 with what follows the point cut off, at most 15. Divide by multiplying with 1 / d, all in float32. Then come the bytes: d as float16, low byte first, and
# 16 bytes of codes, number j and number j + 16 in a byte, number j in the low half. A block of zeros has d = 0 / −8, which is −0.0, and every code is 8.


# %% qlearn={"answer": "gguf.pack_q4_0"}
def pack_q4_0(weights):
    """32 weights -> the 18 bytes of a Q4_0 block.

    weights: float32 array (32,).
    Returns uint8 array (18,).

    The first bytes for [-2.0, 0.25, 0, 0, ...] are 0, 52 (together 0.25 as float16), 128, 137, 136, 136 ...
    """
    ### BEGIN SOLUTION
    d = weights[np.abs(weights).argmax()] / np.float32(-8)
    inverse = 1 / d if d else np.float32(0)
    codes = np.minimum(15, (weights * inverse + np.float32(8.5)).astype(np.uint8))
    return np.concatenate([np.float16([d]).view(np.uint8), codes[:16] | codes[16:] << 4])
    ### END SOLUTION


# %% qlearn={"check": "gguf.pack_q4_0"}
course.check("gguf.pack_q4_0", pack_q4_0)

# %% [markdown]
# The package `gguf` by llama.cpp's authors makes the same bytes, for every block of a layer of our model:

# %% qlearn={"show": true}
model, tokenizer = qlearn.load_model()
up = model.model.layers[2].mlp.up_proj.weight.numpy()  # (768, 256)
theirs = gguf.quants.quantize(up, gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
yours = np.stack([pack_q4_0(block) for block in up.reshape(-1, 32)])
print(f"{len(yours)} blocks, {(yours == theirs).all(1).sum()} of them equal to the package gguf's")
assert np.array_equal(yours, theirs)

# %% [markdown] qlearn={"card": "gguf.six_bits"}
# Q4_K keeps 8 scales and 8 minimums of 6 bits in 12 bytes. Call the bytes a (the first four), b (the next four) and c (the last four). Scale i
# of the first four is the low 6 bits of a[i], and minimum i those of b[i]. Of the other four, number 4 + i: the low 4 bits of the scale are
# the low half of c[i], those of the minimum its high half; the two high bits are the two high bits of a[i] for the scale, and of b[i]
# for the minimum.


# %% qlearn={"answer": "gguf.six_bits"}
def six_bits(twelve):
    """The scales and the minimums of a Q4_K block.

    twelve: uint8 array (12,).
    Returns two arrays of integers, scales (8,) and mins (8,), each number 0 to 63.
    """
    ### BEGIN SOLUTION
    a, b, c = twelve[:4], twelve[4:8], twelve[8:]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4])
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4])
    return scales, mins
    ### END SOLUTION


# %% qlearn={"check": "gguf.six_bits"}
course.check("gguf.six_bits", six_bits)

# %% [markdown] qlearn={"card": "gguf.decode_q4_k"}
# The whole block. Bytes 0-1 are d, bytes 2-3 are dmin, both float16, then come the twelve bytes and 128 bytes of codes. Weight i belongs to
# sub-block s = i // 32, and is d · scale[s] · code − dmin · min[s]. The codes lie in four runs of 32 bytes: the low halves of the first run
# are the codes of sub-block 0, its high halves those of sub-block 1, the second run has sub-blocks 2 and 3, and so on.


# %% qlearn={"answer": "gguf.decode_q4_k"}
def decode_q4_k(block):
    """The weights in a Q4_K block.

    block: uint8 array (144,).
    Returns float32 array (256,), computed in float32. Call your `six_bits`.
    """
    ### BEGIN SOLUTION
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    scales, mins = six_bits(block[4:16])
    qs = block[16:].reshape(4, 32)
    codes = np.stack([qs & 15, qs >> 4], axis=1).reshape(8, 32)
    return (d * scales[:, None] * codes - dmin * mins[:, None]).ravel()
    ### END SOLUTION


# %% qlearn={"check": "gguf.decode_q4_k"}
course.check("gguf.decode_q4_k", decode_q4_k)

# %% [markdown] qlearn={"card": "gguf.header"}
# A GGUF file begins with the four letters GGUF, the version (4 bytes), the number of tensors (8 bytes) and the number of metadata entries
# (8 bytes), all integers unsigned, low byte first. Each entry begins with its key, a string: its length in bytes (8 bytes), then that many bytes of UTF-8.


# %% qlearn={"answer": "gguf.header"}
def header(data):
    """What the first bytes of a GGUF file say.

    data: bytes, the beginning of a file.
    Returns (version, tensors, entries, key): three ints, and the key of the first entry, a str; "" if there are no entries.
    Raises ValueError for data that do not begin with GGUF, or have fewer than 24 bytes.
    """
    ### BEGIN SOLUTION
    if len(data) < 24 or data[:4] != b"GGUF":
        raise ValueError("this is no GGUF file")
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    if not entries:
        return version, tensors, entries, ""
    (length,) = struct.unpack_from("<Q", data, 24)
    return version, tensors, entries, data[32 : 32 + length].decode()
    ### END SOLUTION


# %% qlearn={"check": "gguf.header"}
course.check("gguf.header", header)

# %% [markdown] qlearn={"card": "gguf.fit_scale"}
# The search. Each candidate for the scale gives codes l: x / candidate rounded to the nearest integer (np.round), kept within −8 ... 7. For these codes
# least squares says which scale would be best,
#
# s = Σ w x l / Σ w l l,   with the error   Σ w (x − s l)²,
#
# w being the importance. Return the s with the smallest error, the first one if several are equally good (there is no minimum here). A candidate whose codes make Σ w l l zero is passed over; when all are, return 0.0.


# %% qlearn={"answer": "gguf.fit_scale"}
def fit_scale(x, importance, candidates):
    """The best of the least-squares scales.

    x, importance: float64 arrays (n,), importance not negative.  candidates: list of floats other than 0.
    Returns a float.

    fit_scale(np.array([2.0, -4.1]), np.ones(2), [1.0, 0.1])  is  1.02
    """
    ### BEGIN SOLUTION
    least, best = np.inf, 0.0
    for candidate in candidates:
        codes = np.clip(np.round(x / candidate), -8, 7)
        total = (importance * codes * codes).sum()
        if total > 0:
            s = (importance * x * codes).sum() / total
            error = (importance * (x - s * codes) ** 2).sum()
            if error < least:
                least, best = error, s
    return best
    ### END SOLUTION


# %% qlearn={"check": "gguf.fit_scale"}
course.check("gguf.fit_scale", fit_scale)

# %% [markdown] qlearn={"card": "gguf.n_gpu_layers"}
# llama.cpp's `n_gpu_layers`. The head goes to the GPU first and counts as one, then the last layer, the one before, and so on, until one does
# not fit. Each layer brings its key-value cache along; the head has none. What fills the memory to the last byte fits.


# %% qlearn={"answer": "gguf.n_gpu_layers"}
def n_gpu_layers(layers, head, cache, memory):
    """How many go to the GPU.

    layers: list of int, the bytes of each layer, first to last.  head: int, bytes.  cache: int, bytes of one layer's cache.
    memory: int, bytes that are free on the GPU.
    Returns an int from 0 to len(layers) + 1.

    n_gpu_layers([10, 10, 10], head=5, cache=1, memory=30)  is  3
    """
    ### BEGIN SOLUTION
    count = 0
    for size in [head, *(layer + cache for layer in reversed(layers))]:
        if size > memory:
            break
        memory -= size
        count += 1
    return count
    ### END SOLUTION


# %% qlearn={"check": "gguf.n_gpu_layers"}
course.check("gguf.n_gpu_layers", n_gpu_layers)

# %% [markdown]
# ## On a file
#
# The model, written as Q4_K_M. Your `header` reads its beginning, and your `decode_q4_k` a matrix in it; `export.fields` only says where that begins.

# %% qlearn={"show": true}
with tempfile.TemporaryDirectory() as folder:
    path = export.write_gguf(model, tokenizer, Path(folder) / "model.gguf", "Q4_K_M", progress=False)
    data, spans = path.read_bytes(), export.fields(path)
print(header(data))
start, end = next((span.start, span.end) for span in spans if span.name == "blk.2.ffn_up.weight")
blocks = np.frombuffer(data[start:end], np.uint8).reshape(-1, 144)

# %% qlearn={"show": true}
decoded = np.stack([decode_q4_k(block) for block in blocks])  # (768, 256): a block is a row here
error = np.abs(decoded - up).mean() / np.abs(up).mean()
print(f"{len(blocks)} blocks; off by {error:.1%} of a weight's size on average")
np.testing.assert_allclose(decoded, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K), rtol=1e-5, atol=1e-7)
assert error < 0.1

# %% [markdown]
# Your search, on 500 blocks of 32 weights at 4 bits: what does it gain over the obvious scale, the largest weight divided by −8?

# %% qlearn={"show": true}
gained = []
for x in up.reshape(-1, 32)[:500].astype(np.float64):
    obvious = x[np.abs(x).argmax()] / -8
    found = fit_scale(x, np.ones(32), [obvious * 8 / (8 + 0.1 * i) for i in range(-9, 10)])
    errors = [((x - s * np.clip(np.round(x / s), -8, 7)) ** 2).sum() for s in (found, obvious)]
    gained.append(errors)
found, obvious = np.mean(gained, axis=0)
print(f"squared error with the search: {found / obvious:.0%} of what it is without")
assert found < obvious
