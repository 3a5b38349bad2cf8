"""A whole BitNet after training: its linear layers become `PackedBitLinear` (`bitlinear.py`).

The training (`training/bitnet.py`) computed with trits, or signs, all along, and with one scale for each matrix.
Packing only writes them down, so the model's logits stay what they were, and the floats behind the trits are let go:
they were a memory for the optimizer. The embedding, which is the head as well, and the norms stay in floating point; in
a model as small as the bundled one they are most of the bytes.

Source: BitNet b1.58, arXiv 2402.17764.
"""

import torch
from torch import nn

from qlearn.methods.ternary import binary, check_ternary_bits, ternary
from qlearn.models.bitlinear import PackedBitLinear
from qlearn.models.layers import SKIP, check_skip, linear_layers, matches, replace_layers
from qlearn.models.plugin import mark_quantized

KINDS = ("b158", "b1")


def pack_bitnet(model, kind=None, bits=1.6, skip=SKIP, scale="absmean"):
    """Put packed layers in the place of a trained model's BitLinear, in place.

    model: one with BitLinear layers (`training.bitlinear`); or with plain linear layers, if `kind` says under which
    rounding their weights were trained.
    kind: None, "b158" for trits or "b1" for signs.  bits: what a trit takes, 1.6 or 2.  skip: as for `quantize_model`.
    scale: "absmax" for weights that are trits times a scale already, as those read from a GGUF file.
    Returns the model, whose logits in float32 are what they were.
    Raises ValueError for other kinds or bits, and for a model without such layers; the model is unchanged then.

    >>> from qlearn.training.bitnet import make_model
    >>> pack_bitnet(make_model("b158")).model.layers[0].mlp.down_proj
    PackedBitLinear(768, 256, bias=False, trit, 1.6 bits, inputs int8)
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r} is unknown; choose from {', '.join(KINDS)}")
    check_ternary_bits(bits)
    skip = check_skip(model, skip)
    layers = _layers(model, kind, skip)
    packed = {
        layer: PackedBitLinear(_rounded(layer.weight, kind, bits, scale), layer.bias) for layer, kind in layers.items()
    }
    replace_layers(model, packed)
    kinds = set(layers.values())
    mark_quantized(model, *(("binary", 1) if kinds == {"b1"} else ("ternary", bits)), None, skip)
    return model.eval()


def _layers(model, kind, skip):
    """dict layer -> kind: those that were trained under a rounding, or else all if the kind is given."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not matches(n, skip)}
    layers = {layer: layer.kind for layer in linears.values() if hasattr(layer, "kind")}
    if kind and not layers:
        layers = dict.fromkeys(linear_layers(model, skip).values(), kind)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no BitLinear; give kind= if its linear layers were trained as such"
        )
    return layers


def _rounded(weight, kind, bits, scale):
    """The QuantizedTensor of a weight, with its scale in float32 as the training had it."""
    if kind == "b1":
        return binary(weight, scale_dtype=torch.float32)
    return ternary(weight, bits, scale=scale, scale_dtype=torch.float32)
