# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 05 · QAT: the exercise
#
# Five functions, about 45 minutes: a weight under training, the two directions of fake quantization, its mask, the rounding of Q4_0, and the
# loss. The lesson is [05 · QAT](../lessons/05_qat.ipynb). In the last cells a layer learns with nothing but these five.
#
# Fake quantization can be wrong without its values showing it. So where a gradient matters the check looks at both: `with_gradient` calls your
# function, then goes backward through it.

# %%
import copy

import torch

import qlearn
from qlearn import course
from qlearn.course.tasks.qat import with_gradient

w = torch.tensor([-1.0, -0.6, 0.3, 0.2, 0.85, -0.1, 0.55, -0.3])  # the eight weights of the lesson

# %% [markdown] qlearn={"card": "qat.settle"}
# One weight on the grid of the whole numbers. The model sees it rounded, and the loss is ½ · (rounded − target)². Straight-through
# gives the gradient of the rounded weight to the latent one. Do some steps of gradient descent.


# %% qlearn={"answer": "qat.settle"}
def settle(weight, target, rate, steps):
    """Train one weight under rounding.

    weight: float, the latent weight at the start.  target: float.  rate: learning rate, float.  steps: int.
    Returns (the latent weight after the last step, [the rounded weight that the model saw at each step]): a float, and a list of
    `steps` ints. Round with round(), which takes halves to the even number.

    settle(0.375, target=0.375, rate=0.5, steps=3) == (0.4375, [0, 1, 0])
    """
    ### BEGIN SOLUTION
    seen = []
    for _ in range(steps):
        seen.append(round(weight))
        weight -= rate * (seen[-1] - target)
    return weight, seen
    ### END SOLUTION


# %% qlearn={"check": "qat.settle"}
course.check("qat.settle", settle)

# %% [markdown]
# Your weight with a target of 0.3. It should walk to the edge at 0.5 and stay about it, while what the model sees jumps.

# %% qlearn={"show": true}
seen = settle(0.3, target=0.3, rate=0.05, steps=120)[1]
latent = [settle(0.3, target=0.3, rate=0.05, steps=step)[0] for step in range(120)]
picture, axes = course.plots.figure(8, 3, alt="A latent weight against the steps, and its rounded value.")
axes.step(range(120), seen, where="post", color=course.plots.COLORS["quantized"], linewidth=1, label="rounded")
axes.plot(latent, color=course.plots.COLORS["original"], label="latent")
axes.axhline(0.3, color=course.plots.COLORS["marker"], linestyle="--", linewidth=1, label="target")
axes.set(xlabel="step", ylabel="value (steps of the grid)")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
picture

# %% [markdown] qlearn={"card": "qat.straight_through"}
# The heart of it. Somebody has rounded the weights, and says which of them are **inside** the grid, so that they may learn. Return a tensor
# that *is* the quantized values, all of them. Backward, it passes the gradient to the weights that are inside, unchanged, and nothing to the others.


# %% qlearn={"answer": "qat.straight_through"}
def straight_through(weight, quantized, inside):
    """Quantized values forward, the weight's gradient backward.

    weight: float tensor that requires a gradient.  quantized: float tensor, a constant.  inside: bool tensor. All of one shape.
    Returns a float tensor of that shape, equal to `quantized`.

    `tensor.detach()` has the same values, and is a constant for the backward pass.
    """
    ### BEGIN SOLUTION
    return quantized + (weight - weight.detach()) * inside
    ### END SOLUTION


# %% qlearn={"check": "qat.straight_through"}
course.check("qat.straight_through", with_gradient(straight_through))

# %% [markdown]
# On the eight weights, 0.85 being cut off. The second row should be the quantized values, and the last one 1 for all weights but one.

# %% qlearn={"show": true}
quantized = qlearn.quantize(w[None], "signed_absmax", bits=2, group_size=8).dequantize()[0]
latent = w.clone().requires_grad_()
passed = straight_through(latent, quantized, torch.arange(8) != 4)
passed.sum().backward()
course.table(weight=w, passed_on=passed, quantized=quantized, gradient=latent.grad)

# %% [markdown] qlearn={"card": "qat.clip_mask"}
# Which weights are inside? In steps of d the grid has the numbers −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1. A weight may be up to half a step beyond either end: then it
# is rounded to the end, and not cut off. Two things to mind. d may be negative, which turns the grid round. And a group of zeros has d = 0; its
# weights are on the grid.


# %% qlearn={"answer": "qat.clip_mask"}
def clip_mask(weight, d, bits):
    """Which weights are within half a step of the grid.

    weight: float tensor (groups, n).  d: float tensor (groups, 1), the scale of each group, of either sign, or 0 for a group of zeros.
    bits: 2 to 8.
    Returns a bool tensor (groups, n). Exactly half a step beyond may count either way.

    clip_mask(torch.tensor([[-1.0, 0.3, 0.85]]), d=torch.tensor([[0.5]]), bits=2)  is  [[True, True, False]]
    """
    ### BEGIN SOLUTION
    half = 2 ** (bits - 1)
    steps = weight / torch.where(d == 0, 1, d)
    return (steps >= -half - 0.5) & (steps <= half - 0.5)
    ### END SOLUTION


# %% qlearn={"check": "qat.clip_mask"}
course.check("qat.clip_mask", clip_mask)

# %% [markdown]
# Your mask over many weights, at 2 bits, once for d = 0.5 and once for d = −0.5. The second should be the mirror image of the first.

# %% qlearn={"show": true}
numbers = torch.linspace(-1.6, 1.6, 641)[None]
picture, axes = course.plots.figure(8, 2.2, alt="Where the mask is true for a positive and for a negative scale.")
for height, scale in ((1, 0.5), (0, -0.5)):
    mask = clip_mask(numbers, torch.tensor([[scale]]), bits=2)[0]
    axes.plot(numbers[0, mask], torch.full((int(mask.sum()),), height), "s", color=course.plots.COLORS["other"], markersize=5)
    axes.plot(torch.arange(-2, 2) * scale, [height] * 4, "|", color=course.plots.COLORS["marker"], markersize=22)
axes.set(yticks=[0, 1], yticklabels=["d = −0.5", "d = 0.5"], ylim=(-0.6, 1.6), xlim=(-1.6, 1.6), xlabel="weight (bars: grid points; green: inside)")
picture

# %% [markdown] qlearn={"card": "qat.round_q4_0"}
# Now the rounding itself, as llama.cpp does it for Q4_0. Each 32 neighbours in a row are a group. Its d is **the weight with the largest
# magnitude, with its sign**, divided by −8. The code of a weight is trunc(w · (1 / d) + 8.5), at most 15. (Multiply by 1 / d as llama.cpp does: dividing by d
# is rounded differently, and now and then gives another code.) What comes back is (code − 8) · d, with d rounded to float16, which is what a file
# holds; the codes are found before that rounding. Compute in float32 throughout.


# %% qlearn={"answer": "qat.round_q4_0"}
def round_q4_0(weight):
    """The weights as a Q4_0 file brings them back.

    weight: float32 tensor (rows, columns), columns a multiple of 32.  Returns a float32 tensor of the same shape.
    Of two weights of the same magnitude the first counts, as for argmax. A group of zeros stays zero.

    For 31 weights of 0.5 and one of -1.0, d is 0.125, and all come back as they are.
    """
    ### BEGIN SOLUTION
    groups = weight.unflatten(-1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    d = largest / -8
    inverse = torch.where(d == 0, 0, 1 / d)
    codes = (groups * inverse + 8.5).trunc().clamp(max=15)
    return ((codes - 8) * d.half().float()).flatten(-2)
    ### END SOLUTION


# %% qlearn={"check": "qat.round_q4_0"}
course.check("qat.round_q4_0", round_q4_0)

# %% [markdown]
# A group as your function brings it back: the weights sorted, the largest positive. Look at the top, where the largest has to be exact, and at the bottom,
# where a weight of nearly that size has one step too few.

# %% qlearn={"show": true}
group = torch.cat([torch.linspace(-0.98, 0.9, 31), torch.tensor([1.0])])[None]
picture, axes = course.plots.figure(8, 3, alt="32 weights and what Q4_0 brings back.")
axes.plot(group[0], "o", markersize=5, color=course.plots.COLORS["original"], label="weight")
axes.plot(round_q4_0(group)[0], "x", color=course.plots.COLORS["quantized"], label="brought back")
axes.set(xlabel="weight number", ylabel="value")
axes.legend()
picture

# %% [markdown] qlearn={"card": "qat.distillation_loss"}
# Last, what to learn: the probabilities of the teacher. The loss of one position is KL(teacher ‖ student), the sum over the vocabulary of
# p_teacher · (log p_teacher − log p_student), in nats; the loss of a batch is the mean over all its positions.


# %% qlearn={"answer": "qat.distillation_loss"}
def distillation_loss(student_logits, teacher_logits):
    """How far the student's probabilities are from the teacher's.

    student_logits, teacher_logits: float tensors (..., vocabulary), with at least one axis besides the vocabulary, for texts and positions.
    Returns a tensor without axes, in nats. It has to stay finite where a model is very sure: use log_softmax.
    """
    ### BEGIN SOLUTION
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()
    ### END SOLUTION


# %% qlearn={"check": "qat.distillation_loss"}
course.check("qat.distillation_loss", with_gradient(distillation_loss))

# %% [markdown]
# The gradient of your loss for the four tokens of the lesson. It should be the student's probabilities minus the teacher's.

# %% qlearn={"show": true}
teacher, student = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]), torch.tensor([[1 / 8, 1 / 2, 1 / 4, 1 / 8]])
logits = student.log().requires_grad_()
distillation_loss(logits, teacher.log()).backward()
course.table(teacher=teacher[0], student=student[0], gradient=logits.grad[0], decimals=3)

# %% [markdown]
# ## All together
#
# One matrix of the bundled model reads 512 made-up inputs that are related to one another, and its 256 outputs are taken for logits. The teacher
# has the float matrix. The student has the same one behind your fake quantization, and 100 steps to learn. It is measured on 512 other inputs.

# %% qlearn={"show": true}
from safetensors import safe_open

with safe_open(qlearn.models.loading.BUNDLED / "model.safetensors", "pt") as file:
    matrix = file.get_tensor("model.layers.0.mlp.down_proj.weight").float()
generator = torch.Generator().manual_seed(0)
mixture = torch.randn(64, matrix.shape[1], generator=generator) / 8
inputs, unseen = (torch.randn(512, 64, generator=generator) @ mixture for _ in range(2))


def fake_quantize(latent):
    """Your rounding, your mask, your straight-through."""
    values = round_q4_0(latent.detach())
    groups = latent.detach().reshape(-1, 32)
    d = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    return straight_through(latent, values, clip_mask(groups, d, bits=4).view_as(latent))


def loss_of(latent, inputs):
    return distillation_loss(inputs @ fake_quantize(latent).T, inputs @ matrix.T)


# %% qlearn={"show": true}
latent = copy.deepcopy(matrix).requires_grad_()
optimizer = torch.optim.Adam([latent], lr=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
plain = loss_of(latent, unseen).item()
for _ in range(100):
    optimizer.zero_grad()
    loss_of(latent, inputs).backward()
    optimizer.step()
    schedule.step()
trained = loss_of(latent, unseen).item()
print(f"loss rounded to nearest {plain:.4f}, after training {trained:.4f}: {1 - trained / plain:.0%} of it removed")

# %% [markdown]
# And the file? The bytes of Q4_0, decoded, should be what the training saw, bit for bit.

# %% qlearn={"show": true}
from qlearn.formats import gguf_blocks

stored = gguf_blocks.quantize(latent.detach())
same = torch.equal(gguf_blocks.dequantize(stored), fake_quantize(latent).detach())
print(f"{stored.numel():,} bytes, {8 * stored.numel() / matrix.numel()} bits per weight; as trained, bit for bit: {same}")
assert trained < plain / 2

# %% [markdown]
# That is quantization-aware training. What the package adds is a whole model in place of a matrix, the gradient of the scale, and a GPU.
