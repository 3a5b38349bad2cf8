"""quantize_model with methods that learn from inputs: each layer is shown what it will really be given."""

import copy
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import qlearn
from qlearn.methods import METHODS, absmax, quantize, zero_point
from qlearn.methods.awq import awq
from qlearn.methods.gptq import gptq
from qlearn.methods.statistics import InputStatistics
from qlearn.models import QuantLinear, quantize_model
from qlearn.models.experts import is_transposed
from qlearn.models.recording import watching
from tests.models.conftest import FAMILIES
from tests.models.mixtures import MIXTURES, make_mixture

IDS = torch.randint(0, 128, (9, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "gptq", gptq)
    monkeypatch.setitem(METHODS, "awq", awq)


@pytest.fixture
def spy(monkeypatch):
    """A calibrated method that rounds to nearest and remembers what it was given: a list of (weight, inputs)."""
    seen = []

    def method(weight, bits, group_size, *, inputs, sym=False):
        if isinstance(inputs, InputStatistics):  # and not a trial of the arguments
            seen.append((weight.clone(), inputs))
        return (absmax if sym else zero_point)(weight, bits, group_size)

    monkeypatch.setitem(METHODS, "spy", method)
    monkeypatch.setattr("qlearn.methods.CALIBRATED", frozenset({"spy", "gptq", "awq"}))
    return seen


def run(model, method="spy", **options):
    return quantize_model(
        model, method, **{"bits": 4, "group_size": 16, "progress": False, "calibration": IDS, **options}
    )


def names_of(original, seen):
    """The names of the layers whose weights a method was given, in its order."""
    found = []
    for weight, _ in seen:
        for name, parameter in original.named_parameters():
            if parameter.shape == weight.shape and torch.equal(parameter, weight):
                found.append(name.removesuffix(".weight"))
    return found


@torch.no_grad()
def statistics_of(model, layers, batch=8):
    """The statistics of some layers' inputs, from runs of the whole model."""
    found = {name: InputStatistics(layer.in_features) for name, layer in layers.items()}
    with watching(layers, lambda name, x: found[name].add(x)):
        for ids in IDS.split(batch):
            model(input_ids=ids)
    return found


def test_each_layer_is_shown_what_the_quantized_model_gives_it(make_model, family, spy):
    """Statistics taken while quantizing are those of the finished model: all before a layer was quantized by then."""
    model = make_model(family)
    original = copy.deepcopy(model)
    run(model)
    given = {name: inputs for name, (_, inputs) in zip(names_of(original, spy), spy, strict=False)}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and ".experts." not in n}
    assert layers.keys() <= given.keys()
    for name, finished in statistics_of(model, layers).items():
        assert given[name].count == finished.count == IDS.numel()
        torch.testing.assert_close(given[name].hessian, finished.hessian, rtol=1e-6, atol=1e-6)
    first = "model.layers.0.self_attn." + ("o_proj" if family != "deepseek v3" else "q_b_proj")
    before = statistics_of(original, {first: original.get_submodule(first)})[first]
    assert not torch.allclose(given[first].hessian, before.hessian, rtol=1e-6, atol=1e-6)  # that could have failed


def test_layers_that_read_the_same_are_done_together(make_model, spy):
    model = make_model("qwen3")
    original = copy.deepcopy(model)
    run(model)
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    order += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names_of(original, spy) == [f"model.layers.{i}.{name}" for i in (0, 1) for name in order]
    q, k, v, o, gate, up, down = [inputs for _, inputs in spy[:7]]
    assert q is k is v is not o and gate is up is not down


@pytest.mark.filterwarnings("ignore:.*matrices with .* neither linear layers nor experts")  # biases, in one so tiny
@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_is_shown_its_tokens(family, spy):
    model = make_mixture(family)
    float_experts = {n: (m, p) for n, m in model.named_modules() for p, t in m.named_parameters() if t.dim() == 3}
    columns = {name: 32 if "gate_up" in name else 16 for name, p in model.named_parameters() if p.dim() == 3}
    matrices = {}
    for name, width in columns.items():
        module, _ = float_experts[name.rpartition(".")[0]]
        for number, matrix in enumerate(model.get_parameter(name)):
            matrices[f"{name}.{number}"] = (matrix.mT if is_transposed(module) else matrix).clone(), width
    run(model)
    counts = {}
    for name, (matrix, width) in matrices.items():
        (inputs,) = [inputs for weight, inputs in spy if torch.equal(weight, matrix)]
        assert inputs.in_features == width
        stack = counts.setdefault(name.rpartition(".")[0], [])
        stack.append(inputs.count)
    for stack in counts.values():
        assert sum(stack) == IDS.numel() * (1 if family == "llama 4" else 2)


def without_two_experts():
    """A mixture that never sends a token to experts 2 and 3, the second of its two groups."""
    model = make_mixture("deepseek v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1e9
    return model


@pytest.mark.parametrize("sym, grid", [(False, "zero_point"), (True, "absmax")])
def test_experts_without_a_token(spy, sym, grid):
    model = without_two_experts()
    original = copy.deepcopy(model.model.layers[1].mlp.experts)
    message = (
        f"4 matrices were given no token of the calibration text, so they were quantized with {grid}, clip='mse', "
        "instead of spy: model.layers.*.mlp.experts.down_proj.*, model.layers.*.mlp.experts.gate_up_proj.*; calibrate"
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        run(model, sym=sym)
    experts = model.model.layers[1].mlp.experts
    for number in range(4):
        clip = "mse" if number > 1 else "minmax"
        expected = quantize(original.down_proj[number], grid, 4, 16, clip=clip).dequantize()
        assert torch.equal(experts.down_proj[number], expected)


class LoopMixture(nn.Module):
    """A mixture in which each expert is a module with linear layers of its own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 16), "down": nn.Linear(16, 32)}) for _ in "abc")

    def forward(self, x):
        flat = x.view(-1, 32)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = flat.argmax(-1) % 4 == number  # a fourth of the tokens goes to no expert
            out[mine] += expert["down"](expert["up"](flat[mine]))
        return out.view_as(x)


def test_experts_that_are_modules(make_model, spy):
    model = make_model()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = LoopMixture().requires_grad_(False)
    original = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    order = [name.removeprefix("model.layers.0.mlp.experts.") for name in names_of(original, spy)[4:10]]
    assert order == ["0.up", "1.up", "2.up", "0.down", "1.down", "2.down"]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and ".experts." in n}
    given = {name: inputs for name, (_, inputs) in zip(names_of(original, spy), spy, strict=True)}
    for name, finished in statistics_of(model, layers).items():
        assert 0 < given[name].count == finished.count < IDS.numel()
        torch.testing.assert_close(given[name].hessian, finished.hessian, rtol=1e-6, atol=1e-6)


def test_layers_outside_of_the_blocks(make_model, spy):
    model = make_model("qwen3")
    original = copy.deepcopy(model)
    run(model, skip=())
    assert names_of(original, spy)[-1] == "lm_head"
    finished = statistics_of(model, {"lm_head": model.lm_head})["lm_head"]
    assert spy[-1][1].count == finished.count == IDS.numel()
    torch.testing.assert_close(spy[-1][1].hessian, finished.hessian, rtol=1e-5, atol=1e-6)


def test_a_model_without_blocks(make_model, spy):
    model = make_model("qwen3")
    model.model.layers = model.model.layers[:0]
    run(model, skip=())
    assert isinstance(model.lm_head, QuantLinear) and len(spy) == 1


def test_float_weights_are_let_go_one_by_one(make_model, family, monkeypatch):
    """When a layer is quantized, the matrices of all layers before it are gone."""
    weights, alive = [], []

    def counting(weight, bits, group_size, *, inputs=None):
        if inputs is None or isinstance(inputs, InputStatistics):
            alive.append(sum(ref() is not None for ref in weights))
        return zero_point(weight, bits, group_size)

    for name, calibrated in (("plain", frozenset()), ("calibrated", frozenset({"calibrated"}))):
        monkeypatch.setitem(METHODS, name, counting)
        monkeypatch.setattr("qlearn.methods.CALIBRATED", calibrated)
        model = make_model(family)
        weights[:] = [weakref.ref(p) for n, p in model.named_parameters() if "proj" in n and p.dim() > 1]
        total = len(weights)
        experts = 2 * 4 - 2 if family == "deepseek v3" else 0  # the four of a parameter go together
        run(model, name)
        assert not any(ref() is not None for ref in weights)
        done = alive[-(total + experts) :]
        expected = list(range(total, 0, -1))
        if experts:
            expected[-2:] = [2] * 4 + [1] * 4
        assert sorted(done, reverse=True) == expected
        alive.clear()


@pytest.mark.parametrize(
    "family, method", [*((family, "gptq") for family in FAMILIES), ("llama", "awq"), ("deepseek v3", "awq")]
)
def test_the_real_methods(make_model, family, method):
    """The logits are nearer to the float model's than with rounding to nearest."""
    float_model = make_model(family)
    for name, parameter in float_model.named_parameters():
        if "proj" in name:
            parameter.mul_(10)  # what a layer does must matter
    reference = float_model(input_ids=IDS).logits

    def error(method, **options):
        model = run(copy.deepcopy(float_model), method, bits=3, **options)
        assert not any(type(m) is nn.Linear for n, m in model.named_modules() if n != "lm_head")
        return (model(input_ids=IDS).logits - reference).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(method) < error("zero_point")


def test_text_for_calibration(spy):
    counts = []
    for calibration in ("import os\n" * 60, ["import os\n" * 30] * 2):
        model, _ = qlearn.load_model()
        model.model.layers = model.model.layers[:1]
        quantize_model(model, "spy", progress=False, calibration=calibration)
        counts.append(spy[-1][1].count)
    assert counts == [180, 180]
    model.name_or_path = ""
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_model(model, "spy", progress=False)


def test_other_methods_ignore_calibration(model):
    quantize_model(model, "absmax", group_size=16, progress=False, calibration="", tokenizer="none")


def break_weight(model):
    model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    "arguments, prepare, message",
    [
        ({"bits": 9}, None, r"^layer model\.layers\.0\.self_attn\.q_proj \(32 x 32\): bits=9 "),
        ({"group_size": 48}, None, r"q_proj \(32 x 32\): group_size=48 does not divide the 32 columns"),
        ({}, break_weight, r"layer model\.layers\.1\.mlp\.down_proj \(32 x 64\): .* nan at row 3, column 5"),
        ({"calibration": IDS + 100}, None, "calibration ids go from 100 to"),
        ({"calibration": "text"}, None, "calibration text needs a tokenizer, and none lies at ''"),
        ({}, nn.Module.train, "training mode.*; the model is unchanged"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(model, method, arguments, prepare, message):
    if prepare:
        prepare(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        run(model, method, **arguments)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("error, kind", [(ValueError("no"), ValueError), (MemoryError("no"), RuntimeError)])
@pytest.mark.parametrize("calls, fate", [(0, "is unchanged"), (9, "is partly quantized by now, so load it again")])
def test_a_failure_on_the_way_says_what_has_become_of_the_model(model, monkeypatch, error, kind, calls, fate):
    count = 0

    def failing(weight, bits, group_size, *, inputs):
        nonlocal count
        if isinstance(inputs, InputStatistics):
            count += 1
            if count > calls:
                raise error
        return zero_point(weight, bits, group_size)

    monkeypatch.setitem(METHODS, "failing", failing)
    monkeypatch.setattr("qlearn.methods.CALIBRATED", frozenset({"failing"}))
    where = r"0\.self_attn\.q_proj \(32 x 32\)" if not calls else r"1\.self_attn\.v_proj \(16 x 32\)"
    with pytest.raises(kind, match=rf"^layer model\.layers\.{where}: no; the model {fate}$") as caught:
        run(model, "failing")
    assert caught.value.__cause__ is error
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == calls


def test_inputs_that_overflow_are_reported_with_their_layer(model):
    model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"^the inputs of model\.layers\.1\.self_attn\.q_proj: .* partly quantized"):
        run(model, "gptq")


def test_the_progress_bar_counts_layers(spy, capsys):
    run(make_mixture("deepseek v3"), progress=True)
    lines = [line for line in capsys.readouterr().err.split("\r") if "100%" in line]
    assert (
        lines[-1].startswith("spy, 4 bits: 100%") and "/18" in lines[-1]
    )  # 8 + 8 linear layers and two parameters of experts
