"""The layer of FP4 training: three products as written out by hand, gradients that are right on average, bad sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlearn.rotation import hadamard
from qlearn.training import fp4
from qlearn.training.fp4 import SCHEMES, LowPrecisionLinear, Scheme, to_low_precision
from qlearn.training.low_precision import MXFP4, QuEST, Rounded, Unclipped
from qlearn.training.pretrain import make_model


def plain(x):
    """No rounding at all."""
    return Rounded(x.float())


def data(tokens=64, inputs=96, outputs=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator) for s in ((tokens, inputs), (outputs, inputs), (tokens, outputs))]


def passes(scheme, x, weight, E):
    """(y, dx, dW) of a layer."""
    layer = LowPrecisionLinear(weight.shape[1], weight.shape[0], scheme=scheme)
    layer.weight.data = weight.clone()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(E)
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("rotation", [None, 16, 32])
def test_without_rounding_it_is_a_linear_layer(rotation):
    x, weight, E = data()
    got = passes(Scheme(plain, plain, plain, rotation, rotation), x, weight, E)
    for ours, exact in zip(got, (x @ weight.T, E @ weight, E.T @ x), strict=True):
        assert torch.allclose(ours, exact, atol=2e-5)


def test_naive_fp4_is_six_roundings_and_three_products():
    x, weight, E = data()
    y, dx, dW = passes("naive_fp4", x, weight, E)

    def r(m):
        return MXFP4()(m.contiguous()).values

    X, W = r(x), r(weight)
    assert torch.equal(y, X @ W.T)
    assert torch.allclose(dx, r(E) @ r(W.T).T, atol=1e-5)
    assert torch.allclose(dW, r(E.T) @ r(X.T).T, atol=1e-5)


def test_quartet_is_its_algorithm_line_by_line():
    x, weight, E = data()
    torch.manual_seed(3)
    y, dx, dW = passes("quartet_rtn", x, weight, E)
    torch.manual_seed(3)
    layer = LowPrecisionLinear(96, 32, scheme="quartet_rtn")  # draws the same signs
    signs = torch.sign(layer.H_back[:, 0])
    X, _, mask_x = QuEST()(hadamard(x, 32))
    W, _, mask_w = QuEST()(hadamard(weight, 32))
    assert torch.allclose(y, X @ W.T, atol=1e-5)

    def back(m):
        return Unclipped(False)(hadamard(m * signs.repeat(m.shape[1] // 32), 32)).numbers()

    assert torch.allclose(dx, hadamard((back(E) @ back(W.T).T) * mask_x, 32), atol=1e-4)
    assert torch.allclose(dW, hadamard((back(E.T.contiguous()) @ back(X.T).T) * mask_w, 32), atol=1e-4)


@pytest.mark.parametrize("scheme", ["quartet_sr", "quartet_nvfp4"])
def test_the_gradient_of_stochastic_rounding_is_right_on_average(scheme):
    """The expected gradient is that of the same forward pass with exact backward products (what is masked, masked)."""
    x, weight, E = data(32, 64, 32)
    exact = passes(Scheme(SCHEMES[scheme].forward, plain, plain, *[SCHEMES[scheme].rotate] * 2), x, weight, E)
    torch.manual_seed(0)
    n, sums, squares = 1500, [0, 0], [0, 0]
    for _ in range(n):
        for k, gradient in enumerate(passes(scheme, x, weight, E)[1:]):
            sums[k] = sums[k] + gradient.double()
            squares[k] = squares[k] + gradient.double().square()
    for total, square, expected in zip(sums, squares, exact[1:], strict=True):
        mean, deviation = total / n, (square / n - (total / n).square()).sqrt() / math.sqrt(n)
        z = (mean - expected) / deviation
        assert z.abs().max() < 5  # 2,048 numbers: beyond 5 deviations once in a thousand tests
        assert abs(z.square().mean() - 1) < 0.25


def test_the_gradient_of_rounding_to_nearest_is_not():
    x, weight, E = data(32, 64, 32)
    exact = passes(Scheme(SCHEMES["quartet_rtn"].forward, plain, plain, 32, 32), x, weight, E)[1]
    torch.manual_seed(0)
    n = 300
    runs = torch.stack([passes("quartet_rtn", x, weight, E)[1] for _ in range(n)]).double()
    z = (runs.mean(0) - exact) / (runs.std(0) / math.sqrt(n))
    assert z.square().mean() > 1.5


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_a_model_learns_with_each_scheme(scheme):
    torch.manual_seed(0)
    tokens = (torch.arange(2 * 65) % 11).view(2, 65)
    model = make_model(128, 1)
    before = {name for name, _ in model.named_parameters()}
    to_low_precision(model, scheme)
    assert {name for name, _ in model.named_parameters()} == before
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_signs_are_drawn_anew_in_each_step_of_a_training_and_not_otherwise():
    model = to_low_precision(make_model(128, 1), "quartet_sr")
    layer = model.model.layers[0].self_attn.q_proj
    seen = []
    for _ in range(8):
        model(input_ids=torch.zeros(1, 32, dtype=torch.long))
        seen.append(layer.H_back.clone())
    assert len({tuple(torch.sign(m[:, 0]).tolist()) for m in seen}) > 4
    for m in seen:
        assert torch.equal(m @ m.T, 32 * torch.eye(32))
    kept = layer.H_back.clone()
    model.eval()(input_ids=torch.zeros(1, 32, dtype=torch.long))
    assert torch.equal(layer.H_back, kept)
    assert not any(name.endswith((".H", ".H_back")) for name in model.state_dict())


@pytest.mark.parametrize("scheme", ["quartet_sr", "quartet_nvfp4", "luq", "mxfp8"])
def test_a_compiled_layer_has_gradients_that_point_the_same_way(scheme):
    """A graph in which the two factors of a product got different signs gave gradients at right angles, silently."""
    torch.manual_seed(0)
    first, last = (LowPrecisionLinear(64, outputs, scheme=scheme) for outputs in (64, 32))
    layers = nn.Sequential(first, nn.SiLU(), last)
    x, _, E = data(64, 64, 32)
    (F.linear(F.silu(F.linear(x, layers[0].weight)), layers[2].weight) * E).sum().backward()
    exact = [layers[k].weight.grad.clone() for k in (0, 2)]
    layers.zero_grad()
    layers.compile(backend="aot_eager")
    layers(x).backward(E)
    for k, g in zip((0, 2), exact, strict=True):
        assert F.cosine_similarity(layers[k].weight.grad.flatten(), g.flatten(), dim=0) > 0.75


def test_autocast_multiplies_in_bfloat16():
    x, _, E = data()
    layer = LowPrecisionLinear(96, 32, bias=True, scheme="quartet_sr")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.backward(E.to(y.dtype))
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.bias.grad, E.bfloat16().float().sum(0), rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 32, 64)], ids=str)
def test_inputs_of_any_rank(shape):
    layer = LowPrecisionLinear(64, 32, scheme="fp8")
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 32)


def test_fp8_is_emulated_where_there_are_no_units():
    assert not fp4.has_fp8_units(torch.device("cpu"))


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="scheme='fp3' is unknown; choose from bf16, fp8"):
        LowPrecisionLinear(32, 32, scheme="fp3")
    with pytest.raises(ValueError, match="rotations of 32 do not divide the 48 numbers of a row"):
        LowPrecisionLinear(48, 32, scheme="quartet_sr")(torch.ones(32, 48))
    x = torch.ones(33, 64, requires_grad=True)
    with pytest.raises(ValueError, match="do not divide the 33 numbers of a row; pad them with zeros"):
        LowPrecisionLinear(64, 32, scheme="quartet_sr")(x).sum().backward()
    with pytest.raises(ValueError, match="Identity has no linear layer to train"):
        to_low_precision(nn.Identity(), "quartet_sr")
    model = make_model(128, 1)
    assert to_low_precision(model, "bf16") is model
