"""write_gguf: what another reader finds in its files, what is exact, and what happens when something is wrong.

That the tensors are byte for byte those of llama-quantize is shown in tests/llamacpp/test_quantize.py.
"""

import copy
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qlearn
from qlearn.export import GGUFError, GGUFFile, Imatrix, imatrix, names, write_gguf
from qlearn.export.recipes import SCHEMES
from qlearn.export.sources import sources
from qlearn.models import load_model
from qlearn.training import qat
from qlearn.training.bitlinear import to_bitlinear
from tests.export import tiny


def write(model, path, scheme="F16", **options):
    return GGUFFile(write_gguf(model, tiny.tokenizer(), path / "model.gguf", scheme, progress=False, **options))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_package_gguf_reads_the_same_numbers(name, tmp_path):
    """With names from its own table, and the reordering as in llama.cpp's converter."""
    model, found = tiny.model(name), write(tiny.model(name), tmp_path, "F32")
    config, state = model.config, model.state_dict()
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(found.path).tensors}
    for ours in names.architecture(config.model_type).modules(config.num_hidden_layers).items():
        for kind in ("weight", "bias"):
            numbers = state.get(f"{ours[0]}.{kind}")
            if numbers is None or (ours[1] == "output" and config.tie_word_embeddings):
                assert f"{ours[1]}.{kind}" not in theirs
                continue
            if config.model_type == "llama" and ours[1].endswith(("attn_q", "attn_k")):
                heads = config.num_attention_heads if ours[1].endswith("q") else config.num_key_value_heads
                half = numbers.shape[0] // heads // 2
                numbers = numbers.reshape(heads, 2, half, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)
            assert np.array_equal(theirs.pop(f"{ours[1]}.{kind}"), numbers.numpy()), ours
    assert not theirs


def test_the_metadata_that_llama_cpp_asks_for(tmp_path):
    fields = gguf.GGUFReader(write(tiny.model("bundled"), tmp_path, "Q4_K_M").path).fields
    found = {key: fields[key].contents() for key in fields if not key.startswith("GGUF.")}
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 15
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION and found["general.type"] == "model"
    assert found["llama.context_length"] == 1024 and found["llama.block_count"] == 8
    assert found["llama.rope.dimension_count"] == 64 == found["llama.attention.key_length"]
    assert found["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.padding_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False and len(found["tokenizer.ggml.tokens"]) == 4096
    assert found["tokenizer.ggml.merges"][0] == "Ġ Ġ"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_types_are_those_of_llama_h(scheme):
    name = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(scheme, f"MOSTLY_{scheme}")
    assert SCHEMES[scheme].file_type == gguf.LlamaFileType[name]


# ---- quantized layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", qat.CHECKPOINTS)
def test_the_trained_checkpoints_are_exported_exactly(bits, tmp_path):
    """Every weight of every layer, and at 4 bits the bytes are the codes and scales as they were trained."""
    model, _ = load_model(qat.checkpoint(bits), progress=False)
    found = write(model, tmp_path, "Q4_0")
    for name, layer in model.named_modules():
        if not hasattr(layer, "quantized"):
            continue
        ours = names.architecture("llama").modules(8)[name]
        assert found.tensor(f"{ours}.weight").type.name == "Q4_0"
        heads = names.architecture("llama").heads(f"{ours}.weight", model.config)
        weights, blocks = found.weights(f"{ours}.weight"), found.data(f"{ours}.weight")
        if heads:
            weights, blocks = names.deinterleave(weights, heads), names.deinterleave(blocks, heads)
        assert np.array_equal(weights, layer.quantized.dequantize().numpy())
        codes = layer.quantized.codes().numpy().reshape(len(blocks), -1, 2, 16).astype(np.int16) + 8
        blocks = blocks.reshape(len(blocks), -1, 18)
        assert np.array_equal(blocks[..., 2:], codes[:, :, 0] | codes[:, :, 1] << 4)
        assert np.array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], layer.quantized.scales.numpy())


@pytest.mark.parametrize(
    ("method", "options"),
    [("absmax", {"bits": 4}), ("zero_point", {"bits": 3}), ("signed_absmax", {"bits": 4, "group_size": 32})],
)
def test_other_layers_are_exported_by_their_dequantized_weights(method, options, tmp_path):
    quantized = qlearn.quantize_model(load_model()[0], method, progress=False, **options)
    floats = load_model()[0]
    for name, layer in quantized.named_modules():
        if hasattr(layer, "quantized"):
            floats.get_submodule(name).weight.copy_(layer.quantized.dequantize())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for scheme in ("F32", "Q4_K_M"):
        ours, plain = write(quantized, tmp_path / "a", scheme), write(floats, tmp_path / "b", scheme)
        for name in plain.tensors:
            assert np.array_equal(ours.data(name), plain.data(name)), (scheme, name)


def test_bfloat16_models(tmp_path):
    model = load_model(dtype=torch.bfloat16)[0]
    found = write(model, tmp_path, "BF16")
    expected = model.model.layers[0].mlp.up_proj.weight
    assert np.array_equal(found.weights("blk.0.ffn_up.weight"), expected.float().numpy())
    assert found.tensor("blk.0.attn_norm.weight").type.name == "F32"


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def broken(change, name="bundled"):
    model = copy.deepcopy(tiny.model(name))
    change(model)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _swap(name, module):
    return lambda model: model.set_submodule(name, module)


REFUSED = {
    "NaN": (lambda m: m.model.layers[3].mlp.up_proj.weight[5, 5].fill_(torch.nan), {},
            "tensor blk.3.ffn_up.weight: 1 of the numbers are not finite"),
    "infinity in a norm": (lambda m: m.model.norm.weight[0].fill_(torch.inf), {}, "tensor output_norm.weight: 1 of"),
    "too large for F16": (lambda m: m.model.layers[0].mlp.up_proj.weight[0, 0].fill_(1e6), {},
                          "tensor blk.0.ffn_up.weight: 1e\\+06 is beyond the range of F16"),
    "another kind of layer": (_swap("model.layers.0.mlp.up_proj", Doubled(256, 768, bias=False)), {},
                              "model.layers.0.mlp.up_proj is a Doubled, which computes something else"),
    "a BitLinear in training": (lambda m: to_bitlinear(m, "b158"), {}, "is a BitLinear, which computes something else"),
    "a layer without a weight": (_swap("model.layers.0.mlp.up_proj", nn.Identity()), {}, "is a Identity without a"),
    "a bias too many": (_swap("model.layers.0.input_layernorm", nn.LayerNorm(256)), {}, "no bias in blk.0.attn_norm"),
    "a module too many": (lambda m: m.model.layers[0].mlp.add_module("adapter", nn.Linear(4, 4)), {},
                          "2 tensors that a GGUF file of its architecture has no place for: model.layers.0.mlp.adap"),
    "a module missing": (lambda m: delattr(m.model.layers[0].mlp, "up_proj"), {}, "has no module model.layers.0.mlp"),
    "unknown scheme": (lambda m: None, {"scheme": "Q4_K_XL"}, "scheme 'Q4_K_XL' is unknown"),
    "another activation": (lambda m: setattr(m.config, "hidden_act", "gelu"), {}, "does not compute hidden_act='gelu'"),
    "imatrix of another model": (lambda m: None, {"imatrix": {"other": np.ones(3)}}, "the imatrix is of another model"),
    "imatrix of another width": (lambda m: None, {"imatrix": {"blk.0.attn_q.weight": np.ones(3)}, "scheme": "Q4_K_M"},
                                 "the imatrix has .3,. numbers for blk.0.attn_q.weight, whose rows have 256"),
    "imatrix that is negative": (lambda m: None, {"imatrix": {"blk.0.attn_q.weight": -np.ones(256)}, "scheme": "Q4_0"},
                                 "blk.0.attn_q.weight: the imatrix has numbers that are negative"),
    "no imatrix": (lambda m: None, {"scheme": "Q2_K_S"}, "Q2_K_S without an imatrix"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_are_one_sentence_and_leave_no_file(change, options, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"what was there before")
    with pytest.raises(ValueError, match=message) as error:
        write(broken(change), tmp_path, **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == b"what was there before"


def test_a_bias_that_llama_cpp_has_no_place_for(tmp_path):
    model = tiny.build(tiny.config("qwen3", attention_bias=True))
    with pytest.raises(ValueError, match="qwen3 has no bias in blk"):
        write(model, tmp_path)


def test_another_architecture(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=4096))
    with pytest.raises(GGUFError, match="architecture 'gpt2' is not known here; there are llama, qwen2"):
        write(model, tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tiny.model("odd"), tmp_path / "nowhere")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlearn.export.sources.Source.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tiny.model("odd"), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- imatrix, exceptions, memory -------------------------------------------------------------------------------------


def test_an_imatrix_changes_what_it_is_for_and_is_noted(tmp_path):
    importance = imatrix(tiny.model("bundled"), tiny.tokenizer(), tokens=512, name="calibration")
    plain, weighed = {}, {}
    for kept, given in ((plain, None), (weighed, importance)):
        found = write(tiny.model("bundled"), tmp_path, "Q4_K_S", imatrix=given)
        kept.update({name: found.data(name).copy() for name in found.tensors})
    assert found.metadata["quantize.imatrix.entries_count"] == 56
    assert found.metadata["quantize.imatrix.dataset"] == "calibration"
    changed = {name for name in plain if not np.array_equal(plain[name], weighed[name])}
    assert changed == set(importance)


def test_an_imatrix_may_be_a_dict_and_lack_some(tmp_path):
    given = {"blk.0.attn_q.weight": np.arange(256)}
    found = write(tiny.model("bundled"), tmp_path, "Q4_K_S", imatrix=given)
    assert found.tensor("blk.0.attn_q.weight").type.name == "Q4_K"


def test_exceptions_from_the_recipe(tmp_path):
    found = write(tiny.model("bitnet"), tmp_path, "TQ1_0", types={"token_embd.weight": "Q8_0"})
    assert found.tensor("token_embd.weight").type.name == "Q8_0"
    assert found.tensor("blk.0.ffn_down.weight").type.name == "TQ1_0"


def test_one_tensor_at_a_time(tmp_path):
    """The peak is that of the largest tensor, whatever their number (NumPy's allocations are traced)."""
    peaks = []
    for layers in (2, 10):
        model = tiny.build(tiny.config("qwen3", num_hidden_layers=layers, layer_types=None))
        tracemalloc.start()
        write(model, tmp_path, "Q8_0")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_sources_say_what_they_are():
    found = sources(tiny.model("biased"), names.architecture("llama"))
    assert [s.name for s in found[:4]] == [
        "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias",
    ]  # fmt: skip
    assert found[3].heads == 4 and found[3].encode("F32").shape == (128, 4)


def test_imatrix_class_is_taken_as_it_is(tmp_path):
    found = Imatrix({"blk.0.attn_q.weight": np.ones(256, np.float32)}, {"blk.0.attn_q.weight": 1})
    assert write(tiny.model("bundled"), tmp_path, "Q4_0", imatrix=found).size
