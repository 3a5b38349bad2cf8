"""Quantization-aware training: what is stored is what was trained, the teacher stays, and the loss falls."""

import copy
import itertools
import math

import pytest
import torch
from torch.func import functional_call

from qlearn import load_model, quantize_model
from qlearn.bench.results import read
from qlearn.evaluate import bits_per_weight, calibration_text, perplexity
from qlearn.evaluate.divergence import position_divergences
from qlearn.formats import gguf_blocks
from qlearn.models.quantize import linear_layers
from qlearn.training import qat
from tests.models.conftest import FAMILIES


@pytest.fixture(params=FAMILIES)
def tiny(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval().requires_grad_(False)


@pytest.fixture
def llama():
    """Its weights are ten times as large as a fresh model's, so that it has opinions that rounding can damage."""
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval().requires_grad_(False)
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        matrix *= 10
    return model


@pytest.fixture
def batches():
    ids = torch.randint(128, (2000,), generator=torch.Generator().manual_seed(0))
    return qat.windows(ids, batch=4, length=16)


def weights(model):
    return {name: p.clone() for name, p in model.named_parameters()}


def trained(model, batches, **settings):
    return qat.train(model, batches, progress=False, **{"steps": 3, "warmup": 1, **settings})


def test_every_family_trains(tiny, batches):
    before = weights(tiny)
    student, curve = trained(tiny, batches, bits=3, group_size=16, lr=1e-3)
    assert all(torch.equal(before[name], p) for name, p in tiny.named_parameters())
    moved = [name for name, p in student.named_parameters() if not torch.equal(before[name], p)]
    assert {f"{name}.weight" for name in linear_layers(student)} <= set(moved)
    assert not student.training and all(math.isfinite(point["loss"]) for point in curve)


def test_the_damage_shrinks():
    model, tokenizer = load_model()
    ids = torch.tensor(tokenizer(calibration_text()[:30_000], verbose=False)["input_ids"])
    _, curve = qat.train(model, qat.windows(ids, 2, 64), bits=2, steps=16, warmup=3, lr=1e-3, progress=False)
    assert curve[-1]["loss"] < curve[0]["loss"] / 2


def test_quantize_model_stores_what_was_trained(llama, batches):
    student, _ = trained(llama, batches, bits=2, group_size=32)
    settings = qat.Settings(bits=2, group_size=32)
    seen = qat.fake_quantized(student, [f"{name}.weight" for name in linear_layers(student)], settings)
    ids = next(batches)
    expected = functional_call(student, seen, kwargs={"input_ids": ids}).logits
    quantize_model(student, "signed_absmax", bits=2, group_size=32, progress=False)
    assert torch.equal(student(input_ids=ids).logits, expected)


def test_a_q4_0_file_holds_what_was_trained(llama, batches):
    student, _ = trained(llama, batches, bits=4, group_size=32, lr=1e-3)
    names = [f"{name}.weight" for name in linear_layers(student)]
    seen = qat.fake_quantized(student, names, qat.Settings(bits=4, group_size=32))
    parameters = dict(student.named_parameters())
    for name in names:
        assert torch.equal(gguf_blocks.dequantize(gguf_blocks.quantize(parameters[name])), seen[name])
        assert not torch.equal(parameters[name], seen[name])


def test_without_rounding_distillation_has_nothing_to_learn(llama, batches):
    """Student and teacher agree: the divergence is zero but for float32's rounding, the next-token loss is not."""
    _, distilled = trained(llama, batches, method=None, steps=1)
    _, told = trained(llama, batches, method=None, steps=1, loss="next token")
    assert abs(distilled[0]["loss"]) < 1e-6 and told[0]["loss"] > 1


def test_skipped_layers_are_not_rounded(llama, batches):
    _, every = trained(llama, batches, bits=2, group_size=16, steps=1)
    _, fewer = trained(llama, batches, bits=2, group_size=16, steps=1, skip=("lm_head", "mlp.*", "*mlp*"))
    assert 0 < fewer[0]["loss"] < every[0]["loss"]


def test_another_method(llama, batches):
    student, _ = trained(llama, batches, method="zero_point", bits=4, group_size=16, steps=1)
    assert not student.training


def test_the_clock_ends_it(llama, batches):
    _, curve = trained(llama, batches, steps=100_000, seconds=0.5)
    assert curve[-1]["seconds"] < 5


def test_watch_sees_every_step(llama, batches):
    seen = []
    trained(llama, batches, steps=4, watch=lambda step, loss, student: seen.append((step, student.training)))
    assert seen == [(0, True), (1, True), (2, True), (3, True)]


def test_rate_rises_and_falls_to_zero():
    settings = qat.Settings(steps=100, warmup=10, lr=1.0)
    rates = [qat.learning_rate(step, step / 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[100] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


def test_loss_is_the_divergence_that_is_measured():
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    expected = position_divergences(a.flatten(0, 1), b.flatten(0, 1)).mean()
    assert qat.distillation_loss(b, a).item() == pytest.approx(expected.item(), rel=1e-5)


def test_windows_are_cuts_of_the_text():
    found = next(qat.windows(torch.arange(50), batch=64, length=8))
    assert torch.equal(found - found[:, :1], torch.arange(8).expand(64, 8))
    assert found.min() == 0 and found.max() == 49
    assert torch.equal(found, next(qat.windows(torch.arange(50), batch=64, length=8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "'mse' is unknown"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"bits": 1}, "bits=1"),
        ({"group_size": 5}, "group_size=5"),
        ({"method": "nope"}, "'nope' is unknown"),
        ({"skip": ("lm_head", "*proj")}, "no linear layer"),
    ],
)
def test_bad_settings(llama, batches, changes, message):
    with pytest.raises(ValueError, match=message):
        trained(llama, batches, **changes)


def test_short_text():
    with pytest.raises(ValueError, match="3 tokens, fewer than a window of 8"):
        next(qat.windows(torch.arange(3), batch=1, length=8))


def test_a_loss_that_is_not_finite(llama, batches):
    broken = copy.deepcopy(llama)
    broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        trained(broken, batches)


@pytest.mark.parametrize("bits", qat.CHECKPOINTS)
def test_checkpoints_are_the_ones_that_were_measured(bits):
    """The same text and convention on a CPU; the GPU had multiplied in TensorFloat32, whose 10 bits move little."""
    model, tokenizer = load_model(qat.checkpoint(bits), progress=False)
    (run,) = (run for run in read("qat")["runs"] if run["name"] == f"{bits} bit")
    found = perplexity(model, tokenizer, convention="llama.cpp")
    assert found == pytest.approx(run["trained"]["evaluation"]["perplexity"], rel=1e-3)
    assert bits_per_weight(model) < bits_per_weight(load_model()[0])


def test_no_other_checkpoint():
    with pytest.raises(ValueError, match="no trained checkpoint of 5 bits"):
        qat.checkpoint(5)
