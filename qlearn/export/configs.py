"""The sizes of a model: transformers' configuration, and the metadata of a GGUF file that say the same.

    hidden_size               llama.embedding_length            256
    num_hidden_layers         llama.block_count                 8
    intermediate_size         llama.feed_forward_length         768
    num_attention_heads       llama.attention.head_count        4
    rms_norm_eps              llama.attention.layer_norm_rms_epsilon

A configuration can ask for more than llama.cpp computes for an architecture: another activation, attention in a sliding
window, a rotary embedding that is stretched in a way of its own. Such a model would run and write nonsense, so it is
refused here instead.

**Stretched rotary embeddings.** "linear" divides all positions by a factor, and a file says so in its metadata.
"llama3" divides the slow frequencies only, and is stored as a tensor, `rope_freqs.weight`: by what each frequency is
divided. From that tensor the configuration is found again by trying the numbers that all Llama 3 models use.

Source: conversion/base.py and conversion/llama.py of llama.cpp; LLM_KV in src/llama-arch.cpp.
"""

import math

import numpy as np

from qlearn.export import names
from qlearn.export.gguf_file import GGUFError, one_line

ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_SIZES = {  # transformers -> metadata, without the architecture in front
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
_EPSILON = "attention.layer_norm_rms_epsilon"


def head_size(config):
    """Numbers in a query of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def metadata(config, architecture):
    """The metadata of a configuration: dict key -> int (stored as uint32), float (float32) or str.

    config: of transformers.  architecture: names.Architecture.
    Raises ValueError for a configuration that llama.cpp does not compute.

    >>> import qlearn
    >>> found = metadata(qlearn.load_model()[0].config, names.architecture("llama"))
    >>> found["llama.embedding_length"], found["llama.attention.head_count_kv"], found["llama.rope.freq_base"]
    (256, 2, 10000.0)
    """
    check(config, architecture)
    size, rope = head_size(config), config.rope_parameters
    found = {key: getattr(config, name) for name, key in _SIZES.items()}
    found |= {_EPSILON: float(config.rms_norm_eps), "attention.key_length": size, "attention.value_length": size}
    found |= {"rope.dimension_count": size, "rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "llama3":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{architecture.name}.{key}": value for key, value in found.items()}


def check(config, architecture):
    """Raise ValueError, naming the setting, for a configuration that llama.cpp does not compute."""
    rope = config.rope_parameters
    stretched = ("default", "linear", "llama3") if architecture.name == "llama" else ("default", "linear")
    whole = head_size(config) * config.num_attention_heads == config.hidden_size
    wrong = {
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
        f"rope_type={rope['rope_type']!r}": rope["rope_type"] not in stretched,
        f"partial_rotary_factor={rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"head_dim={head_size(config)}": not whole and architecture.name in ("qwen2", "bitnet"),
        "a head that is not tied to the embedding": architecture.tied and not config.tie_word_embeddings,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise ValueError(
            f"llama.cpp's {architecture.name} does not compute {found[0]}; such a model cannot be exported"
        )


def rope_freqs(config):
    """What each frequency of a "llama3" rotary embedding is divided by: float32 (half of a head,); None for others.

    Frequencies whose wave is shorter than a quarter of the original context stay, those whose wave is longer than it
    are divided by the factor, and in between the division sets in gradually.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    return _divisors(rope, head_size(config))


def _divisors(rope, size):
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)  # tokens
    smooth = ((context / waves - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def config(file):
    """The configuration of the model in a file, with the tokens that begin and end its texts.

    file: GGUFFile.  Returns a configuration of transformers.
    Raises GGUFError for an unknown architecture, and metadata that are missing or make no sense.
    """
    from transformers import AutoConfig

    architecture = names.architecture(file.get("general.architecture", str))
    found = {name: _size(file, architecture, key) for name, key in _sizes_in(file, architecture).items()}
    layers = {names.layer_number(name) for name in file.tensors} - {None}
    if layers != set(range(min(found["num_hidden_layers"], len(layers) + 1))):
        raise GGUFError(f"the metadata tell of {found['num_hidden_layers']} layers, and the file has {len(layers)}")
    found["head_dim"] = _size(file, architecture, "attention.key_length", found)
    found["rms_norm_eps"] = _shortest(file.get(f"{architecture.name}.{_EPSILON}", float))
    found["rope_parameters"] = _rope(file, architecture, found["head_dim"])
    found["tie_word_embeddings"] = "output.weight" not in file.tensors
    if architecture.name == "llama":
        found |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
        found |= {"mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    found |= {"hidden_act": "silu", "architectures": None} | _special(file)
    try:
        made = AutoConfig.for_model(architecture.name, **found)
        check(made, architecture)
    except Exception as error:  # transformers has an exception of its own for each thing that it checks
        raise GGUFError(f"the metadata of {file.path} make no model: {one_line(error)}") from error
    return made


def _sizes_in(file, architecture):
    """_SIZES, without what a file may leave out."""
    left_out = {} if f"{architecture.name}.vocab_size" in file.metadata else {"vocab_size"}
    return {name: key for name, key in _SIZES.items() if name not in left_out}


def _size(file, architecture, key, found=None):
    """A size of at least 1; the size of a head may follow from the others."""
    default = None
    if key == "attention.key_length":
        default = found["hidden_size"] // found["num_attention_heads"]
    elif key == "attention.head_count_kv":
        default = file.get(f"{architecture.name}.attention.head_count", int)
    value = file.get(f"{architecture.name}.{key}", int, default)
    if value < 1:
        raise GGUFError(f"{architecture.name}.{key} is {value}, and no model has that; the file is damaged")
    return value


def _rope(file, architecture, size):
    """The rotary embedding as transformers has it."""
    key = f"{architecture.name}.rope"
    rope = {"rope_type": "default", "rope_theta": _shortest(file.get(f"{key}.freq_base", float, 10000.0))}
    scaling = file.get(f"{key}.scaling.type", str, "none")
    factor = file.get(f"{key}.scaling.factor", float, 1.0)
    if ROPE_FREQS in file.tensors:
        return _llama3(file, rope, size, file.get(f"{key}.scaling.original_context_length", int, 8192))
    if scaling == "linear" and factor != 1.0:
        return rope | {"rope_type": "linear", "factor": _shortest(factor)}
    if scaling not in ("none", "linear"):
        raise GGUFError(f"a rotary embedding stretched by {scaling!r} is not read here; only linear and llama3 are")
    return rope


def _llama3(file, rope, size, context):
    """The rotary embedding that has the divisors of the file."""
    divisors = file.weights(ROPE_FREQS).ravel()
    rope = rope | LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": context}
    rope["factor"] = float(divisors.max(initial=1.0))
    expected = _divisors(rope, size)
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-5):
        raise GGUFError(f"{ROPE_FREQS} is not that of a Llama 3 model; its rotary embedding is not known here")
    return rope


def _special(file):
    """The ids of the special tokens."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: file.get(f"tokenizer.ggml.{key}", int, -1) for name, key in keys.items()}
    return {name: id if id >= 0 else None for name, id in found.items()}


def _shortest(value):
    """A float32 as the shortest number that stands for it: 9.999999974752427e-07 is 1e-06."""
    return float(str(np.float32(value)))
