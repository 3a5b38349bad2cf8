"""Folding a scale: letting the operation in front of a layer divide its outputs, so that nobody has to do it later.

AWQ and SmoothQuant multiply the columns of a weight by s, which is right if the layer's inputs are divided by s:

    W x  =  (W · s) (x / s)

Whatever made x can do that along with its own work, if it ends by multiplying each channel with a number it stores.

    a norm                   weight / s, and its bias / s if it has one
    a norm with 1 + weight   (1 + weight) / s − 1, for Gemma stores its norms that way
    a linear layer           its rows / s, its bias / s, if what lies between it and the group lets a factor pass: the
                             product with a gate does, attention's average over v does, a GELU does not

Which operation that is differs from one architecture to the next, and lists of class names are out of date with each
new one. So it is found by trying. All norms and linear layers of the right size that the block runs before the group
are candidates, the latest first. With the columns of the group multiplied by s, the block computes something else. If
it computes what it did before once a candidate divides by s, the candidate is the one. If none does, there is none:
o_proj under grouped-query attention, where one channel of v becomes several of x; or a norm that is also read by
something which knows nothing of s, such as the router of a mixture or a layer that is quantized already.

**The trial** is a calculation beside the model, in float32, over one window of the calibration text; the block itself
is changed only after it has succeeded, so there is nothing to undo. Its s is not the one asked for, but 2 or 1/2 for
each channel at random. Those change only exponents, so no rounding blurs the comparison: a fold in the right place
leaves every bit as it was (but for 1 + weight, which is rounded to 24 bits). In a wrong place it changes the outputs
about as much as if nothing had been divided, and that is what the comparison is measured by. Where the group has too
little influence on the outputs to measure anything, such as an expert that no token of the window was sent to, nothing
has been shown, and nothing is folded.

In a model of 16-bit floats the new weights are rounded to 16 bits, as they are after any training step. What a norm
really divides by after that is what the columns are multiplied with.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from qlearn.models.excerpt import excerpt
from qlearn.models.recording import Enough, call, hidden_states, watching

TOLERANCE = 1e-4  # of the group's influence on the outputs: rounding 1 + weight makes 1e-6 of it, a wrong place about 1
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of an output: how far two sums of the same numbers may be apart
MEASURABLE = 100  # times the rounding: an influence that is large enough to measure by


def fold(block, names, scale, norms_only=False):
    """Multiply the columns of some layers by a scale, and have the operation in front of them divide by it.

    block: a `calibration.Block`.
    names: the layers (nn.Linear) that read one tensor, all of them, by their names within the block; as from `groups`.
    scale: positive, (in_features,), one factor for each input channel.
    norms_only: do not let a linear layer divide.
    Returns True: done, the block computes what it did before; or False: nothing has been changed, for there is no
    operation that could divide.
    Raises ValueError for a layer that is no nn.Linear, and for a scale that does not fit.

    >>> import qlearn
    >>> from qlearn.models.calibration import calibration_ids, walk
    >>> model, tokenizer = qlearn.load_model()
    >>> block = next(walk(model, calibration_ids(tokenizer, tokens=64, window=32)))
    >>> fold(block, ["mlp.gate_proj", "mlp.up_proj"], torch.full((256,), 2.0))      # into the norm
    True
    >>> fold(block, ["self_attn.o_proj"], torch.full((256,), 2.0))                  # 4 heads of q share 2 of v
    False
    """
    layers = {name: block.module.get_submodule(name) for name in names}
    scale = _check(layers, scale)
    trial = None
    for name, divider in _in_front(block, layers, norms_only):
        trial = trial or _Trial(block, layers)
        for offset in (0, 1) if _is_norm(divider) else (0,):
            if trial.succeeds(name, divider, offset):
                return _commit(layers.values(), divider, scale, offset)
    return False


def _check(layers, scale):
    """The scale as float32, or a ValueError."""
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; only the columns of an nn.Linear can be multiplied")
        if scale.shape != (layer.in_features,) or not ((scale > 0) & torch.isfinite(scale)).all():
            raise ValueError(
                f"a scale of shape {tuple(scale.shape)} does not fit {name} with {layer.in_features} columns or is not "
                "positive; pass one positive factor for each column"
            )
    return scale.detach().float().to(layer.weight.device)


def _is_norm(module):
    return not isinstance(module, nn.Linear)


def _in_front(block, layers, norms_only):
    """What could divide: (name, module) of the fitting modules that are run before the layers, the latest first."""
    columns = next(iter(layers.values())).in_features
    fitting = {
        name: module
        for name, module in block.module.named_modules()
        if name not in layers and _fits(module, columns) and not (norms_only and isinstance(module, nn.Linear))
    }
    order, reached = {}, []

    def see(name, _):
        if name in layers:
            reached.append(name)
            raise Enough
        order.pop(name, None)
        order[name] = fitting[name]

    with watching({**fitting, **layers}, see):
        for arguments in excerpt(block.calls[:1], tokens=1):
            call(block.module, arguments)
    return list(order.items())[::-1] if reached else []


def _fits(module, columns):
    """Whether a module ends by multiplying `columns` channels: a linear layer of so many rows, or a norm so wide."""
    own = dict(module.named_parameters(recurse=False))
    linear = isinstance(module, nn.Linear)
    return "weight" in own and all(p.shape[:1] == (columns,) and (linear or p.dim() == 1) for p in own.values())


class _Trial:
    """The block computed in float32 with some of its parameters replaced, on one window."""

    def __init__(self, block, layers):
        self.module, (self.arguments,) = block.module, excerpt(block.calls[:1], tokens=1)
        self.arguments = tree_map(_float, self.arguments)
        self.parameters = {name: _float(p.detach()) for name, p in block.module.named_parameters()}
        columns = next(iter(layers.values())).in_features
        signs = torch.randint(2, (columns,), generator=torch.Generator().manual_seed(0))
        self.scale = (2.0 ** (2 * signs - 1)).to(next(iter(layers.values())).weight.device)
        self.multiplied = {f"{n}.weight": self.parameters[f"{n}.weight"] * self.scale for n in layers}
        self.before = self.run({})
        self.influence = (self.run(self.multiplied) - self.before).abs().mean()

    @torch.no_grad()
    def run(self, replaced):
        """The hidden states that the block returns."""
        parameters = {**self.parameters, **replaced}
        return hidden_states(functional_call(self.module, parameters, *self.arguments)).float()

    def succeeds(self, name, divider, offset):
        """Whether the outputs are what they were when this module divides."""
        rounding = ROUNDING * self.before.abs()
        if not self.influence > MEASURABLE * rounding.mean():
            return False
        divided = {f"{name}.{n}": p for n, p in _divided(divider, self.scale, offset).items()}
        change = (self.run({**self.multiplied, **divided}) - self.before).abs()
        return bool((change <= TOLERANCE * self.influence + rounding).all())


def _float(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _divided(module, scale, offset):
    """The parameters of a module that divides its outputs by the scale, float32: dict name -> tensor."""
    offsets = {"weight": offset}
    parameters = {name: p.detach().float() for name, p in module.named_parameters(recurse=False)}
    return {
        name: (p + offsets.get(name, 0)) / scale.view(-1, *[1] * (p.dim() - 1)) - offsets.get(name, 0)
        for name, p in parameters.items()
    }


@torch.no_grad()
def _commit(layers, divider, scale, offset):
    """Change the parameters; False, and nothing is changed, if their dtype cannot hold the new ones."""
    new = [(p, _divided(divider, scale, offset)[n].to(p.dtype)) for n, p in divider.named_parameters(recurse=False)]
    if _is_norm(divider):
        weight, stored = divider.weight.float() + offset, dict(new)[divider.weight].float() + offset
        scale = torch.where(weight == 0, scale, weight / stored)
    new += [(layer.weight, (layer.weight.float() * scale).to(layer.weight.dtype)) for layer in layers]
    if not all(torch.isfinite(tensor).all() for _, tensor in new):
        return False
    for parameter, tensor in new:
        parameter.copy_(tensor)
    return True
