"""BitNet from nothing: the two schedules, a run of a few steps, and what it writes."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlearn.formats.integers import unpack, unpack_trits
from qlearn.training import bitnet, pretrain
from qlearn.training.bitlinear import BitLinear
from qlearn.training.tokens import load_tokens

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 128}


@pytest.fixture
def small_tokens(tmp_path):
    """A stream that a vocabulary of 128 can hold, and that is easy to learn."""
    stream = (np.arange(4500) % 16).astype(np.uint16)
    about = json.dumps({"tokens": 4500, "held_out_tokens": 1500, "held_out_bytes": 3000})
    np.savez(tmp_path / "small.npz", stream=stream, held_out=stream[:1500], about=np.array(about))
    return tmp_path / "small.npz"


@pytest.mark.parametrize("kind", bitnet.KINDS)
def test_a_run_learns_and_writes_its_two_files(kind, small_tokens, tmp_path):
    record = bitnet.run(
        kind, small_tokens, tmp_path / "out", steps=8, batch=1, device="cpu", compile=False, name="x", lr=3e-2, **TINY
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.json", "x.safetensors"]
    assert json.loads((tmp_path / "out" / "x.json").read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == 8 and record["tokens_seen"] == 8 * 1024
    assert record["held_out"]["loss"] < math.log(128)
    tensors = load_file(tmp_path / "out" / "x.safetensors")
    assert {tensors[name].dtype for name in tensors if name.endswith("norm.weight")} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert (f"{'model.layers.0.mlp.up_proj'}.packed" in tensors) == (kind != "bf16")


@pytest.mark.parametrize("kind", ["b158", "b1"])
def test_the_file_holds_exactly_what_the_layers_computed_with(kind):
    torch.manual_seed(0)
    model = bitnet.make_model(kind, **TINY)
    tensors = bitnet.stored_tensors(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    assert len(layers) == 7
    for name, layer in layers.items():
        V, beta = layer.rounded()
        packed = tensors[f"{name}.packed"].numpy()
        if kind == "b158":
            codes = unpack_trits(packed, V.numel())
        else:
            codes = 2 * unpack(packed, 1, V.numel()).astype(np.int8) - 1
        assert np.array_equal(codes.reshape(V.shape), V.numpy())
        assert tensors[f"{name}.scale"].item() == beta.item()


@pytest.mark.parametrize("kind", bitnet.KINDS)
def test_what_was_written_comes_back(kind, tmp_path):
    torch.manual_seed(0)
    model = bitnet.round_floats(bitnet.make_model(kind, **TINY).eval())
    bitnet.write(model, {"kind": kind}, tmp_path, "m")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(bitnet.load(tmp_path / "m.safetensors", **TINY)(ids).logits, model(ids).logits)
    behind = bitnet.load(tmp_path / "m.safetensors", packed=False, **TINY)
    for name, p in model.named_parameters():
        assert torch.equal(dict(behind.named_parameters())[name], p.bfloat16().float())


def test_what_cannot_be_loaded(tmp_path):
    path = tmp_path / "m.safetensors"
    model = bitnet.make_model("b158", **TINY)
    bitnet.write(model, {"kind": "b158"}, tmp_path, "m")
    with pytest.raises(
        ValueError, match=r"has \(128, 32\) for model.embed_tokens.weight, not \(4096, 256\); pass the sizes"
    ):
        bitnet.load(path)
    with pytest.raises(ValueError, match=r"has nothing for model.layers.1.self_attn.q_proj.weight, not \(32, 32\)"):
        bitnet.load(path, **TINY | {"num_hidden_layers": 2})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        bitnet.load(path, **TINY)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no file of this training"):
        bitnet.load(path)
    with pytest.raises(FileNotFoundError):
        bitnet.load(tmp_path / "nothing.safetensors")


def test_rounding_to_bfloat16_leaves_the_floats_behind_bitlinear_alone():
    model = bitnet.make_model("b158", **TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    bitnet.round_floats(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] if "_proj" in name else before[name].bfloat16().float())


def test_the_sizes_are_those_of_the_bundled_model():
    with torch.device("meta"):
        ours, bundled = bitnet.make_model("b158"), pretrain.make_model()
    sub_norms = 8 * (256 + 768)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in bundled.parameters()) + sub_norms
    ours, bundled = ours.config, bundled.config
    for name in ("rope_parameters", "vocab_size", "pad_token_id", "max_position_embeddings", "hidden_act"):
        assert getattr(ours, name) == getattr(bundled, name)


def test_the_bundled_schedule_is_unchanged():
    for step in (0, 10, 149, 150, 3000, 5826):
        expected = 3e-3 * min(1.0, (step + 1) / 150) * (1 - step / 5827)
        assert pretrain.linear(step, 5827) == (expected, 0.1)


def test_the_rates_reach_the_optimizer():
    optimizer = pretrain.make_optimizer(bitnet.make_model("b158", **TINY))
    pretrain.set_rates(optimizer, 0.5, 0.0)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (0.5, 0.0)]
    pretrain.set_rates(optimizer, 0.25, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.1), (0.25, 0.0)]


def test_a_loss_that_is_no_number_ends_the_run(small_tokens):
    stream, held_out, _ = load_tokens(small_tokens, "cpu")
    model = bitnet.make_model("b158", **TINY)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 2; lower the learning rate"):
        pretrain.train(model, stream, held_out, None, 4, log_every=2, batch=1, compile=False)


def test_unknown_names_are_told(small_tokens, tmp_path):
    with pytest.raises(ValueError, match="kind='b2' is unknown; choose from bf16, b158, b1"):
        bitnet.make_model("b2")
    with pytest.raises(ValueError, match="schedule='cosine' is unknown; choose from linear, two-stage"):
        bitnet.run("b158", small_tokens, tmp_path, schedule="cosine", device="cpu")
    with pytest.raises(ValueError, match="no trained checkpoint of kind 'b1'"):
        bitnet.checkpoint("b1")


def test_the_command_says_how_its_token_file_is_made(capsys):
    with pytest.raises(SystemExit):
        bitnet.main(["--tokens", "none.npz"])
    assert "there is no file none.npz; python -m qlearn.training.tokens none.npz makes it" in capsys.readouterr().err
