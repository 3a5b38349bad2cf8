"""The recipe of the bundled model, as one command.

    python -m qlearn.training.pretrain --seconds 400 --out model/

1. Collect the corpus (`corpus.py`): Python source with permissive licences, twenty standard-library modules held out.
2. Train a byte-level BPE of 4,096 tokens with GPT-2's pre-tokenization, which every GGUF reader knows.
3. Train a Llama of 7.3 M parameters: 8 layers of width 256, MLP 768, 4 heads that share 2 key-value heads, tied
   embeddings. All of these are multiples of 128 or 256, so that every block format of the course fits without a
   remainder.
4. AdamW, learning rate 3e-3 after a short warm-up, falling linearly to zero. The number of steps is measured: how
   many fit in the seconds that were given. `--steps` fixes it instead, to repeat a run.
5. Save bf16 safetensors and the tokenizer in transformers' own format, and `training.json`: the corpus, the settings,
   the loss curve, the held-out perplexity, the machine.

It needs a GPU: 400 seconds of an H200 are about two days of a laptop.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlearn.evaluate.provenance import provenance
from qlearn.training import corpus

END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 1024
TOKENS_PER_STEP = 192 * CONTEXT
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 150, 0.1, 1.0


def train_tokenizer(texts):
    """Byte-level BPE with GPT-2's split; token 0 marks the end (and so the beginning) of a file.

    texts: list of str.  Returns a tokenizers.Tokenizer of VOCABULARY entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts, chunk=512):
    """All texts as one stream of token ids, each file preceded by token 0.

    Returns a uint16 array.  Encoded in chunks because a batch keeps offsets and masks for every token.
    """
    stream = []
    for start in range(0, len(texts), chunk):
        for encoding in tokenizer.encode_batch(texts[start : start + chunk]):
            stream.append(np.array([0, *encoding.ids], dtype=np.uint16))
    return np.concatenate(stream)


def make_model(width=256, layers=8):
    """The architecture of the bundled model, freshly initialized.

    width: a multiple of 128; heads of 64 numbers, half as many for keys and values, and an MLP three times as wide.
    Raises ValueError for another width.
    """
    if width < 128 or width % 128:
        raise ValueError(f"width={width} is no multiple of 128; take 256, as the bundled model has")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def windows(stream, batch, generator):
    """Yield batches of CONTEXT + 1 tokens for ever; each pass has a new offset and each window once."""
    reach = torch.arange(CONTEXT + 1, device=stream.device)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        count = (len(stream) - offset - 1) // CONTEXT
        order = torch.randperm(count, generator=generator).to(stream.device)
        for start in range(0, count - batch + 1, batch):
            first = order[start : start + batch] * CONTEXT + offset
            yield stream[first[:, None] + reach].long()


def linear(step, steps, peak=PEAK_LR):
    """Linear warm-up, then linear to zero; the weight decay stays. Returns (learning rate, weight decay) of a step.

    >>> linear(0, 1000) < linear(149, 1000), linear(1000, 1000)
    (True, (0.0, 0.1))
    """
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps), WEIGHT_DECAY


def make_optimizer(model):
    """AdamW for two groups of parameters: the matrices, which decay, and the norms, which do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def set_rates(optimizer, rate, decay):
    """The learning rate of all parameters, and the weight decay of the matrices."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.param_groups[0]["weight_decay"] = decay


@torch.no_grad()
def held_out_loss(model, stream, batch=32):
    """Mean cross-entropy in nats per token over consecutive windows of CONTEXT tokens of a held-out stream."""
    count = (len(stream) - 1) // CONTEXT
    reach = torch.arange(CONTEXT + 1, device=stream.device)
    total = 0.0
    for start in range(0, count, batch):
        first = torch.arange(start, min(start + batch, count), device=stream.device) * CONTEXT
        tokens = stream[first[:, None] + reach].long()
        with torch.autocast(stream.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return total / (count * CONTEXT)


def train(
    model, stream, held_out, seconds, steps=None, log_every=25, *,
    schedule=linear, batch=TOKENS_PER_STEP // CONTEXT, deadline=None, compile=True,
):  # fmt: skip
    """Train in place.

    stream, held_out: integer tensors of tokens, on the device of the model.  seconds: the budget from which the number
    of steps follows, when `steps` is None.  schedule: (step, steps) -> (learning rate, weight decay).
    batch: windows of CONTEXT tokens in a step.  deadline: None, or the time.time() at which training has to be over:
    where `steps` do not fit, fewer are planned, and the schedule ends with them.  compile: use torch.compile.
    Returns {"steps", "seconds", "curve": [{"step", "loss"}], "held_out_curve": [{"step", "loss"}]}.
    Raises ValueError when the loss is no longer finite.
    """
    optimizer = make_optimizer(model)
    batches = windows(stream, batch, torch.Generator().manual_seed(0))

    def loss_of(tokens):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    compiled = torch.compile(loss_of) if compile else loss_of
    curve, held_out_curve, running = [], [], torch.zeros((), device=stream.device)
    step, planned, started, timed_from = 0, steps, time.time(), None
    while planned is None or step < planned:
        set_rates(optimizer, *schedule(step, planned or 100_000))
        loss = compiled(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        step += 1
        if step == 10:  # compiled and warm: from here on the clock tells how many steps fit
            wait_for(stream.device)
            started = timed_from = time.time()
        if step == 60:
            wait_for(stream.device)
            planned = plan(planned, seconds, deadline, (time.time() - timed_from) / 50)
        if step % log_every == 0:
            curve.append({"step": step, "loss": round(_finite(running.item() / log_every, step), 4)})
            running.zero_()
        if (planned and step % max(1, planned // 12) == 0) or step == planned:
            held_out_curve.append({"step": step, "loss": round(held_out_loss(model, held_out), 4)})
            print(step, curve[-1:], held_out_curve[-1], f"{time.time() - started:.0f} s", flush=True)
    wait_for(stream.device)
    return {"steps": step, "seconds": round(time.time() - started, 1), "curve": curve, "held_out_curve": held_out_curve}


def plan(steps, seconds, deadline, seconds_a_step):
    """How many steps to make, as it is known after 60: those that fit in `seconds`, or `steps` unless a deadline is
    in the way, of which a twentieth is kept for what comes between steps.

    >>> plan(5000, None, time.time() + 100, 0.1)
    5000 steps do not fit before the deadline; 1010 are made
    1010
    """
    if steps is None:
        steps = 10 + int(seconds / seconds_a_step)
        print(f"{steps} steps fit in {seconds:.0f} s", flush=True)
    if deadline is not None:
        fit = 60 + round(0.95 * (deadline - time.time()) / seconds_a_step)
        if fit < steps:
            print(f"{steps} steps do not fit before the deadline; {fit} are made", flush=True)
        steps = max(60, min(steps, fit))
    return steps


def wait_for(device):
    """Until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _finite(loss, step):
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}; lower the learning rate")
    return loss


def save(model, tokenizer, folder):
    """bf16 safetensors and the tokenizer, in transformers' own format."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    wrapped.model_max_length = CONTEXT
    wrapped.save_pretrained(folder)


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", default="model", help="folder to write")
    parser.add_argument("--seconds", type=float, default=400, help="training time; the number of steps follows from it")
    parser.add_argument("--steps", type=int, help="fix the number of steps instead")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("training the bundled model needs a CUDA GPU; the finished model ships with the package")

    begun = time.time()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    files, sources = corpus.collect()
    learned = [f.text for f in files if not f.held_out]
    held = [f.text for f in files if f.held_out]
    random.Random(0).shuffle(learned)
    print(f"{len(learned)} files, {sum(map(len, learned)) / 1e6:.1f} MB, {time.time() - begun:.0f} s", flush=True)
    tokenizer = train_tokenizer(learned[:4000])
    stream, held_stream = encode(tokenizer, learned), encode(tokenizer, held)
    print(f"{len(stream) / 1e6:.1f} M tokens, held out {len(held_stream)}, {time.time() - begun:.0f} s", flush=True)

    model = make_model().cuda()
    on_gpu = [torch.from_numpy(s.astype(np.int32)).cuda() for s in (stream, held_stream)]
    run = train(model, *on_gpu, options.seconds, options.steps)
    save(model, tokenizer, options.out)
    loss = held_out_loss(model, on_gpu[1])
    held_bytes = sum(len(t.encode()) for t in held)
    record = {
        **provenance(f"python -m qlearn.training.pretrain --steps {run['steps']}"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            "files": len(learned),
            "characters": sum(map(len, learned)),
            "tokens": len(stream),
            "sources": sources,
        },
        "tokens_per_step": TOKENS_PER_STEP,
        "tokens_seen": run["steps"] * TOKENS_PER_STEP,
        "learning_rate": PEAK_LR,
        "held_out": {
            "modules": sorted(corpus.HELD_OUT_MODULES),
            "tokens": len(held_stream),
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss * len(held_stream) / held_bytes / math.log(2),
        },
        **run,
    }
    (Path(options.out) / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("steps", "seconds", "parameters", "tokens_seen", "held_out")}), flush=True)


if __name__ == "__main__":
    main()
