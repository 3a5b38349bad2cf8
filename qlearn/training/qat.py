"""Quantization-aware training (QAT) with distillation: a model learns to live with its rounding.

After rounding, a model is a slightly wrong copy of what it was. Two things put it right again:

1. **Fake quantization** (`fake_quant.py`). Every linear layer computes with the rounded weights, so the loss that is
   measured is that of the quantized model, and the gradient passes straight through the rounding to the float weights
   behind it.
2. **Distillation.** The unquantized model is the teacher. At each position the student is not told only which token
   came, but the teacher's whole probability distribution, and the loss is how far its own is away from it:

       loss = KL(teacher || student) = sum over tokens of p_teacher * (log p_teacher - log p_student)

   It is zero where the two agree, so nothing but the damage is left to learn, and every position of any text teaches.

That is the recipe of the Gemma 3 report: fine-tune for up to 5,000 steps with the probabilities of the unquantized
checkpoint as targets. Its learning rate, optimizer, batch and data were not published; those here are our own.

Afterwards `quantize_model(student, method, ...)` stores exactly the weights that the training saw, because both use
the same method.

Source: Gemma Team, Gemma 3 Technical Report, arXiv 2503.19786, section 2.3; Hinton et al., arXiv 1503.02531.
"""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm.auto import tqdm

from qlearn.models.quantize import SKIP, linear_layers
from qlearn.training.fake_quant import fake_quantize

LOSSES = ("distill", "next token")
CHECKPOINTS = (4, 2)
EVERY = 10  # steps from one point of the curve to the next: to read a loss, one has to wait for the GPU


@dataclass
class Settings:
    """How to train.

    method, bits, group_size, options: the rounding that the student is trained under, as for `qlearn.quantize`;
    method None trains without any.
    loss: "distill" (the teacher's probabilities) or "next token" (the text itself).
    steps: optimizer steps.  seconds: stop earlier when they are over; the learning rate falls by the clock then.
    lr: peak learning rate of AdamW, reached after `warmup` steps; fewer bits need more: 2e-4 for 4, 6e-4 for 2.
    clip: largest norm of the gradient.  clip_mask, scale_gradient: as for `fake_quantize`.
    """

    method: str | None = "signed_absmax"
    bits: int = 4
    group_size: int = 32
    loss: str = "distill"
    steps: int = 5000
    seconds: float | None = None
    lr: float = 2e-4
    warmup: int = 50
    clip: float = 1.0
    clip_mask: bool = True
    scale_gradient: bool = True
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown; choose from {', '.join(LOSSES)}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} trains nothing; ask for at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} trains nothing; choose a learning rate above 0")


def train(teacher, batches, settings=None, *, skip=SKIP, progress=True, compile=False, watch=None, **changes):
    """Train a copy of a model to live with its quantization.

    teacher: a causal language model of transformers; it is left unchanged.
    batches: iterator of int64 tensors (windows, length) of token ids, on the teacher's device.
    settings: Settings; `changes` are set on top of it: train(model, batches, bits=2, steps=100).
    skip: layers that stay unquantized, as for quantize_model.  compile: torch.compile the forward pass (GPU).
    watch: called as watch(step, loss, student) after each step.
    Returns (student in eval mode, float weights; curve: list of {"step", "loss", "seconds"}).
    Raises ValueError for bad settings, for a model without linear layers, and when the loss is no longer finite.
    """
    settings = Settings(**{**vars(settings or Settings()), **changes})
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    names = _rounded_names(student, settings, skip)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of = _loss_function(teacher.eval(), student, settings.loss)
    loss_of = torch.compile(loss_of) if compile else loss_of
    curve, started = [], time.perf_counter()
    for step, done in _schedule(settings, progress):
        loss = loss_of(fake_quantized(student, names, settings), next(batches))
        _update(student, optimizer, loss, learning_rate(step, done, settings), settings.clip)
        if step % EVERY == 0 or step == settings.steps - 1:
            curve.append({"step": step, "loss": _finite(loss, step), "seconds": time.perf_counter() - started})
        if watch is not None:
            watch(step, loss, student)
    return student.eval().requires_grad_(False), curve


def checkpoint(bits):
    """The folder of a bundled model after quantization-aware training, for `load_model`.

    bits: 4 or 2, one scale for each 32 weights. `bench/qat.py` made them, and `bench/results/qat.json` has what they
    were measured at. Raises ValueError for other bits.

    >>> from qlearn import load_model
    >>> model, tokenizer = load_model(checkpoint(2), progress=False)
    >>> model.model.layers[0].mlp.down_proj
    QuantLinear(768, 256, bias=False, int2, 2.5 bits)
    """
    if bits not in CHECKPOINTS:
        raise ValueError(f"there is no trained checkpoint of {bits} bits; choose from {CHECKPOINTS}")
    return Path(__file__).parent / "checkpoints" / f"qat_{bits}_bit"


def fake_quantized(model, names, settings):
    """The model's parameters with those called `names` fake-quantized: dict for torch.func.functional_call."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name] = fake_quantize(
            parameters[name], settings.method, settings.bits, settings.group_size,
            clip_mask=settings.clip_mask,
            scale_gradient=settings.scale_gradient and settings.method == "signed_absmax", **settings.options,
        )  # fmt: skip
    return parameters


def distillation_loss(student_logits, teacher_logits):
    """KL(teacher || student), the mean over positions, in nats.

    student_logits, teacher_logits: (..., vocabulary), any floating dtype; computed in float32.

    >>> distillation_loss(torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log())
    tensor(0.1438)
    """
    vocabulary = student_logits.shape[-1]
    student = F.log_softmax(student_logits.float(), -1).reshape(-1, vocabulary)
    teacher = F.log_softmax(teacher_logits.float(), -1).reshape(-1, vocabulary)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def learning_rate(step, done, settings):
    """Linear warm-up over the first steps, and a cosine to zero over the share `done` (0 to 1) of the training.

    >>> learning_rate(500, 0.5, Settings(lr=1.0)), learning_rate(0, 0.0, Settings(lr=1.0))
    (0.5, 0.02)
    """
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * (1 + math.cos(math.pi * done)) / 2


def windows(ids, batch, length, seed=0):
    """Random windows of a long stream of tokens, for ever.

    ids: 1-D integer tensor.  Yields int64 (batch, length) on its device.
    Raises ValueError when the stream is shorter than a window.

    >>> next(windows(torch.arange(100), batch=2, length=3)).shape
    torch.Size([2, 3])
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a window of {length}; give more text")
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(length, device=ids.device)
    while True:
        first = torch.randint(len(ids) - length + 1, (batch, 1), generator=generator).to(ids.device)
        yield ids[first + reach].long()


def _loss_function(teacher, student, kind):
    """A function (parameters of the student, tokens) -> loss."""

    def loss_of(parameters, tokens):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=tokens.is_cuda):
            logits = functional_call(student, parameters, kwargs={"input_ids": tokens, "use_cache": False}).logits
            if kind == "next token":
                return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
            with torch.no_grad():
                wanted = teacher(input_ids=tokens, use_cache=False).logits
        return distillation_loss(logits, wanted)

    return loss_of


def _rounded_names(model, settings, skip):
    """Names of the weights that are trained under rounding; all are tried once, so that bad settings are told here."""
    if settings.method is None:
        return []
    names = [f"{name}.weight" for name in linear_layers(model, skip)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer to train with skip={skip}; skip fewer")
    with torch.no_grad():
        fake_quantized(model, names, settings)
    return names


def _schedule(settings, progress):
    """Yield (step, share of the training that lies behind): by steps, or by the clock where that is further."""
    started = time.perf_counter()
    for step in tqdm(range(settings.steps), desc="training", unit=" steps", disable=not progress):
        by_clock = (time.perf_counter() - started) / settings.seconds if settings.seconds else 0.0
        if by_clock >= 1:
            return
        yield step, max(step / settings.steps, by_clock)


def _update(student, optimizer, loss, rate, clip):
    """One step of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _finite(loss, step):
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} at step {step}; lower lr")
    return value
