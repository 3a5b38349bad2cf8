"""Tiny models with random weights, one for each rule of the recipes, and small enough to be written in no time.

All use the bundled tokenizer. Their configurations:

    bundled    the model that ships: llama, 8 layers, 4 heads sharing 2 keys, tied
    qwen3      a head of its own, 4 heads that share one key, norms on q and k
    qwen2      biases on q, k, v
    biased     llama with a bias everywhere that llama.cpp knows one
    deep       llama, 33 layers: n // 8 and n // 16 are not 0
    odd        rows of 96 and 208: no multiple of 256, and one no multiple of 32
    seventy    llama, 80 layers with shared keys: what llama.cpp takes for a 70B
    bitnet     norms in front of the output and the down projection
"""

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qlearn

COMMON = {"vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "qwen3": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
              "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False},
    "qwen2": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biased": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 32, "attention_bias": True, "mlp_bias": True,
               "tie_word_embeddings": False},
    "deep": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 33, "num_attention_heads": 4,
             "num_key_value_heads": 1, "tie_word_embeddings": False},
    "odd": {"hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 4, "num_attention_heads": 3,
            "num_key_value_heads": 3, "tie_word_embeddings": True},
    "seventy": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 80, "num_attention_heads": 2,
                "num_key_value_heads": 1, "tie_word_embeddings": False},
    "bitnet": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
               "num_key_value_heads": 2, "hidden_act": "silu", "tie_word_embeddings": True},
}  # fmt: skip
KINDS = {"biased": "llama", "deep": "llama", "odd": "llama", "seventy": "llama"}
NAMES = ("bundled", *SIZES)


def config(name, **changes):
    """The configuration of a tiny model."""
    return AutoConfig.for_model(KINDS.get(name, name), **COMMON | SIZES[name] | changes)


@functools.cache
def model(name):
    """A model by name; it is shared, so leave it as it is."""
    return qlearn.load_model()[0] if name == "bundled" else build(config(name))


def build(config, seed=0):
    """A model with random weights, norms and biases among them, and large ones, so that a swap of two is seen."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(4)
    return made


@functools.cache
def tokenizer():
    """The bundled tokenizer."""
    return qlearn.load_model()[1]
