"""The importance matrix: mean squares of the inputs, and files that come back the same.

That llama-imatrix finds the same, and llama-quantize takes the files, is shown in tests/llamacpp/test_quantize.py.
"""

import gguf
import numpy as np
import pytest
import torch

import qlearn
from qlearn.evaluate import calibration_text
from qlearn.export import GGUFError, Imatrix, imatrix
from tests.export import handmade, tiny, tokens


@pytest.fixture(scope="module")
def found():
    return imatrix(tiny.model("bundled"), tiny.tokenizer(), tokens=1024)


def test_every_matrix_of_the_layers_and_nothing_else(found):
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert list(found) == [
        f"blk.{i}.{kind}.weight"
        for i in range(8)
        for kind in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ] and len(found) == 8 * len(kinds)
    assert set(found.counts.values()) == {1024} and found.chunks == 2 and "1024 tokens" in repr(found)


def test_mean_squares_by_hand(found):
    """With a hook of the test's own on two layers, all chunks one by one."""
    model, tokenizer = tiny.model("bundled"), tiny.tokenizer()
    ids = tokenizer(calibration_text(), split_special_tokens=True)["input_ids"][:1024]
    seen = {"self_attn.v_proj": [], "mlp.down_proj": []}
    layer = model.model.layers[5]
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0]))
        for name in seen
    ]
    for start in (0, 512):
        model(torch.tensor([ids[start : start + 512]]))
    for handle in handles:
        handle.remove()
    for name, ours in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        expected = torch.cat(seen[name], 1)[0].double().square().mean(0).numpy()
        assert np.allclose(found[f"blk.5.{ours}.weight"], expected, rtol=1e-4)


def test_q_k_and_v_read_the_same(found):
    assert np.array_equal(found["blk.3.attn_q.weight"], found["blk.3.attn_k.weight"])
    assert not np.array_equal(found["blk.3.attn_q.weight"], found["blk.4.attn_q.weight"])


def test_chunks_begin_with_bos_where_texts_do():
    tokenizer = tokens.byte_level("gpt-2", bos=True)
    model = tiny.build(tiny.config("odd", vocab_size=len(tokenizer), num_hidden_layers=1))
    ids = tokenizer(calibration_text(), split_special_tokens=True)["input_ids"][:1024]
    first = []
    handle = model.register_forward_pre_hook(lambda m, a, k: first.append(k["input_ids"].clone()), with_kwargs=True)
    imatrix(model, tokenizer, tokens=1024)
    handle.remove()
    assert torch.cat(first)[:, 0].tolist() == [1, 1] and torch.cat(first)[1, 1:].tolist() == ids[513:1024]


def test_quantized_layers_are_watched_as_well():
    model = qlearn.quantize_model(qlearn.load_model()[0], "absmax", bits=8, progress=False)
    assert len(imatrix(model, tiny.tokenizer(), tokens=512)) == 56


def test_there_and_back(found, tmp_path):
    found.save(tmp_path / "imatrix.gguf")
    back = Imatrix.load(tmp_path / "imatrix.gguf")
    assert back.counts == found.counts and back.datasets == ["text"] and back.chunk_size == 512
    assert back.keys() == found.keys() and all(np.array_equal(back[name], found[name]) for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_the_file_as_the_package_gguf_reads_it(found, tmp_path):
    found.save(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix" and "general.architecture" not in reader.fields
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.datasets"].contents() == ["text"]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["blk.0.ffn_down.weight.counts"].tolist() == [[1024.0]]
    assert np.array_equal(tensors["blk.0.ffn_down.weight.in_sum2"][0], found.sums["blk.0.ffn_down.weight"])


def test_no_tokens_mean_that_all_columns_matter_alike():
    empty = Imatrix({"x": np.zeros(3, np.float32)}, {"x": 0})
    assert empty["x"].tolist() == [1, 1, 1] and empty.chunks == 0


@pytest.mark.parametrize(
    ("texts", "message"),
    [("too short", "fewer than the 512 of a chunk; give more text"), ([3], "is of type int"), ("", "have 0 tokens")],
    ids=["short", "no text", "empty"],
)
def test_texts_that_do_not_do_are_told(texts, message):
    with pytest.raises(ValueError, match=message):
        imatrix(tiny.model("bundled"), tiny.tokenizer(), texts)


def test_inputs_that_overflow_are_told():
    model = tiny.build(tiny.config("odd"))
    model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the inputs of blk\.1\.attn_q\.weight overflow"):
        imatrix(model, tiny.tokenizer(), tokens=512)


def test_files_that_are_no_imatrix_are_told(tmp_path):
    path = tmp_path / "f.gguf"
    path.write_bytes(handmade.SMALL)
    with pytest.raises(GGUFError, match="is no imatrix"):
        Imatrix.load(path)
    path.write_bytes(b"\x05\0\0\0legacy format")
    with pytest.raises(GGUFError):
        Imatrix.load(path)
    kind = handmade.entry("general.type", handmade.STRING, "imatrix")
    path.write_bytes(handmade.file([kind], [handmade.tensor("a.in_sum2", [4, 1])], bytes(16)))
    with pytest.raises(GGUFError, match=r"has no tensor a\.counts"):
        Imatrix.load(path)
    both = [handmade.tensor("a.in_sum2", [4, 2]), handmade.tensor("a.counts", [1, 2], 0, 32)]
    path.write_bytes(handmade.file([kind], both, bytes(40)))
    with pytest.raises(GGUFError, match="a has 2 counts: an imatrix of experts"):
        Imatrix.load(path)
