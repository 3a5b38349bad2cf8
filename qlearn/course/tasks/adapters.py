"""The exercise of lesson 11: an adapter from its forward pass to its merging, LoftQ's start, and what it all needs.

`merge` and `loftq` ask for what the package's functions of these names do to one layer, `memory` for the sum of what
`training_memory.by_formula` gives in parts, rounded once; `forward`, `parameters` and `gradients` are a formula each.
Numbers are eighths where three matrices are multiplied, so that float32 holds them exactly and the order of the
products cannot be told from the last bits. The rounding of LoftQ is given in the exercise, `rounded`; its grid hangs on
the matrix that it rounds, so what is left can grow again.
"""

import torch

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.training.lora import LoraLinear

X_BY_HAND = torch.tensor([[1.0, 0.0, 2.0, 1.0]])
A_BY_HAND = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
B_BY_HAND = torch.tensor([[1.0], [-1.0], [0.0], [2.0]])
W_BY_HAND = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def rounded(weight):
    """2 bits, one grid for each row: four values from its smallest to its largest weight, evenly spaced.

    >>> rounded(torch.tensor([[0.0, 0.4, 1.1, 3.0]])).tolist()
    [[0.0, 0.0, 1.0, 3.0]]
    """
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low) / 3
    return ((weight - low) / step).round() * step + low


# What is right.


def forward(x, weight, A, B, alpha):
    """W x + (alpha / r) B A x, with the thin products first."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight
    layer = LoraLinear(base, A.shape[0], alpha)
    layer.A.data, layer.B.data = A, B
    return layer(x).detach()


def parameters(layers, r, target=None):
    """r * (in + out) for each layer that gets an adapter."""
    return sum(
        r * (inputs + outputs)
        for name, (outputs, inputs) in layers.items()
        if target is None or name.rpartition(".")[2] in target
    )


def gradients(x, gradient, A, B, alpha):
    """What arrives at A and at B, when `gradient` arrives at y."""
    scale = alpha / len(A)
    x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return scale * (gradient @ B).T @ x, scale * gradient.T @ (x @ A.T)


def merge(codes, scale, A, B, alpha):
    """Q + (alpha / r) B A, Q being what the codes stand for."""
    return codes * scale + alpha / len(A) * B @ A


def low_rank(matrix, r):
    """The best A (r, in), B (out, r), the roots of the singular values in each."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def loftq(weight, r, iterations):
    """(Q, B A) of the iteration after which the least is left."""
    change, best, least = torch.zeros_like(weight), None, float("inf")
    for _ in range(iterations):
        quantized = rounded(weight - change)
        A, B = low_rank(weight - quantized, r)
        change = B @ A
        left = (weight - quantized - change).norm().item()
        if left < least:
            best, least = (quantized, change), left
    return best


def memory(parameters, bits, learning=None, learning_bits=32):
    """Bytes of weights, gradients and AdamW's two numbers, all told."""
    held, learned, own = parameters * bits / 8, parameters, bits
    if learning is not None:
        held, learned, own = held + learning * learning_bits / 8, learning, learning_bits
    return round(held + learned * own / 8 + learned * 2 * 4)


# The cases.


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _eighths(*shape, seed=0):
    """Random multiples of 1/8 between -2 and 2, float32: sums of products of three of them are exact."""
    return (8 * _random(*shape, seed=seed)).round().clamp(-16, 16) / 8


def _forward_cases():
    def case(name, shape, rows, r, alpha, seed=0):
        columns = shape[-1]
        W, A, B = (
            _eighths(*size, seed=seed + n) for n, size in enumerate(((rows, columns), (r, columns), (rows, r)), 1)
        )
        return Case(name, (_eighths(*shape, seed=seed), W, A, B, alpha))

    return [
        Case("the numbers of the lesson", (X_BY_HAND, W_BY_HAND, A_BY_HAND, B_BY_HAND, 1)),
        case("rank 2, alpha 4", (3, 6), 5, 2, 4, seed=10),
        case("rank 4, alpha 4", (3, 6), 8, 4, 4, seed=20),
        case("rank 4, alpha 1", (2, 6), 8, 4, 1, seed=30),
        case("texts of tokens", (2, 3, 4), 6, 2, 8, seed=40),
        case("one vector", (5,), 3, 2, 2, seed=50),
        case("as many rows as columns", (4, 4), 4, 2, 16, seed=60),
        case("as many rows as columns, and that is the rank", (3, 3), 3, 3, 6, seed=70),
        Case("B is zero", (_eighths(2, 4), _eighths(3, 4, seed=1), _eighths(2, 4, seed=2), torch.zeros(3, 2), 16)),
    ]


_SHAPES = {
    "layers.0.self_attn.q_proj": (256, 256), "layers.0.self_attn.k_proj": (128, 256),
    "layers.0.mlp.up_proj": (768, 256), "layers.0.mlp.down_proj": (256, 768),
}  # fmt: skip


def _parameters_cases():
    return [
        Case("one square layer", ({"q_proj": (256, 256)}, 8)),
        Case("one wide layer", ({"down_proj": (256, 768)}, 8)),
        Case("one tall layer", ({"up_proj": (768, 256)}, 8)),
        Case("rank 1", ({"q_proj": (4, 4)}, 1)),
        Case("a block", (_SHAPES, 16)),
        Case("a block, q_proj alone", (_SHAPES, 16), {"target": ("q_proj",)}),
        Case("a block, two kinds", (_SHAPES, 4), {"target": ("k_proj", "down_proj")}),
        Case("two blocks, one kind", (_SHAPES | {"layers.1.mlp.up_proj": (768, 256)}, 4), {"target": ("up_proj",)}),
        Case("a name that ends alike", ({"proj": (8, 8), "q_proj": (4, 8)}, 2), {"target": ("proj",)}),
        Case("a name that begins alike", ({"proj": (8, 8), "proj_out": (4, 8)}, 2), {"target": ("proj",)}),
        Case("a target with another name in it", ({"proj": (8, 8), "q_proj": (4, 8)}, 2), {"target": ("q_proj",)}),
        Case("a target that is a part in the middle", (_SHAPES, 16), {"target": ("mlp",)}),
        Case(
            "names of several depths",
            ({"model.layers.0.mlp.up_proj": (8, 4), "up_proj": (4, 4)}, 3),
            {"target": ("up_proj",)},
        ),
        Case("a rank above the sides", ({"q_proj": (4, 8)}, 16)),
        Case("no layer of that kind", (_SHAPES, 16), {"target": ("gate_proj",)}),
        Case("an empty list of targets", (_SHAPES, 16), {"target": ()}),
        Case("no layers", ({}, 16)),
    ]


def _gradients_cases():
    def case(name, shape, rows, r, alpha, seed=0, zero=""):
        columns = shape[-1]
        A = _eighths(r, columns, seed=seed + 2) * (zero != "A" and zero != "both")
        B = _eighths(rows, r, seed=seed + 3) * (zero != "B" and zero != "both")
        return Case(name, (_eighths(*shape, seed=seed), _eighths(*shape[:-1], rows, seed=seed + 1), A, B, alpha))

    return [
        case("one token", (1, 4), 3, 2, 2),
        case("the start: B is zero", (3, 4), 5, 2, 2, seed=10, zero="B"),
        case("A is zero", (3, 4), 5, 2, 2, seed=20, zero="A"),
        case("both are zero", (3, 4), 5, 2, 2, seed=30, zero="both"),
        case("many tokens", (6, 5), 4, 3, 3, seed=40),
        case("alpha 16", (4, 5), 4, 2, 16, seed=50),
        case("alpha 1 and rank 4", (4, 6), 5, 4, 1, seed=60),
        case("texts of tokens", (2, 3, 4), 5, 2, 4, seed=70),
        case("as many rows as columns", (3, 4), 4, 2, 4, seed=80),
        case("everything is square", (3, 3), 3, 3, 6, seed=90),
    ]


def _merge_cases():
    def case(name, rows, columns, r, alpha, seed=0):
        codes = (3 * _random(rows, columns, seed=seed)).round().clamp(-8, 7)
        scale = (1 + _eighths(rows, 1, seed=seed + 1).abs()) / 8
        return Case(name, (codes, scale, _eighths(r, columns, seed=seed + 2), _eighths(rows, r, seed=seed + 3), alpha))

    return [
        Case("the numbers of the lesson", (W_BY_HAND, torch.ones(4, 1), A_BY_HAND, B_BY_HAND, 1)),
        case("rank 2", 5, 6, 2, 2, seed=10),
        case("rank 4, alpha 16", 6, 8, 4, 16, seed=20),
        case("rank 4, alpha 1", 6, 8, 4, 1, seed=30),
        case("as many rows as columns", 4, 4, 2, 8, seed=40),
        case("everything is square", 4, 4, 4, 8, seed=50),
        case("one row", 1, 6, 1, 2, seed=60),
        Case("B is zero", (W_BY_HAND, torch.full((4, 1), 0.5), A_BY_HAND, torch.zeros(4, 1), 16)),
        Case("fine steps and a large change", (W_BY_HAND, torch.full((4, 1), 2.0**-12), A_BY_HAND, B_BY_HAND, 1)),
    ]


def _loftq_cases():
    def case(name, rows, columns, r, iterations, seed=0):
        return Case(name, (_random(rows, columns, seed=seed, dtype=torch.float64), r, iterations))

    return [
        case("once", 6, 8, 2, 1),
        case("twice", 6, 8, 2, 2, seed=5),
        case("rank 1", 6, 6, 1, 3, seed=6),
        case("rank 4", 8, 10, 4, 3, seed=4),
        case("the first is the best", 4, 16, 2, 6),
        case("the first is the best, once more", 4, 16, 2, 4, seed=1),
        case("the second is the best of six", 6, 8, 2, 6, seed=2),
        case("the second is the best of six, once more", 6, 8, 2, 6, seed=3),
        case("the last but one is the best", 4, 16, 2, 6, seed=2),
        case("a tall matrix", 8, 6, 2, 6, seed=1),
    ]


def _memory_cases():
    return [
        Case("full, 16 bits", (1000, 16)),
        Case("full, 32 bits", (1000, 32)),
        Case("the paper's 65 billion, full", (65_200_000_000, 16)),
        Case("adapters beside 16 bits", (1000, 16), {"learning": 40}),
        Case("adapters beside 4.25 bits", (1600, 4.25), {"learning": 40}),
        Case("adapters of 16 bits beside 4.25 bits", (1600, 4.25), {"learning": 40, "learning_bits": 16}),
        Case("as many learn as stand still", (800, 4), {"learning": 800}),
        Case("nothing learns", (800, 4), {"learning": 0}),
        Case("parts of bytes, full", (1002, 4.25)),
        Case("less than half a byte too many", (1002, 4.25), {"learning": 40}),
        Case("more than half a byte too many", (1001, 4.25), {"learning": 40}),
    ]


# The mistakes: `forward`.


def _adapted(x, weight, A, B, scale):
    return x @ weight.T + scale * (x @ A.T @ B.T)


_FORWARD_MUTANTS = (
    Mutant(
        "without the base",
        lambda x, weight, A, B, alpha: alpha / len(A) * x @ A.T @ B.T,
        "This is the adapter alone: it stands beside W, so W x is added.",
    ),
    Mutant(
        "without the adapter",
        lambda x, weight, A, B, alpha: x @ weight.T,
        "This is W x alone: the adapter's part, (alpha / r) B A x, is missing.",
    ),
    Mutant(
        "not scaled",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, 1),
        "This is what you get without the factor alpha / r.",
    ),
    Mutant(
        "alpha for alpha / r",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, alpha),
        "This is what you get when the adapter is multiplied by alpha: divide alpha by the rank, so that more summands "
        "do not make the change larger.",
    ),
    Mutant(
        "1 / r",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, 1 / len(A)),
        "This is what you get when the adapter is divided by r and alpha is left out.",
    ),
    Mutant(
        "r / alpha",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, len(A) / alpha),
        "This is r / alpha: the factor is alpha / r.",
    ),
    Mutant(
        "rank-stabilized",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, alpha / len(A) ** 0.5),
        "This is alpha / sqrt(r), the factor of rsLoRA: LoRA divides by r itself.",
    ),
    Mutant(
        "alpha / in",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, alpha / A.shape[1]),
        "This is alpha divided by the number of inputs, A.shape[1]: r is the number of rows of A.",
    ),
    Mutant(
        "everything scaled",
        lambda x, weight, A, B, alpha: alpha / len(A) * (x @ weight.T + x @ A.T @ B.T),
        "This is what you get when W x is scaled as well: the factor belongs to the adapter alone.",
    ),
    Mutant(
        "subtracted",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, -alpha / len(A)),
        "This is what you get when the adapter's part is subtracted: it is added.",
    ),
    Mutant(
        "A twice",
        lambda x, weight, A, B, alpha: _adapted(x, weight, A, B, (alpha / len(A)) ** 2),
        "This is what you get when both products are scaled by alpha / r: the factor counts once.",
    ),
)


# The mistakes: `parameters`.


def _counted(each, chosen=lambda name, target: name.rpartition(".")[2] in target):
    def count(layers, r, target=None):
        return sum(
            each(r, outputs, inputs)
            for name, (outputs, inputs) in layers.items()
            if target is None or chosen(name, target)
        )

    return count


_PARAMETERS_MUTANTS = (
    Mutant(
        "the whole matrix",
        _counted(lambda r, outputs, inputs: outputs * inputs),
        "This is the size of W: A has r x in numbers, B has out x r.",
    ),
    Mutant(
        "W counted too",
        _counted(lambda r, outputs, inputs: outputs * inputs + r * (outputs + inputs)),
        "This counts W as well: it is frozen, and does not learn.",
    ),
    Mutant(
        "A alone",
        _counted(lambda r, outputs, inputs: r * inputs),
        "This is A alone: B has out x r numbers more.",
    ),
    Mutant(
        "B alone",
        _counted(lambda r, outputs, inputs: r * outputs),
        "This is B alone: A has r x in numbers more.",
    ),
    Mutant(
        "twice the outputs",
        _counted(lambda r, outputs, inputs: 2 * r * outputs),
        "This counts both as r x out: A is as wide as the input.",
    ),
    Mutant(
        "twice the inputs",
        _counted(lambda r, outputs, inputs: 2 * r * inputs),
        "This counts both as r x in: B is as tall as the output.",
    ),
    Mutant(
        "a square in the middle",
        _counted(lambda r, outputs, inputs: r * (outputs + inputs) + r * r),
        "This adds an r x r matrix between A and B: there is none, they are multiplied directly.",
    ),
    Mutant(
        "rank forgotten",
        _counted(lambda r, outputs, inputs: outputs + inputs),
        "This is what rank 1 would need: multiply by r.",
    ),
    Mutant(
        "product of the sides",
        _counted(lambda r, outputs, inputs: r * outputs * inputs),
        "This multiplies the sides: A and B are two matrices, so their sizes are added.",
    ),
    Mutant(
        "target ignored",
        lambda layers, r, target=None: parameters(layers, r),
        "Only calls with a target are wrong: layers whose last name is not in it get no adapter.",
    ),
    Mutant(
        "whole names",
        _counted(lambda r, outputs, inputs: r * (outputs + inputs), lambda name, target: name in target),
        "Only calls with a target are wrong: compare the last part of the name, behind the last dot.",
    ),
    Mutant(
        "the end of the name",
        _counted(
            lambda r, outputs, inputs: r * (outputs + inputs),
            lambda name, target: any(name.endswith(wanted) for wanted in target),
        ),
        "Only a target that is the end of another name is wrong: q_proj ends with proj, and is another layer. Compare "
        "the whole last part.",
    ),
    Mutant(
        "the beginning of the name",
        _counted(
            lambda r, outputs, inputs: r * (outputs + inputs),
            lambda name, target: any(name.rpartition(".")[2].startswith(wanted) for wanted in target),
        ),
        "Only a target that is the beginning of another name is wrong: proj_out begins with proj, and is another "
        "layer. Compare the whole last part.",
    ),
    Mutant(
        "anywhere in the name",
        _counted(
            lambda r, outputs, inputs: r * (outputs + inputs),
            lambda name, target: any(wanted in name for wanted in target),
        ),
        "Only calls with a target are wrong, where it is found somewhere inside a name: compare the whole last part.",
    ),
    Mutant(
        "any part of the name",
        _counted(
            lambda r, outputs, inputs: r * (outputs + inputs),
            lambda name, target: any(wanted in name.split(".") for wanted in target),
        ),
        "Only a target that is a part in the middle of a name is wrong, such as mlp: the last part alone counts.",
    ),
    Mutant(
        "inside a target",
        _counted(
            lambda r, outputs, inputs: r * (outputs + inputs),
            lambda name, target: any(name.rpartition(".")[2] in wanted for wanted in target),
        ),
        "Only a name that is found inside a target is wrong: proj is a part of q_proj, and another layer. Ask whether "
        "the last part is one of the targets.",
    ),
    Mutant(
        "the rank is limited",
        _counted(lambda r, outputs, inputs: min(r, outputs, inputs) * (outputs + inputs)),
        "Only a rank above the sides of a matrix is wrong: it is a waste, but A has r x in numbers and B has out x r "
        "all the same.",
    ),
    Mutant(
        "an empty target for none",
        lambda layers, r, target=None: parameters(layers, r, target or None),
        "Only an empty target is wrong: None means all layers, and an empty list none of them.",
    ),
)


# The mistakes: `gradients`.


def _rows(x, gradient):
    return x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])


def _gradients_scaled(of_A, of_B):
    """`gradients` with other factors, functions of alpha and r."""

    def wrong(x, gradient, A, B, alpha):
        right = gradients(x, gradient, A, B, len(A))  # a scale of 1
        return of_A(alpha, len(A)) * right[0], of_B(alpha, len(A)) * right[1]

    return wrong


def _right_factor(alpha, r):
    return alpha / r


def _first_token(x, gradient, A, B, alpha):
    x, gradient = _rows(x, gradient)
    return gradients(x[:1], gradient[:1], A, B, alpha)


def _averaged(x, gradient, A, B, alpha):
    of_A, of_B = gradients(x, gradient, A, B, alpha)
    tokens = x.numel() // x.shape[-1]
    return of_A / tokens, of_B / tokens


def _after_a_step(x, gradient, A, B, alpha):
    of_A, of_B = gradients(x, gradient, A, B, alpha)
    return A - of_A, B - of_B


def _summed_first(x, gradient, A, B, alpha):
    x, gradient = _rows(x, gradient)
    return gradients(x.sum(0, keepdim=True), gradient.sum(0, keepdim=True), A, B, alpha)


def _square_only(wrong):
    """A wrong formula that has the right shapes only where all sides are equal."""

    def guarded(x, gradient, A, B, alpha):
        try:
            found = wrong(*_rows(x, gradient), A, B, alpha / len(A))
        except RuntimeError:
            found = None
        if found is None or (found[0].shape, found[1].shape) != (A.shape, B.shape):
            return torch.full_like(A, torch.nan), torch.full_like(B, torch.nan)
        return found

    return guarded


_GRADIENTS_MUTANTS = (
    Mutant(
        "exchanged",
        lambda *args: gradients(*args)[::-1],
        "These are the right ones in the wrong order: first that of A, then that of B.",
    ),
    Mutant(
        "not scaled",
        _gradients_scaled(lambda alpha, r: 1, lambda alpha, r: 1),
        "This is what you get without the factor alpha / r: it stands in y, so it stands in both gradients.",
    ),
    Mutant(
        "scaled by alpha",
        _gradients_scaled(lambda alpha, r: alpha, lambda alpha, r: alpha),
        "This is what you get with the factor alpha: it is alpha / r.",
    ),
    Mutant(
        "A's not scaled",
        _gradients_scaled(lambda alpha, r: 1, _right_factor),
        "Only the gradient of A is wrong: it lacks the factor alpha / r.",
    ),
    Mutant(
        "B's not scaled",
        _gradients_scaled(_right_factor, lambda alpha, r: 1),
        "Only the gradient of B is wrong: it lacks the factor alpha / r.",
    ),
    Mutant(
        "scaled twice",
        _gradients_scaled(lambda alpha, r: (alpha / r) ** 2, lambda alpha, r: (alpha / r) ** 2),
        "This is what you get when alpha / r is counted twice: y has it once.",
    ),
    Mutant(
        "negative",
        lambda *args: tuple(-found for found in gradients(*args)),
        "These are the negatives: gradients point uphill, and the optimizer is who turns them round.",
    ),
    Mutant(
        "the mean over the tokens",
        _averaged,
        "This is what you get when the tokens are averaged: what arrives at the tokens is added up. (If the loss is a "
        "mean, `gradient` has been divided already.)",
    ),
    Mutant(
        "the first token",
        _first_token,
        "This is what you get from the first token alone: all of them are added up.",
    ),
    Mutant(
        "tokens added up before the product",
        _summed_first,
        "This is what you get when x and the gradient are summed over the tokens before the product: first the "
        "products, token by token, then the sum.",
    ),
    Mutant(
        "after a step",
        _after_a_step,
        "These are A and B after a step of gradient descent: only the gradients are wanted.",
    ),
    Mutant(
        "A's is zero",
        lambda x, gradient, A, B, alpha: (torch.zeros_like(A), gradients(x, gradient, A, B, alpha)[1]),
        "This is right while B is zero, at the start of a training, and wrong after the first step.",
    ),
    Mutant(
        "B's is zero",
        lambda x, gradient, A, B, alpha: (gradients(x, gradient, A, B, alpha)[0], torch.zeros_like(B)),
        "This is what you get when B gets no gradient: then it would stay zero, and A would never learn either.",
    ),
    Mutant(
        "a gradient where B is zero",
        lambda x, gradient, A, B, alpha: gradients(x, gradient, A, B + (B == 0).all(), alpha),
        "Only the gradient of A where B is zero is wrong: what reaches A has passed B, so nothing does.",
    ),
    Mutant(
        "transposed in a square",
        _square_only(lambda x, g, A, B, s: (s * ((g @ B).T @ x).T, s * (g.T @ (x @ A.T)).T)),
        "This has the right shape only where all sides are equal, and is transposed there: that of A is (r, in), that "
        "of B is (out, r).",
    ),
)


# The mistakes: `merge`.


def _merged(codes, scale, A, B, factor):
    return codes * scale + factor * B @ A


def _square(product, like):
    return product if product.shape == like.shape else torch.full_like(like, torch.nan)


_MERGE_MUTANTS = (
    Mutant(
        "not scaled",
        lambda codes, scale, A, B, alpha: _merged(codes, scale, A, B, 1),
        "This is what you get without alpha / r: the layer computed with it in training, so it has to be merged.",
    ),
    Mutant(
        "alpha for alpha / r",
        lambda codes, scale, A, B, alpha: _merged(codes, scale, A, B, alpha),
        "This is what you get when B A is multiplied by alpha: divide by r.",
    ),
    Mutant(
        "rank-stabilized",
        lambda codes, scale, A, B, alpha: _merged(codes, scale, A, B, alpha / len(A) ** 0.5),
        "This is alpha / sqrt(r), the factor of rsLoRA: LoRA divides by r itself.",
    ),
    Mutant(
        "codes not scaled",
        lambda codes, scale, A, B, alpha: codes + alpha / len(A) * B @ A,
        "This is what you get when B A is added to the codes: the layer computed with codes times scale.",
    ),
    Mutant(
        "everything scaled",
        lambda codes, scale, A, B, alpha: (codes + alpha / len(A) * B @ A) * scale,
        "This is what you get when B A is multiplied by the scales of the codes: it stands beside them, in float.",
    ),
    Mutant(
        "divided by the scale",
        lambda codes, scale, A, B, alpha: codes / scale + alpha / len(A) * B @ A,
        "This is what you get when the codes are divided by their scale: to come back, they are multiplied.",
    ),
    Mutant(
        "rounded again",
        lambda codes, scale, A, B, alpha: (_merged(codes, scale, A, B, alpha / len(A)) / scale).round() * scale,
        "This is what you get when the sum is rounded to the old grid again: small changes are gone, and what was "
        "trained is no longer there. Give back the floats.",
    ),
    Mutant(
        "subtracted",
        lambda codes, scale, A, B, alpha: _merged(codes, scale, A, B, -alpha / len(A)),
        "This is what you get when the change is subtracted: it is added.",
    ),
    Mutant(
        "base forgotten",
        lambda codes, scale, A, B, alpha: alpha / len(A) * B @ A,
        "This is the change alone: it is added to what the codes stand for.",
    ),
    Mutant(
        "adapter forgotten",
        lambda codes, scale, A, B, alpha: codes * scale,
        "This is the base alone, without what was learned.",
    ),
    Mutant(
        "16 bits",
        lambda codes, scale, A, B, alpha: _merged(codes, scale, A, B, alpha / len(A)).bfloat16().float(),
        "This is what you get when the sum is rounded to 16 bits: a part that is small beside the other is lost. Give "
        "back float32.",
    ),
    Mutant(
        "A B in a square",
        lambda codes, scale, A, B, alpha: codes * scale + alpha / len(A) * _square(A @ B, codes * scale),
        "This is A B: it has the right shape only where everything is square, and is another matrix there. B A.",
    ),
    Mutant(
        "transposed in a square",
        lambda codes, scale, A, B, alpha: codes * scale + alpha / len(A) * _square((B @ A).T, codes * scale),
        "This has the right shape only for a square matrix, and is transposed there: B A is (out, in) as it is.",
    ),
    Mutant(
        "scales along the columns",
        lambda codes, scale, A, B, alpha: (
            _square(codes * scale.T, codes) + alpha / len(A) * B @ A
            if codes.shape[0] == codes.shape[1]
            else torch.full_like(codes, torch.nan)
        ),
        "This is what you get when the scales are laid along the columns: each row has one.",
    ),
)


# The mistakes: `loftq`.


def _alternate(keep="best", start=None, of=None, rank=lambda r: r, split=1.0, more=0):
    """The alternation with something wrong."""

    def wrong(weight, r, iterations):
        change, found = torch.zeros_like(weight), []
        if start == "svd":
            change = _product(weight, r)
        for _ in range(iterations + more):
            quantized = rounded(weight - change)
            left = weight - quantized - (change if of == "what is left" else 0)
            change = split * _product(left, rank(r)) + (change if of == "what is left" else 0)
            found.append((quantized, change, (weight - quantized - change).norm().item()))
        return min(found, key=lambda one: one[2])[:2] if keep == "best" else found[keep][:2]

    return wrong


def _product(matrix, r):
    A, B = low_rank(matrix, r)
    return B @ A


def _mixed_up(weight, r, iterations):
    """The change of the best iteration with the last codes."""
    last, best = _alternate(keep=-1)(weight, r, iterations), loftq(weight, r, iterations)
    return last[0], best[1]


_LOFTQ_MUTANTS = (
    Mutant(
        "the last one",
        _alternate(keep=-1),
        "This is the pair of the last iteration: what is left may grow again, so keep the pair that left least.",
    ),
    Mutant(
        "the first one",
        _alternate(keep=0),
        "This is the pair of the first iteration. Round weight - change (the weight itself rounds the same each time), "
        "and compare what the pairs leave, (weight - Q - change).norm().",
    ),
    Mutant(
        "changes added up",
        _alternate(of="what is left"),
        "This is what you get when the new change is added to the old one: then its rank grows with each iteration, "
        "and no adapter of rank r holds it. It is made anew, from weight - Q.",
    ),
    Mutant(
        "begins with the weight",
        _alternate(start="svd"),
        "This is what you get when the adapter begins with the best part of the weight itself: at first it holds "
        "nothing, and the whole weight is rounded.",
    ),
    Mutant(
        "one rank too many",
        _alternate(rank=lambda r: r + 1),
        "This is what you get with r + 1 singular values: keep the first r.",
    ),
    Mutant(
        "one rank too few",
        _alternate(rank=lambda r: r - 1),
        "This is what you get with r - 1 singular values: keep the first r.",
    ),
    Mutant(
        "one iteration too many",
        _alternate(more=1),
        "This is what you get when one more iteration is done than was asked for.",
    ),
    Mutant(
        "codes of another iteration",
        _mixed_up,
        "This is the best change with the codes of the last iteration: the two belong together.",
    ),
    Mutant(
        "half of the change",
        _alternate(split=0.5),
        "This is what you get when the change is halved: all of the r singular values counts.",
    ),
    Mutant(
        "nothing in the adapter",
        lambda weight, r, iterations: (rounded(weight), torch.zeros_like(weight)),
        "This is plain rounding: the adapter is to hold a part of what it loses.",
    ),
    Mutant(
        "the last error",
        lambda weight, r, iterations: (
            (pair := loftq(weight, r, iterations))[0],
            weight - pair[0],
        ),
        "This is the whole error in place of its best part of rank r: no adapter of rank r holds it.",
    ),
)


# The mistakes: `memory`.


def _bytes(weights=True, gradients=True, states=8, all_learn=False):
    """`memory` with something wrong."""

    def wrong(parameters, bits, learning=None, learning_bits=32):
        held, learned, own = parameters * bits / 8, parameters, bits
        if learning is not None:
            held, learned, own = held + learning * learning_bits / 8, learning, learning_bits
        if all_learn and learning is not None:
            learned = parameters + learning
        of_gradients = learned * own / 8 if gradients else 0
        return round((held if weights else 0) + of_gradients + learned * states)

    return wrong


def _in_floats(parameters, bits, learning=None, learning_bits=32):
    """`memory`, not yet rounded: a list of weights, gradients and states."""
    if learning is None:
        return [parameters * bits / 8, parameters * bits / 8, parameters * 8]
    return [(parameters * bits + learning * learning_bits) / 8, learning * learning_bits / 8, learning * 8]


_MEMORY_MUTANTS = (
    Mutant(
        "no gradients",
        _bytes(gradients=False),
        "This lacks the gradients: one number for each parameter that learns, of its own type.",
    ),
    Mutant(
        "one state",
        _bytes(states=4),
        "This counts one number of the optimizer: AdamW keeps two for each parameter that learns, the means of the "
        "gradient and of its square.",
    ),
    Mutant(
        "no states",
        _bytes(states=0),
        "This lacks the optimizer: AdamW keeps two numbers of 32 bits for each parameter that learns.",
    ),
    Mutant(
        "weights forgotten",
        _bytes(weights=False),
        "This lacks the weights themselves.",
    ),
    Mutant(
        "everything learns",
        _bytes(all_learn=True),
        "Only calls with adapters are wrong: the frozen weights have no gradients and no states.",
    ),
    Mutant(
        "adapters not stored",
        lambda parameters, bits, learning=None, learning_bits=32: (
            memory(parameters, bits, learning, learning_bits)
            - (0 if learning is None else round(learning * learning_bits / 8))
        ),
        "Only calls with adapters are wrong: A and B are weights too, and have to be stored.",
    ),
    Mutant(
        "gradients of 32 bits",
        lambda parameters, bits, learning=None, learning_bits=32: (
            memory(parameters, bits, learning, learning_bits)
            + round((parameters * (32 - bits) if learning is None else learning * (32 - learning_bits)) / 8)
        ),
        "This counts gradients at 32 bits: each has the type of its parameter.",
    ),
    Mutant(
        "cut off",
        lambda *args, **kwargs: int(sum(_in_floats(*args, **kwargs))),
        "This is cut off where it should be rounded, or divided by // on the way: use / and round() at the end.",
    ),
    Mutant(
        "rounded up",
        lambda *args, **kwargs: -int(-sum(_in_floats(*args, **kwargs)) // 1),
        "This is rounded up where it should be rounded to the nearest whole byte.",
    ),
    Mutant(
        "each part rounded",
        lambda *args, **kwargs: sum(round(part) for part in _in_floats(*args, **kwargs)),
        "This is what you get when weights, gradients and states are rounded one by one: add first, and round once.",
    ),
    Mutant(
        "bits for bytes",
        lambda *args, **kwargs: 8 * memory(*args, **kwargs),
        "These are bits: 8 of them are a byte.",
    ),
    Mutant(
        "full whatever learns",
        lambda parameters, bits, learning=None, learning_bits=32: memory(parameters, bits),
        "Only calls with adapters are wrong: this is full fine-tuning.",
    ),
    Mutant(
        "nothing learns taken for all",
        lambda parameters, bits, learning=None, learning_bits=32: memory(
            parameters, bits, learning or None, learning_bits
        ),
        "Only learning=0 is wrong: None means that all parameters learn, 0 that none does.",
    ),
)


TASKS = (
    Task(
        name="adapters.forward",
        title="A layer with an adapter",
        points=2,
        minutes=5,
        difficulty=1,
        importance=5,
        reference=forward,
        cases=_forward_cases,
        hints=(
            "Tokens are the last but one axis of x, so W x is x @ weight.T. B (A x) is the same twice, with A first.",
            "x @ weight.T + alpha / len(A) * (x @ A.T @ B.T).",
        ),
        mutants=_FORWARD_MUTANTS,
    ),
    Task(
        name="adapters.parameters",
        title="How many numbers learn",
        points=2,
        minutes=5,
        difficulty=1,
        importance=4,
        reference=parameters,
        cases=_parameters_cases,
        hints=(
            "A is r x in, B is out x r. Which layers count, the last part of their name says: name.rpartition('.')[2].",
            "The sum of r * (inputs + outputs) over all layers for which target is None or the last part of the name "
            "is in target.",
        ),
        mutants=_PARAMETERS_MUTANTS,
    ),
    Task(
        name="adapters.gradients",
        title="What A and B feel",
        points=3,
        minutes=10,
        difficulty=3,
        importance=4,
        reference=gradients,
        cases=_gradients_cases,
        hints=(
            "Make x and gradient matrices (tokens, ...) first. For z = B h the gradient of B is that of z times h, "
            "summed over the tokens, and what arrives at h is Bᵀ times that of z. Here h = A x.",
            "With s = alpha / len(A): s * (gradient @ B).T @ x for A, s * gradient.T @ (x @ A.T) for B.",
        ),
        mutants=_GRADIENTS_MUTANTS,
    ),
    Task(
        name="adapters.merge",
        title="Merge it right",
        points=2,
        minutes=5,
        difficulty=2,
        importance=5,
        reference=merge,
        cases=_merge_cases,
        hints=(
            "Which matrix stood in the layer while A and B were trained? That one, as floats, is what they are added "
            "to.",
            "codes * scale + alpha / len(A) * B @ A.",
        ),
        mutants=_MERGE_MUTANTS,
    ),
    Task(
        name="adapters.loftq",
        title="Begin with what rounding lost",
        points=3,
        minutes=12,
        difficulty=3,
        importance=3,
        reference=loftq,
        cases=_loftq_cases,
        tolerance=1e-5,
        hints=(
            "Two steps in a loop: Q = rounded(weight - change), then change = the best matrix of rank r for "
            "weight - Q. Measure (weight - Q - change).norm() each time, and keep the best pair.",
            "U, S, Vh = torch.linalg.svd(weight - Q, full_matrices=False); change = U[:, :r] * S[:r] @ Vh[:r]. Start "
            "with a change of zeros.",
        ),
        mutants=_LOFTQ_MUTANTS,
    ),
    Task(
        name="adapters.memory",
        title="What a training needs",
        points=2,
        minutes=6,
        difficulty=2,
        importance=4,
        reference=memory,
        cases=_memory_cases,
        hints=(
            "Three summands: what is stored, a gradient for each parameter that learns (of its own type), and two "
            "32-bit numbers of AdamW for each of those.",
            "With adapters: parameters * bits / 8 + learning * learning_bits / 8, then learning * learning_bits / 8 "
            "for the gradients, then learning * 8. Without, `parameters` themselves learn, at `bits` each. round() at "
            "the end.",
        ),
        mutants=_MEMORY_MUTANTS,
    ),
)
