"""Fine-tuning on pairs of a question and its answer.

The loss is the usual one, the mean of -log p(token) over tokens, but over those of the answers alone: nobody wants the
model to learn to ask. A text is

    tokens      question | answer | end | padding
    labels      -100 ... | answer | end | -100 ...          -100 is what cross_entropy ignores

Padding stands on the right, where no token that counts can see it, so no attention mask is needed.

What learns is what requires a gradient: the adapters after `add_lora`, or all parameters after `requires_grad_(True)`.
Fewer numbers that learn take larger steps: 6e-3 is good for adapters of the bundled model, 1e-3 for all of it. (For
models of billions QLoRA has 2e-4.)

**Less memory still.** transformers' `model.gradient_checkpointing_enable()`, in newer versions
`activation_checkpointing_enable()`, keeps only what goes from layer to layer, and computes the rest anew in the
backward pass: a third more work, and the larger part of the activations is gone. `paged=True` takes the AdamW of
bitsandbytes that lets a GPU move optimizer states to main memory when its own is full. The states of adapters are
small, so that is a safeguard against peaks, and of no use where memory is never full.

Source: QLoRA, arXiv 2305.14314, section 3 and appendix B.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from qlearn.evaluate.completions import complete
from qlearn.training.qat import learning_rate

IGNORED = -100


@dataclass
class Settings:
    """How to train: `steps` of `batch` pairs, or fewer when `seconds` are over; the rate falls by the clock then.

    lr: peak learning rate of AdamW, reached after `warmup` steps, from where it falls to zero on a cosine.
    clip: largest norm of the gradient.  paged: see the top of this file.  seed: of the order of the pairs.
    """

    steps: int = 200
    batch: int = 16
    lr: float = 6e-3
    warmup: int = 10
    seconds: float | None = None
    clip: float = 1.0
    paged: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} trains nothing; give at least 1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} trains nothing; choose a learning rate above 0")


def finetune(model, pairs, tokenizer, settings=None, *, progress=True, watch=None, **changes):
    """Train what requires a gradient, in place.

    model: a causal language model of transformers.  pairs: list of objects with `prompt` and `answer`, str each.
    settings: Settings; `changes` are set on top: finetune(model, pairs, tokenizer, steps=100, lr=1e-3).
    watch: called as watch(step, loss, model) after each step.
    On a GPU products are computed in bfloat16, by autocast.
    Returns the curve: list of {"step", "loss", "seconds"}, a point for each step. The model is in eval mode then.
    Raises ValueError for bad settings, for a model in which nothing requires a gradient, and when the loss is no longer
    finite.
    """
    settings = Settings(**{**vars(settings or Settings()), **changes})
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("nothing requires a gradient; add_lora(model), or model.requires_grad_(True) for all of it")
    optimizer = make_optimizer(learned, settings.lr, settings.paged)
    batches = shuffled(encode(pairs, tokenizer), settings.batch, settings.seed, learned[0].device)
    model.train()
    losses, seconds, started = [], [], time.perf_counter()
    for step in tqdm(range(settings.steps), desc="fine-tuning", unit=" steps", disable=not progress):
        by_clock = (time.perf_counter() - started) / settings.seconds if settings.seconds else 0.0
        if by_clock >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, max(step / settings.steps, by_clock), settings)
        loss = answer_loss(model, *next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seconds.append(time.perf_counter() - started)
        if watch is not None:
            watch(step, losses[-1], model)
    model.eval()
    return _curve(losses, seconds)


def make_optimizer(parameters, lr, paged=False):
    """AdamW without weight decay.  paged: that of bitsandbytes, whose states a GPU may move to main memory.

    Raises ValueError for paged=True without a GPU or without bitsandbytes.
    """
    if not paged:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    try:
        if not torch.cuda.is_available():
            raise ImportError
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as error:
        raise ValueError("paged=True needs a CUDA GPU and the package bitsandbytes; leave it out") from error
    return PagedAdamW32bit(parameters, lr=lr, weight_decay=0.0)


def encode(pairs, tokenizer):
    """Token ids of pairs: list of (ids, how many of them are the question's).

    Raises ValueError for an empty list, and for a question without tokens.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("there are no pairs to learn from; give at least one")
    questions, answers = (
        tokenizer([getattr(p, part) for p in pairs], add_special_tokens=part == "prompt", verbose=False)["input_ids"]
        for part in ("prompt", "answer")
    )
    if not all(questions):
        raise ValueError("a question has no tokens; give the model something to answer")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [(q + a + end, len(q)) for q, a in zip(questions, answers, strict=True)]


def collate(encoded, device="cpu"):
    """Pad texts to one length: (ids, labels), int64 (texts, length); see the top of this file.

    >>> collate([([5, 6, 7], 1), ([8, 9], 1)])
    (tensor([[5, 6, 7], [8, 9, 0]]), tensor([[-100, 6, 7], [-100, 9, -100]]))
    """
    longest = max(len(ids) for ids, _ in encoded)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in encoded])
    place = torch.arange(longest)
    asked, whole = (torch.tensor(n)[:, None] for n in zip(*((a, len(ids)) for ids, a in encoded), strict=True))
    labels = padded.masked_fill((place < asked) | (place >= whole), IGNORED)
    return padded.to(device), labels.to(device)


def shuffled(encoded, batch, seed=0, device="cpu"):
    """Batches for ever, in an order that is new for each pass through the texts."""
    generator = torch.Generator().manual_seed(seed)
    waiting = []
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(len(encoded), generator=generator).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield collate([encoded[i] for i in chosen], device)


def answer_loss(model, ids, labels, reduction="mean"):
    """-log p of the labels that count, in nats: their mean, or with reduction="sum" their sum."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits
    counts = labels[:, 1:] != IGNORED
    return F.cross_entropy(logits[:, :-1][counts].float(), labels[:, 1:][counts], reduction=reduction)


@torch.no_grad()
def held_out_loss(model, pairs, tokenizer, batch=64):
    """Mean -log p over the tokens of all answers, in nats."""
    encoded = sorted(encode(pairs, tokenizer), key=lambda text: len(text[0]))  # little padding
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(encoded), batch):
        ids, labels = collate(encoded[start : start + batch], device)
        total += answer_loss(model, ids, labels, "sum").item()
        count += (labels[:, 1:] != IGNORED).sum().item()
    return total / count


def exact_match(model, pairs, tokenizer, max_new_tokens=48, batch=256):
    """Share of questions, 0 to 1, that the model answers with exactly the right characters, and then ends."""
    right = 0
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        written = complete(model, tokenizer, [p.prompt for p in part], max_new_tokens)
        right += sum(text == pair.answer for text, pair in zip(written, part, strict=True))
    return right / len(pairs)


def _curve(losses, seconds):
    """All losses at once: to read one by one, a GPU would be waited for at each step."""
    values = torch.stack(losses).tolist() if losses else []
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {step}; lower lr")
    return [{"step": n, "loss": v, "seconds": s} for n, (v, s) in enumerate(zip(values, seconds, strict=True))]
