"""Quantization-aware training of the bundled model, measured against plain rounding and against more training alone.

    python -m qlearn.bench.qat --steps 3000 --out results/

needs CUDA GPUs and uses all it finds. With `--jobs` it runs others than the usual ones; so was made
`results/qat_5000_steps.json`, four learning rates for 4 bits. The corpus is the one the bundled model was trained
on (`training/corpus.py`); everything is measured on two texts that no training ever saw: the evaluation text of the
package, and the twenty modules of the standard library that the corpus leaves out.

For each bit width, in llama.cpp's perplexity convention:

    float       the bundled model
    plain       its weights rounded
    QAT         the same rounding after training under it

    removed  =  (plain - QAT) / (plain - float)        the share of the damage that is gone

and two controls, trained as long on the same batches without any rounding and rounded afterwards: one with the
distillation loss, which starts at its minimum and should change nothing, and one with the usual next-token loss, which
shows what more training alone would do.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from qlearn import evaluate
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.formats import gguf_blocks
from qlearn.models import load_model, quantize_model
from qlearn.models.quantize import linear_layers
from qlearn.training import corpus, qat
from qlearn.training.pretrain import encode

GROUP_SIZE = 32
BATCH, LENGTH = 64, 1024


@dataclass(frozen=True)
class Job:
    """One training run: what it is called, what it is rounded to at the end, and how it is trained."""

    name: str
    bits: int
    lr: float
    fake_quant: bool = True
    loss: str = "distill"
    clip_mask: bool = True
    scale_gradient: bool = True


JOBS = (
    Job("2 bit", 2, 6e-4),
    Job("3 bit", 3, 4e-4),
    Job("4 bit", 4, 2e-4),
    Job("control, next-token loss", 4, 2e-4, fake_quant=False, loss="next token"),
    Job("4 bit, next-token loss", 4, 2e-4, loss="next token"),
    Job("control, distillation", 4, 2e-4, fake_quant=False),
    Job("4 bit, scale without gradient", 4, 2e-4, scale_gradient=False),
)


def prepare(folder):
    """Tokenize the corpus of this machine into `folder`. Returns what the record says about it."""
    files, _ = corpus.collect()
    _, tokenizer = load_model()
    learned = [f.text for f in files if not f.held_out]
    np.random.default_rng(0).shuffle(learned)
    np.save(folder / "stream.npy", encode(tokenizer.backend_tokenizer, learned))
    (folder / "held_out.txt").write_text("\n".join(f.text for f in files if f.held_out), encoding="utf8")
    return {"files": len(learned), "tokens": len(np.load(folder / "stream.npy", mmap_mode="r"))}


class Meter:
    """Measures models on both texts against the unquantized one."""

    def __init__(self, model, tokenizer, folder):
        texts = {"evaluation": None, "standard library": (folder / "held_out.txt").read_text(encoding="utf8")}
        self.references = {
            name: evaluate.Reference(model, tokenizer, text, convention="llama.cpp") for name, text in texts.items()
        }
        self.float = {name: {"perplexity": r.perplexity, "tokens": r.tokens} for name, r in self.references.items()}

    def __call__(self, model):
        """{text: perplexity, KL divergence in nats, flip rate} of a model."""
        compared = {name: evaluate.compare(model, reference) for name, reference in self.references.items()}
        return {
            name: {"perplexity": c.perplexity, "kl_divergence": c.kl_divergence, "flip_rate": c.flip_rate}
            for name, c in compared.items()
        }


def run(job, folder, out, steps, device):
    """Train and measure one job; returns its part of the record."""
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    teacher, tokenizer = load_model()
    teacher.cuda()
    meter = Meter(teacher, tokenizer, folder)
    plain = meter(rounded(teacher, job.bits))
    stream = torch.from_numpy(np.load(folder / "stream.npy").astype(np.int32)).cuda()
    on_the_way, begun = [], time.perf_counter()

    def watch(step, loss, student):
        if (step + 1) % max(1, steps // 10) == 0:
            found = meter(rounded(student, job.bits))["evaluation"]
            on_the_way.append({"step": step + 1, **found})
            print(f"{job.name}: {step + 1} {found} {time.perf_counter() - begun:.0f} s", flush=True)

    settings = qat.Settings(
        "signed_absmax" if job.fake_quant else None, job.bits, GROUP_SIZE, job.loss, steps, None, job.lr,
        clip_mask=job.clip_mask, scale_gradient=job.scale_gradient,
    )  # fmt: skip
    batches = qat.windows(stream, BATCH, LENGTH)
    student, curve = qat.train(teacher, batches, settings, progress=False, compile=True, watch=watch)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    found = meter(stored(student, job.bits))
    record = {
        **asdict(job), "group_size": GROUP_SIZE, "bits_per_weight": job.bits + 16 / GROUP_SIZE, "steps": steps,
        "tokens_per_step": BATCH * LENGTH, "seconds": seconds, "float": meter.float, "plain": plain, "trained": found,
        "removed": {
            text: (plain[text]["perplexity"] - found[text]["perplexity"])
            / (plain[text]["perplexity"] - meter.float[text]["perplexity"])
            for text in found
        },
        "export_is_exact": export_is_exact(student) if job.bits == 4 else None,
        "curve": [[point["step"], round(point["loss"], 5)] for point in curve], "on_the_way": on_the_way,
    }  # fmt: skip
    if job.fake_quant and job.loss == "distill" and job.scale_gradient:
        save(student, tokenizer, job, out)
    print(f"{job.name}: removed {record['removed']} in {seconds:.0f} s", flush=True)
    return record


def rounded(model, bits):
    """A quantized copy of a model."""
    return quantize_model(copy.deepcopy(model).eval(), "signed_absmax", bits, GROUP_SIZE, progress=False)


def stored(student, bits):
    """The student as a checkpoint stores it: linear layers quantized, everything else in bfloat16."""
    model = rounded(student, bits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


@torch.no_grad()
def export_is_exact(student):
    """Whether Q4_0 bytes, decoded, are the fake-quantized weights bit for bit, in every layer."""
    names = {f"{name}.weight": layer for name, layer in linear_layers(student).items()}
    seen = qat.fake_quantized(student, names, qat.Settings(bits=4, group_size=gguf_blocks.BLOCK_TYPES["Q4_0"].weights))
    return all(
        torch.equal(gguf_blocks.dequantize(gguf_blocks.quantize(layer.weight)), seen[name])
        for name, layer in names.items()
    )


def save(student, tokenizer, job, out):
    """The checkpoint that ships with the package (`training.qat.checkpoint`): packed layers, the rest in bfloat16."""
    folder = out / f"qat_{job.bits}_bit"
    stored(student, job.bits).cpu().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_all(jobs, folder, out, steps):
    """All jobs, two at a time on each GPU: one alone leaves it waiting between its many small kernels."""
    context = torch.multiprocessing.get_context("spawn")
    devices = context.Manager().Queue()
    for device in 2 * list(range(torch.cuda.device_count())):
        devices.put(device)
    with context.Pool(2 * torch.cuda.device_count(), maxtasksperchild=1) as pool:
        return pool.starmap(_on_a_free_gpu, [(devices, job, folder, out, steps) for job in jobs], chunksize=1)


def _on_a_free_gpu(devices, *arguments):
    device = devices.get()
    try:
        return run(*arguments, device)
    finally:
        devices.put(device)


def main(argv=None):
    """Run the jobs and write `qat.json`."""
    parser = argparse.ArgumentParser(description="Measure quantization-aware training of the bundled model.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("qat"), help="folder to write")
    parser.add_argument("--jobs", type=json.loads, help="JSON list of jobs (dicts) instead of the usual ones")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this takes minutes on a GPU and days on a CPU; lesson 05 has a version of one minute")
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [Job(**job) for job in options.jobs] if options.jobs else JOBS
    with tempfile.TemporaryDirectory() as folder:
        about = prepare(Path(folder))
        print(about, flush=True)
        runs = run_all(jobs, Path(folder), options.out, options.steps)
    command = f"python -m qlearn.bench.qat --steps {options.steps}"
    if options.jobs:
        command += f" --jobs '{json.dumps(options.jobs)}'"
    record = provenance(command) | {"corpus": about, "runs": runs}
    write("qat", record, options.out)
    for r in runs:
        text = "evaluation"
        figures = [r[which][text]["perplexity"] for which in ("float", "plain", "trained")]
        print(f"{r['name']:28}", *(f"{p:9.4f}" for p in figures), f"removed {100 * r['removed'][text]:.1f} %")


if __name__ == "__main__":
    main()
