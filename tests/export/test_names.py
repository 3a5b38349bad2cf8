"""Names are gguf's, and the order of the rows is the one that makes llama.cpp's rotation transformers'."""

import gguf
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlearn.export import GGUFError
from qlearn.export.names import ARCHITECTURES, architecture, deinterleave, interleave, layer_number
from tests.export import tiny


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_package_gguf(name):
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    theirs = gguf.get_tensor_name_map(number, 3)
    for module, ours in architecture(name).modules(3).items():
        if name == "bitnet" and module == "lm_head":
            continue  # always tied
        if module.endswith("_sub_norm"):  # gguf has the names of an older implementation for these
            module = {"attn": "self_attn.inner_attn_ln", "ffn": "mlp.ffn_layernorm"}[ours.split(".")[-1].split("_")[0]]
            module = f"model.layers.{layer_number(ours)}.{module}"
        assert theirs.get_name(module) == ours


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_module_with_parameters_has_a_name(name):
    model = tiny.model(name)
    known = architecture(model.config.model_type).modules(model.config.num_hidden_layers)
    assert {parameter.rpartition(".")[0] for parameter, _ in model.named_parameters()} <= known.keys()
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (1, 8), (3, 4), (4, 64)])
def test_interleave_is_what_the_converter_does(heads, size):
    rows = np.arange(heads * size * 5).reshape(heads * size, 5)
    permuted = rows.reshape(heads, 2, size // 2, 5).swapaxes(1, 2).reshape(rows.shape)  # conversion/llama.py
    assert np.array_equal(interleave(rows, heads), permuted)
    assert np.array_equal(deinterleave(permuted, heads), rows)
    vector = np.arange(heads * size)
    assert np.array_equal(interleave(vector, heads), interleave(rows, heads)[:, 0] // 5)


def test_turning_neighbours_in_the_new_order_is_turning_halves_in_the_old():
    """The dot products of rotated queries and keys are the same."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)  # batch, head, position, size
    angles = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])

    def neighbours(x):
        x = torch.from_numpy(interleave(np.ascontiguousarray(x[0, 0].T.numpy()), 1).T.copy())
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    assert torch.allclose(neighbours(q) @ neighbours(k).T, a[0, 0] @ b[0, 0].T, atol=1e-12)


def test_only_llama_reorders_and_only_q_and_k():
    config = tiny.model("bundled").config
    heads = {
        name: architecture("llama").heads(f"blk.0.{name}.weight", config) for name in ("attn_q", "attn_k", "attn_v")
    }
    assert heads == {"attn_q": 4, "attn_k": 2, "attn_v": None}
    assert architecture("llama").heads("token_embd.weight", config) is None
    assert architecture("qwen3").heads("blk.0.attn_q.weight", config) is None
    assert architecture("bitnet").heads("blk.0.attn_q.weight", config) is None


def test_layer_numbers():
    assert [layer_number(name) for name in ("blk.0.attn_q.weight", "blk.123.x", "output.weight", "a.blk.1.")] == [
        0, 123, None, None,
    ]  # fmt: skip


def test_an_unknown_architecture_is_told():
    with pytest.raises(GGUFError, match="architecture 'gpt2' is not known here; there are llama, qwen2, qwen3, bitnet"):
        architecture("gpt2")
