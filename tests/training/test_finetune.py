"""Fine-tuning: what the loss counts, what learns, what the measures say."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from qlearn import load_model, quantize_model
from qlearn.training import finetune as module
from qlearn.training.adapters_task import pairs
from qlearn.training.finetune import (
    Settings,
    answer_loss,
    collate,
    encode,
    exact_match,
    finetune,
    held_out_loss,
    make_optimizer,
    shuffled,
)
from qlearn.training.lora import add_lora
from tests.models.conftest import FAMILIES


@dataclass
class Pair:
    prompt: str
    answer: str


class Letters:
    """A tokenizer for the tiny models: a letter is a token, and 1 the end."""

    eos_token_id = pad_token_id = 1

    def __call__(self, texts, **kwargs):
        one = isinstance(texts, str)
        ids = [[ord(letter) for letter in text] for text in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i > 1)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval().requires_grad_(False)
    model.generation_config.eos_token_id = 1
    return model


TASK = [Pair(a + b, b + a) for a in "abcd" for b in "xyz"]


def test_texts_are_question_answer_end():
    assert encode([Pair("ab", "c"), Pair("a", "")], Letters()) == [([97, 98, 99, 1], 2), ([97, 1], 1)]


def test_nothing_to_encode():
    with pytest.raises(ValueError, match="there are no pairs"):
        encode([], Letters())
    with pytest.raises(ValueError, match="a question has no tokens"):
        encode([Pair("", "a")], Letters())


def test_a_batch_is_padded_on_the_right():
    ids, labels = collate([([5, 6, 7, 8], 3), ([9, 4], 1)])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]] and ids.dtype == labels.dtype == torch.int64
    assert labels.tolist() == [[-100, -100, -100, 8], [-100, 4, -100, -100]]


def test_the_loss_is_that_of_the_answers_one_by_one(llama):
    """Padding and company change nothing: float32 sums in another order, about 1e-6."""
    texts = encode([Pair("ab", "cde"), Pair("q", "r")], Letters())
    total = count = 0
    for ids, asked in texts:
        log_p = F.log_softmax(llama(torch.tensor([ids])).logits[0].double(), -1)
        total -= sum(log_p[place - 1, ids[place]].item() for place in range(asked, len(ids)))
        count += len(ids) - asked
    assert answer_loss(llama, *collate(texts)).item() == pytest.approx(total / count, rel=1e-5)
    assert answer_loss(llama, *collate(texts), "sum").item() == pytest.approx(total, rel=1e-5)
    assert held_out_loss(llama, [Pair("ab", "cde"), Pair("q", "r")], Letters(), batch=1) == pytest.approx(
        total / count, rel=1e-5
    )


def test_every_text_comes_once_in_a_pass():
    texts = [([number, 1], 1) for number in range(10)]
    batches = shuffled(texts, 5)
    first, second = (sorted(i for _ in range(2) for i in next(batches)[0][:, 0].tolist()) for _ in range(2))
    assert first == second == list(range(10))
    assert torch.equal(next(shuffled(texts, 5))[0], next(shuffled(texts, 5))[0])
    assert len(next(shuffled(texts, 32))[0]) == 32


@pytest.mark.parametrize("bits", [None, 4])
def test_it_learns_and_only_what_requires_a_gradient(llama, bits):
    if bits:
        quantize_model(llama, bits=bits, group_size=16, progress=False)
    add_lora(llama, r=8)
    before = {name: t.clone() for name, t in llama.state_dict().items()}
    curve = finetune(llama, TASK, Letters(), steps=40, lr=2e-2, progress=False)
    assert [point["step"] for point in curve] == list(range(40)) and curve[-1]["loss"] < curve[0]["loss"] - 0.2
    assert {n[-1] for n, t in llama.state_dict().items() if not torch.equal(t, before[n])} == {"A", "B"}
    assert not llama.training


def test_all_of_the_model_learns_when_it_may(llama):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    finetune(llama.requires_grad_(True), TASK, Letters(), steps=2, lr=1e-3, progress=False)
    assert not any(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_exact_answers(monkeypatch):
    """Right is the answer to the letter, and nothing after it."""
    written = {"a": "xy", "b": "xyz", "c": "x", "d": "XY", "e": "xy", "f": ""}
    monkeypatch.setattr(module, "complete", lambda model, tokenizer, prompts, n: [written[p] for p in prompts])
    asked = [Pair(prompt, "xy") for prompt in written]
    assert exact_match(None, asked, None) == exact_match(None, asked, None, batch=4) == 2 / 6
    assert exact_match(None, asked[:1], None) == 1 and exact_match(None, asked[1:4], None) == 0


def test_an_answer_ends_where_the_model_ends_it(llama):
    """What it learned by heart it writes, and the end as well."""
    finetune(llama.requires_grad_(True), TASK[:1], Letters(), steps=60, lr=1e-2, progress=False)
    assert exact_match(llama, TASK[:1], Letters(), max_new_tokens=6) == 1


def test_the_bundled_model_begins_to_learn_the_task():
    model, tokenizer = load_model()
    held_out = pairs(16, held_out=True)
    before = held_out_loss(model, held_out, tokenizer)
    finetune(add_lora(model), pairs(64), tokenizer, steps=8, batch=4, warmup=2, lr=5e-3, progress=False)
    assert held_out_loss(model, held_out, tokenizer) < 0.75 * before


def test_the_clock_ends_it(llama):
    add_lora(llama)
    curve = finetune(llama, TASK, Letters(), steps=100_000, seconds=0.5, progress=False)
    assert 1 <= len(curve) < 10_000 and curve[-1]["seconds"] < 5


def test_watch_sees_every_step(llama):
    seen = []
    add_lora(llama)
    finetune(
        llama, TASK, Letters(), steps=3, progress=False, watch=lambda step, loss, m: seen.append((step, m.training))
    )
    assert seen == [(0, True), (1, True), (2, True)]


def test_the_rate_and_the_clip_arrive(llama, monkeypatch):
    rates, norms = [], []
    optimizer_of = module.make_optimizer

    def watched(parameters, lr, paged):
        optimizer = optimizer_of(parameters, lr, paged)

        def look(optimizer, *_):
            rates.append(optimizer.param_groups[0]["lr"])
            norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

        optimizer.register_step_pre_hook(look)
        return optimizer

    monkeypatch.setattr(module, "make_optimizer", watched)
    finetune(add_lora(llama), TASK, Letters(), steps=4, warmup=2, lr=1.0, clip=1e-3, progress=False)
    assert rates[0] == 0.5 and rates[1] > rates[2] > rates[3] > 0
    assert max(norms) < 1.01e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 trains nothing"),
        ({"batch": 0}, "batch=0 trains nothing"),
        ({"warmup": 0}, "warmup=0 trains nothing"),
        ({"lr": 0.0}, "lr=0.0 trains nothing"),
        ({"lr": float("nan")}, "lr=nan trains nothing"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_nothing_that_learns(llama):
    with pytest.raises(ValueError, match="nothing requires a gradient; add_lora"):
        finetune(llama, TASK, Letters(), progress=False)


def test_a_loss_that_is_no_number(llama):
    llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan at step 0; lower lr"):
        finetune(add_lora(llama), TASK, Letters(), steps=2, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_paged_states_need_a_gpu(llama):
    with pytest.raises(ValueError, match="paged=True needs a CUDA GPU and the package bitsandbytes"):
        make_optimizer(list(llama.parameters()), 1e-3, paged=True)
