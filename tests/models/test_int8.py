"""W8A8: integer products bit for bit, and layers within a derived bound."""

import time

import pytest
import torch

from qlearn.methods import absmax
from qlearn.models import int8
from qlearn.models.int8 import (
    MAX_IN_FEATURES,
    Int8Linear,
    int8_matmul,
    quantize_tokens,
    quantize_with,
)

SHAPES = [
    (3, 1, 4),
    (40, 1, 24),
    (1, 8, 8),
    (1, 1, 1),
    (7, 33, 5),
    (16, 256, 768),
    (33, 4096, 16),
    (0, 8, 8),
    (17, 8, 0),
]


def random_codes(rows, columns, low=-128, high=128):
    return torch.randint(low, high, (rows, columns), dtype=torch.int8)


def in_python(x, w):
    """The product by Python's integers, which never overflow."""
    return [[sum(a * b for a, b in zip(row, other, strict=True)) for other in w.tolist()] for row in x.tolist()]


def saturating_int_mm(x, w):
    """What a processor without integer dot products may do: add pairs of products in 16 bits, which saturate."""
    products = x.int()[:, :, None] * w.int()[None]
    pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(1, dtype=torch.int32)


class TestProduct:
    @pytest.mark.parametrize("tokens, columns, rows", SHAPES)
    def test_random_codes(self, tokens, columns, rows):
        x, w = random_codes(tokens, columns), random_codes(rows, columns)
        product = int8_matmul(x, w)
        assert product.dtype == torch.int32 and product.shape == (tokens, rows)
        assert torch.equal(product.long(), x.long() @ w.long().T)

    def test_against_pythons_integers(self):
        x, w = random_codes(3, 50), random_codes(4, 50)
        assert int8_matmul(x, w).tolist() == in_python(x, w)

    @pytest.mark.parametrize("columns", [256, 16384, MAX_IN_FEATURES])
    def test_the_largest_codes_in_the_longest_rows(self, columns):
        x = torch.stack([torch.full((columns,), v, dtype=torch.int8) for v in (-128, 127, -127)])
        expected = [[a * b * columns for b in (-128, 127, -127)] for a in (-128, 127, -127)]
        assert int8_matmul(x, x).tolist() == expected
        assert columns < MAX_IN_FEATURES or 2**31 - 128**2 <= expected[0][0] < 2**31

    def test_longer_rows_are_refused(self):
        codes = torch.zeros(1, MAX_IN_FEATURES + 1, dtype=torch.int8)
        with pytest.raises(ValueError, match="131072 columns could overflow"):
            int8_matmul(codes, codes)

    @pytest.mark.parametrize("tokens, columns, rows", SHAPES)
    def test_floats_and_the_padding_agree_with_it(self, tokens, columns, rows):
        x, w = random_codes(tokens, columns), random_codes(rows, columns)
        assert torch.equal(int8.float32_matmul(x, w), int8_matmul(x, w))
        assert torch.equal(int8._padded_int_mm(x, w), int8_matmul(x, w))

    def test_padding_satisfies_cuda(self, monkeypatch):
        """What torch demands of `_int_mm` on CUDA: more than 16 rows, and sizes that are multiples of 8."""
        seen = []
        monkeypatch.setattr(torch, "_int_mm", lambda x, w: seen.append((*x.shape, w.shape[1])) or x.int() @ w.int())
        for tokens, columns, rows in SHAPES:
            if rows:
                int8._padded_int_mm(random_codes(tokens, columns), random_codes(rows, columns))
        assert all(m > 16 and k % 8 == 0 and n % 8 == 0 for m, k, n in seen) and len(seen) == len(SHAPES) - 1

    def test_floats_are_exact_up_to_the_longest_rows(self):
        """1024 products of -128 with itself are 2**24; with one more row of them the sum is split."""
        for columns in (1023, 1024, 1025, 4096, MAX_IN_FEATURES):
            x = torch.full((1, columns), -128, dtype=torch.int8)
            odd = torch.cat([x[:, 1:], torch.full((1, 1), 127, dtype=torch.int8)], 1)
            assert int8.float32_matmul(x, x).item() == 128**2 * columns
            assert int8.float32_matmul(odd, x).item() == 128**2 * (columns - 1) - 127 * 128

    @pytest.mark.parametrize("broken", ["missing", "saturating", "slow"])
    def test_where_torchs_product_does_not_serve_floats_take_over(self, monkeypatch, broken):
        def slow(x, w):
            time.sleep(0.2)
            return x.int() @ w.int()

        x, w = random_codes(5, 300), random_codes(6, 300)
        expected = x.long() @ w.long().T
        int8.integers_serve_on_this_cpu.cache_clear()
        try:
            if broken == "missing":
                monkeypatch.delattr(torch, "_int_mm")
            else:
                monkeypatch.setattr(torch, "_int_mm", saturating_int_mm if broken == "saturating" else slow)
            assert not int8.integers_serve_on_this_cpu()
            assert torch.equal(int8_matmul(x, w).long(), expected)
        finally:
            int8.integers_serve_on_this_cpu.cache_clear()

    def test_where_it_serves_it_is_used(self, monkeypatch):
        used = []
        monkeypatch.setattr(int8, "integers_serve_on_this_cpu", lambda: True)
        monkeypatch.setattr(torch, "_int_mm", lambda x, w: used.append(1) or x.int() @ w.int())
        x, w = random_codes(5, 30), random_codes(6, 30)
        assert torch.equal(int8_matmul(x, w).long(), x.long() @ w.long().T) and used

    @pytest.mark.parametrize(
        "x, w, message",
        [
            (torch.zeros(2, 4), torch.zeros(2, 4), "torch.float32"),
            (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8), "torch.uint8"),
            (torch.zeros(4, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8), "two int8 matrices"),
            (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 5, dtype=torch.int8), "4 and 5 columns do not fit"),
        ],
    )
    def test_what_does_not_fit_is_named(self, x, w, message):
        with pytest.raises(ValueError, match=message):
            int8_matmul(x, w)


class TestActivations:
    def test_dynamic_is_absmax_of_each_row(self):
        x = torch.randn(9, 40) * torch.logspace(-20, 20, 9)[:, None]
        codes, scale = quantize_tokens(x)
        expected = absmax(x, bits=8, scale_dtype=torch.float32)
        assert torch.equal(codes, expected.codes()) and torch.equal(scale, expected.scales)

    def test_static_clips(self):
        x = torch.tensor([[-9.0, -1.0, 0.0, 0.5, 2.0]])
        assert quantize_with(x, torch.tensor(1 / 127)).tolist() == [[-127, -127, 0, 64, 127]]

    def test_static_agrees_with_torch(self):
        x = torch.randn(50, 40)
        theirs = torch.fake_quantize_per_tensor_affine(x, 2.0**-6, 0, -127, 127) * 2**6
        assert torch.equal(quantize_with(x, torch.tensor(2.0**-6)), theirs.to(torch.int8))

    def test_zeros(self):
        codes, scale = quantize_tokens(torch.zeros(2, 3))
        assert not codes.any() and scale.tolist() == [[1.0], [1.0]]

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_so_in_its_own_row(self, broken):
        layer = Int8Linear(absmax(torch.randn(4, 8), bits=8))
        x = torch.ones(2, 8)
        x[0, 3] = broken
        y = layer(x)
        assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1]).all()


def layers(bias=True, activations="dynamic", seed=0):
    """A float layer, its inputs, and the W8A8 layer made of it."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(12, 40, generator=generator), torch.randn(3, 5, 40, generator=generator)
    b = torch.randn(12, generator=generator) if bias else None
    scale = None if activations == "dynamic" else x.abs().max().item() / 127
    return weight, b, x, Int8Linear(absmax(weight, bits=8), b, scale)


class TestLayer:
    @pytest.mark.parametrize("activations", ["dynamic", "static"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_the_product_of_the_two_rounded_matrices(self, activations, bias):
        _, b, x, layer = layers(bias, activations)
        rows = x.view(15, 40).double()
        scale = rows.abs().amax(-1, keepdim=True) / 127 if activations == "dynamic" else layer.input_scale.double()
        rounded = (rows / scale.float()).round() * scale
        expected = rounded @ layer.quantized.dequantize().double().T + (0 if b is None else b.double())
        assert (layer(x).view(15, 12) - expected).abs().max() < 2**-18  # a few float32 roundings of values below 32

    @pytest.mark.parametrize("activations", ["dynamic", "static"])
    def test_the_error_of_an_output_is_within_half_a_step_of_each_factor(self, activations):
        """|x'w' - xw| <= sum of |x' - x||w'| + |x||w' - w|, and neither is off by more than half its step."""
        weight, b, x, layer = layers(True, activations)
        step_x = (x.abs().amax(-1, keepdim=True) if activations == "dynamic" else x.abs().max()) / 127
        step_w = layer.scales.float().T
        w = layer.quantized.dequantize()
        bound = step_x / 2 * w.abs().sum(1) + x.abs().sum(-1, keepdim=True) * step_w / 2
        error = (layer(x) - torch.nn.functional.linear(x, weight, b)).abs()
        assert (error <= bound * (1 + 1e-5)).all()
        assert error.max() > bound.max() / 100  # a bound that is far too large would see no mistake

    def test_shapes_and_dtypes(self):
        _, _, x, layer = layers()
        assert layer(x).shape == (3, 5, 12) and layer(x[0, 0]).shape == (12,) and layer(x[:0]).shape == (0, 5, 12)
        for dtype in (torch.float16, torch.bfloat16):
            y = layer(x.to(dtype))
            assert y.dtype == dtype
            assert torch.equal(y, layer(x.to(dtype).float()).to(dtype))

    def test_a_change_of_dtype_keeps_the_scales(self):
        _, _, x, layer = layers(activations="static")
        before = layer(x.half().float())
        layer.half()
        assert layer.input_scale.dtype == torch.float32 and layer.bias.dtype == torch.float16
        layer.bias.data = layer.bias.data.float()
        torch.testing.assert_close(layer(x.half().float()), before, rtol=0, atol=2**-9)  # the bias was rounded

    def test_state_dict_holds_the_input_scale(self):
        _, _, x, layer = layers(activations="static")
        other = Int8Linear(absmax(torch.randn(12, 40), bits=8), torch.zeros(12), 1.0)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))

    def test_the_codes_are_the_packed_bytes(self):
        layer = layers()[-1]
        assert torch.equal(layer.weight_codes(), layer.quantized.codes())
        assert layer.weight_codes().data_ptr() == layer.packed.data_ptr()

    def test_no_gradient_passes(self):
        _, _, x, layer = layers()
        assert not layer(x.requires_grad_()).requires_grad

    def test_it_says_what_it_is(self):
        assert "inputs int8 dynamic" in repr(layers()[-1])
        assert "inputs int8 static, scale 0.0" in repr(layers(activations="static")[-1])

    @pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8, "group_size": 8}, {"bits": 8, "per": "tensor"}])
    def test_other_weights_are_refused(self, options):
        with pytest.raises(ValueError, match="is not int8 with a scale for each row"):
            Int8Linear(absmax(torch.randn(2, 16), **options))

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_input_scale_that_is_none(self, scale):
        with pytest.raises(ValueError, match="is no scale"):
            Int8Linear(absmax(torch.randn(2, 16)), input_scale=scale)
