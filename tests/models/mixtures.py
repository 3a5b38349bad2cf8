"""Tiny mixtures of experts that keep their matrices in different ways."""

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from tests.models.conftest import FAMILIES, SIZES

SMALL = SIZES | {"intermediate_size": 16, "head_dim": 16, "num_local_experts": 4}
LLAMA4 = {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "moe_layers": [0, 1]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MIXTURES = {
    "deepseek v3": FAMILIES["deepseek v3"],  # (experts, out, in)
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_experts_per_tok=2, rope_parameters=ROPE)),
    "llama 4": lambda: Llama4ForCausalLM(Llama4TextConfig(**SMALL, **LLAMA4, rope_parameters=ROPE)),
}  # the last two keep (experts, in, out), gpt-oss says so, and Llama 4 multiplies them all at once


def make_mixture(name):
    """A random mixture in eval mode, whose experts are not as tiny as the initialization makes them."""
    torch.manual_seed(0)
    model = MIXTURES[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.normal_(std=0.3)
    return model
