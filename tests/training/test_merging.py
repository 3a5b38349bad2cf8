"""Merging: the right sum computes what the adapters did, within what rounding allows, and the wrong ones do not."""

import copy
import math

import pytest
import torch
from torch import nn

from qlearn import load_model, quantize, quantize_model
from qlearn.models import QuantLinear
from qlearn.models.quantize import linear_layers
from qlearn.training.loftq import add_loftq
from qlearn.training.lora import LoraLinear, add_lora, lora_layers
from qlearn.training.merging import arrived, measure, merge, merge_onto, trained_on
from tests.models.conftest import FAMILIES

IDS = torch.arange(64).view(4, 16)
METHODS = {"float": None, "4 bit": ("zero_point", 4), "2 bit": ("absmax", 2), "trits": ("ternary", 1.6)}
UNIT = 2.0**-24  # half of the distance from 1 to the next float32


def make(family="llama"):
    """A random model whose weights are large enough that it has opinions."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for layer in linear_layers(model).values():
        layer.weight *= 8
    return model


def adapted(family="llama", method=("zero_point", 4)):
    model = make(family)
    if method is not None:
        quantize_model(model, method[0], bits=method[1], group_size=16, progress=False)
    add_lora(model, r=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.02)
    return model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_merged_layer_is_within_the_bound_of_float32(method, bias):
    """Sums of k terms err by at most k u / (1 - k u) times the sum of magnitudes, u = 2**-24, in any order (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). The adapter's path sums in + r terms, and W x another
    in; the merged matrix sums r + 1 terms, and its product in. Scale, bias and final sums add less than ten."""
    torch.manual_seed(0)
    n, r = 96, 8
    base = nn.Linear(n, 64, bias=bias)
    if method is not None:
        base = QuantLinear(quantize(base.weight, *method, group_size=16), base.bias)
    layer = LoraLinear(base, r=r, alpha=12)
    nn.init.normal_(layer.B, std=0.3)
    x = torch.randn(200, n)
    merged = merge(nn.Sequential(copy.deepcopy(layer)))
    assert type(merged[0]) is nn.Linear and merged[0].weight.dtype == torch.float32
    error = (merged(x) - layer(x)).double().abs()
    W, A, B = (t.detach().double().abs() for t in (trained_on(layer), layer.A, layer.B))
    magnitudes = x.double().abs() @ (W + layer.scale * B @ A).T
    if bias:
        magnitudes += layer.base.bias.double().abs()
    k = 3 * n + 2 * r + 10
    assert (error <= k * UNIT / (1 - k * UNIT) * magnitudes).all()
    assert (layer(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_merged_model_is_the_model_with_adapters(family, method):
    """In float64, where 1e-16 for each of some thousand operations, amplified by a few layers, stays below 1e-9."""
    model = adapted(family, method).double()
    if family == "deepseek v3":
        model.set_experts_implementation("eager")  # torch has no grouped product of experts in float64
    expected = model(IDS).logits
    merged = merge(copy.deepcopy(model), torch.float64)
    assert not lora_layers(merged)
    assert not any(isinstance(m, QuantLinear) and ".experts." not in n for n, m in merged.named_modules())
    assert (merged(IDS).logits - expected).abs().max() < 1e-9
    assert not any(p.requires_grad for p in merged.parameters())
    assert torch.equal(model(IDS).logits, expected)


def test_merged_onto_its_own_weights_is_right():
    model = adapted(method=None)
    other = merge_onto(make(), model)
    assert torch.equal(other(IDS).logits, merge(model)(IDS).logits)


@pytest.mark.parametrize("family", ["llama with bias", "gemma3"])
def test_merged_onto_others_is_wrong(family):
    model = adapted(family, ("zero_point", 2))
    expected = model(IDS).logits
    wrong = merge_onto(make(family), model)
    for name, layer in lora_layers(model).items():
        W = make(family).get_submodule(name)
        assert torch.equal(wrong.get_submodule(name).weight, W.weight + layer.change())
        assert W.bias is None or torch.equal(wrong.get_submodule(name).bias, W.bias)
    right_error = (merge(model)(IDS).logits - expected).abs().max()
    assert (wrong(IDS).logits - expected).abs().max() > 1000 * right_error


@pytest.mark.parametrize(
    ("make_original", "name"),
    [(lambda: nn.Linear(2, 2), "no such layer"), (lambda: adapted(), "no float layer")],
    ids=["another model", "a quantized one"],
)
def test_an_original_that_does_not_fit(make_original, name):
    with pytest.raises(ValueError, match=r"the original has no nn\.Linear\(32, 32\) called model\.layers\.0"):
        merge_onto(make_original(), adapted())


def test_types():
    bfloat16 = merge(add_lora(make().bfloat16()))
    assert {p.dtype for p in bfloat16.parameters()} == {torch.bfloat16}
    asked = merge(adapted(), torch.bfloat16)
    assert {layer.weight.dtype for layer in linear_layers(asked).values()} == {torch.bfloat16}


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    model, tokenizer = load_model()
    quantize_model(model, bits=4, progress=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for number, base in enumerate((model, load_model(tmp_path / "base", progress=False)[0])):
        merged = merge(add_lora(base, r=2))
        merged.save_pretrained(tmp_path / f"merged {number}")
        tokenizer.save_pretrained(tmp_path / f"merged {number}")
        again, _ = load_model(tmp_path / f"merged {number}", progress=False)
        assert not hasattr(again.config, "quantization_config")
        assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_layers_without_an_adapter_stay_quantized_and_can_be_saved(tmp_path):
    model, tokenizer = load_model()
    merge(add_lora(quantize_model(model, bits=4, progress=False), target="down_proj"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, progress=False)[0](IDS).logits, model(IDS).logits)


def test_a_merged_model_can_be_quantized_again():
    model = merge(adapted(method=("zero_point", 4)))
    assert quantize_model(model, "zero_point", bits=4, group_size=16, progress=False)(IDS).logits.isfinite().all()


def batches():
    labels = IDS.clone()
    labels[:, :5] = -100
    return [(IDS[:2], labels[:2]), (IDS[2:], labels[2:])]


def test_the_report():
    """2 bits and LoftQ: the adapters hold a part of the weights, so on the originals that part is there twice."""
    original = make()
    model, _ = add_loftq(make(), bits=2, group_size=16, r=8, progress=False)
    before = model(IDS).logits.clone(), original(IDS).logits.clone()
    rows = {row.name: row for row in measure(model, original, batches(), "zero_point", bits=2, group_size=16)}
    assert list(rows) == ["adapters", "Q + BA", "W + BA", "quantize(Q + BA)", "quantize(W + BA)"]
    assert rows["adapters"].logit_error == rows["adapters"].kl_divergence == rows["adapters"].flip_rate == 0
    assert rows["Q + BA"].logit_error < 1e-5 and rows["Q + BA"].flip_rate == 0
    assert rows["Q + BA"].loss == pytest.approx(rows["adapters"].loss, rel=1e-5)
    for name in ("W + BA", "quantize(Q + BA)", "quantize(W + BA)"):
        assert rows[name].logit_error > 1000 * rows["Q + BA"].logit_error and rows[name].flip_rate > 0
    assert rows["quantize(Q + BA)"].nbytes < rows["adapters"].nbytes < rows["Q + BA"].nbytes == rows["W + BA"].nbytes
    assert torch.equal(model(IDS).logits, before[0]) and torch.equal(original(IDS).logits, before[1])


def test_the_report_counts_labels_alone():
    """By hand: the loss is the mean over the positions in front of a label, and the error their root mean square."""
    model, original = adapted(method=("zero_point", 2)), make()
    rows = {row.name: row for row in measure(model, original, batches())}
    assert list(rows) == ["adapters", "Q + BA", "W + BA"]
    found, expected = (m(IDS).logits[:, 4:-1] for m in (merge_onto(make(), model), model))
    assert rows["W + BA"].logit_error == pytest.approx((found - expected).square().mean().sqrt().item(), rel=1e-5)
    by_hand = nn.functional.cross_entropy(found.flatten(0, 1), IDS[:, 5:].flatten()).item()
    assert rows["W + BA"].loss == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("skipped", [(), ("lm_head", "*down_proj")], ids=["all layers", "one kind has none"])
def test_how_much_of_the_change_arrives(skipped):
    """All of it in the right sum, and the sum of the errors' share in the wrong one, by hand, layer by layer."""
    model, original = make(), make()
    quantize_model(model, "absmax", bits=2, group_size=16, progress=False)
    add_lora(model, r=4, skip=skipped or ("lm_head",))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.02)
    rows = {row.name: row.arrived for row in measure(model, original, batches(), "absmax", bits=2, group_size=16)}
    assert rows["adapters"] == pytest.approx(1, abs=1e-12) and rows["Q + BA"] == pytest.approx(1, abs=1e-5)
    layers = {
        name: (trained_on(layer), layer.change(), original.get_submodule(name).weight)
        for name, layer in lora_layers(model).items()
    }
    size = sum(D.square().sum() for Q, D, W in layers.values())
    expected = 1 + sum(((W - Q) * D).sum() for Q, D, W in layers.values()) / size
    assert rows["W + BA"] == pytest.approx(expected.item(), rel=1e-4)
    for name, sums in (("Q", [Q + D for Q, D, W in layers.values()]), ("W", [W + D for Q, D, W in layers.values()])):
        again = [quantize(total, "absmax", bits=2, group_size=16).dequantize() for total in sums]
        of = zip(again, layers.values(), strict=True)
        expected = sum(((R - Q) * D).sum() for R, (Q, D, W) in of) / size
        assert rows[f"quantize({name} + BA)"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_small_change_on_the_grid_is_lost_and_one_beside_it_arrives_on_average():
    """Rounding to whole numbers, a change of 0.1: on the grid nothing moves; of ten even places one passes an edge."""
    layer = LoraLinear(nn.Linear(11, 1, bias=False), r=1, alpha=1)
    W = torch.cat([torch.arange(10) / 10 + 0.05, torch.tensor([7.0])])  # absmax, 4 bits: the scale is 7 / 7
    Q = W.round()
    layer.base.weight.data, layer.A.data = Q[None].clone(), torch.full((1, 11), 0.1)
    layer.A.data[0, -1] = 0
    layer.B.data.fill_(1.0)
    model = nn.Sequential(layer)
    found = {}
    for name, start in (("Q", Q), ("W", W)):
        rounded = quantize(start[None] + layer.change(), "absmax", bits=4, scale_dtype=torch.float32)
        found[name] = arrived(nn.Sequential(QuantLinear(rounded)), model)
    assert found == {"Q": 0.0, "W": pytest.approx(1, rel=1e-6)}


def test_of_no_change_no_share_arrives():
    model = add_lora(make(), r=2)
    assert math.isnan(arrived(make(), model))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to merge"):
        arrived(make(), make())


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to merge"):
        merge(make())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to merge"):
        merge_onto(make(), make())
