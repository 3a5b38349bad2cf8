"""The dispatcher: who is chosen, what the others said, and that nothing is replaced silently."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import qlearn
from qlearn.kernels import dispatch
from qlearn.kernels.cpu.packed import packed_matmul
from qlearn.kernels.dispatch import choose, explain, matmul, use
from qlearn.models import QuantLinear


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("QLEARN_KERNELS", raising=False)


@pytest.fixture(scope="module")
def quantized():
    return qlearn.quantize(
        torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), "absmax", 4, group_size=64
    )


def rows(count, columns=256, dtype=torch.float32):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_few_rows_go_to_the_kernel(quantized, count):
    assert choose(rows(count), quantized) == ("cpu", {"cuda": "x is on cpu"})
    assert torch.equal(matmul(rows(count), quantized), packed_matmul(rows(count), quantized))


@pytest.mark.parametrize(
    "x", [rows(9), rows(9).view(3, 3, 256), rows(1, dtype=torch.bfloat16)], ids=["9", "3 x 3", "bf16"]
)
def test_the_rest_is_f_linear(quantized, x):
    assert choose(x, quantized).backend == "reference"
    bias = torch.ones(128, dtype=x.dtype)
    assert torch.equal(matmul(x, quantized, bias), F.linear(x, quantized.dequantize(x.dtype), bias))


def other_reasons():
    small = qlearn.quantize(torch.ones(8, 64), "absmax", 4, group_size=64)
    large, x = qlearn.quantize(torch.ones(128, 256), "absmax", 4, group_size=64), rows(1)
    yield "rows", rows(9), large, "x has 9 rows; the cpu kernel gains with up to 8"
    yield "a small weight", rows(1, 64), small, "the weight has 512 numbers; it takes 32768"
    yield "a dtype", x.double(), large, "x is float64; the cpu kernel is taken for float32"
    yield "a gradient", rows(1).requires_grad_(True), large, "x wants a gradient"
    yield "a table", x, qlearn.quantize(torch.ones(128, 256), "nf4", group_size=64), "nf4 is a table of numbers"
    yield "a subclass", rows(1).as_subclass(type("Mine", (torch.Tensor,), {})), large, "x is a Mine"
    yield "no device", torch.empty(1, 256, device="meta"), large.to("meta"), "x is on meta"


CASES = list(other_reasons())


@pytest.mark.parametrize(("x", "weight", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_reasons_against_the_cpu(x, weight, sentence):
    choice = choose(x, weight)
    assert choice.backend == "reference" and choice.reasons["cpu"].startswith(sentence)


def test_autocast(quantized):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose(rows(1), quantized).reasons["cpu"] == "autocast is on, and decides on another dtype"
        assert matmul(rows(1), quantized).dtype == torch.bfloat16


def test_programs_that_torch_traces(quantized):
    seen = []

    def product(x):
        seen.append(choose(x, quantized).backend)
        return matmul(x, quantized)

    x = rows(2)
    by_row = torch.func.vmap(product)(x)
    traced = torch.jit.trace(product, x, check_trace=False)
    assert seen == ["reference"] * 2
    torch.testing.assert_close(by_row, F.linear(x, quantized.dequantize()))
    torch.testing.assert_close(traced(x), F.linear(x, quantized.dequantize()))


def test_explain(quantized):
    assert explain(rows(1), quantized) == "cuda       no: x is on cpu\ncpu        yes"
    assert explain(rows(9), quantized).splitlines()[-1] == "reference  yes"


def test_use_goes_before_the_environment(quantized, monkeypatch):
    monkeypatch.setenv("QLEARN_KERNELS", "reference")
    assert choose(rows(1), quantized) == ("reference", {})
    with use("cpu"):
        assert choose(rows(1), quantized) == ("cpu", {})
        with use("reference"):
            assert choose(rows(1), quantized) == ("reference", {})
        assert choose(rows(1), quantized).backend == "cpu"
    assert choose(rows(1), quantized).backend == "reference"
    monkeypatch.setenv("QLEARN_KERNELS", "")
    assert choose(rows(1), quantized).backend == "cpu"


def test_what_is_slower_can_be_asked_for(quantized):
    with use("cpu"):
        assert torch.equal(matmul(rows(9), quantized), packed_matmul(rows(9), quantized))
        assert matmul(rows(1, dtype=torch.bfloat16), quantized).dtype == torch.bfloat16


def test_after_an_error_the_choice_is_the_usual_one(quantized):
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert choose(rows(1), quantized).backend == "cpu"


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_unknown_names(quantized, name, monkeypatch):
    with (
        pytest.raises(ValueError, match=f"use: there are no kernels '{name}'; choose 'cuda', 'cpu', 'reference'"),
        use(name),
    ):
        pass
    if name:
        monkeypatch.setenv("QLEARN_KERNELS", name)
        with pytest.raises(ValueError, match=f"QLEARN_KERNELS: there are no kernels '{name}'"):
            matmul(rows(1), quantized)


def test_what_was_asked_for_is_not_replaced(quantized):
    with use("cuda"), pytest.raises(ValueError, match="kernels of 'cuda' were asked for, but x is on cpu; ask for"):
        matmul(rows(1), quantized)
    with use("cpu"), pytest.raises(ValueError, match="kernels of 'cpu' were asked for, but x is float64"):
        matmul(rows(1, dtype=torch.float64), quantized)


class OnAGpu(SimpleNamespace):
    """What the dispatcher looks at of a tensor on a GPU, where there is none."""

    device, requires_grad, dtype, shape = torch.device("cuda"), False, torch.float16, (1, 256)


@pytest.mark.parametrize("sentence", [None, "the groups are too small"])
def test_a_gpu_is_asked_first(quantized, sentence, monkeypatch):
    backend = SimpleNamespace(why_not=lambda x, quantized: sentence, matmul=lambda x, quantized, bias: "by cuda")
    monkeypatch.setitem(sys.modules, "qlearn.kernels.cuda", SimpleNamespace(backend=backend))
    monkeypatch.setattr(dispatch, "_needs_torch", lambda x: None)
    monkeypatch.setattr(OnAGpu, "numel", lambda self: 256, raising=False)
    monkeypatch.setattr(OnAGpu, "dim", lambda self: 2, raising=False)
    choice = choose(OnAGpu(), quantized)
    if sentence is None:
        assert choice == ("cuda", {}) and matmul(OnAGpu(), quantized) == "by cuda"
    else:
        assert choice == ("reference", {"cuda": sentence, "cpu": "x is on cuda"})


def test_without_numba_cuda_the_reference_serves(quantized, monkeypatch):
    monkeypatch.setitem(sys.modules, "qlearn.kernels.cuda", None)
    monkeypatch.setattr(OnAGpu, "numel", lambda self: 256, raising=False)
    monkeypatch.setattr(OnAGpu, "dim", lambda self: 2, raising=False)
    choice = choose(OnAGpu(), quantized)
    assert choice.backend == "reference" and "install qlearn[gpu]" in choice.reasons["cuda"]


def test_a_layer_generates_through_it(quantized):
    layer, x = QuantLinear(quantized, torch.ones(128)), rows(1)
    assert torch.equal(layer(x), packed_matmul(x, quantized, torch.ones(128)))
    with use("reference"):
        assert torch.equal(layer(x), F.linear(x, quantized.dequantize(), torch.ones(128)))
    with use("cuda"):  # a training goes its own way
        x = x.requires_grad_(True)
        assert torch.equal(layer(x), F.linear(x, quantized.dequantize(), torch.ones(128)))


def test_numba_is_not_imported_before_it_is_needed():
    program = (
        "import sys, torch, qlearn, qlearn.kernels.dispatch, qlearn.models.linear\n"
        "assert not [name for name in sys.modules if name.startswith('numba')]\n"
        "layer = qlearn.models.linear.QuantLinear(qlearn.quantize(torch.ones(128, 256), 'absmax', 4, group_size=64))\n"
        "layer(torch.ones(9, 256))\n"
        "assert not [name for name in sys.modules if name.startswith('numba')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
