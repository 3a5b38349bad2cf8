"""The exercise of lesson 05: a weight trained under rounding, the parts of fake quantization, and the loss.

`round_q4_0` and `distillation_loss` are the package's own. The other three are a formula each: the package has them
inside of `fake_quantize`, and the exercise's last cells hold the answers against it.

Fake quantization is wrong in a way that its values do not show, so where a gradient matters it is judged too: the
reference, the mutants and, in the notebook, the learner's function are called through `with_gradient`.
"""

import functools

import torch
import torch.nn.functional as F

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats import gguf_blocks
from qlearn.training import qat


def with_gradient(function):
    """A function of tensors that returns its result together with the gradient for its first argument.

    Returns {"values": the result, "gradient": of the loss that adds the result's numbers, the first of them once, the
    second twice, and so on; None where the result does not depend on the argument, a sentence where it is no tensor}.
    A function that writes into its argument changes the caller's tensor, so that the check can tell.

    >>> with_gradient(lambda x: 3 * x)(torch.ones(2))
    {'values': tensor([3., 3.]), 'gradient': tensor([3., 6.])}
    """
    if not callable(function):
        return function

    @functools.wraps(function)
    def run(given, *args, **kwargs):
        x = given.clone().requires_grad_(True)
        result = function(x, *args, **kwargs)
        given.data = x.data
        if not isinstance(result, torch.Tensor):
            return {"values": result, "gradient": f"none, because the result is a {type(result).__name__}, no tensor"}
        gradient = None
        if result.requires_grad:
            times = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
            (gradient,) = torch.autograd.grad((result * times).sum(), x, allow_unused=True)
        return {"values": result.detach(), "gradient": gradient}

    return run


# What is right.


def settle(weight, target, rate, steps):
    """The latent weight after the last step (float), and its rounded value at each step (list of int)."""
    history = []
    for _ in range(steps):
        history.append(round(weight))
        weight -= rate * (history[-1] - target)
    return weight, history


def straight_through(weight, quantized, inside):
    """The quantized values, with the gradient of the weights that are inside (tensors of one shape)."""
    return quantized + (weight - weight.detach()) * inside


def clip_mask(weight, d, bits):
    """Bool (groups, n): which weights are rounded, and not cut off, by the signed grid with scales d (groups, 1)."""
    half = 2 ** (bits - 1)
    steps = weight / torch.where(d == 0, 1, d)
    return (steps >= -half - 0.5) & (steps <= half - 0.5)


def round_q4_0(weight):
    """What comes back, float32, of the weights (rows, columns) that were stored as Q4_0."""
    return gguf_blocks.dequantize(gguf_blocks.quantize(weight))


# The cases.


def _random(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _settle_cases():
    return [
        Case("three steps, by hand", (0.3, 0.3, 0.5, 3)),
        Case("the target is above the middle", (0.81, 0.83, 0.47, 12)),
        Case("it starts on the other side", (0.93, 0.29, 0.107, 40)),
        Case("a small rate", (0.31, 0.31, 0.0217, 90)),
        Case("a rate of 1", (0.37, 0.37, 1.0, 20)),
        Case("between -2 and -1", (-1.35, -1.37, 0.193, 30)),
        Case("from far away", (3.3, 0.45, 0.15, 60)),
        Case("the target is a grid point", (2.2, 2.0, 0.3, 5)),
        Case("halfway, where round() takes the even number", (0.5, 0.25, 0.0625, 10)),
        Case("halfway, where the even number is the upper one", (1.5, 1.75, 0.25, 2)),
        Case("a rate of 0", (0.7, 0.2, 0.0, 4)),
        Case("no steps", (0.3, 0.3, 0.5, 0)),
    ]


def _by_hand():
    weight = torch.tensor([-1.0, -0.6, 0.3, 0.2, 0.85, -0.1, 0.55, -0.3])
    quantized = torch.tensor([-1.0, -0.5, 0.5, 0.0, 0.5, 0.0, 0.5, -0.5])
    return weight, quantized, torch.tensor([True, True, True, True, False, True, True, True])


def _straight_through_case(name, *shape, seed, inside=0.7, spread=1.0):
    """Quantized values and a mask that do not follow from the weights, so that neither can be made up."""
    weight = _random(*shape, seed=seed, spread=spread)
    quantized = (_random(*shape, seed=seed + 100) * 4).round() * spread / 4 + 0.0  # 0.0: no minus zero
    return Case(name, (weight, quantized, torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < inside))


def _straight_through_cases():
    weight, quantized, inside = _by_hand()
    return [
        Case("the eight weights of the lesson", (weight, quantized, inside)),
        Case("all inside", (weight, quantized, torch.ones(8, dtype=torch.bool))),
        Case("none inside", (weight, quantized, torch.zeros(8, dtype=torch.bool))),
        _straight_through_case("a matrix", 4, 6, seed=1),
        _straight_through_case("half of them inside", 40, seed=2, inside=0.5),
        _straight_through_case("three dimensions", 2, 3, 4, seed=3),
        _straight_through_case("small weights", 5, 8, seed=4, spread=1e-3),
        Case(
            "a weight of zero that is rounded up",
            (torch.tensor([0.0, 0.4]), torch.tensor([0.5, 0.5]), torch.tensor([True, True])),
        ),
        Case("one weight", (torch.tensor([0.7]), torch.tensor([1.0]), torch.tensor([True]))),
    ]


def _clip_mask_cases():
    def column(*scales):
        return torch.tensor(scales)[:, None]

    weight = _by_hand()[0]
    tiny = column(1e-7, -1e-7, 1e-12, -1e-12)
    sizes = _random(2, 8, seed=4) * column(100.0, 0.01)
    return [
        Case("the eight weights of the lesson", (weight[None], column(0.5), 2)),
        Case("the same with all signs turned round", (-weight[None], column(-0.5), 2)),
        Case("a positive scale, 3 bits", (_random(3, 16, spread=3.0), column(0.8, 1.1, 0.6), 3)),
        Case("a negative scale, 3 bits", (_random(3, 16, seed=1, spread=3.0), column(-0.8, -1.1, -0.6), 3)),
        Case("scales of both signs, 4 bits", (_random(4, 32, seed=2), column(0.13, -0.11, 0.1, -0.2), 4)),
        Case("within the last half step", (torch.tensor([[7.4, -8.4, 7.6, -8.6]]), column(1.0), 4)),
        Case("the same, turned round", (torch.tensor([[7.4, -8.4, 8.4, -7.6]]), column(-1.0), 4)),
        Case("8 bits", (_random(2, 64, seed=3), column(0.01, -0.012), 8)),
        Case("groups of very different size", (sizes, column(60.0, -0.006), 2)),
        Case("all inside, a zero among them", (torch.tensor([[0.3, 0.0, -0.7, 1.2]]), column(0.5), 4)),
        Case("a group of zeros, whose scale is 0", (torch.stack([torch.zeros(8), weight]), column(0.0, 0.5), 2)),
        Case("very small scales that are not 0", (torch.linspace(-12, 12, 96) * tiny, tiny, 4)),
    ]


def _q4_0_cases():
    ties = torch.tensor([[-8.0, *(step + 0.5 for step in range(-8, 7)), *torch.arange(-8.0, 8.0).tolist()]])
    both = 0.5 * _random(1, 32, seed=7).clamp(-1.9, 1.9)
    both[0, 5], both[0, 20] = 2.0, -2.0
    sizes = _random(3, 64, seed=6) * 10.0 ** torch.tensor([-2, -1, 0])[:, None]
    zeros = _random(2, 64, seed=8)
    zeros[0, 32:] = 0
    opposite = torch.cat([torch.tensor([[1.0, -0.99, -0.9]]), 0.3 * _random(1, 29, seed=4)], 1)
    unequal = _random(2, 64, seed=3) * torch.tensor([0.01] * 32 + [5.0] * 32)
    hair = 0.5 * _random(2, 32, seed=9)
    hair[0, :2], hair[1, :3] = torch.tensor([-2.8, -1.575]), torch.tensor([-2.6, -2.4375, -1.7875])
    below = torch.zeros(1, 32)
    below[0, 0], below[0, 1:3] = -8.0, torch.nextafter(torch.tensor([-0.5, -1.5]), torch.tensor(-2.0))
    tiny = _random(2, 64, seed=3) * torch.tensor([[1e-6], [1e-4]])
    tiny = torch.cat([tiny.view(4, 32), ties * 2.0**-24])  # the last d is the smallest float16
    return [
        Case("the largest is negative", (-_random(1, 32).abs().sort().values,)),
        Case("the largest is positive", (_random(1, 32).abs().sort().values,)),
        Case("a row of two groups", (_random(1, 64, seed=1),)),
        Case("a matrix", (_random(4, 96, seed=2),)),
        Case("groups of very different size in a row", (unequal,)),
        Case("rows of very different size", (sizes,)),
        Case("halfway between two grid points", (ties,)),
        Case("the same, turned round", (-ties,)),
        Case("within a hair of halfway", (hair,)),
        Case("the next float32 below halfway", (below,)),
        Case("a weight near the other end", (opposite,)),
        Case("two equally large weights, the positive one first", (both,)),
        Case("two equally large weights, the negative one first", (-both,)),
        Case("a constant", (torch.full((1, 32), 0.3),)),
        Case("weights of a model", (_random(2, 256, seed=5, spread=0.03),)),
        Case("very small weights", (tiny,)),
        Case("a group of zeros", (zeros,)),
    ]  # fmt: skip


def _distillation_cases():
    def pair(*shape, seed, spread=2.0):
        return _random(*shape, seed=seed, spread=spread), _random(*shape, seed=seed + 100, spread=spread)

    student, teacher = (torch.tensor([p]).log() for p in ([1 / 8, 1 / 2, 1 / 4, 1 / 8], [1 / 2, 1 / 4, 1 / 8, 1 / 8]))
    near, far = pair(3, 6, seed=4)
    return [
        Case("the four tokens of the lesson", (student, teacher)),
        Case("logits need not be logarithms of probabilities", (student + 3, teacher - 5)),
        Case("five positions", pair(5, 8, seed=1)),
        Case("two texts of three positions", pair(2, 3, 10, seed=2)),
        Case("as many positions as tokens", pair(6, 6, seed=3)),
        Case("both nearly agree", (near, near + 1 + 0.1 * far)),
        Case("a large vocabulary", pair(4, 500, seed=5)),
        Case("one position", pair(1, 7, seed=6)),
        Case("a student that is very sure", (torch.tensor([[300.0, 0.0, 290.0]]), torch.tensor([[0.0, 2.0, 1.0]]))),
        Case("a teacher that is very sure", (torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[300.0, 0.0, -5.0]]))),
        Case("a vocabulary of one: nothing to choose", pair(2, 1, seed=7)),
    ]


# The mistakes: `settle`.


def _settle(weight, target, rate, steps, step, rounds=round, after=False):
    """`settle` with another step(weight, rounded, target, rate) -> weight, or another rounding."""
    history = []
    for _ in range(steps):
        rounded = rounds(weight)
        weight = step(weight, rounded, target, rate)
        history.append(rounds(weight) if after else rounded)
    return weight, history


def _right(weight, rounded, target, rate):
    return weight - rate * (rounded - target)


def _floor(x):
    return int(x // 1)


_SETTLE_MUTANTS = (
    Mutant(
        "the gradient of the weight itself",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: weight - r * (weight - t)),
        "This is what you get when the loss is measured at the latent weight: it glides to its target and stays, and "
        "nobody looks at its rounded value. The model computes with the rounded one, so its gradient is that of the "
        "rounded one.",
    ),
    Mutant(
        "the rounded weight is updated",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: rounded - r * (rounded - t)),
        "This is what you get when the update starts from the rounded weight: what earlier steps added up is thrown "
        "away each time, so that no step shorter than half a grid step ever counts. Update the latent weight.",
    ),
    Mutant(
        "the true gradient",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: weight),
        "This is what you get with the true derivative of rounding, which is zero: nothing ever moves.",
    ),
    Mutant(
        "uphill",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: weight + r * (rounded - t)),
        "This is what you get when the gradient is added: a descent subtracts it.",
    ),
    Mutant(
        "twice the gradient",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: weight - 2 * r * (rounded - t)),
        "This is what you get when the loss is the whole squared distance: with one half before it, the gradient is "
        "the distance itself.",
    ),
    Mutant(
        "only the sign",
        lambda w, t, r, n: _settle(
            w, t, r, n, lambda weight, rounded, t, r: weight - r * ((rounded > t) - (rounded < t))
        ),
        "This is what you get when only the sign of the gradient counts: each step is the rate times the whole "
        "distance.",
    ),
    Mutant(
        "floor for round",
        lambda w, t, r, n: _settle(w, t, r, n, _right, rounds=_floor),
        "This is what you get when the weight is rounded down: its threshold is then the grid point itself, not the "
        "middle between two of them.",
    ),
    Mutant(
        "int for round",
        lambda w, t, r, n: _settle(w, t, r, n, _right, rounds=int),
        "This is what you get when int() cuts off what follows the point: use round().",
    ),
    Mutant(
        "halves rounded up",
        lambda w, t, r, n: _settle(w, t, r, n, _right, rounds=lambda x: _floor(x + 0.5)),
        "Only halves are wrong: round() takes them to the even number, 0.5 to 0.",
    ),
    Mutant(
        "recorded after the step",
        lambda w, t, r, n: _settle(w, t, r, n, _right, after=True),
        "This is what you get when the rounded weight is noted after the update: note what the model computed with, "
        "which is the value before it.",
    ),
    Mutant(
        "one step too many",
        lambda w, t, r, n: settle(w, t, r, n + 1),
        "This is what you get after one step more than was asked for.",
    ),
    Mutant(
        "one step too few",
        lambda w, t, r, n: settle(w, t, r, max(n - 1, 0)),
        "This is what you get after one step less than was asked for.",
    ),
    Mutant(
        "the rounded weight at the end",
        lambda w, t, r, n: (float(round(settle(w, t, r, n)[0])), settle(w, t, r, n)[1]),
        "The history is right, but what is returned beside it is the rounded weight: return the latent one.",
    ),
    Mutant(
        "the latent history",
        lambda w, t, r, n: (settle(w, t, r, n)[0], [settle(w, t, r, k)[0] for k in range(n)]),
        "The history holds the latent weights: note their rounded values.",
    ),
    Mutant(
        "halves rounded down",
        lambda w, t, r, n: _settle(w, t, r, n, _right, rounds=lambda x: -_floor(0.5 - x)),
        "Only halves are wrong: round() takes them to the even number, 1.5 to 2.",
    ),
    Mutant(
        "the target rounded, too",
        lambda w, t, r, n: _settle(w, t, r, n, lambda weight, rounded, t, r: weight - r * (rounded - round(t))),
        "This is what you get when the target is rounded as well: then most weights are where they should be at once, "
        "and nothing is left to learn. Only the weight is rounded.",
    ),
    Mutant(
        "the last update left out",
        lambda w, t, r, n: (settle(w, t, r, max(n - 1, 0))[0], settle(w, t, r, n)[1]),
        "The history is right, but the weight that is returned has not had its last update.",
    ),
    Mutant(
        "one entry too many",
        lambda w, t, r, n: (settle(w, t, r, n)[0], settle(w, t, r, n + 1)[1]),
        "The weight is right, but the history has one entry more than there were steps: what the model would see after "
        "the last update does not belong to it.",
    ),
)


# The mistakes: `straight_through`.

_STRAIGHT_THROUGH_MUTANTS = (
    Mutant(
        "detach forgotten",
        with_gradient(lambda weight, quantized, inside: weight * inside + (quantized - weight * inside)),
        "The values are right, but their gradient is zero: without detach() the two times that the weight occurs "
        "cancel each other in the backward pass, too.",
    ),
    Mutant(
        "the quantized values alone",
        with_gradient(lambda weight, quantized, inside: quantized),
        "The values are right, but nothing leads back from them to the weights: no gradient arrives.",
    ),
    Mutant(
        "no mask",
        with_gradient(lambda weight, quantized, inside: quantized + (weight - weight.detach())),
        "This is what you get when the gradient passes everywhere: where `inside` is false, it has to be zero.",
    ),
    Mutant(
        "the mask inverted",
        with_gradient(lambda weight, quantized, inside: quantized + (weight - weight.detach()) * ~inside),
        "This is what you get when the mask is turned round: only the weights that were cut off learn.",
    ),
    Mutant(
        "the mask on the values",
        with_gradient(lambda weight, quantized, inside: (quantized + weight - weight.detach()) * inside),
        "This is what you get when the mask multiplies the values as well: weights that were cut off become 0. It "
        "concerns the gradient only.",
    ),
    Mutant(
        "the mask on the weight only",
        with_gradient(lambda weight, quantized, inside: weight * inside + (quantized - weight).detach()),
        "The gradient is right, but where `inside` is false the weight is subtracted from the values and never added: "
        "the mask has to come in both places, or on the difference of weight and weight.detach().",
    ),
    Mutant(
        "the float weight where nothing is learnt",
        with_gradient(
            lambda weight, quantized, inside: torch.where(inside, quantized + weight - weight.detach(), weight.detach())
        ),
        "This is what you get when the weights that were cut off keep their float values: the model has to compute "
        "with the quantized values of all of them.",
    ),
    Mutant(
        "the quantized weight only inside, the rest learns",
        with_gradient(lambda weight, quantized, inside: torch.where(inside, quantized, weight)),
        "This is what you get when `inside` chooses between quantized values and weights: all values are the "
        "quantized ones, and the gradient is the weights'.",
    ),
    Mutant(
        "detach on the wrong one",
        with_gradient(lambda weight, quantized, inside: weight.detach() * inside + (quantized - weight * inside)),
        "The values are right, but the gradient has the wrong sign: of the two times that the weight occurs, it is "
        "the one that is subtracted that has to be detached.",
    ),
    Mutant(
        "the weights themselves",
        with_gradient(lambda weight, quantized, inside: weight * inside),
        "These are the float weights: forward, the values have to be the quantized ones.",
    ),
    Mutant(
        "the weights with the mask's gradient",
        with_gradient(lambda weight, quantized, inside: torch.where(inside, weight, weight.detach())),
        "The gradient is right, but the values are the float weights: forward they have to be the quantized ones.",
    ),
    Mutant(
        "twice the gradient",
        with_gradient(lambda weight, quantized, inside: quantized + (2 * weight - 2 * weight.detach()) * inside),
        "The gradient is twice what arrives: it has to pass as it is.",
    ),
    Mutant(
        "the ratio for the difference",
        with_gradient(lambda weight, quantized, inside: weight * (quantized / weight).detach() * inside),
        "This is what you get when the weight is multiplied by quantized / weight: its gradient is multiplied by that "
        "too, and a weight of zero gives NaN. Add a difference.",
    ),
    Mutant(
        "the float weight where it learns",
        with_gradient(lambda weight, quantized, inside: torch.where(inside, weight, quantized)),
        "The gradient is right, but the weights that learn keep their float values: forward, all values have to be the "
        "quantized ones.",
    ),
    Mutant(
        "the weight added and not taken away",
        with_gradient(lambda weight, quantized, inside: quantized + weight * inside),
        "The gradient is right, but the values are the sum of weights and quantized values: what is added has to be "
        "zero forward, weight - weight.detach().",
    ),
    Mutant(
        "one mask for all",
        with_gradient(lambda weight, quantized, inside: quantized + (weight - weight.detach()) * inside.all()),
        "This is what you get when one weight that is cut off takes the gradient from all: the mask counts for each "
        "weight by itself.",
    ),
)


# The mistakes: `clip_mask`.


def _mask(weight, d, low, high):
    steps = weight / torch.where(d == 0, 1, d)
    return (steps >= low) & (steps <= high)


def _between(weight, low, high):
    return (weight >= low) & (weight <= high)


def _half(bits):
    return 2 ** (bits - 1)


def _absolute_half(weight, d, bits):
    first, last = -_half(bits) * d, (_half(bits) - 1) * d
    return _between(weight, torch.minimum(first, last) - 0.5, torch.maximum(first, last) + 0.5)


_CLIP_MASK_MUTANTS = (
    Mutant(
        "only up to the last grid points",
        lambda weight, d, bits: _mask(weight, d, -_half(bits), _half(bits) - 1),
        "This is what you get when the ends are the outermost grid points themselves: a weight within half a step of "
        "them is rounded like any other, so it may learn.",
    ),
    Mutant(
        "a whole step beyond",
        lambda weight, d, bits: _mask(weight, d, -_half(bits) - 1, _half(bits)),
        "This is what you get when the mask ends a whole step beyond the grid: from half a step on, weights are cut "
        "off.",
    ),
    Mutant(
        "as many steps above as below",
        lambda weight, d, bits: _mask(weight, d, -_half(bits) - 0.5, _half(bits) + 0.5),
        "This is what you get when the grid has 2**(bits - 1) steps on both sides: it has one less on the positive "
        "one.",
    ),
    Mutant(
        "absmax's grid",
        lambda weight, d, bits: _mask(weight, d, -_half(bits) + 0.5, _half(bits) - 0.5),
        "This is what you get for absmax, which leaves the lowest code unused: here it is in use.",
    ),
    Mutant(
        "turned round",
        lambda weight, d, bits: _mask(weight, d, -_half(bits) + 0.5, _half(bits) + 0.5),
        "This is what you get when the longer side is the positive one: in steps of d the grid goes from "
        "-2**(bits - 1) to 2**(bits - 1) - 1.",
    ),
    Mutant(
        "unsigned codes",
        lambda weight, d, bits: _mask(weight, d, -0.5, 2**bits - 0.5),
        "This is what you get for unsigned codes: these go from -2**(bits - 1) to 2**(bits - 1) - 1.",
    ),
    Mutant(
        "the sign of the scale ignored",
        lambda weight, d, bits: _mask(weight, d.abs(), -_half(bits) - 0.5, _half(bits) - 0.5),
        "This is what you get when a negative scale is treated like a positive one: it turns the grid round, so that "
        "the longer side is the positive one.",
    ),
    Mutant(
        "ends not sorted",
        lambda weight, d, bits: _between(weight, (-_half(bits) - 0.5) * d, (_half(bits) - 0.5) * d),
        "This is what you get when both ends are multiplied by a negative scale and stay where they are: the lower one "
        "is then the higher one, and nothing lies between. Divide the weight, or sort the ends.",
    ),
    Mutant(
        "0 / 0",
        lambda weight, d, bits: _between(weight / d, -_half(bits) - 0.5, _half(bits) - 0.5),
        "Only the group of zeros is wrong: 0 / 0 is NaN, which lies between nothing. Its weights sit on the grid, so "
        "they are inside.",
    ),
    Mutant(
        "outside",
        lambda weight, d, bits: ~clip_mask(weight, d, bits),
        "This is the opposite: true is for the weights that may learn.",
    ),
    Mutant(
        "no half step below",
        lambda weight, d, bits: _mask(weight, d, -_half(bits), _half(bits) - 0.5),
        "This is what you get when only the upper end is half a step beyond the grid: below the lowest grid point, "
        "too, half a step is only rounded.",
    ),
    Mutant(
        "one bit too many",
        lambda weight, d, bits: _mask(weight, d, -(2**bits) - 0.5, 2**bits - 0.5),
        "This is what you get with 2**bits steps on each side: one bit of them is the sign.",
    ),
    Mutant(
        "clamp(min=...) swallows negative scales",
        lambda weight, d, bits: _between(weight / d.clamp(min=1e-8), -_half(bits) - 0.5, _half(bits) - 0.5),
        "This is what you get when d.clamp(min=...) is to keep zeros out of the division: every negative scale becomes "
        "that minimum, too. Replace only what is 0, with torch.where(d == 0, 1, d).",
    ),
    Mutant(
        "half a unit for half a step",
        lambda weight, d, bits: _absolute_half(weight, d, bits),
        "This is what you get when 0.5 is added at the ends of the grid after it was scaled: half a step is half of d.",
    ),
    Mutant(
        "only the upper end",
        lambda weight, d, bits: weight / torch.where(d == 0, 1, d) <= _half(bits) - 0.5,
        "This is what you get when only the end at 2**(bits - 1) - 1 is tested: in steps of d weights are cut off at "
        "the lower end as well.",
    ),
    Mutant(
        "the first group's scale for all",
        lambda weight, d, bits: clip_mask(weight, d[:1], bits),
        "This is what you get when all groups are measured with the scale of the first: each row has its own.",
    ),
    Mutant(
        "a little added to the scale",
        lambda weight, d, bits: _between(weight / (d + 1e-8), -_half(bits) - 0.5, _half(bits) - 0.5),
        "Only very small scales are wrong: something like 1e-8 was added to d to keep zeros out of the division, and "
        "next to such a scale that is much. Replace only what is 0, with torch.where(d == 0, 1, d).",
    ),
)


# The mistakes: `round_q4_0`.


def _q4_0(
    weight,
    group=32,
    largest=None,
    steps=-8,
    coding=lambda d: d,
    stored=lambda d: d.half().float(),
    code=lambda u: (u + 8.5).trunc(),
    low=0,
    high=15,
    guard=True,
    inverts=True,
    inverse=lambda d: 1 / d,
    product=None,
):
    """`round_q4_0` with one thing different."""
    groups = weight.unflatten(-1, (-1, group))
    largest = _signed_largest if largest is None else largest
    d = largest(groups) / steps
    inverse = inverse(coding(d))
    if guard:
        inverse = torch.where(d == 0, 0, inverse)
    steps = groups * inverse if inverts else groups / torch.where(d == 0, 1, d)
    whole = code(steps).clamp(low, high) - 8
    return (product(whole, d) if product else whole * stored(d)).flatten(-2)


def _signed_largest(groups):
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _last_largest(groups):
    place = groups.shape[-1] - 1 - groups.flip(-1).abs().argmax(-1, keepdim=True)
    return groups.gather(-1, place)


def _larger_end(groups):
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return torch.where(high > -low, high, low)


def _strided(weight):
    """32 weights that lie a row's length / 32 apart share a scale."""
    apart = weight.unflatten(-1, (32, -1)).transpose(-1, -2)
    return _q4_0(apart.flatten(-2)).view_as(apart).transpose(-1, -2).flatten(-2)


_Q4_0_MUTANTS = (
    Mutant(
        "magnitude for signed maximum",
        lambda weight: _q4_0(weight, largest=lambda groups: groups.abs().amax(-1, keepdim=True)),
        "This is what you get when d is made from the largest magnitude: where that weight is positive, it needs 8 "
        "steps on the side that has 7, and is cut off. Keep its sign.",
    ),
    Mutant(
        "the largest value",
        lambda weight: _q4_0(weight, largest=lambda groups: groups.amax(-1, keepdim=True)),
        "This is what you get when d is made from the largest value: take the one that is furthest from zero, on "
        "either side.",
    ),
    Mutant(
        "d with the wrong sign",
        lambda weight: _q4_0(weight, steps=8),
        "This is what you get when the largest weight is divided by 8: by -8, so that it lands on the side with 8 "
        "steps.",
    ),
    Mutant(
        "7 steps",
        lambda weight: _q4_0(weight, steps=-7),
        "This is what you get when d is a 7th of the largest weight: it has 8 steps on its side.",
    ),
    Mutant(
        "d not rounded to float16",
        lambda weight: _q4_0(weight, stored=lambda d: d),
        "This is what you get when the values are computed with d in float32: the file holds it in float16, so the "
        "values that come back are code times that.",
    ),
    Mutant(
        "d rounded to bfloat16",
        lambda weight: _q4_0(weight, stored=lambda d: d.bfloat16().float()),
        "This is what you get when d is stored as bfloat16: in the file it is a float16.",
    ),
    Mutant(
        "codes by the float16",
        lambda weight: _q4_0(weight, coding=lambda d: d.half().float()),
        "This is what you get when the codes are found with d after its rounding to float16: they are found with the "
        "float32, and only what is stored is rounded.",
    ),
    Mutant(
        "divided by d",
        lambda weight: _q4_0(weight, inverts=False),
        "Only weights within a hair of halfway differ: w / d and w * (1 / d) are rounded differently, and llama.cpp "
        "multiplies by 1 / d. A file has to hold what the training saw, to the last bit.",
    ),
    Mutant(
        "ties to even",
        lambda weight: _q4_0(weight, code=lambda u: u.round() + 8),
        "Only halves are wrong: torch.round takes them to the even number, trunc(w * (1 / d) + 8.5) takes them up.",
    ),
    Mutant(
        "half a step too much",
        lambda weight: _q4_0(weight, code=lambda u: (u + 8.5).round()),
        "This is what you get when w * (1 / d) + 8.5 is rounded: the 0.5 is there because trunc cuts off.",
    ),
    Mutant(
        "half a step too little",
        lambda weight: _q4_0(weight, code=lambda u: (u + 8).trunc()),
        "This is what you get when w * (1 / d) + 8 is cut off: without the 0.5 every code is rounded down.",
    ),
    Mutant(
        "cut off before the 8 is added",
        lambda weight: _q4_0(weight, code=lambda u: (u + 0.5).trunc() + 8),
        "This is what you get when w * (1 / d) + 0.5 is cut off: below zero that rounds upwards, towards zero. With "
        "8.5 added nothing is below zero.",
    ),
    Mutant(
        "no end at 15",
        lambda weight: _q4_0(weight, high=16),
        "This is what you get without min(15, ...): a weight that is nearly as large as the largest, with the other "
        "sign, gets code 16, which does not fit 4 bits.",
    ),
    Mutant(
        "code 0 left unused",
        lambda weight: _q4_0(weight, low=1),
        "This is what you get when the codes end at 1: the largest weight needs code 0.",
    ),
    Mutant(
        "a scale for a whole row",
        lambda weight: _q4_0(weight, group=weight.shape[-1]),
        "This is what you get when all weights of a row share a scale: each 32 have their own.",
    ),
    Mutant(
        "one scale for all",
        lambda weight: _q4_0(weight.reshape(1, -1), group=weight.numel()).reshape(weight.shape),
        "This is what you get with one scale for the whole matrix: each 32 weights have their own.",
    ),
    Mutant(
        "32 weights that are not neighbours",
        _strided,
        "This is what you get when 32 weights that lie apart share a scale, as unflatten(-1, (32, -1)) groups them: "
        "it has to be (-1, 32).",
    ),
    Mutant(
        "the last of equals",
        lambda weight: _q4_0(weight, largest=_last_largest),
        "Only a group with two equally large weights of different sign is wrong: the first of them counts, as with "
        "argmax.",
    ),
    Mutant(
        "no scale for zeros",
        lambda weight: _q4_0(weight, guard=False),
        "Only the group of zeros is wrong: its d is 0, 1 / d is infinite, and 0 times infinity is NaN.",
    ),
    Mutant(
        "the codes",
        lambda weight: _q4_0(weight, stored=torch.ones_like),
        "These are codes: multiply them by d.",
    ),
    Mutant(
        "floor(... + 0.5)",
        lambda weight: _q4_0(weight, code=lambda u: (u + 0.5).floor() + 8),
        "Only the next number below a half differs: in exact arithmetic floor(u + 0.5) + 8 is trunc(u + 8.5), but "
        "u + 8.5 is rounded to float32 before it is cut off, and for such a number that is up to the next whole one. A "
        "file has llama.cpp's rounding.",
    ),
    Mutant(
        "in float64",
        lambda weight: _q4_0(weight.double(), stored=lambda d: d.half().double()),
        "Only weights within a hair of halfway differ: this was computed in float64, and llama.cpp computes in float32 "
        "throughout.",
    ),
    Mutant(
        "the larger of maximum and minimum",
        lambda weight: _q4_0(weight, largest=_larger_end),
        "Only a group with two equally large weights is wrong, where the positive one comes first: the first of them "
        "counts, as with argmax, and not always the negative one.",
    ),
    Mutant(
        "the product in float16",
        lambda weight: _q4_0(weight, product=lambda steps, d: (steps.half() * d.half()).float()),
        "This is what you get when code - 8 and d are multiplied in float16: d is stored in float16, and the product "
        "is computed in float32.",
    ),
    Mutant(
        "1 / d rounded to float16",
        lambda weight: _q4_0(weight, inverse=lambda d: (1 / d).half().float()),
        "This is what you get when 1 / d is rounded to float16: for a small d it is infinite then. Only the stored d "
        "is rounded.",
    ),
    Mutant(
        "a little added to d",
        lambda weight: _q4_0(weight, inverse=lambda d: 1 / (d + 1e-8)),
        "Only very small weights are wrong: something like 1e-8 was added to d to keep zeros out of the division, and "
        "next to such a d that is much. Replace the inverse only where d is 0.",
    ),
)


# The mistakes: `distillation_loss`.


def _log_softmax(logits, axis=-1):
    return logits.log_softmax(axis)


def _kl(student, teacher):
    """KL(teacher || student) of log probabilities, one for each position."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def _loss(student_logits, teacher_logits, kl=_kl, mean=torch.mean):
    return mean(kl(_log_softmax(student_logits), _log_softmax(teacher_logits)))


def _temperature(student_logits, teacher_logits):
    return 4 * qat.distillation_loss(student_logits / 2, teacher_logits / 2)


def _log_of_more(logits):
    return (logits.softmax(-1) + 1e-8).log()


def _without_nan(student_logits, teacher_logits):
    student, teacher = student_logits.softmax(-1), teacher_logits.softmax(-1)
    return (teacher * (teacher.log() - student.log())).nan_to_num().sum(-1).mean()


def _rows_of_log(*logits):
    return [_log_softmax(each).flatten(0, -2) for each in logits]


_LOSS_MUTANTS = (
    Mutant(
        "KL the other way round",
        with_gradient(lambda s, t: _loss(s, t, kl=lambda student, teacher: _kl(teacher, student))),
        "This is KL(student || teacher), weighted with the student's probabilities: weight with the teacher's. "
        "(F.kl_div takes the student first, and measures KL of its second argument from it.)",
    ),
    Mutant(
        "cross-entropy",
        with_gradient(lambda s, t: _loss(s, t, kl=lambda student, teacher: -(teacher.exp() * student).sum(-1))),
        "This is the cross-entropy: its gradient is right, but it is not zero where the two agree. Subtract the "
        "teacher's own entropy, or sum p_teacher * (log p_teacher - log p_student).",
    ),
    Mutant(
        "mean over the vocabulary, too",
        with_gradient(lambda s, t: _loss(s, t) / s.shape[-1]),
        "This is what you get with the mean over all numbers, F.kl_div's reduction='mean': sum over the vocabulary, "
        "and take the mean over positions.",
    ),
    Mutant(
        "sum over positions",
        with_gradient(lambda s, t: _loss(s, t, mean=torch.sum)),
        "This is the sum over all positions: take their mean, or the loss grows with the batch.",
    ),
    Mutant(
        "mean over the first axis only",
        with_gradient(lambda s, t: _loss(s, t, mean=torch.sum) / len(s)),
        "This is what reduction='batchmean' gives for more than two axes: it divides by the number of texts, not of "
        "positions. Flatten them to (positions, vocabulary) first.",
    ),
    Mutant(
        "logits for logarithms",
        with_gradient(lambda s, t: (t.softmax(-1) * (t - s)).sum(-1).mean()),
        "This is what you get with logits in place of log probabilities: a constant added to all logits of a position "
        "must not change the loss. Use log_softmax.",
    ),
    Mutant(
        "the student's logits not normalized",
        with_gradient(lambda s, t: _kl(s, _log_softmax(t)).mean()),
        "This is what you get when the student's logits are taken for log probabilities: log_softmax is missing.",
    ),
    Mutant(
        "the teacher's logits not normalized",
        with_gradient(lambda s, t: _kl(_log_softmax(s), t).mean()),
        "This is what you get when the teacher's logits are taken for log probabilities: log_softmax is missing.",
    ),
    Mutant(
        "softmax, then log",
        with_gradient(lambda s, t: _kl(s.softmax(-1).log(), t.softmax(-1).log()).mean()),
        "Only where a model is very sure is this wrong: softmax gives 0 there, and its logarithm is infinite. "
        "log_softmax computes both in one, without that.",
    ),
    Mutant(
        "softmax over the positions",
        with_gradient(lambda s, t: _kl(_log_softmax(s, 0), _log_softmax(t, 0)).mean()),
        "This is what you get when the probabilities of one token at all positions add up to 1: the vocabulary is the "
        "last axis.",
    ),
    Mutant(
        "in bits",
        with_gradient(lambda s, t: _loss(s, t) / torch.log(torch.tensor(2.0))),
        "This is the right loss in bits: take natural logarithms, so that it is in nats like every other loss of the "
        "course.",
    ),
    Mutant(
        "squared distance of the logits",
        with_gradient(lambda s, t: (s - t).square().sum(-1).mean()),
        "This is the squared distance between logits: compare probabilities.",
    ),
    Mutant(
        "the teacher's most likely token",
        with_gradient(lambda s, t: F.cross_entropy(s.reshape(-1, s.shape[-1]), t.argmax(-1).reshape(-1))),
        "This is the cross-entropy with the teacher's most likely token: that throws away all its other "
        "probabilities, which are what distillation is about.",
    ),
    Mutant(
        "a temperature",
        with_gradient(_temperature),
        "This is what you get at temperature 2: the logits are compared as they are.",
    ),
    Mutant(
        "the sign",
        with_gradient(lambda s, t: -_loss(s, t)),
        "This is the negative of the divergence, which is never below zero: turn the sign round.",
    ),
    Mutant(
        "no gradient for the student",
        with_gradient(lambda s, t: qat.distillation_loss(s.detach(), t)),
        "The value is right, but no gradient arrives at the student: leave its logits in the graph.",
    ),
    Mutant(
        "a number for a tensor",
        with_gradient(lambda s, t: qat.distillation_loss(s, t).item()),
        "The value is right, but it is a number, as item() makes it: nothing leads back from that. Return the tensor.",
    ),
    Mutant(
        "softmax, then log, for the student only",
        with_gradient(lambda s, t: _kl(s.softmax(-1).log(), _log_softmax(t)).mean()),
        "Only where the student is very sure is this wrong: its softmax gives 0 there, and the logarithm of that is "
        "infinite. Use log_softmax for both.",
    ),
    Mutant(
        "log(p + 1e-8)",
        with_gradient(lambda s, t: _kl(_log_of_more(s), _log_of_more(t)).mean()),
        "This is what you get when something like 1e-8 is added before the logarithm: it is finite then, but wrong for "
        "all tokens that are hardly likely. log_softmax needs no such help.",
    ),
    Mutant(
        "nan_to_num",
        with_gradient(_without_nan),
        "Only where a model is very sure is this wrong: nan_to_num replaces what softmax and log have spoiled, and the "
        "right number is lost. Use log_softmax.",
    ),
    Mutant(
        "log_target forgotten",
        with_gradient(lambda s, t: F.kl_div(*_rows_of_log(s, t), reduction="batchmean")),
        "This is what F.kl_div gives when its second argument holds log probabilities and log_target=True is missing: "
        "it takes them for probabilities.",
    ),
    Mutant(
        "sum over the positions of a text",
        with_gradient(lambda s, t: _loss(s, t, mean=lambda kl: kl.sum(-1).mean())),
        "This is the sum over the positions of each text, and the mean over texts: take the mean over all positions.",
    ),
)


TASKS = (
    Task(
        name="qat.settle",
        title="A weight between two grid points",
        points=2,
        minutes=7,
        difficulty=1,
        importance=4,
        reference=settle,
        cases=_settle_cases,
        hints=(
            "Each step does three things: round, note the rounded value, and correct the latent weight by what the "
            "rounded one got wrong.",
            "history.append(round(weight)), then weight -= rate * (history[-1] - target).",
        ),
        mutants=_SETTLE_MUTANTS,
    ),
    Task(
        name="qat.straight_through",
        title="Forward one thing, backward another",
        points=3,
        minutes=10,
        difficulty=3,
        importance=5,
        reference=with_gradient(straight_through),
        cases=_straight_through_cases,
        hints=(
            "weight - weight.detach() is zero forward, and passes the gradient backward. What has to be added to it, "
            "and what has to be multiplied by the mask?",
            "quantized + (weight - weight.detach()) * inside.",
        ),
        mutants=_STRAIGHT_THROUGH_MUTANTS,
    ),
    Task(
        name="qat.clip_mask",
        title="Who may learn",
        points=2,
        minutes=8,
        difficulty=2,
        importance=3,
        reference=clip_mask,
        cases=_clip_mask_cases,
        hints=(
            "Measure the weights in steps of the grid, weight / d: then a negative d needs no thought. What happens "
            "to a group of zeros?",
            "steps = weight / torch.where(d == 0, 1, d); then -half - 0.5 <= steps <= half - 0.5 with half = "
            "2**(bits - 1).",
        ),
        mutants=_CLIP_MASK_MUTANTS,
    ),
    Task(
        name="qat.round_q4_0",
        title="Exactly what the file will hold",
        points=3,
        minutes=12,
        difficulty=3,
        importance=5,
        reference=round_q4_0,
        cases=_q4_0_cases,
        hints=(
            "unflatten(-1, (-1, 32)) gives groups. The largest weight with its sign is where abs() has its argmax, and "
            "gather fetches it.",
            "d = largest / -8; inverse = torch.where(d == 0, 0, 1 / d); codes = (groups * inverse + 8.5).trunc() up to "
            "15; the values are (codes - 8) * d.half().float(), flattened.",
        ),
        mutants=_Q4_0_MUTANTS,
    ),
    Task(
        name="qat.distillation_loss",
        title="How far from the teacher",
        points=2,
        minutes=8,
        difficulty=2,
        importance=5,
        reference=with_gradient(qat.distillation_loss),
        tolerance=1e-4,  # the loss is a difference of larger numbers
        cases=_distillation_cases,
        hints=(
            "Both logits become log probabilities over the last axis. Whose probabilities weight the difference, and "
            "over which axis is it a sum, over which a mean?",
            "student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1); the loss is "
            "(teacher.exp() * (teacher - student)).sum(-1).mean().",
        ),
        mutants=_LOSS_MUTANTS,
    ),
)
