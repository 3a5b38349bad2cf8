"""Adapters as files: peft computes the same from ours, we from peft's, and broken files are told in a sentence."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlearn import load_model, quantize_model
from qlearn.training.lora import LoraLinear, add_lora, lora_layers, remove_lora
from qlearn.training.lora_files import CONFIG, WEIGHTS, load_adapters, save_adapters, target_modules
from tests.models.conftest import FAMILIES

peft = pytest.importorskip("peft")
IDS = torch.arange(32).view(2, 16)


def make(family="llama"):
    torch.manual_seed(0)
    return FAMILIES[family]().eval().requires_grad_(False)


def trained(family="llama", **arguments):
    """A model with adapters that say something."""
    model = add_lora(make(family), **{"r": 3, "alpha": 5, **arguments})
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.1)
    return model


def by_peft(family, folder):
    return peft.PeftModel.from_pretrained(make(family), folder).eval()


@pytest.fixture
def folder(tmp_path):
    save_adapters(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DENSE = sorted(FAMILIES.keys() - {"deepseek v3"})
CASES = [(family, target) for family in DENSE for target in (None, "down_proj", ["*layers.1.*"])]
# In a mixture peft takes the names of all MLPs for those of the experts, so there it reads only what is outside.
CASES += [("deepseek v3", "*self_attn*"), ("deepseek v3", "*.1.self_attn*")]


@pytest.mark.parametrize(("family", "target"), CASES, ids=str)
def test_peft_computes_the_same_bit_for_bit(family, target, tmp_path):
    model = trained(family, target=target)
    save_adapters(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and of unexpected keys
        theirs = by_peft(family, tmp_path)
    with torch.no_grad():
        assert not torch.equal(make(family)(IDS).logits, model(IDS).logits)
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    assert len([m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]) == len(lora_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_comes_back(family, tmp_path):
    model = trained(family)
    save_adapters(model, tmp_path)
    assert torch.equal(load_adapters(make(family), tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"target_modules": ["v_proj"]}, {"target_modules": "all-linear"}],
    ids=str,
)
def test_we_compute_what_peft_does(changes, tmp_path):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **changes}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapters(make(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-6 if changes else 0)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        f"{name}.{x}" for name in lora_layers(ours) for x in "AB"
    }


def test_the_bundled_model_and_peft(tmp_path):
    model, tokenizer = load_model()
    add_lora(model, r=8)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.01)
    save_adapters(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load_model()[0], tmp_path).eval()
    ids = torch.tensor([tokenizer("def f(x):\n    return x")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"].endswith("bundled")


@pytest.mark.parametrize("bits", [4, 2])
def test_a_quantized_base_and_its_adapter_come_back(bits, tmp_path):
    model, _ = load_model()
    quantize_model(model, "zero_point", bits=bits, group_size=64, progress=False).save_pretrained(tmp_path / "base")
    load_model()[1].save_pretrained(tmp_path / "base")
    add_lora(model, r=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.01)
    save_adapters(model, tmp_path / "adapter", base=tmp_path / "base")
    again = load_adapters(load_model(tmp_path / "base", progress=False)[0], tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "base")


def test_saved_and_loaded_in_training_mode(folder):
    again = load_adapters(make().train(), folder)
    assert all(module.training for module in again.modules())
    assert torch.equal(again.eval()(IDS).logits, trained()(IDS).logits)


def test_dropout_comes_back(tmp_path):
    save_adapters(trained(dropout=0.25), tmp_path)
    assert {layer.dropout.p for layer in lora_layers(load_adapters(make(), tmp_path)).values()} == {0.25}


def test_a_bfloat16_base_is_given_back_float32_adapters(folder):
    layers = lora_layers(load_adapters(make().bfloat16(), folder)).values()
    assert {layer.A.dtype for layer in layers} == {torch.float32}


def test_nothing_is_left_half_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_names_are_short_where_that_says_it_all():
    model = make()
    every = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert target_modules(model, every) == sorted({name.rpartition(".")[2] for name in every})
    assert target_modules(model, every[1:]) == sorted(every[1:])
    assert target_modules(trained(), every) == target_modules(model, every)


def test_no_adapters_to_save(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to save"):
        save_adapters(make(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unequal_adapters(tmp_path):
    model = nn.Sequential(LoraLinear(nn.Linear(2, 2), r=1), LoraLinear(nn.Linear(2, 2), r=2))
    with pytest.raises(ValueError, match="the adapters differ in"):
        save_adapters(model, tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {name}"):
        load_adapters(make(), folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_truncated_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is incomplete"):
        load_adapters(make(), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"bias": "lora_only", "rank_pattern": {"q_proj": 2}}, "uses bias, rank_pattern"),
        ({"r": 4}, r"has \(3, 64\) for .*lora_A.weight, not \(4, 64\)"),
        ({"r": "x"}, "r='x' is no rank"),
        ({"r": None}, "r=None is no rank"),
    ],
)
def test_what_an_adapter_may_not_be(folder, changes, message):
    change_config(folder, **changes)
    model = make()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert not lora_layers(model)


def test_a_config_without_the_rank(folder):
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"r=0\.0 is no rank"):
        load_adapters(make(), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.zeros(1)}, "lora_magnitude_vector"),
        (lambda t: {}, "no tensors"),
        (lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}, "no linear layer of Llama"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("layers.1.mlp.up_proj.lora_B.weight")}, "has nothing"),
        (lambda t: {k: v[:, :1] for k, v in t.items()}, "it is for another model"),
    ],
    ids=["more tensors", "none", "another layer", "half an adapter", "other sizes"],
)
def test_tensors_that_do_not_fit(folder, change, message):
    save_file({k: v.contiguous() for k, v in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS)
    model = make()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, folder)
    assert not lora_layers(model)


def test_not_onto_a_model_with_adapters(folder):
    model = trained()
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapters(model, folder)
    assert lora_layers(load_adapters(remove_lora(model), folder))
