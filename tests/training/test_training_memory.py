"""Memory of a training step: the formula is what is really held after a step."""

import copy

import pytest
import torch

from qlearn import quantize_model
from qlearn.evaluate import quantized_layers
from qlearn.training.lora import add_lora
from qlearn.training.training_memory import Memory, by_formula, measured, of_model, peak
from tests.models.conftest import FAMILIES

IDS = torch.arange(32).view(2, 16)


def prepared(kind):
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().requires_grad_(kind == "full")
    if kind == "qlora":
        quantize_model(model, "zero_point", bits=4, group_size=16, progress=False)
    if kind == "bfloat16":
        model.bfloat16()
    return model if kind == "full" else add_lora(model, r=4)


def after_a_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return measured(model, optimizer)


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16", "qlora"])
def test_the_formula_is_what_is_held(kind):
    model = prepared(kind)
    expected = of_model(model)
    assert after_a_step(model) == expected == of_model(model)


def test_a_quantized_base_counts_its_packed_bytes():
    plain, packed = of_model(prepared("lora")), of_model(prepared("qlora"))
    layers = quantized_layers(prepared("qlora")).values()
    saved = sum(4 * q.shape[0] * q.shape[1] - q.nbytes for q in layers)
    assert plain.weights - packed.weights == saved
    assert (plain.gradients, plain.optimizer) == (packed.gradients, packed.optimizer)


def test_tied_weights_count_once():
    model = FAMILIES["llama"]()
    numbers = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert of_model(model) == Memory(4 * numbers + buffers, 4 * numbers, 8 * numbers)
    assert of_model(copy.deepcopy(model)) == of_model(model)


def test_by_numbers():
    assert by_formula(1000) == Memory(2000, 2000, 8000)
    assert by_formula(1000, bits=32) == Memory(4000, 4000, 8000)
    assert by_formula(1000, bits=4.5, learning=10) == Memory(562 + 40, 40, 80)
    assert by_formula(1000, bits=16, learning=10, learning_bits=16, gradient_bits=32) == Memory(2020, 40, 80)
    assert by_formula(1000).total == 12_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_peak_needs_a_gpu():
    with pytest.raises(ValueError, match="the peak is measured on a CUDA GPU"):
        peak(lambda: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_peak():
    before = torch.cuda.memory_allocated()
    assert peak(lambda: torch.zeros(2**20, device="cuda").sum()) - before >= 2**22
