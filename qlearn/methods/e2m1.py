"""Rounding to sixteen numbers, on tensors where they lie: fast enough for every step of a training, or of a model.

FP4 (E2M1) has eight magnitudes, and the distance between neighbours doubles twice:

    0   0.5   1   1.5   2     3     4           6
     step 0.5              step 1      step 2

So a magnitude a < 6 lies in a stretch with a known step, and to round it is to round a / step to a whole number. Three
ways to do that are needed:

- **nearest, ties to even**: what hardware does.
- **nearest, ties down**: what Quartet's emulation does; a number halfway goes to the smaller magnitude.
- **stochastic**: up with the probability (a - lower) / step, else down. The result is wrong by more than the nearest
  number would be, but *on average it is right*: its expected value is a.

`qlearn.formats` rounds the same way, exactly and on the CPU, and says which code a number has. This file gives values
only, and can be compiled into one pass over the memory of a GPU.

A scale of a microscaling format has eight bits of exponent and none of mantissa: it is a power of two. The exponent
bits of a float32 are already that, so masking out the others rounds down to a power of two, exactly.

Source: OCP Microscaling Formats 1.0; Castro et al., Quartet, arXiv 2505.14669.
"""

import torch

MAX = 6.0
EXPONENT_BITS = 0x7F800000
SQRT2 = 2**0.5


def round_e2m1(x, ties="even"):
    """Each number as the nearest of FP4's; beyond 6, the end.

    x: floating point, any shape.  ties: "even" or "down".  Returns the dtype of x.  Raises ValueError for other ties.

    >>> round_e2m1(torch.tensor([0.3, -0.75, 2.5, 5.0, 5.1, 100.0])).tolist()
    [0.5, -1.0, 2.0, 4.0, 6.0, 6.0]
    >>> round_e2m1(torch.tensor([0.3, -0.75, 2.5, 5.0, 5.1, 100.0]), "down").tolist()
    [0.5, -0.5, 2.0, 4.0, 6.0, 6.0]
    """
    magnitude = x.abs().clamp(max=MAX)
    step = step_of(magnitude)
    if ties == "even":
        steps = (magnitude / step).round()
    elif ties == "down":
        steps = (magnitude / step - 0.5).ceil()
    else:
        raise ValueError(f"ties={ties!r} is unknown; choose 'even' or 'down'")
    return torch.copysign(steps * step, x)


def round_e2m1_stochastically(x, random=None):
    """Each number as one of its two neighbours in FP4, the nearer one more often: unbiased within -6 ... 6.

    x: floating point, any shape.  random: numbers in [0, 1) of that shape; drawn afresh unless given. The sum of the
    two is rounded to float32, so one draw in some ten million goes up that should not.

    >>> x = torch.full((100_000,), 2.25)
    >>> rounded = round_e2m1_stochastically(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))
    >>> rounded.unique().tolist(), round(rounded.mean().item(), 2)
    ([2.0, 3.0], 2.25)
    """
    random = torch.rand_like(x) if random is None else random
    magnitude = x.abs().clamp(max=MAX)
    step = step_of(magnitude)
    return torch.copysign((magnitude / step + random).floor() * step, x)


def step_of(magnitude):
    """The distance between the two neighbours of a magnitude in 0 ... 6.

    >>> step_of(torch.tensor([0.0, 1.9, 2.0, 3.9, 4.0, 6.0])).tolist()
    [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]
    """
    return torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(magnitude.dtype)


def power_of_two(x, rule="floor"):
    """Positive float32 numbers as powers of two, as an E8M0 scale holds them; zero and subnormals become 2**-126.

    rule: "floor", the next power below; "nearest", on a scale of logarithms; "ceil", the next above.
    Raises ValueError for another rule.

    >>> [power_of_two(torch.tensor([0.2, 1.0, 1.4, 1.5, 5.0]), rule).tolist() for rule in ("floor", "nearest", "ceil")]
    [[0.125, 1.0, 1.0, 1.0, 4.0], [0.25, 1.0, 1.0, 2.0, 4.0], [0.25, 1.0, 2.0, 2.0, 8.0]]
    """
    if rule == "ceil":
        below = power_of_two(x)
        return torch.where(below < x, below * 2, below)
    if rule not in ("floor", "nearest"):
        raise ValueError(f"rule={rule!r} is unknown; choose floor, nearest or ceil")
    x = (x * SQRT2 if rule == "nearest" else x).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.contiguous().view(torch.int32) & EXPONENT_BITS).view(torch.float32)


def mx_scale(largest):
    """The scale of a block of MXFP4 by the rule of the OCP specification: 2**(floor(log2 largest) - 2).

    largest: float32, the largest magnitude of a block.  Returns float32, no smaller than 2**-127, as E8M0 ends there.

    >>> mx_scale(torch.tensor([0.75, 4.0, 7.9])).tolist()
    [0.125, 1.0, 1.0]
    """
    return (power_of_two(largest) / 4).clamp(min=2.0**-127)
