"""LoRA and QLoRA: a frozen matrix, and a small one beside it that learns.

Fine-tuning moves every weight of a model a little. LoRA says that the change need not have full rank. So W stays as it
is, and beside it stand two thin matrices, whose product is the change:

    y = W x + (alpha / r) B (A x)             A is r x in, B is out x r

For the projection 768 -> 256 of the bundled model and r = 8, A and B have 8 * (768 + 256) = 8,192 numbers in place of
196,608. Only they have gradients and optimizer states, and that is where the memory of a training goes: AdamW keeps two
more numbers for each one that it trains (`training_memory.py`).

**The start.** A is random (Kaiming, as nn.Linear is initialized) and B is zero, so the first forward pass is exactly
that of the model without adapters. A gets no gradient in the first step, as B is in front of it; B does, and from the
second step on both learn. Two zeros would never learn anything.

**alpha** says how much a change counts: with alpha fixed, one learning rate does for several ranks r, because the
factor alpha / r makes up for the number of summands.

**QLoRA** is the same with a W that is stored in few bits. Its codes have no gradient and need none: y is differentiable
in x (`models/product.py`), which is all that the adapters below it need. The paper takes NF4 with double quantization;
here any method of the registry will do:

    quantize_model(model, "zero_point", bits=4, group_size=64)
    add_lora(model, r=16)

Which layers get an adapter matters more than r, says the paper: all linear layers do by default. The experts of a
mixture, which lie in one parameter, get none.

The adapters are float32 and so is their product, whatever W is stored in; under autocast it is bfloat16, and the
numbers that are updated stay float32.

Beside this file: `lora_files.py` writes adapters as peft does, `merging.py` makes one matrix of W, A and B, `loftq.py`
starts A and B with what the quantization of W lost.

Source: LoRA, arXiv 2106.09685, section 4.1; QLoRA, arXiv 2305.14314, sections 3 and 4; the names in the files and the
initialization are those of the package peft.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from qlearn.models.experts import QuantExperts
from qlearn.models.layers import SKIP, check_skip, linear_layers, matches, replace_layers
from qlearn.models.linear import QuantLinear


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter.

    base: nn.Linear or QuantLinear; its weight is frozen here.  r: rank, at least 1.  alpha: see the top of this file.
    dropout: share of the adapter's inputs that is zeroed in training.
    Attributes: base; A, float32 (r, in_features); B, float32 (out_features, r); r, alpha, scale = alpha / r.
    Raises ValueError for a rank below 1, an alpha that is no positive number, and a dropout outside 0 <= p < 1.

    >>> layer = LoraLinear(nn.Linear(3, 2), r=1, alpha=2)
    >>> layer.A.data, layer.B.data = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5], [0.0]])
    >>> x = torch.tensor([[4.0, 9.0, 9.0]])
    >>> (layer(x) - layer.base(x)).round(decimals=4).tolist()             # scale 2 * B (0.5, 0) * A x (4)
    [[4.0, 0.0]]
    """

    def __init__(self, base, r=8, alpha=16, dropout=0.0):
        super().__init__()
        check_rank(r, alpha, dropout)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.alpha = r, alpha
        device = next(t.device for t in (*base.parameters(), *base.buffers()))
        self.A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def scale(self):
        """alpha / r, a float."""
        return self.alpha / self.r

    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features) in the dtype of the base layer's."""
        y = self.base(x)
        change = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B) * self.scale
        return (y + change).to(y.dtype)

    @torch.no_grad()
    def change(self):
        """(alpha / r) B A, what is added to the weight: (out_features, in_features), in the dtype of A and B."""
        return self.B @ self.A * self.scale

    def extra_repr(self):
        """What print(model) shows."""
        return f"r={self.r}, alpha={self.alpha}"


def add_lora(model, r=8, alpha=16, dropout=0.0, target=None, skip=SKIP):
    """Freeze a model and give its linear layers adapters, in place.

    model: any model; its linear layers may be quantized, all or some.  r, alpha, dropout: as for `LoraLinear`.
    target: None for all linear layers; or names, last parts of names ("q_proj") or patterns of those that get one.
    skip: layers that get none, as for `quantize_model`.
    Returns the model, in which the adapters alone require gradients.
    Raises ValueError for what `LoraLinear` does not take, for a name in `target` or `skip` that fits nothing, for a
    model that has adapters already, and for one without a layer to adapt; the model is unchanged then.

    >>> from qlearn import load_model, quantize_model
    >>> model, tokenizer = load_model()
    >>> model = add_lora(quantize_model(model, "absmax", bits=4, progress=False), r=4, target="down_proj")
    >>> model.model.layers[0].mlp.down_proj
    LoraLinear(
      r=4, alpha=16
      (base): QuantLinear(768, 256, bias=False, int4, 4.25 bits)
      (dropout): Identity()
    )
    >>> count_parameters(model)
    (32768, 7377152)
    """
    check_rank(r, alpha, dropout)
    layers = adaptable_layers(model, target, skip)
    adapters = {layer: LoraLinear(layer, r, alpha, dropout).train(model.training) for layer in layers.values()}
    model.requires_grad_(False)
    replace_layers(model, adapters)
    return model


def adaptable_layers(model, target=None, skip=SKIP):
    """The layers that `add_lora` gives an adapter: dict name -> nn.Linear or QuantLinear, in the model's order.

    Raises ValueError as `add_lora` does.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge them or remove them (remove_lora) first")
    skip = check_skip(model, skip)
    target = (target,) if isinstance(target, str) else target
    candidates = linear_layers(model, skip) | _quantized_layers(model, skip)
    for pattern in target or ():
        if not any(matches(name, [pattern]) for name in candidates):
            raise ValueError(f"target={pattern!r} fits no linear layer of {type(model).__name__} that is not skipped")
    found = {
        n: candidates[n] for n, _ in model.named_modules() if n in candidates and (not target or matches(n, target))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer for an adapter with skip={skip}; nn.Linear and QuantLinear take one"
        )
    return found


def lora_layers(model):
    """The layers with an adapter: dict name -> LoraLinear, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def remove_lora(model):
    """Take the adapters off again, in place: each layer is the frozen one it was. Returns the model."""
    replace_layers(model, {layer: layer.base for layer in lora_layers(model).values()})
    return model


def count_parameters(model):
    """(trainable parameters, all of them): a quantized weight counts as one, whatever its bits."""
    codes = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    every = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), every + codes


def check_rank(r, alpha, dropout=0.0):
    """Raise ValueError for what no adapter can be made of."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} is no rank; give a whole number of at least 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r} is no factor; give a positive number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is no share; give a number from 0 to below 1")


def _quantized_layers(model, skip):
    """Quantized layers through which gradients pass: not those that round their inputs, nor the parts of experts."""
    experts = {part for module in model.modules() if isinstance(module, QuantExperts) for part in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and type(module).forward is QuantLinear.forward
        and module not in experts
        and not matches(name, skip)
    }
