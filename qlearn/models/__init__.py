"""Whole models: loading one, quantizing its linear layers, and hearing what it writes.

    load_model           the bundled model, or any other by folder or Hugging Face id          loading.py
    quantize_model       every linear layer and expert of a model, in place                    quantize.py
    QuantLinear          the layer that takes the place of nn.Linear                           linear.py
    QuantizationConfig   transformers' own way: from_pretrained, save_pretrained               plugin.py
    quantize_w8a8        weights and activations in 8 bits                                     w8a8.py
    quantize_attention   the two products of every attention, emulated                         attention.py
    pack_bitnet          a trained BitNet as trits                                             bitnet.py
    generate             the greedy continuation of a prompt                                   generate.py
    memory.plan          which layers go to the GPU, and how many tokens a second are left     memory.py

What they stand on: which matrices a model has (`layers.py`, `experts.py`), what flows through it block by block
(`calibration.py`, `recording.py`), which operation can take over a scale (`folding.py`). What moves scales about before
anything is rounded: `awq.py`, `smoothquant.py`; and why that helps: `outliers.py`.

They work on any causal language model of transformers; nothing is special-cased for the bundled one.
"""

from qlearn.models.attention import quantize_attention
from qlearn.models.bitnet import pack_bitnet
from qlearn.models.generate import generate
from qlearn.models.linear import QuantLinear
from qlearn.models.loading import load_model
from qlearn.models.plugin import QuantizationConfig
from qlearn.models.quantize import quantize_model
from qlearn.models.w8a8 import quantize_w8a8

__all__ = [
    "QuantLinear",
    "QuantizationConfig",
    "generate",
    "load_model",
    "pack_bitnet",
    "quantize_attention",
    "quantize_model",
    "quantize_w8a8",
]
