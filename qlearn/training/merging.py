"""Merging: one matrix in place of W, A and B, done right, and what the usual mistakes cost.

An adapter beside a float matrix can be added to it, and the model is a plain one again, with nothing left to compute
beside:

    W' = W + (alpha / r) B A

With quantized weights there are two matrices that could be W. The adapter was trained beside Q = dequantize(codes). In
the gradients that formed it stood the outputs of Q, rounding errors and all, so it has learned to make up for them. So

    right    Q + s B A         the numbers that were trained, as a float matrix
    wrong    W + s B A         on the float weights from before quantization: the errors that the adapter mends are not
                               there, and their remedy is an error itself

The mistake is common because it is so easy: the adapter's file has just A and B in it, and fits both.

**Quantized again.** Who wants few bits afterwards rounds the sum, and that is no longer what was trained. No program
should do that silently. Which sum is better to round depends. Q lies on the grid, and a change that is small beside the
steps rounds back to Q: what was learned is lost. W lies between the grid points, so the same change carries some of
its weights across, and what else rounding does to W, the errors of Q once more, B A has learned to mend; unless the
codes were not those of W, as after LoftQ (`loftq.py`). With D = s B A and R for the merged matrix, `measure` reports
the share of the change that is in it:

    arrived = sum (R - Q) D / sum D^2          1: all of D is there;  0: R has nothing of it, as if D had not been added

W = [0.25, 0.75], rounded to whole numbers, is Q = [0, 1]. A change of 0.3 for both gives Q + D = [0.3, 1.3], which
rounds to Q, and W + D = [0.55, 1.05], which rounds to [1, 1]: of D arrive 0 and (1 * 0.3 + 0 * 0.3) / 0.18 = 1.67.
Over many weights, which lie anywhere between the grid points, the second is 1 on average.

What it came to here, as loss on the answers of 100 held-out pairs after 100 steps of 8 pairs with r = 16
(`adapters_task.py`), is also what `measure` gives for any model:

                                 adapters    Q + BA    W + BA    quantize(Q + BA)    quantize(W + BA)
    NF4, 4.13 bits                  0.091     0.091     0.096               0.102               0.103
    SINQ, 2 bits                    0.131     0.131     0.384               3.51                0.464
    SINQ, 2 bits, LoftQ             0.077     0.077     0.398               0.836               2.67

Source: huggingface/peft issues 2321, 2105 and 1043; artidoro/qlora issue 28, where the right order was asked for.
"""

import copy
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qlearn.evaluate.divergence import position_divergences
from qlearn.evaluate.size import model_bytes
from qlearn.models.layers import replace_layers
from qlearn.models.linear import QuantLinear
from qlearn.models.quantize import quantize_model
from qlearn.training.lora import lora_layers


def merge(model, dtype=None):
    """Add each adapter to the weight it was trained on, in place; the layers are nn.Linear again.

    dtype: of the merged matrices; None keeps that of a float layer, and makes float32 of a quantized one. A change that
    is small beside its weight is lost in bfloat16, which has 8 bits of precision.
    Returns the model, without adapters and without gradients. Layers without an adapter stay what they are.
    Raises ValueError for a model without adapters.

    >>> from qlearn.training.lora import LoraLinear
    >>> model = nn.Sequential(LoraLinear(nn.Linear(2, 1, bias=False), r=1, alpha=1))
    >>> model[0].base.weight.data, model[0].A.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    >>> model[0].B.data.fill_(4.0)
    tensor([[4.]])
    >>> merge(model)[0].weight.tolist()
    [[3.0, 2.0]]
    """
    layers = _adapted(model)
    replace_layers(model, {layer: _linear(layer, trained_on(layer), dtype) for layer in layers.values()})
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not any(isinstance(module, QuantLinear) for module in model.modules()):
        quantizer.remove_quantization_config(model)  # a float model like any other, for save_pretrained as well
    return model


def merge_onto(original, model):
    """Add the adapters of a model to the weights of another one, in place.

    original: the float model, with a layer of the same size for each adapter of `model`.  Returns it.
    This is right where both have the same weights. It is the mistake described above where `model` is quantized.
    Raises ValueError for a model without adapters, or an original that its adapters do not fit.
    """
    merged = {}
    for name, layer in _adapted(model).items():
        try:
            own = original.get_submodule(name)
        except AttributeError:
            own = None
        if not isinstance(own, nn.Linear) or own.weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the original has no nn.Linear({layer.in_features}, {layer.out_features}) called {name}; give the "
                "float model that the quantized one was made of"
            )
        merged[own] = _linear(layer, own.weight, None, own.bias)
    replace_layers(original, merged)
    return original


@torch.no_grad()
def trained_on(layer):
    """The weight that an adapter was trained on: (out_features, in_features), dequantized where it is quantized."""
    return _weight(layer.base)


def _weight(layer):
    return layer.quantized.dequantize() if isinstance(layer, QuantLinear) else layer.weight


@dataclass(frozen=True)
class Merged:
    """What became of a model by one way of merging, beside the model with its adapters.

    logit_error: root mean square of the differences of the logits.  kl_divergence: in nats, mean over positions.
    flip_rate: share of positions with another most likely token.  loss: mean over the labels that count, in nats.
    nbytes: of a file that holds the model, what is not quantized in bfloat16.
    arrived: share of the adapters' change that the weights hold, see the top of this file; NaN if the change is zero.
    """

    name: str
    logit_error: float
    kl_divergence: float
    flip_rate: float
    loss: float
    nbytes: int
    arrived: float

    as_dict = asdict


def measure(model, original, batches, method=None, bits=4, group_size=64, progress=False, **options):
    """Measure every way of merging on the same batches.

    model: with adapters.  original: the float model from before quantization.  Both are left unchanged.
    batches: list of (ids, labels), int64 (texts, length) each; labels of -100 are not counted in `loss`, and positions
    that predict them not in the rest.  method, bits, group_size, options: how to quantize what was merged; method None
    leaves that out.
    Returns a list of Merged called "adapters", "Q + BA", "W + BA", and with a method "quantize(Q + BA)" and
    "quantize(W + BA)"; Q are the weights that the adapters were trained on, W those of the original.
    """
    models = {"adapters": model, "Q + BA": merge(copy.deepcopy(model))}
    models["W + BA"] = merge_onto(copy.deepcopy(original), model)
    for name in ("Q + BA", "W + BA") if method is not None else ():
        rounded = copy.deepcopy(models[name])
        models[f"quantize({name})"] = quantize_model(rounded, method, bits, group_size, progress=progress, **options)
    reference = [_predict(model, *batch) for batch in batches]
    return [
        _compare(name, candidate, batches, reference, arrived(candidate, model)) for name, candidate in models.items()
    ]


@torch.no_grad()
def arrived(merged, model):
    """The share of the adapters' change that merged weights hold: sum (R - Q) D / sum D^2 over all layers.

    merged: a model with the layers of `model`, float or quantized, or `model` itself.  model: with adapters.
    Returns a float, NaN where all changes are zero. Raises ValueError for a model without adapters.

    >>> from qlearn.training.lora import LoraLinear
    >>> model = nn.Sequential(LoraLinear(nn.Linear(2, 1, bias=False), r=1, alpha=1))
    >>> model[0].base.weight.data, model[0].A.data = torch.tensor([[3.0, 2.0]]), torch.tensor([[0.25, 0.0]])
    >>> model[0].B.data.fill_(1.0)
    tensor([[1.]])
    >>> exact = merge(copy.deepcopy(model))
    >>> arrived(exact, model)
    1.0
    >>> exact[0].weight.data.round_()
    tensor([[3., 2.]])
    >>> arrived(exact, model)
    0.0
    """
    product = size = 0.0
    for name, layer in _adapted(model).items():
        Q, D, found = trained_on(layer).double(), layer.change().double(), merged.get_submodule(name)
        R = Q + D if found is layer else _weight(found).double()
        product += ((R - Q) * D).sum().item()
        size += D.square().sum().item()
    return product / size if size else math.nan


def _compare(name, model, batches, reference, arrived):
    """One way of merging beside the reference."""
    squares = divergence = flips = loss = 0.0
    count = 0
    for (ids, labels), expected in zip(batches, reference, strict=True):
        logits, targets = _predict(model, ids, labels)[0], expected[1]
        squares += (logits - expected[0]).double().square().mean(-1).sum().item()
        divergence += position_divergences(expected[0], logits).sum().item()
        flips += (logits.argmax(-1) != expected[0].argmax(-1)).sum().item()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return Merged(
        name, (squares / count) ** 0.5, divergence / count, flips / count, loss / count, model_bytes(model), arrived
    )


@torch.no_grad()
def _predict(model, ids, labels):
    """Logits, float32 (positions, vocabulary), and targets (positions,), where a label counts."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    counts = labels[:, 1:] != -100
    return logits[counts].float(), labels[:, 1:][counts]


def _adapted(model):
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to merge")
    return layers


@torch.no_grad()
def _linear(layer, weight, dtype, bias=None):
    """nn.Linear with an adapter's change added to a weight."""
    bias = layer.base.bias if bias is None else bias
    new = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    summed = weight.to(layer.A.dtype) + layer.change()
    new.weight = nn.Parameter(summed.to(dtype or weight.dtype), requires_grad=False)
    new.bias = bias
    return new.train(layer.training)
