"""When is training in FP4 the best choice? A scaling law, efficiencies and speeds give an answer.

FP4 is faster and worse. Speed is useful, for in the same time a larger model, or more text, fits. So a precision P is
judged by the loss it reaches in a given time. Let the baseline (FP8 here) train N parameters on D tokens, and let P be
f times as fast in a forward pass and b times in a backward pass. A backward pass is twice the work of a forward pass
(one product for the gradient of the inputs and one for that of the weights, against one), so a training step is t times
as fast:

    1 / t = (1/3) / f + (2/3) / b

and the time of a training is proportional to N D / t. There are three ways to spend the time saved:

    "size"     a larger model, N f, whose forward pass takes as long as the baseline's; the tokens are what the time for
               training leaves it, D t / f. This is Quartet's question: which model is best to serve, and to train?
    "tokens"   the same model, N, and more tokens, D t: when the size is given.
    "both"     only the time for training is given, and size and tokens are those with the least loss.

    loss of P = L(its parameters x eff_N, its tokens x eff_D)

Under "both" all of a precision is in one number, t eff_N eff_D: how many times as much training it is worth as the
baseline (`worth`). Under "size" a large D / N favours whoever has a fast forward pass: tokens are plenty then, and
parameters count. Under "tokens" it is the other way round.

**Speeds** are those that Quartet's authors report for their kernels on one GPU, an RTX 5090: FP4 is 2 times as fast as
FP8 and 4 times as BF16 in a forward pass, and 1.6 and 2.9 times in training; what that leaves for the backward pass is
computed here. Elsewhere they differ.
**Efficiencies** are fitted to the published losses (`measured`). FP8 is taken to lose nothing; none of the
published runs is in it. BF16, which is slower and then no better, is never the choice.

Source: Castro et al., Quartet, arXiv 2505.14669, the sections on the scaling law and on speed.
"""

import math
from dataclasses import dataclass

import numpy as np

from qlearn.training.scaling_law import Efficiency, fit_efficiency
from qlearn.training.scaling_runs import SCHEMES, published

SPENDS = ("size", "tokens", "both")
#: Which published runs tell what a precision costs.
RUNS = {"FP4 forward": "forward_quest", "FP4 backward": "backward_sr", "FP4": "quest_forward_sr_backward"}


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the baseline.

    >>> Speed(forward=2.0, backward=2.0).training, round(Speed(forward=2.0, backward=1.0).training, 3)
    (2.0, 1.2)
    """

    forward: float = 1.0
    backward: float = 1.0

    def __post_init__(self):
        if not all(math.isfinite(value) and value > 0 for value in (self.forward, self.backward)):
            raise ValueError(f"speeds of {self.forward} and {self.backward} are none; give numbers above 0")

    @property
    def training(self):
        """Of a forward and a backward pass together, of which the backward pass is two thirds of the work."""
        return 1 / (1 / 3 / self.forward + 2 / 3 / self.backward)

    @classmethod
    def from_training(cls, forward, training):
        """From the speeds of a forward pass and of a whole step.

        Raises ValueError when no backward pass, however fast, would give that.

        >>> speed = Speed.from_training(forward=2.0, training=1.6)
        >>> round(speed.backward, 3), round(speed.training, 3)
        (1.455, 1.6)
        """
        rest = 1 / training - 1 / 3 / forward
        if not rest > 0:
            raise ValueError(
                f"training cannot be {training} times as fast when a forward pass is {forward} times; give less"
            )
        return cls(forward, 2 / 3 / rest)


_FP4 = Speed.from_training(2.0, 1.6)
#: On an RTX 5090, relative to FP8.
SPEEDS = {
    "BF16": Speed.from_training(2.0 / 4.0, 1.6 / 2.9),
    "FP8": Speed(),
    "FP4 forward": Speed(_FP4.forward, 1.0),
    "FP4 backward": Speed(1.0, _FP4.backward),
    "FP4": _FP4,
}


def measured(law):
    """The efficiency of each precision of `SPEEDS` under a law, FP4's fitted to the published losses.

    Returns {name: Efficiency}.

    >>> from qlearn.training.scaling_law import fit
    >>> for name, each in measured(fit(published("bf16"))).items():
    ...     print(f"{name:12} {each.N:.3f} {each.D:.3f}")
    BF16         1.000 1.000
    FP8          1.000 1.000
    FP4 forward  0.645 1.000
    FP4 backward 1.000 0.893
    FP4          0.658 0.822
    """
    fitted = {name: fit_efficiency(law, published(scheme), SCHEMES[scheme]) for name, scheme in RUNS.items()}
    return {name: fitted.get(name, Efficiency()) for name in SPEEDS}


def worth(efficiency, speed):
    """How many times as much training a precision is worth as the baseline: t eff_N eff_D.

    When size and tokens are free, the least loss depends on the product of effective parameters and effective tokens
    alone, and that is what this multiplies. Above 1 the precision wins, at any budget.

    >>> worth(Efficiency(0.5, 0.8), Speed(2.0, 2.0))
    0.8
    """
    return speed.training * efficiency.N * efficiency.D


def split(law, product):
    """The best N and D whose product is given: (N, D), numbers or arrays.

    Both terms of the law's sum are powers, so the least is where alpha A / N^alpha = beta B / D^beta.

    >>> from qlearn.training.scaling_law import Law
    >>> N, D = split(Law(A=1.0, alpha=0.5, B=1.0, beta=0.5, E=1.0, gamma=1.0), 1e20)
    >>> print(f"{N:.0f} {D:.0f}")
    10000000000 10000000000
    """
    product = _positive("product", product)
    ratio = law.alpha * law.A / (law.beta * law.B)
    N = (ratio * product**law.beta) ** (1 / (law.alpha + law.beta))
    return N, product / N


def loss_in_time(law, efficiency, speed, N, D, spend="size"):
    """The loss that a precision reaches in the time in which the baseline trains N parameters on D tokens.

    N, D: numbers or arrays that broadcast.  spend: "size", "tokens" or "both", see the top of the file.
    Returns nats per token, float64. Raises ValueError for an unknown spend, or N or D not above 0.
    """
    N, D, t = _positive("N", N), _positive("D", D), speed.training
    if spend == "size":
        return law.loss(N * speed.forward, D * t / speed.forward, efficiency.N, efficiency.D)
    if spend == "tokens":
        return law.loss(N, D * t, efficiency.N, efficiency.D)
    if spend == "both":
        return law.loss(*split(law, N * D * worth(efficiency, speed)))
    raise ValueError(f"spend={spend!r} is unknown; choose from {', '.join(SPENDS)}")


def optimal_precision(law, efficiencies, speeds, N, D, spend="size"):
    """Which precision reaches the least loss in the time in which the baseline trains N parameters on D tokens.

    efficiencies: {name: Efficiency}.  speeds: {name: Speed}, of these names at least.
    N, D: numbers or arrays that broadcast.  spend: how time saved is used, "size", "tokens" or "both".
    Returns (array of names, {name: array of losses}); where several are equally good, the first of `efficiencies`.
    Raises ValueError when there is no precision, or one without a speed, and as `loss_in_time` does.

    >>> from qlearn.training.scaling_law import fit
    >>> law = fit(published("bf16"))
    >>> best, losses = optimal_precision(law, measured(law), SPEEDS, N=1e9, D=[2e10, 1e12])
    >>> best.tolist()
    ['FP4 backward', 'FP4']
    >>> for name, loss in losses.items():
    ...     print(f"{name:12} {loss[0]:.3f} {loss[1]:.3f}")
    BF16         2.618 2.424
    FP8          2.569 2.327
    FP4 forward  2.616 2.310
    FP4 backward 2.555 2.324
    FP4          2.602 2.305
    """
    if not efficiencies:
        raise ValueError("there is no precision to choose from; give at least one efficiency")
    unknown = [name for name in efficiencies if name not in speeds]
    if unknown:
        raise ValueError(f"there is no speed for {', '.join(unknown)}; give one for each efficiency")
    losses = {name: loss_in_time(law, each, speeds[name], N, D, spend) for name, each in efficiencies.items()}
    names = np.array(list(losses))
    return names[np.argmin(np.stack(list(losses.values())), axis=0)], losses


def _positive(name, values):
    values = np.asarray(values, np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} has an entry that is not above 0 or not finite; give parameters and tokens")
    return values
