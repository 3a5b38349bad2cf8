# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 00 · Start here
#
# **In 15 minutes** you will know that everything on your machine works, you will have quantized a language model and seen where its
# text breaks, and you will know how lessons and exercises go. You need Python, and to know what a matrix product is.
#
# Run a cell with Shift-Enter, or all of them with *Run → Run All Cells*.
#
# **The question.** This course brings its own language model: seven million numbers that write Python. On disk each of them takes
# 16 bits. How many bits can you leave it before it can no longer write? Say it before you look. Your guess is kept, and it will be
# shown beside the answer.

# %%
import math

import qlearn
from qlearn import course

course.predict("the fewest bits per number at which the model still writes Python", low=1, high=16, key="fewest-bits")

# %% [markdown]
# ## Is everything there?
#
# Each line below says OK, or what to do about it. A missing GPU is no problem: every lesson runs on two CPU cores.

# %%
from qlearn.course import doctor

doctor.examine()

# %% [markdown]
# ## A model that writes Python
#
# It is small, a thousandth of the models you know, and it was trained on nothing but Python files. Give it the head of a function and
# it writes a body that looks right. Do not expect it to *be* right: it forgets what a function was for. What we need is that its
# text is good enough for you to see when it breaks.

# %%
model, tokenizer = qlearn.load_model()
prompt = '''class Stack:
    """A last-in, first-out collection."""

    def __init__(self):'''

print(prompt + qlearn.generate(model, tokenizer, prompt, max_new_tokens=60))

# %% [markdown]
# ## Three lines
#
# The first loads the model a second time. The second stores every weight of its linear layers with 4 bits instead of 16. The third
# lets it write.

# %%
small, _ = qlearn.load_model()
qlearn.quantize_model(small, "absmax", bits=4, group_size=64, progress=False)
print(prompt + qlearn.generate(small, tokenizer, prompt, max_new_tokens=60))

# %% [markdown]
# ## What changed
#
# Here are eight weights of one layer. Above, as they were. In the middle, what is stored now: whole numbers from −7 to 7, four bits each.
# Below, what the layer computes with: the whole number times a **scale**, which 64 neighbouring weights share.

# %%
before = model.model.layers[0].mlp.down_proj.weight
after = small.model.layers[0].mlp.down_proj.quantized
course.table(original=before[0, :8], codes=after.codes()[0, :8], reconstructed=after.dequantize()[0, :8], decimals=3)

# %% tags=["nbval-check-output"]
assert after.codes().abs().max() <= 7
print("bits for each code:", after.format.bits)
print("bits for each weight, scales counted:", after.bits_per_weight)

# %% [markdown]
# The scale has 16 bits, and 64 weights share it: 16 / 64 = 0.25 bits more for each. This course always counts them. "4 bits" is a
# name; 4.25 is what you pay.

# %% [markdown]
# ## Drag it
#
# Before you do: at which number of bits will the text stop being Python? Will it get worse bit by bit, or all at once?

# %%
def at(bits):
    """The text and the perplexity of the model with `bits` bits for each weight."""
    quantized, _ = qlearn.load_model()
    qlearn.quantize_model(quantized, "absmax", bits=bits, group_size=64, progress=False)
    text = prompt + qlearn.generate(quantized, tokenizer, prompt, max_new_tokens=60)
    return text, qlearn.evaluate.perplexity(quantized, tokenizer, tokens=4096)


course.widgets.text_breaker(at, bits=(2, 8))

# %% [markdown]
# **What you should have seen.** Down to 5 bits, other words at most. At 4 it still writes Python, but repeats itself; at 3 its Python
# falls apart; at 2 it is noise. The number under the text says the same: the **perplexity**. A model reads and writes **tokens**, pieces
# of a word or so, and perplexity tells among how many equally likely ones it wavers at each step of a text that it has never seen.
# Fewer is better.

# %% [markdown]
# ## Measured
#
# A text from one prompt is an anecdote. The course measures on a fixed piece of Python that the model was never trained on: its first
# 4,096 tokens, here and in every lesson.

# %%
reference = qlearn.evaluate.Reference(model, tokenizer, tokens=4096)
rows = [qlearn.evaluate.report(model, tokenizer, reference, name="16 bit")]
for bits in (8, 4, 3, 2):
    quantized, _ = qlearn.load_model()
    qlearn.quantize_model(quantized, "absmax", bits=bits, group_size=64, progress=False)
    rows.append(qlearn.evaluate.report(quantized, tokenizer, reference, name=f"absmax {bits} bit"))
qlearn.evaluate.table(rows)

# %% [markdown]
# Each row is one model. **KLD**, the Kullback-Leibler divergence, says how far its probabilities are from those of the original; **flips**, how
# often its first choice for the next token is another one (**same top** is the rest). The last columns are the price: true bits for each
# quantized weight, and the megabytes of the whole model.
#
# We say that a model still writes while its perplexity is less than one and a half times that of the original.

# %%
ppl = {row.name: row.perplexity for row in rows}
assert ppl["absmax 8 bit"] < 1.01 * ppl["16 bit"], "eight bits are almost free"
assert ppl["absmax 2 bit"] > 3 * ppl["16 bit"], "two bits, this way, are too few"
works = [bits for bits in (8, 4, 3, 2) if ppl[f"absmax {bits} bit"] < 1.5 * ppl["16 bit"]]
course.reveal("fewest-bits", min(works), unit="bits, with the simplest method there is")

# %% [markdown]
# Three bits are too few *for this method*. Much of the course is about methods that get more out of the same bits, and each lesson puts
# what it measured on one picture, **the board**: to the left is smaller, down is better. **Loss** is the logarithm of perplexity, in
# **nats**; the picture shows how much of it quantization adds. The line, the **Pareto front**, joins the points that no other beats in
# both size and loss.

# %%
for row in rows[:1] + rows[2:4]:
    name = "unquantized" if row.name == "16 bit" else row.name
    course.board.add(name, row.bits_per_weight, math.log(row.perplexity))
course.board.show()

# %% [markdown]
# ## How an exercise works
#
# Most lessons come with an exercise notebook. You write a function, and `check` runs it on cases that were chosen to find mistakes. If
# yours is a mistake that it knows, it says which.
#
# This one is wrong. Run both cells, read what `check` says, repair the function, and run them again.

# %%
def packed_size(count, bits):
    """How many bytes do `count` codes of `bits` bits (1 to 8) fill, when they are packed without gaps?"""
    return count * bits


# %% qlearn={"check": "start_here.packed_size"}
course.check("start_here.packed_size", packed_size)

# %% [markdown]
# Stuck? Ask for a hint, and ask again for a more direct one. In a terminal, `qlearn progress` lists what you have solved, and
# `qlearn grade exercises/01_bits.ipynb` grades a whole notebook.

# %%
course.hint("start_here.packed_size")

# %% [markdown]
# ## The map
#
# | | lesson | minutes | |
# |---|---|---|---|
# | 00 | Start here | 15 | you are here |
# | 01 | [Bits](01_bits.ipynb) | 60 | what a stored number is: fields, rounding, FP32 down to FP4 |
# | 02 | [Absmax](02_absmax.ipynb) | 45 | one ruler for many weights; six decibels a bit; what scales cost |
# | 03 | [Zero-point](03_zero_point.ipynb) | 55 | lopsided rulers, integer matrix products, where to clip |
# | 04 | [Whole models](04_ptq.ipynb) | 80 | what a model weighs; activations in 8 bits, calibration, outliers |
# | 05 | [QAT](05_qat.ipynb) | 80 | training under rounding: gradients through a staircase; learning from the unquantized model |
# | 06 | [GPTQ and AWQ](06_gptq.ipynb) | 100 | round one weight, let the others make up for it |
# | 07 | [GGUF to the byte](07_gguf.ipynb) | 100 | files of llama.cpp: blocks, scales of scales, Q4_K_M, imatrix, offloading |
# | 08 | [BitNet](08_bitnet.ipynb) | 80 | weights of −1, 0, 1, trained as such; products without multiplying |
# | 09 | [FP4 training](09_fp4_training.ipynb) | 120 | gradients in sixteen numbers; what a rotation does; a scaling law and what it knows |
# | 10 | [SINQ](10_sinkhorn.ipynb) | 85 | two scales for every weight; what Hadamard, HQQ and NF4 do; all methods at true bits |
# | 11 | [Adapters](11_adapters.ipynb) | 90 | a small matrix learns beside a frozen one; QLoRA, LoftQ, merging |
#
# More lessons follow. Each asks you to predict, works a small case by hand, climbs from a Python loop to fast code, compares with an independent
# implementation, lets you drag what matters, and ends on the model. On the way you build one sentence: *a format is a grid of numbers, and
# a method decides which weight goes where on it.*

# %% [markdown]
# ## What you can now do
#
# You can load the model, quantize it, let it write and measure it, in a line each. Next, the grid itself: [01 · Bits](01_bits.ipynb).
