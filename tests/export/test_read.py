"""read_gguf: the model computes with the numbers of the file, bit for bit, and nonsense is told."""

import copy

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlearn.export import GGUFError, GGUFFile, names, read_gguf, write_gguf
from qlearn.export.recipes import SCHEMES
from qlearn.models import generate
from qlearn.models.bitlinear import PackedBitLinear
from qlearn.models.bitnet import pack_bitnet
from tests.export import tiny

IDS = torch.arange(2, 130).reshape(2, 64)


def write(model, path, scheme="F16", **options):
    return write_gguf(model, tiny.tokenizer(), path / "model.gguf", scheme, progress=False, **options)


def decoded_by_gguf(model, path):
    """A copy of the model with the weights of a file, decoded by the package gguf, and reordered as its maker says."""
    copied, file = copy.deepcopy(model), GGUFFile(path)
    config, modules = model.config, names.architecture(model.config.model_type).modules(model.config.num_hidden_layers)
    for name, parameter in copied.named_parameters():
        module, _, kind = name.rpartition(".")
        stored = f"{modules[module]}.{kind}"
        number = gguf.GGMLQuantizationType(file.tensor(stored).type.id)
        data = file.data(stored).copy()
        numbers = gguf.quants.dequantize(data.view(np.float16) if number == 1 else data.view(np.float32) if number == 0
                                         else data, number).reshape(parameter.shape)  # fmt: skip
        if config.model_type == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            pairs = numbers.reshape(heads, len(numbers) // heads // 2, 2, *numbers.shape[1:])
            numbers = pairs.swapaxes(1, 2).reshape(numbers.shape)
        parameter.copy_(torch.from_numpy(numbers.copy()))
    return copied


@pytest.mark.parametrize("name", tiny.NAMES)
def test_unquantized_there_and_back(name, tmp_path):
    model, _ = read_gguf(write(tiny.model(name), tmp_path, "F32"))
    before, after = tiny.model(name).state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(IDS).logits, tiny.model(name)(IDS).logits)


@pytest.mark.parametrize("name", ["qwen3", "biased", "odd", "bitnet"])
@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K_M", "MXFP4"])
def test_the_logits_are_those_of_the_dequantized_weights(name, scheme, tmp_path):
    path = write(tiny.model(name), tmp_path, scheme)
    model, _ = read_gguf(path)
    assert torch.equal(model(IDS).logits, decoded_by_gguf(tiny.model(name), path)(IDS).logits)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "Q2_K_S"])
def test_every_scheme_of_the_bundled_model(scheme, tmp_path):
    path = write(tiny.model("bundled"), tmp_path, scheme)
    model, _ = read_gguf(path)
    assert torch.equal(model(IDS).logits, decoded_by_gguf(tiny.model("bundled"), path)(IDS).logits)


def packed_bitnet(kind, scale_dtype):
    """A tiny BitNet with packed layers, its scales rounded to a type."""
    model = pack_bitnet(copy.deepcopy(tiny.model("bitnet")), kind)
    for layer in model.modules():
        if isinstance(layer, PackedBitLinear):
            layer.scales.copy_(layer.scales.to(scale_dtype))
    return model


@pytest.mark.parametrize("scheme", ["TQ1_0", "TQ2_0", "Q8_0", "F16"])
@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_ternary_layers_of_bitnet_come_back_packed(kind, scheme, tmp_path):
    """With scales that float16 holds, nothing is lost: the logits are the same, inputs rounded to 8 bits and all."""
    before = packed_bitnet(kind, torch.float16)
    after, _ = read_gguf(write(before, tmp_path, scheme, types={"token_embd.weight": "F32"}))
    layers = [m for m in after.modules() if isinstance(m, PackedBitLinear)]
    assert len(layers) == 21 and layers[0].quantized.bits_per_weight < 1.61
    assert torch.equal(after(IDS).logits, before(IDS).logits)


def test_a_scale_of_bitnet_is_rounded_to_float16_and_its_trits_stay(tmp_path):
    before = packed_bitnet("b158", torch.float32)
    after, _ = read_gguf(write(before, tmp_path, "TQ1_0"))
    old, new = (m.model.layers[1].mlp.up_proj.quantized for m in (before, after))
    assert torch.equal(old.codes(), new.codes()) and torch.equal(old.scales.half().float(), new.scales)


def test_bitnet_layers_that_are_not_ternary_stay_as_they_are(tmp_path):
    """The first has another scale in each block of 256."""
    for scheme in ("TQ1_0", "F16"):
        model, _ = read_gguf(write(tiny.model("bitnet"), tmp_path, scheme))
        assert not any(isinstance(m, PackedBitLinear) for m in model.modules())


def test_what_comes_back(tmp_path):
    model, tokenizer = read_gguf(write(tiny.model("bundled"), tmp_path))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    assert generate(model, tokenizer, "import numpy as", 1) == " np"


def test_a_head_of_its_own(tmp_path):
    model, _ = read_gguf(write(tiny.model("qwen3"), tmp_path))
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_second_time_the_bytes_are_the_same(tmp_path):
    """Q8_0, Q4_0 and ternary blocks are fixed points: to decode and encode them changes nothing but signs of zero."""
    first = GGUFFile(write(tiny.model("bundled"), tmp_path, "Q8_0"))
    kept = {name: first.data(name).copy() for name in first.tensors}
    model, tokenizer = read_gguf(first.path)
    again = GGUFFile(write_gguf(model, tokenizer, tmp_path / "again.gguf", "Q8_0", progress=False))
    assert all(np.array_equal(again.data(name), kept[name]) for name in kept)


def rewritten(path, drop=(), **tensors):
    """A file again, without some of its tensors, and with others (name with __ for a dot -> array)."""
    reader, target = gguf.GGUFReader(path), path.with_name("rewritten.gguf")
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].clear()
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, numbers in tensors.items():
        writer.add_tensor(name.replace("__", "."), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_rewritten_files_are_the_same(tmp_path):
    model, _ = read_gguf(rewritten(write(tiny.model("bitnet"), tmp_path, "F32")))
    assert torch.equal(model(IDS).logits, tiny.model("bitnet")(IDS).logits)


def test_scales_beside_the_matrices_of_bitnet(tmp_path):
    path = write(tiny.model("bitnet"), tmp_path, "F32")
    model, _ = read_gguf(rewritten(path, blk__0__attn_q__scale=np.float32([0.5])))
    expected = tiny.model("bitnet").model.layers[0].self_attn.q_proj.weight * 0.5
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)


def test_some_biases_are_missing(tmp_path):
    path = write(tiny.model("biased"), tmp_path, "F32")
    model, _ = read_gguf(rewritten(path, drop=["blk.1.attn_output.bias"]))
    assert not model.model.layers[1].self_attn.o_proj.bias.any()
    assert model.model.layers[0].self_attn.o_proj.bias.any()


def test_a_tensor_is_missing(tmp_path):
    path = rewritten(write(tiny.model("odd"), tmp_path), drop=["blk.1.ffn_up.weight"])
    with pytest.raises(GGUFError, match=r"has no tensor blk\.1\.ffn_up\.weight; it is incomplete"):
        read_gguf(path)


def test_a_tensor_too_many(tmp_path):
    path = rewritten(write(tiny.model("odd"), tmp_path), blk__1__ffn_gate_exps__weight=np.zeros((4, 4), np.float32))
    with pytest.raises(GGUFError, match=r"has 1 tensors that are not known here: blk\.1\.ffn_gate_exps"):
        read_gguf(path)


def test_a_tensor_of_another_shape(tmp_path):
    path = write(tiny.model("odd"), tmp_path)
    path = rewritten(path, drop=["blk.1.ffn_up.weight"], blk__1__ffn_up__weight=np.zeros((96, 96), np.float32))
    with pytest.raises(GGUFError, match=r"blk.1.ffn_up.weight has the shape \(96, 96\), where \(208, 96\) is needed"):
        read_gguf(path)


def test_an_imatrix_is_no_model(tmp_path):
    from qlearn.export import imatrix

    imatrix(tiny.model("odd"), tiny.tokenizer(), tokens=512).save(tmp_path / "imatrix.gguf")
    with pytest.raises(GGUFError, match="has no metadata 'general"):
        read_gguf(tmp_path / "imatrix.gguf")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "nothing.gguf")


# ---- damaged models: a model, or GGUFError ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(the bytes of a whole small model, where its list of tensors ends, a path)."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1}  # fmt: skip
    path = write(tiny.build(tiny.config("odd", **sizes)), folder, "Q8_0")
    return path.read_bytes(), GGUFFile(path).data_start, folder / "damaged.gguf"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_a_model_or_a_gguf_error(small, data):
    whole, head, path = small
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        near_an_end = st.one_of(st.integers(0, 1200), st.integers(head - 1500, head - 1))
        damaged[data.draw(near_an_end)] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        model, tokenizer = read_gguf(path)
    except GGUFError as error:
        assert "\n" not in str(error)
    else:
        assert model.config.num_hidden_layers == 1 and len(tokenizer) >= 1
