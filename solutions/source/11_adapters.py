# ---
# jupyter:
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # 11 · Adapters: the exercise
#
# Six short functions, about 45 minutes: an adapter's forward pass, its size and its gradients; how to merge it; how LoftQ starts it; what a training
# needs. The lesson is [11 · Adapters](../lessons/11_adapters.ipynb). In the last cells your adapter mends a layer of 2 bits.
#
# Each `check` runs your function on cases that were chosen to find mistakes. `course.hint("adapters.forward")` helps.

# %%
import copy

import torch

import qlearn
from qlearn import course
from qlearn.course.tasks.adapters import rounded
from qlearn.models.calibration import calibration_ids
from qlearn.models.layers import linear_layers
from qlearn.training.lora import add_lora, count_parameters

A_by_hand = torch.tensor([[2.0, 0.0, 1.0, -1.0]])  # the change of the lesson
B_by_hand = torch.tensor([[1.0], [-1.0], [0.0], [2.0]])

# %% [markdown] qlearn={"card": "adapters.forward"}
# y = W x + (alpha / r) B A x, for all tokens at once. r is not passed in: A knows it. Do not make the matrix B A.


# %% qlearn={"answer": "adapters.forward"}
def forward(x, weight, A, B, alpha):
    """What a layer with an adapter puts out.

    x: float32 (..., in): texts of tokens, tokens, or a single vector.  weight: float32 (out, in).
    A: float32 (r, in).  B: float32 (out, r).  alpha: a number.
    Returns float32 (..., out).

    With x = [4, 1], weight the identity, A [[1, 0]], B [[0.5], [0]] and alpha 2 it is [8, 1].
    """
    ### BEGIN SOLUTION
    return x @ weight.T + alpha / len(A) * (x @ A.T @ B.T)
    ### END SOLUTION


# %% qlearn={"check": "adapters.forward"}
course.check("adapters.forward", forward)

# %% [markdown] qlearn={"card": "adapters.parameters"}
# How many numbers learn in a model? Layers are named as in transformers, `layers.0.mlp.down_proj`. A `target` says which get an adapter, by the last part
# of the name.


# %% qlearn={"answer": "adapters.parameters"}
def parameters(layers, r, target=None):
    """How many numbers all A and B have.

    layers: dict name -> (out, in), the shape of the weight.  r: int.
    target: None for all layers, or a tuple of last parts of names.
    Returns an int.

    parameters({"layers.0.mlp.up_proj": (768, 256), "layers.0.mlp.gate_proj": (768, 256)}, 2, ("up_proj",)) == 2048
    """
    ### BEGIN SOLUTION
    total = 0
    for name, (outputs, inputs) in layers.items():
        if target is None or name.rpartition(".")[2] in target:
            total += r * (outputs + inputs)
    return total
    ### END SOLUTION


# %% qlearn={"check": "adapters.parameters"}
course.check("adapters.parameters", parameters)

# %% [markdown]
# The layers of the bundled model, but for the last one, `lm_head`, which gets no adapter. Yours against the package's count:

# %% qlearn={"show": true}
model, tokenizer = qlearn.load_model()
shapes = {name: tuple(layer.weight.shape) for name, layer in linear_layers(model).items()}
for r in (4, 16, 64):
    counted, _ = count_parameters(add_lora(copy.deepcopy(model), r=r))
    print(f"r = {r:2}: yours {parameters(shapes, r):9,}, the package's {counted:9,}")
    assert parameters(shapes, r) == counted

# %% [markdown] qlearn={"card": "adapters.gradients"}
# Backward, by hand. `gradient` is what arrives at y, one row for each token. What arrives at A and at B, over all tokens? Each contains the other matrix, and both
# the factor alpha / r. W gets nothing.


# %% qlearn={"answer": "adapters.gradients"}
def gradients(x, gradient, A, B, alpha):
    """The backward pass of the adapter.

    x: float32 (..., in).  gradient: float32 (..., out), of the output.  A: (r, in).  B: (out, r).
    Returns the gradients of A, (r, in), and of B, (out, r): summed over all tokens.

    With x [[1, 0, 2, 1]], gradient [[1, 2, 0, -1]], alpha 1 and A and B of the lesson (see above), that of A
    is [[-3, 0, -6, -3]], and that of B [[3], [6], [0], [-3]].
    """
    ### BEGIN SOLUTION
    scale = alpha / len(A)
    x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return scale * (gradient @ B).T @ x, scale * gradient.T @ (x @ A.T)
    ### END SOLUTION


# %% qlearn={"check": "adapters.gradients"}
course.check("adapters.gradients", gradients)

# %% [markdown]
# Autograd goes backward through your forward pass. Does it agree with you?

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
sizes = (9, 6), (9, 5), (5, 6), (2, 6), (5, 2)
x, above, weight, A, B = (torch.randn(*size, generator=generator) for size in sizes)
A, B = A.requires_grad_(), B.requires_grad_()
(forward(x, weight, A, B, alpha=8) * above).sum().backward()
for own, of in zip(gradients(x, above, A.detach(), B.detach(), alpha=8), (A, B)):
    torch.testing.assert_close(own, of.grad, rtol=1e-4, atol=1e-4)

# %% [markdown] qlearn={"card": "adapters.merge"}
# A layer of codes, one scale for each row, and an adapter that was trained beside it. Make one float matrix of them: the one that puts out the same.


# %% qlearn={"answer": "adapters.merge"}
def merge(codes, scale, A, B, alpha):
    """One matrix in place of codes, scales, A and B.

    codes: float32 (out, in), whole numbers.  scale: float32 (out, 1).  A: (r, in).  B: (out, r).
    Returns float32 (out, in).

    With codes [[2, -1]], scale [[0.5]], A [[4, 0]], B [[0.25]] and alpha 2 it is [[3, -0.5]].
    """
    ### BEGIN SOLUTION
    return codes * scale + alpha / len(A) * B @ A
    ### END SOLUTION


# %% qlearn={"check": "adapters.merge"}
course.check("adapters.merge", merge)

# %% [markdown] qlearn={"card": "adapters.loftq"}
# Codes and adapter, one improved at a time. In each iteration: round what the adapter does not hold, then let the adapter hold the best part of
# rank r of what rounding lost. What is left may grow again, so keep the pair that leaves least. `rounded` is given: 2 bits, a grid for each row. It needs
# no further arguments. The best part of rank r comes from `torch.linalg.svd`.


# %% qlearn={"answer": "adapters.loftq"}
def loftq(weight, r, iterations):
    """The alternation of LoftQ.

    weight: float64 (out, in).  r: int, the rank.  iterations: int, at least 1.
    Returns (Q, change) of the iteration that left the smallest norm of weight - Q - change, both (out, in).
    Q: what `rounded` gave.  change: of rank r, what B A is to be. At first the adapter holds nothing.
    """
    ### BEGIN SOLUTION
    change, best, least = torch.zeros_like(weight), None, float("inf")
    for _ in range(iterations):
        Q = rounded(weight - change)
        U, S, Vh = torch.linalg.svd(weight - Q, full_matrices=False)
        change = U[:, :r] * S[:r] @ Vh[:r]
        left = (weight - Q - change).norm().item()
        if left < least:
            best, least = (Q, change), left
    return best
    ### END SOLUTION


# %% qlearn={"check": "adapters.loftq"}
course.check("adapters.loftq", loftq)

# %% [markdown] qlearn={"card": "adapters.memory"}
# What does a training with AdamW hold? Weights; a gradient for each parameter that learns, in the type of that parameter; and two numbers of 32 bits for each of
# them. Activations are left out.


# %% qlearn={"answer": "adapters.memory"}
def memory(parameters, bits, learning=None, learning_bits=32):
    """Bytes that a training step holds, activations left out.

    parameters: int, of the model.  bits: of each of them, scales counted; need not be whole.
    learning: None if the parameters learn themselves; else how many learn beside them, as they stand still.
    learning_bits: of a parameter that learns beside.
    Returns an int: rounded to whole bytes at the end.

    memory(1000, bits=16) == 12000  and  memory(1000, bits=4, learning=10) == 660
    """
    ### BEGIN SOLUTION
    total, learned, learned_bits = parameters * bits / 8, parameters, bits
    if learning is not None:
        total, learned, learned_bits = total + learning * learning_bits / 8, learning, learning_bits
    return round(total + learned * learned_bits / 8 + learned * 2 * 4)
    ### END SOLUTION


# %% qlearn={"check": "adapters.memory"}
course.check("adapters.memory", memory)

# %% [markdown]
# How large a model can be trained on a card of 24 GB, in full and with adapters, 1 % of its parameters, beside weights of 4.127 bits?

# %% qlearn={"show": true}
ways = {"in full, 16 bits": lambda n: memory(n, 16), "QLoRA": lambda n: memory(n, 4.127, n // 100, 16)}
for name, needs in ways.items():
    largest = max(n for n in range(1, 100) if needs(n * 10**9) < 24e9)
    print(f"{name:17} {largest} billion parameters, activations not counted")

# %% [markdown]
# ## A layer of 2 bits, mended
#
# A projection of the bundled model, what it reads while the model goes through the calibration text, and what it should put out.

# %% qlearn={"show": true}
layer = model.model.layers[1].self_attn.q_proj
kept = []
hook = layer.register_forward_hook(lambda module, args, output: kept.append(args[0]))
model.model(calibration_ids(tokenizer, tokens=1024))
hook.remove()
inputs, weight = kept[0].flatten(0, 1).detach(), layer.weight.detach()
wanted = inputs @ weight.T


# %% qlearn={"show": true}
def error(outputs):
    """In % of what the layer should put out."""
    return 100 * ((outputs - wanted).norm() / wanted.norm()).item()


Q = rounded(weight)
print(f"2 bits: {error(inputs @ Q.T):.1f} %")

# %% [markdown]
# Now your adapter learns to make up for that, from your own gradients. B starts at zero; Adam, a relative of AdamW, makes the steps.

# %% qlearn={"show": true}
generator = torch.Generator().manual_seed(0)
A, B = torch.randn(16, 256, generator=generator) / 16, torch.zeros(256, 16)
optimizer = torch.optim.Adam([A, B], lr=3e-3)
curve = []
for step in range(200):
    outputs = forward(inputs, Q, A, B, alpha=16)
    A.grad, B.grad = gradients(inputs, (outputs - wanted) / len(inputs), A, B, alpha=16)
    curve.append(error(outputs))
    optimizer.step()

# %% qlearn={"show": true}
picture, axes = course.plots.figure(7, 2.8, alt="The error of the layer's output against the steps.")
axes.plot(curve, color=course.plots.COLORS["error"])
axes.set(xlabel="step", ylabel="error of the output (%)", ylim=(0, None))
picture

# %% [markdown]
# Merged, on what it was trained on, and on the float weight, which needed no mending:

# %% qlearn={"show": true}
one = torch.ones(256, 1)
right, wrong = merge(Q, one, A, B, alpha=16), merge(weight, one, A, B, alpha=16)
on_Q, on_W = error(inputs @ right.T), error(inputs @ wrong.T)
print(f"before {curve[0]:.1f} %, merged right {on_Q:.1f} %, on the float weight {on_W:.1f} %")
assert on_Q < curve[0]

# %% [markdown]
# And LoftQ's start, without any training and without having seen an input:

# %% qlearn={"show": true}
Q2, change = loftq(weight.double(), r=16, iterations=5)
print(f"{error(inputs @ (Q2 + change).float().T):.1f} % before the first step")

# %% [markdown]
# LoftQ makes the error of the *weights* small; the training saw which inputs the layer really gets. You know the difference from lesson 06.
