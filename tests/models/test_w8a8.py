"""W8A8 of whole models: every family, both kinds of activations, and what it costs the bundled one."""

import warnings

import pytest
import torch
from torch import nn

import qlearn
from qlearn import evaluate
from qlearn.methods import absmax
from qlearn.methods.observers import make_observer
from qlearn.models.calibration import calibration_ids
from qlearn.models.int8 import Int8Linear
from qlearn.models.outliers import add_outlier
from qlearn.models.recording import forward, watching
from qlearn.models.w8a8 import quantize_w8a8

IDS = torch.arange(96).view(4, 24)


def w8a8(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_w8a8(model, *args, calibration=IDS, progress=False, **options)


def linear_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def largest_inputs(model, names):
    """What plain hooks say: dict name -> largest magnitude that the layer reads in any window."""
    largest = dict.fromkeys(names, 0.0)

    def see(name, x):
        largest[name] = max(largest[name], x.abs().max().item())

    with watching({name: model.get_submodule(name) for name in names}, see):
        forward(model, IDS)
    return largest


class TestModel:
    @pytest.mark.parametrize("activations", ["dynamic", "static"])
    def test_every_layer_of_every_family_multiplies_integers(self, make_model, family, activations):
        """Each layer's output is compared with one computed in float64 from the very input that it was given."""
        model, weights = make_model(family), {}
        names = linear_names(model)
        for name in names:
            layer = model.get_submodule(name)
            weights[name] = absmax(layer.weight, bits=8).dequantize().double(), layer.bias
        assert w8a8(model, activations) is model
        assert [n for n, m in model.named_modules() if isinstance(m, Int8Linear)] == names
        seen = {}

        def check(layer, args, output):
            (x,), (weight, bias) = args, weights[seen[layer]]
            x = x.double()
            scale = (x.float().abs().amax(-1, keepdim=True) / 127) if activations == "dynamic" else layer.input_scale
            scale = scale + (scale == 0)  # a row of zeros, such as the embedding of the padding token, has scale 1
            rounded = (x.float() / scale).round().clamp(-127, 127).double() * scale
            expected = rounded @ weight.T + (0 if bias is None else bias.double())
            torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)

        for name in names:
            layer = model.get_submodule(name)
            seen[layer] = name
            layer.register_forward_hook(check)
        forward(model, IDS)

    def test_static_scales_are_those_of_the_float_model(self, make_model, family):
        model = make_model(family)
        largest = largest_inputs(model, linear_names(model))
        w8a8(model, "static")
        for name, value in largest.items():
            assert model.get_submodule(name).input_scale.item() == pytest.approx(value / 127, rel=1e-6)

    @pytest.mark.parametrize("observer, options", [("percentile", {"percentile": 90.0}), ("mse", {}), ("entropy", {})])
    def test_the_observer_chooses_the_scale(self, model, observer, options):
        name, expected = "model.layers.0.mlp.down_proj", make_observer(observer, **options)
        with watching({name: model.get_submodule(name)}, lambda _, x: expected.observe(x)):
            forward(model, IDS)
        w8a8(model, "static", observer, **options)
        assert model.get_submodule(name).input_scale.item() == pytest.approx(expected.scale(), rel=1e-6)

    def test_bits_per_weight_count_the_scales(self, model):
        names = linear_names(model)
        sizes = [model.get_submodule(name).weight.shape for name in names]
        w8a8(model)
        stored = sum(rows * columns * 8 + rows * 16 for rows, columns in sizes)
        assert evaluate.bits_per_weight(model) == stored / sum(rows * columns for rows, columns in sizes)

    def test_skip(self, model):
        w8a8(model, skip=("lm_head", "down_proj"))
        assert all(type(block.mlp.down_proj) is nn.Linear for block in model.model.layers)
        assert all(isinstance(block.mlp.up_proj, Int8Linear) for block in model.model.layers)

    def test_an_untied_head_that_is_not_skipped(self, make_model):
        model = w8a8(make_model("qwen3"), "static", skip=())
        assert isinstance(model.lm_head, Int8Linear) and model.lm_head.input_scale > 0

    def test_experts_that_stay_in_floats_are_named(self, make_model):
        with pytest.warns(UserWarning, match=r"experts stay in floating point.*model\.layers\.\*\.mlp\.experts"):
            quantize_w8a8(make_model("deepseek v3"), progress=False)

    def test_a_layer_that_nothing_reaches(self, model):
        model.model.layers[0].spare = nn.Linear(32, 32)
        with pytest.raises(ValueError, match=r"layer model\.layers\.0\.spare was given nothing"):
            w8a8(model, "static")
        assert not any(isinstance(m, Int8Linear) for m in model.modules())
        assert isinstance(w8a8(model, "dynamic").model.layers[0].spare, Int8Linear)

    def test_a_broken_weight_is_named_and_nothing_is_replaced(self, model):
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
        with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.down_proj \(32 x 64\): 1 of 2048 weights"):
            w8a8(model)
        assert not any(isinstance(m, Int8Linear) for m in model.modules())

    def test_nan_in_calibration_is_traced_to_a_layer(self, model):
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
        with pytest.raises(ValueError, match=r"the inputs of layer model\.layers\.1\.self_attn\.q_proj: 96 of 3072"):
            w8a8(model, "static")

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"activations": "fixed"}, "activations='fixed' is unknown; choose from dynamic, static"),
            ({"activations": "static", "observer": "max"}, "observer 'max' is unknown"),
            ({"activations": "static", "observer": "percentile", "percentile": 0}, "percentile=0"),
            ({"smooth": 1.5}, "alpha=1.5 is out of range"),
            ({"skip": "nothing_like_it"}, "skip='nothing_like_it' fits no layer"),
            ({"skip": "*"}, "no linear layer to quantize"),
        ],
    )
    def test_wrong_arguments_are_named(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            w8a8(model, **options)
        assert not any(isinstance(m, Int8Linear) for m in model.modules())


class TestOnTheBundledModel:
    """What the lesson shows: dynamic is nearly free, an outlier ruins static activations, and smoothing mends them."""

    @pytest.fixture(scope="class")
    @staticmethod
    def divergence():
        model, tokenizer = qlearn.load_model()
        reference = evaluate.Reference(model, tokenizer, tokens=512)
        ids = calibration_ids(tokenizer, tokens=512, window=256)

        def measure(outlier=False, **options):
            model, _ = qlearn.load_model()
            for i in range(8 if outlier else 0):
                add_outlier(model, f"model.layers.{i}.self_attn.q_proj", channel=7, factor=64)
            quantize_w8a8(model, calibration=ids, progress=False, **options)
            return evaluate.kl_divergence(model, reference)

        return measure

    def test_dynamic_is_nearly_free(self, divergence):
        assert divergence() < 0.01

    def test_an_outlier_ruins_static_activations_and_smoothing_mends_them(self, divergence):
        plain = divergence(activations="static")
        assert divergence(True, activations="static") > 4 * plain
        assert divergence(True, activations="static", smooth=0.5) < plain
