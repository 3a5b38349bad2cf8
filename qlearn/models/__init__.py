"""Whole models: loading one, quantizing its linear layers, and hearing what it writes.

    load_model       the bundled model, or any other by folder or Hugging Face id      loading.py
    quantize_model   every linear layer of a model, in place                           quantize.py
    QuantLinear      the layer that takes the place of nn.Linear                       linear.py
    generate         the greedy continuation of a prompt                               generate.py

    QuantizationConfig   transformers' own way: from_pretrained(..., quantization_config=), save_pretrained   plugin.py

They work on any causal language model of transformers; nothing is special-cased for the bundled one.
"""

from qlearn.models.generate import generate
from qlearn.models.linear import QuantLinear
from qlearn.models.loading import load_model
from qlearn.models.plugin import QuantizationConfig
from qlearn.models.quantize import quantize_model

__all__ = ["QuantLinear", "QuantizationConfig", "generate", "load_model", "quantize_model"]
