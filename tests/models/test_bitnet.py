"""Packed BitNet: the logits of the training bit for bit, the bytes, the way to a file and back."""

import copy

import pytest
import torch
from torch import nn

from qlearn import load_model
from qlearn.methods import absmax, binary, ternary
from qlearn.models.bitlinear import WORTH_THREADS, PackedBitLinear
from qlearn.models.bitnet import pack_bitnet
from qlearn.models.layers import linear_layers
from qlearn.training.bitlinear import BitLinear, to_bitlinear
from qlearn.training.bitnet import make_model
from tests.models.conftest import FAMILIES

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}


@pytest.fixture(params=["b158", "b1"])
def kind(request):
    return request.param


def packed(layer, bits=1.6):
    """The packed layer of a BitLinear."""
    quantized = (
        binary(layer.weight, scale_dtype=torch.float32)
        if layer.kind == "b1"
        else ternary(layer.weight, bits, scale_dtype=torch.float32)
    )
    return PackedBitLinear(quantized, layer.bias)


class TestLayer:
    @pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (96, 40), (768, 256), (1001, 7)])
    @pytest.mark.parametrize("bits", [1.6, 2])
    @pytest.mark.parametrize("bias", [False, True])
    def test_it_computes_what_the_training_did(self, kind, sizes, bits, bias):
        torch.manual_seed(0)
        layer = BitLinear(*sizes, bias=bias, kind=kind)
        x = torch.randn(2, 19, sizes[0]) ** 3
        x[0, 0], x[0, 1], x[0, 2] = 0, 1e-30, 1e30
        y = packed(layer, bits)(x)
        assert torch.equal(y, layer(x)) and y.shape == (2, 19, sizes[1])

    def test_float32_sums_are_exact_up_to_the_bound(self):
        """2**24 / 128 inputs, all as large as can be: the last length at which BitLinear is exact for certain."""
        layer = BitLinear(2**24 // 128, 1)
        layer.weight.data.fill_(1.0)
        x = torch.ones(1, 2**24 // 128)
        x[0, :1000] = torch.rand(1000)
        assert torch.equal(packed(layer)(x), layer(x))

    def test_bfloat16(self, kind):
        """BitLinear rounds the sum and the output, by 2**-8 of them at most, the packed layer only the output."""
        torch.manual_seed(0)
        layer = BitLinear(96, 40, kind=kind).to(torch.bfloat16)
        x = torch.randn(7, 96, dtype=torch.bfloat16)
        ours, theirs = packed(layer)(x), layer(x)
        assert ours.dtype == torch.bfloat16
        assert ((ours.float() - theirs.float()).abs() <= 3.05 * 2**-8 * ours.float().abs()).all()

    def test_any_number_of_dimensions(self):
        layer = packed(BitLinear(8, 4))
        for shape in [(8,), (3, 8), (0, 8), (2, 3, 5, 8)]:
            assert layer(torch.randn(shape)).shape == (*shape[:-1], 4)

    def test_large_work_is_shared_by_threads(self):
        layer = BitLinear(256, 1024)
        x = torch.randn(WORTH_THREADS // (256 * 1024), 256)
        assert torch.equal(packed(layer)(x), layer(x))

    def test_other_weights_are_seen(self):
        one, other = BitLinear(40, 8), BitLinear(40, 8)
        x = torch.randn(3, 40)
        layer = packed(one)
        assert torch.equal(layer(x), one(x))
        layer.load_state_dict(packed(other).state_dict())
        assert torch.equal(layer(x), other(x))
        layer.packed, layer.scales = (getattr(packed(one), name) for name in ("packed", "scales"))
        assert torch.equal(layer(x), one(x))
        layer.packed.data, layer.scales.data = packed(other).packed, packed(other).scales
        assert torch.equal(layer(x), other(x))

    def test_the_integer_units_give_the_same(self, kind):
        layer, x = packed(BitLinear(96, 40, kind=kind)), torch.randn(5, 96)
        assert torch.equal(layer._on_cpu(x), layer._with_int8(x))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_no_number_is_not_hidden(self, bad):
        layer = packed(BitLinear(8, 4))
        x = torch.randn(2, 8)
        x[0, 3] = bad
        y = layer(x)
        assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1]).all()

    def test_the_scale_survives_a_change_of_type(self):
        layer = packed(BitLinear(8, 4))
        before = layer.scales.clone()
        assert torch.equal(layer.to(torch.bfloat16).scales, before)

    @pytest.mark.parametrize(
        "quantized",
        [
            lambda w: absmax(w, bits=4),
            lambda w: ternary(w, group_size=4),
            lambda w: binary(w, group_size=8),
            lambda w: absmax(w, bits=2),
        ],
        ids=["int4", "groups of trits", "rows of signs", "a scale for each row"],
    )
    def test_what_is_refused(self, quantized):
        with pytest.raises(ValueError, match="is not ternary or binary with one scale"):
            PackedBitLinear(quantized(torch.randn(4, 8)))


def test_a_twos_complement_that_is_no_trit_is_refused():
    layer = PackedBitLinear(absmax(torch.tensor([[1.0, -1.0, 0.0, 1.0]]), bits=2, per="tensor"))
    assert layer(torch.ones(1, 4)).shape == (1, 1)
    layer.packed.fill_(0b10101010)  # -2, which absmax and ternary leave unused
    with pytest.raises(ValueError, match="is no matrix of -1, 0, 1"):
        layer(torch.ones(1, 4))


class TestModel:
    def test_the_logits_stay(self, kind):
        torch.manual_seed(0)
        model = make_model(kind, **TINY).eval()
        ids = torch.randint(128, (2, 20))
        with torch.no_grad():
            expected = model(ids).logits
            assert torch.equal(pack_bitnet(model)(ids).logits, expected)
        assert not [m for m in model.modules() if isinstance(m, BitLinear)]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_any_model_that_was_trained_so(self, family, kind):
        torch.manual_seed(0)
        model = to_bitlinear(FAMILIES[family]().eval(), kind)
        plain = copy.deepcopy(model)
        ids = torch.randint(128, (1, 9))
        with torch.no_grad():
            assert torch.equal(pack_bitnet(model)(ids).logits, plain(ids).logits)

    def test_plain_layers_are_packed_when_the_kind_is_given(self, kind):
        torch.manual_seed(0)
        plain = make_model("bf16", **TINY).eval()
        trained = to_bitlinear(copy.deepcopy(plain), kind)
        ids = torch.arange(9)[None]
        with torch.no_grad():
            assert torch.equal(pack_bitnet(plain, kind)(ids).logits, trained(ids).logits)

    def test_weights_that_are_ternary_already_are_packed_as_they_are(self):
        torch.manual_seed(0)
        packed = pack_bitnet(make_model("b158", **TINY))
        plain = make_model("bf16", **TINY).eval()
        layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedBitLinear)}
        plain.load_state_dict(dict(packed.named_parameters()), strict=False)
        for name, layer in layers.items():
            plain.get_submodule(name).weight.data = layer.quantized.dequantize()
        again = pack_bitnet(plain, "b158", scale="absmax")
        ids = torch.arange(9)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, packed(ids).logits)

    def test_the_bytes_of_the_bundled_size(self):
        model = pack_bitnet(make_model("b158"))
        layers = [m for m in model.modules() if isinstance(m, PackedBitLinear)]
        assert len(layers) == 56
        assert sum(layer.quantized.nbytes for layer in layers) <= 6_291_456 / 5 + 56 * 5
        assert type(model.lm_head) is nn.Linear

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_comes_back_from_a_folder_bit_for_bit(self, kind, dtype, tmp_path):
        torch.manual_seed(0)
        model = pack_bitnet(make_model(kind, **TINY).to(dtype))
        model.save_pretrained(tmp_path)
        load_model()[1].save_pretrained(tmp_path)
        again, _ = load_model(tmp_path, dtype=dtype, progress=False)
        assert type(again.model.layers[1].mlp.down_proj) is PackedBitLinear
        assert again.config.quantization_config.method == ("ternary" if kind == "b158" else "binary")
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "b2"}, "kind='b2' is unknown; choose from b158, b1"),
            ({"kind": "b158", "bits": 3}, "bits=3 is not what trits are stored in"),
            ({"kind": "b158", "scale": "max"}, "scale='max' is unknown"),
            ({}, "has no BitLinear; give kind= if"),
            ({"kind": "b158", "skip": "down"}, "skip='down' fits no layer"),
        ],
    )
    def test_what_is_refused(self, arguments, message):
        model = make_model("bf16", **TINY)
        with pytest.raises(ValueError, match=message):
            pack_bitnet(model, **arguments)
        assert len(linear_layers(model)) == 14
