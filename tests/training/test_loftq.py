"""LoftQ: the adapter begins with what the rounding lost, and the model begins nearer to the one in floats."""

import itertools

import pytest
import torch
from torch import nn

from qlearn import load_model, quantize, quantize_model
from qlearn.evaluate import Reference, compare, quantized_layers
from qlearn.models import QuantLinear
from qlearn.training.loftq import add_loftq, loftq, low_rank
from qlearn.training.lora import add_lora, lora_layers, remove_lora
from qlearn.training.merging import trained_on
from tests.models.conftest import FAMILIES

METHODS = {
    "zero_point, 2 bits": ("zero_point", 2),
    "zero_point, 4 bits": ("zero_point", 4),
    "absmax, 3 bits": ("absmax", 3),
    "ternary": ("ternary", 1.6),
    "signs": ("binary", 1),
}


def rounding(method, bits):
    return lambda weight: quantize(weight, method, bits=bits, group_size=16)


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(48, 64)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("r", [1, 8, 48])
def test_the_residual_falls_and_the_best_is_kept(weight, method, r):
    quantized, A, B, residuals = loftq(weight, rounding(*method), r, iterations=6)
    assert A.shape == (r, 64) and B.shape == (48, r) and len(residuals) == 7
    assert residuals[1] < residuals[0]  # the SVD is optimal for the first codes
    found = (weight - quantized.dequantize() - B @ A).norm() / weight.norm()
    assert found.item() == pytest.approx(min(residuals[1:]), rel=1e-4, abs=1e-6)


def test_the_first_pair_is_plain_quantization_and_the_svd_of_its_error(weight):
    plain = quantize(weight, "zero_point", bits=2, group_size=16)
    quantized, A, B, residuals = loftq(weight, rounding("zero_point", 2), r=4, iterations=1)
    assert torch.equal(quantized.packed, plain.packed)
    error = weight - plain.dequantize()
    singular = torch.linalg.svdvals(error.double())
    expected = singular[4:].square().sum().sqrt() / weight.double().norm()  # Eckart and Young
    assert residuals == pytest.approx([(error.norm() / weight.norm()).item(), expected.item()], rel=1e-5)
    assert (A @ A.T - torch.diag(singular[:4].float())).abs().max() < 1e-3  # the roots are split evenly
    assert (B.T @ B - torch.diag(singular[:4].float())).abs().max() < 1e-3


def test_a_full_rank_loses_nothing(weight):
    """The rest is the rounding of the SVD in float32: some 1e-6."""
    *_, residuals = loftq(weight, rounding("zero_point", 2), r=48, iterations=1)
    assert residuals[1] < 1e-5


def test_the_best_is_not_always_the_last():
    """A method whose second rounding is worse than the first: the first pair is kept."""
    calls = itertools.count()
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))

    def worse(w):
        return quantize(w, "zero_point", bits=8 if next(calls) == 0 else 2, group_size=16)

    quantized, A, B, residuals = loftq(weight, worse, r=2, iterations=3)
    assert min(residuals[1:]) == residuals[1] and quantized.format.name == "uint8"
    assert torch.allclose(quantized.dequantize() + B @ A, weight, atol=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "a constant"])
def test_weights_without_an_error(value):
    quantized, A, B, residuals = loftq(torch.full((16, 16), value), rounding("zero_point", 2), r=2)
    assert torch.allclose(quantized.dequantize() + B @ A, torch.full((16, 16), value), atol=1e-3)
    assert all(0 <= residual < 1e-2 for residual in residuals)


def test_low_rank_is_optimal(weight):
    A, B = low_rank(weight, 5)
    assert torch.linalg.matrix_rank(B @ A) == 5
    rest = (weight - B @ A).norm()
    assert rest.item() == pytest.approx(torch.linalg.svdvals(weight)[5:].square().sum().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [1, 16, 100])
def test_any_alpha_gives_the_same_start(alpha):
    torch.manual_seed(0)
    model, residuals = add_loftq(FAMILIES["llama"]().eval(), bits=2, group_size=16, r=4, alpha=alpha, progress=False)
    torch.manual_seed(0)
    original = FAMILIES["llama"]()
    for name, layer in lora_layers(model).items():
        W = original.get_submodule(name).weight
        left = (W - trained_on(layer) - layer.change()).norm() / W.norm()
        assert left.item() == pytest.approx(min(residuals[name][1:]), rel=1e-4)
        assert layer.A.norm().item() == pytest.approx(layer.B.norm().item(), rel=1e-4)


@pytest.mark.parametrize(("bits", "r"), [(2, 8), (4, 8)])
def test_the_model_starts_nearer_to_the_one_in_floats(bits, r):
    reference = Reference(*load_model(), tokens=512)
    plain = quantize_model(load_model()[0], "zero_point", bits=bits, group_size=64, progress=False)
    model, residuals = add_loftq(load_model()[0], bits=bits, group_size=64, r=r, iterations=2, progress=False)
    before, after = compare(plain, reference), compare(model, reference)
    assert after.kl_divergence < 0.95 * before.kl_divergence
    assert len(residuals) == 56 and all(min(norms[1:]) < norms[0] for norms in residuals.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model, residuals = add_loftq(model, "absmax", bits=3, group_size=16, r=2, iterations=2, progress=False)
    assert list(residuals) == list(lora_layers(model)) and all(p.requires_grad == ("A" in n[-1] or "B" in n[-1])
                                                               for n, p in model.named_parameters())  # fmt: skip
    assert {type(layer.base) for layer in lora_layers(model).values()} == {QuantLinear}
    model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()


def test_the_base_can_be_saved_once_the_adapters_are_off(tmp_path):
    model, tokenizer = load_model()
    remove_lora(add_loftq(model, r=2, iterations=1, progress=False)[0]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, ids = load_model(tmp_path, progress=False)[0], torch.arange(16)[None]
    assert len(quantized_layers(again)) == 56 and torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq"}, "'gptq' learns from inputs"),
        ({"method": "nothing"}, "'nothing' is unknown"),
        ({"iterations": 0}, "iterations=0 quantizes nothing"),
        ({"r": 40}, r"layer model.layers.0.self_attn.q_proj \(32 x 32\): r=40 is no rank"),
        ({"r": 0}, "r=0 is no rank"),
        ({"group_size": 7}, "layer model.layers.0.self_attn.q_proj .*7"),
        ({"skip": ("*proj",)}, "no float linear layer"),
        ({"skip": ("nope",)}, "skip='nope' fits no layer"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, message):
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match=message):
        add_loftq(model, **{"group_size": 16, "r": 2, "progress": False, **arguments})
    assert not quantized_layers(model) and all(p.requires_grad for p in model.parameters())


def test_weights_that_are_no_numbers():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0 \(8 x 8\): 1 of 64 weights are not finite"):
        add_loftq(model, group_size=8, r=1, progress=False)


def test_not_onto_adapters():
    with pytest.raises(ValueError, match="has adapters already"):
        add_loftq(add_lora(FAMILIES["llama"]()), progress=False)
