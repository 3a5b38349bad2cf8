"""What the dispatcher asks of the CUDA kernels, as far as it shows without a GPU: the tensors are on the CPU here."""

import gc

import pytest
import torch

import qlearn
from qlearn.kernels.cuda import backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the simulator; tests/gpu has its own")


def weight(rows=16, columns=128, method="absmax", **options):
    options = {"bits": 4, "group_size": 64} | options
    return qlearn.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), method, **options)


@pytest.mark.parametrize(
    ("x", "quantized", "sentence"),
    [
        (torch.ones(1, 128).half(), weight(), None),
        (torch.ones(2, 16, 128).bfloat16(), weight(), None),
        (torch.ones(1, 128), weight(), "x is float32; the kernel takes float16 and bfloat16"),
        (torch.ones(33, 128).half(), weight(), "x has 33 rows; the kernel takes 1 to 32"),
        (torch.ones(0, 128).half(), weight(), "x has 0 rows; the kernel takes 1 to 32"),
        (
            torch.ones(1, 128).half(),
            weight(method="nf4"),
            "the format is nf4, and the kernel knows integers of 2, 3, 4 and 8 bits",
        ),
    ],
    ids=["one row", "32 rows of three dimensions", "float32", "33 rows", "no row", "nf4"],
)
def test_why_not(x, quantized, sentence):
    assert backend.why_not(x, quantized) == sentence


def test_an_older_gpu(monkeypatch):
    monkeypatch.setattr(backend, "capability", lambda device: (8, 6))
    reason = backend.why_not(torch.ones(1, 128).half(), weight())
    assert reason == "the GPU has compute capability 8.6, and the kernel needs 9.0"


def test_shape_bias_and_an_address_between():
    """x is a view that begins 2 bytes into its memory; the kernel could not copy from there."""
    quantized, bias = weight(), torch.arange(16).half()
    x = torch.randn(385, generator=torch.Generator().manual_seed(1)).half()[1:].view(3, 1, 128)
    y = backend.matmul(x, quantized, bias)
    expected = x.double() @ quantized.dequantize().double().T + bias.double()
    assert y.shape == (3, 1, 16) and y.dtype == torch.float16
    assert torch.allclose(
        y.double(), expected, rtol=2**-9, atol=2**-9
    )  # y is rounded twice, and the bias added between


def test_it_is_arranged_once():
    quantized = weight()
    assert backend.arranged(quantized) is backend.arranged(quantized)


@pytest.mark.parametrize("name", ["packed", "scales"])
def test_it_is_arranged_again_when_a_tensor_was_written_to(name):
    """As load_state_dict does."""
    quantized, other = weight(), weight(method="zero_point", bits=4)
    before = backend.arranged(quantized).data.clone()
    getattr(quantized, name).copy_(getattr(other, name).flip(0))
    assert not torch.equal(backend.arranged(quantized).data, before)


def test_it_goes_when_the_codes_go():
    quantized = weight()
    backend.arranged(quantized)
    count = len(backend._arranged)
    del quantized
    gc.collect()
    assert len(backend._arranged) == count - 1
