"""Sizes go into the metadata and come back; what llama.cpp does not compute is refused."""

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlearn.export import GGUFError, GGUFFile, configs, write_gguf
from qlearn.export.names import architecture
from tests.export import handmade, tiny
from tests.export.handmade import STRING, array, entry, tensor

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3 of 3.2": LLAMA3 | {"factor": 32.0},
    "llama3 of a shorter context": LLAMA3 | {"original_max_position_embeddings": 512},
}
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "hidden_act", "model_type",
)  # fmt: skip


def written(config, path):
    """The file of a model with that configuration."""
    return GGUFFile(write_gguf(tiny.build(config), tiny.tokenizer(), path, "F16", progress=False))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_there_and_back(name, tmp_path):
    path = write_gguf(tiny.model(name), tiny.tokenizer(), tmp_path / "model.gguf", "Q8_0", progress=False)
    before, after = tiny.model(name).config, configs.config(GGUFFile(path))
    assert {f: getattr(before, f) for f in FIELDS} == {f: getattr(after, f) for f in FIELDS}
    assert configs.head_size(before) == configs.head_size(after)
    for field in ("attention_bias", "mlp_bias"):
        assert getattr(before, field, False) == getattr(after, field, False)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_embeddings_there_and_back(rope, tmp_path):
    config = tiny.config("biased", rope_parameters=rope, rms_norm_eps=3e-6)
    after = configs.config(written(config, tmp_path / "model.gguf"))
    assert after.rope_parameters == rope and after.rms_norm_eps == 3e-6


@pytest.mark.parametrize("rope", [LLAMA3, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64}])
def test_the_divisors_are_those_of_transformers(rope):
    config = tiny.config("biased", rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    assert np.allclose(configs.rope_freqs(config), (plain / stretched).numpy(), rtol=1e-6)


def test_other_rotary_embeddings_have_no_divisors():
    assert configs.rope_freqs(tiny.config("biased")) is None


REFUSED = {
    "another activation": ("biased", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "bitnet's own activation": ("bitnet", {"hidden_act": "relu2"}, "bitnet does not compute hidden_act='relu2'"),
    "bitnet with a head": ("bitnet", {"tie_word_embeddings": False}, "a head that is not tied to the embedding"),
    "yarn": (
        "biased",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        "llama does not compute rope_type='yarn'",
    ),
    "llama3 for qwen3": ("qwen3", {"rope_parameters": LLAMA3}, "qwen3 does not compute rope_type='llama3'"),
    "a part of the head": (
        "biased",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "a window": (
        "qwen3",
        {"layer_types": ["full_attention"] * 4 + ["sliding_attention"], "use_sliding_window": True},
        "a sliding window",
    ),
    "heads that do not make the width": ("bitnet", {"head_dim": 32}, "bitnet does not compute head_dim=32"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(name, changes, message):
    config = tiny.config(name, **changes)
    with pytest.raises(ValueError, match=message) as error:
        configs.metadata(config, architecture(config.model_type))
    assert "cannot be exported" in str(error.value)


# ---- metadata that make no model -------------------------------------------------------------------------------------

GOOD = {
    "llama.block_count": (4, 1), "llama.context_length": (4, 64), "llama.embedding_length": (4, 8),
    "llama.feed_forward_length": (4, 16), "llama.attention.head_count": (4, 2), "llama.attention.head_count_kv": (4, 1),
    "llama.attention.layer_norm_rms_epsilon": (6, 1e-5), "llama.vocab_size": (4, 10),
}  # fmt: skip


def file(tmp_path, tensors=("blk.0.attn_q.weight",), **changes):
    """A file with the metadata GOOD, changed, and tensors without anything in them."""
    metadata = {key: value for key, value in (GOOD | changes).items() if value is not None}
    entries = [entry("general.architecture", STRING, "llama")]
    entries += [entry(key, *value) if isinstance(value, tuple) else value for key, value in metadata.items()]
    (tmp_path / "f.gguf").write_bytes(
        handmade.file(entries, [tensor(name, [8], 0, 32 * i) for i, name in enumerate(tensors)], bytes(32))
    )
    return GGUFFile(tmp_path / "f.gguf")


def test_what_may_be_left_out(tmp_path):
    found = configs.config(file(tmp_path, **{"llama.attention.head_count_kv": None, "llama.vocab_size": None}))
    assert found.num_key_value_heads == 2 and found.head_dim == 4 and found.rope_parameters["rope_theta"] == 10000.0
    assert found.tie_word_embeddings and found.bos_token_id is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, "has no metadata 'llama.block_count'"),
        ({"llama.block_count": (4, 2)}, "tell of 2 layers, and the file has 1"),
        ({"llama.block_count": (4, 2**31)}, "tell of 2147483648 layers"),
        ({"llama.block_count": (4, 0)}, "llama.block_count is 0"),
        ({"llama.embedding_length": (6, 8.0)}, "is of the type float32, where int is needed"),
        ({"llama.attention.head_count": (4, 0)}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": (5, -2)}, "llama.attention.head_count is -2"),
        ({"llama.attention.head_count": (4, 16)}, "llama.attention.key_length is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "has no metadata 'llama.attention.layer_norm"),
        ({"llama.rope.scaling.type": (STRING, "yarn")}, "stretched by 'yarn' is not read here"),
        ({"llama.feed_forward_length": array("llama.feed_forward_length", 4, [16])}, "type array of uint32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_make_no_model_are_told(tmp_path, changes, message):
    with pytest.raises(GGUFError, match=message):
        configs.config(file(tmp_path, **changes))


def test_an_unknown_architecture_is_told(tmp_path):
    (tmp_path / "f.gguf").write_bytes(handmade.file([entry("general.architecture", STRING, "mamba")]))
    with pytest.raises(GGUFError, match="architecture 'mamba' is not known here"):
        configs.config(GGUFFile(tmp_path / "f.gguf"))


def test_divisors_of_another_kind_are_told(tmp_path):
    model = tiny.build(tiny.config("biased", rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}))
    path = write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F16", progress=False)
    with pytest.raises(GGUFError, match=r"rope_freqs\.weight is not that of a Llama 3 model"):
        configs.config(GGUFFile(path))
