"""Loading: offline, quiet, and with a clear sentence when it cannot be done."""

import shutil

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

import qlearn
from qlearn.models import generate, load_model
from qlearn.models.loading import BUNDLED


@pytest.fixture
def folder(model, tmp_path):
    """A saved tiny model with the bundled tokenizer."""
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", fail)


def test_the_bundled_model_needs_no_network_and_says_nothing(no_network, capsys):
    model, tokenizer = load_model()
    assert capsys.readouterr() == ("", "")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("def f(x):\n    return x\n")["input_ids"]) == "def f(x):\n    return x\n"


def test_the_bundled_model_in_its_own_type():
    assert {p.dtype for p in load_model(dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_a_folder(folder, model):
    loaded, _ = load_model(folder, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(load_model(str(folder))[0].lm_head.weight, model.lm_head.weight)


def test_progress_bars_are_shown_on_request_and_left_as_they_were(folder, capsys):
    from transformers.utils import logging

    load_model(folder, progress=False)
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    load_model(folder, progress=True)
    assert "Loading weights" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere'; give an existing one"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '\./nowhere'"):
        load_model("./nowhere")


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda f: (f / "model.safetensors").unlink(), OSError, "is not complete .*; fetch all of its files"),
        (lambda f: (f / "config.json").unlink(), ValueError, "is no causal language model"),
        (lambda f: (f / "config.json").write_text('{"model_type": "vit"}'), ValueError, "is no causal language model"),
        (
            lambda f: (f / "model.safetensors").open("r+b").truncate(5000),
            ValueError,
            "a weight file of .* is incomplete",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), ValueError, "is no causal language model"),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(folder, progress=False)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_offline(no_network):
    message = (
        "the model 'nobody/unknown' is not on this machine and the Hugging Face hub cannot be reached; .* load_model"
    )
    with pytest.raises(OSError, match=message):
        load_model("nobody/unknown")


def test_a_model_the_hub_does_not_have(monkeypatch):
    def missing(*args, **kwargs):
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.model_info", missing)
    with pytest.raises(OSError, match=r"there is no model 'nobody/unknown', neither .*; check the spelling"):
        load_model("nobody/unknown")


def test_an_id_no_hub_could_have():
    with pytest.raises(OSError, match="there is no model 'not an id', neither"):
        load_model("not an id")


def test_generate_gives_the_continuation_alone():
    model, tokenizer = qlearn.load_model()
    prompt = "import numpy as np\n\n\ndef mean(values):"
    first = generate(model, tokenizer, prompt, max_new_tokens=6)
    assert not first.startswith("import") and first.startswith("\n    ")
    assert generate(model, tokenizer, prompt, max_new_tokens=12).startswith(first)
