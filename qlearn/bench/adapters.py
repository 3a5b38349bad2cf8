"""Adapters compared: what each number that learns, and each bit that does not, is worth.

    python -m qlearn.bench.adapters --out FILE        (a CUDA GPU, 4 minutes)

**Learning.** The bundled model learns to write the line of Python that a sentence asks for
(`training/adapters_task.py`), in as many steps each way:

    full       all parameters learn; 32-bit weights, products in bfloat16
    LoRA       adapters beside frozen weights in bfloat16
    QLoRA      the same beside weights of 4 bits and of 2
    LoftQ      2 bits, and adapters that begin with what the rounding lost

Each way is run with three learning rates, one is chosen by the loss on pairs of their own, and the figures are those
of other pairs, of held-out combinations:

    loss            mean -log p over the tokens of right answers, in nats
    exact           share of answers that are right to the last character
    perplexity      on the evaluation text of the package: how much Python was forgotten over the task

and for quantized weights what each way of merging the adapters does (`training/merging.py`).

**Memory.** One training step of the bundled model, and of a Llama of a billion random parameters: what the formula says
for weights, gradients and optimizer, what is really held, and the peak, activations included; with and without gradient
checkpointing, and the seconds of a step. These are run alone; the trainings before them share the GPU.
"""

import argparse
import os
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlearn.bench.results import write
from qlearn.evaluate import bits_per_weight, perplexity
from qlearn.evaluate.provenance import provenance
from qlearn.models import load_model, quantize_model
from qlearn.training import finetune, merging, training_memory
from qlearn.training.adapters_task import pairs
from qlearn.training.loftq import add_loftq
from qlearn.training.lora import add_lora, count_parameters
from qlearn.training.pretrain import wait_for

GROUP_SIZE = 64
RATES = {True: (5e-4, 1e-3, 2e-3), False: (3e-3, 6e-3, 1.2e-2)}  # by whether all parameters learn
COUNTS = {"trained": 20_000, "choosing": 500, "measured": 500, "tokens": 8192}  # pairs, and tokens of plain Python
TRIAL = {"trained": 8, "choosing": 4, "measured": 4, "tokens": 64}
BILLION = {
    "vocab_size": 32_768, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A way to fine-tune. r: None trains all parameters.  method, bits, options: of the frozen weights; None: bfloat16.
    loftq: whether the adapters begin with what the rounding lost."""

    name: str
    r: int | None = None
    method: str | None = None
    bits: float | None = None
    loftq: bool = False
    options: tuple = ()

    def build(self, model):
        """The model, float32, made ready to learn in this way, in place."""
        options = {"group_size": GROUP_SIZE, "progress": False, **dict(self.options)}
        if self.r is None:
            return model.requires_grad_(True)
        if self.loftq:
            model, _ = add_loftq(model, self.method, self.bits, r=self.r, **options)
            return _rest_in_bfloat16(model)
        if self.method is not None:
            quantize_model(model, self.method, self.bits, **options)
        return _rest_in_bfloat16(add_lora(model, r=self.r))


FOUR = ("nf4", 4, (("double_quant", True),))
TWO = ("sinq", 2, ())
RANKS = (4, 16, 64)
JOBS = (
    Job("full"),
    *(Job(f"LoRA, r {r}", r) for r in RANKS),
    *(Job(f"QLoRA, {FOUR[0]}, r {r}", r, *FOUR[:2], False, FOUR[2]) for r in RANKS),
    *(Job(f"QLoRA, 2 bit, r {r}", r, *TWO[:2], False, TWO[2]) for r in RANKS),
    *(Job(f"LoftQ, 2 bit, r {r}", r, *TWO[:2], True, TWO[2]) for r in RANKS),
)
MEMORY_JOBS = (JOBS[0], JOBS[2], JOBS[5], JOBS[8])  # all with r 16


def learn(job, lr, settings, device, counts=COUNTS):
    """One training: its part of the record.

    settings: finetune.Settings, but for lr.  counts: pairs to train on, to choose lr by, to measure on, and tokens.
    """
    begun = time.perf_counter()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    model = job.build(model.to(device))
    trained = pairs(counts["trained"])
    choosing, measured = pairs(counts["choosing"], held_out=True, seed=1), pairs(counts["measured"], held_out=True)
    record = asdict(job) | {
        "lr": lr, "parameters": count_parameters(model),
        "bits_per_weight": bits_per_weight(model) if job.method else None,
        "memory": asdict(training_memory.of_model(model)),
        "before": {"loss": finetune.held_out_loss(model, measured, tokenizer)},
    }  # fmt: skip
    on_the_way = []

    def watch(step, loss, model):
        if (step + 1) % max(1, settings.steps // 6) == 0:
            on_the_way.append([step + 1, round(finetune.held_out_loss(model.eval(), choosing, tokenizer), 5)])
            model.train()

    try:
        curve = finetune.finetune(model, trained, tokenizer, settings, lr=lr, progress=False, watch=watch)
    except ValueError as error:  # a learning rate that is too high is an answer as well
        return record | {"failed": str(error)}
    model.float()  # measured in float32, whatever it was trained in
    record["after"] = figures(model, measured, tokenizer, counts["tokens"])
    record |= {
        "chosen_by": finetune.held_out_loss(model, choosing, tokenizer), "on_the_way": on_the_way,
        "curve": [[point["step"], round(point["loss"], 5)] for point in curve[:: max(1, settings.steps // 50)]],
    }  # fmt: skip
    if job.method is not None:
        record["merging"] = merged(job, model, measured[:256], tokenizer)
    print(f"{job.name:22} lr {lr:<7g} {record['after']} {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def figures(model, measured, tokenizer, tokens):
    """Loss, share of exact answers, perplexity: see the top of this file."""
    return {
        "loss": finetune.held_out_loss(model, measured, tokenizer),
        "exact": finetune.exact_match(model, measured, tokenizer),
        "perplexity": perplexity(model, tokenizer, tokens=tokens),
    }


def merged(job, model, measured, tokenizer):
    """What each way of merging does to the answers: dicts of merging.Merged."""
    device = next(model.parameters()).device
    batches = [
        finetune.collate(finetune.encode(measured[i : i + 64], tokenizer), device) for i in range(0, len(measured), 64)
    ]
    original = load_model()[0].to(device)
    options = {"group_size": GROUP_SIZE, **dict(job.options)}
    return [row.as_dict() for row in merging.measure(model, original, batches, job.method, job.bits, **options)]


def step_memory(model, name, batch, length, checkpointing=False):
    """One training step of a model on random tokens: bytes by formula, held and at the peak, and seconds.

    model: made ready to learn by the job of that name.  Without a GPU the peak is None.
    """
    device = next(model.parameters()).device
    _checkpointing(model.train(), checkpointing)
    optimizer = finetune.make_optimizer([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)

    def step(keep=False):
        finetune.answer_loss(model, ids, ids).backward()
        optimizer.step()
        if not keep:
            optimizer.zero_grad(set_to_none=True)

    step()
    peak = training_memory.peak(step) if ids.is_cuda else None
    begun = time.perf_counter()
    for _ in range(3):
        step()
    wait_for(device)
    seconds = (time.perf_counter() - begun) / 3
    step(keep=True)
    found = {
        "job": name, "checkpointing": checkpointing, "batch": batch, "length": length,
        "parameters": count_parameters(model), "formula": asdict(training_memory.of_model(model)),
        "held": asdict(training_memory.measured(model, optimizer)),
        "allocated": torch.cuda.memory_allocated() if ids.is_cuda else None, "peak": peak, "seconds": seconds,
    }  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    return found


def memory(device, sizes=BILLION, shapes=((64, 64), (4, 1024))):
    """The second part of the record: dict name of a model -> list of `step_memory`.

    sizes: of the random Llama.  shapes: (texts, length) of a step, for the bundled model and for that one.
    """
    models = {"bundled": lambda: load_model()[0], "billion": partial(random_model, sizes, device)}
    found = {name: [] for name in models}
    for (name, make), shape in zip(models.items(), shapes, strict=True):
        for job in MEMORY_JOBS:
            torch.manual_seed(0)
            model = job.build(make().to(device))
            for checkpointing in (False, True):
                found[name].append(step_memory(model, job.name, *shape, checkpointing))
                print(name, {n: found[name][-1][n] for n in ("job", "checkpointing", "peak", "seconds")}, flush=True)
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return found


def _checkpointing(model, on):
    """Switch transformers' gradient checkpointing on or off; newer versions call it activation checkpointing."""
    known_as = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{known_as}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{known_as}_checkpointing_disable")()


def random_model(sizes, device):
    """A Llama that nobody trained: for memory and speed what its weights say does not matter."""
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def best(runs):
    """Of each job the run with the learning rate that was best on the pairs for choosing; failed ones never are."""
    chosen = {}
    for run in runs:
        if "failed" not in run and run["chosen_by"] <= chosen.get(run["name"], run)["chosen_by"]:
            chosen[run["name"]] = run
    return list(chosen.values())


def summary(runs):
    """The record of all learning rates as one for each job: the best run, and beside it the figures of each rate."""
    order = [job.name for job in JOBS]
    runs = sorted(runs, key=lambda run: (order.index(run["name"]) if run["name"] in order else len(order), run["lr"]))
    rates = {}
    for run in runs:
        rates.setdefault(run["name"], []).append({"lr": run["lr"], **run.get("after", {})})  # a failed one has none
    return [run | {"rates": rates[run["name"]]} for run in best(runs)]


def run_all(jobs, rates, settings, device, workers, counts):
    """Yield the trainings with all learning rates as they end, some at a time: one leaves a GPU waiting for Python."""
    calls = [(job, lr, settings, device, counts) for job in jobs for lr in rates[job.r is None]]
    if workers == 1:
        yield from map(_learn, calls)
        return
    with torch.multiprocessing.get_context("spawn").Pool(workers, _quiet, (workers,)) as pool:
        yield from pool.imap_unordered(_learn, calls)


def _learn(call):
    return learn(*call)


def _rest_in_bfloat16(model):
    """What is frozen in 32 bits goes to 16; quantized tensors and adapters stay what they are."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _quiet(processes):
    """For each process: no warnings of libraries, and its share of the processor."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, os.cpu_count() // processes))


def main(argv=None):
    """Run everything, print a table, write the record."""
    parser = argparse.ArgumentParser(description="Full fine-tuning, LoRA, QLoRA and LoftQ on one task.")
    parser.add_argument("--out", type=Path, default=Path("adapters.json"), help="file to write")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=8, help="trainings at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trial", action="store_true", help="few steps of small things, to see whether all of it runs")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.trial:
        parser.error("this takes minutes on a GPU and hours on a CPU; see whether it runs with --trial")
    _quiet(options.workers)
    settings = finetune.Settings(steps=options.steps, batch=options.batch)
    jobs, rates, counts, sizes, shapes = JOBS, RATES, COUNTS, BILLION, ((64, 64), (4, 1024))
    if options.trial:
        jobs, rates = [job for job in JOBS if job.r in (None, 16)], {whole: lrs[:1] for whole, lrs in RATES.items()}
        settings, counts, shapes = finetune.Settings(steps=2, batch=2), TRIAL, ((2, 8), (2, 8))
        sizes = BILLION | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 256, "num_hidden_layers": 2}
    command = f"python -m qlearn.bench.adapters --steps {options.steps} --batch {options.batch}"
    record = provenance(command + " --trial" * options.trial) | {
        "settings": asdict(settings), "counts": counts, "group_size": GROUP_SIZE, "billion": sizes,
        "workers": options.workers,
    }  # fmt: skip
    begun = time.perf_counter()
    record["memory"] = memory(options.device, sizes, shapes)
    _, tokenizer = load_model()
    untrained = load_model()[0].to(options.device)
    measured = pairs(counts["measured"], held_out=True)
    record["untrained"] = figures(untrained, measured, tokenizer, counts["tokens"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for run in run_all(jobs, rates, settings, options.device, options.workers, counts):
        runs.append(run)
        record |= {"runs": summary(runs), "seconds": round(time.perf_counter() - begun, 1)}
        write(options.out.stem, record, options.out.parent)  # what there is, should the time end
    for run in record["runs"]:
        row = [run["parameters"][0] / 1e6, run["memory"]["weights"] / 1e6, *run["after"].values()]
        print(f"{run['name']:22} lr {run['lr']:<7g}", *(f"{figure:9.4f}" for figure in row))
    print(f"{record['seconds']} s")


if __name__ == "__main__":
    main()
