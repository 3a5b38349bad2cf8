"""Training in FP4 against FP8 and bfloat16: one loss for each scheme, width and number of tokens.

    python -m qlearn.training.tokens tokens.npz
    python -m qlearn.bench.fp4_training --tokens tokens.npz --runs runs/
    python -m qlearn.bench.fp4_training --merge runs/ --out results/

The first command makes the corpus of the bundled model into tokens. The second trains every model of `WIDTHS` with
six schemes (`COMPARED`; `training/fp4.py` has more) and every number of tokens, spread over all GPUs it finds, and
writes a file for each width and scheme, a row at a time; rows that are there already are not made again, so it may be
stopped and started. The third makes one file of them all.

The architecture is the bundled model's (`pretrain.make_model`), wider; N is the number of parameters in its linear
layers, which is what scaling laws count. All runs of a width see the same batches in the same order, with the same
learning rate, and end on the same schedule. Those of a seed start alike; `--seed 1` makes them all once more, which the
committed results have, and of some schemes a third time. The loss is that on the twenty held-out modules of the
standard library, computed with the scheme's own forward pass, in nats a token.

On a GPU that has FP8 units the scheme fp8 uses them. FP4 is emulated, on any: what it computes is FP4's, what it costs
is not, so the seconds say nothing about FP4.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.models.layers import linear_layers
from qlearn.training.fp4 import SCHEMES, to_low_precision
from qlearn.training.pretrain import CONTEXT, PEAK_LR, held_out_loss, linear, make_model, train
from qlearn.training.tokens import load_tokens

WIDTHS = (256, 384, 512)
TOKENS = (8_000_000, 20_000_000, 50_000_000)
BATCH = 16  # windows of 1,024 tokens in a step; with 64, the smallest number of tokens is too few steps to learn from
ALL = ("bf16", *SCHEMES)
COMPARED = ("bf16", "fp8", "quartet_sr", "quartet_rtn", "naive_fp4", "luq")  # those of the committed results


def peak_rate(width):
    """The learning rate: the bundled model's, and lower for wider models.

    >>> peak_rate(256), peak_rate(512)
    (0.003, 0.0015)
    """
    return PEAK_LR * 256 / width


def run(width, scheme, tokens, budgets=TOKENS, batch=BATCH, device="cuda", compile=True, layers=8, seed=0):
    """Train one model for each number of tokens, and yield a row, a dict, as each is done.

    width: of the model.  scheme: "bf16" or a name of SCHEMES.  tokens: a file of `training.tokens`.
    batch: windows in a step.  compile: the blocks of the model, by torch.compile.
    Raises ValueError for an unknown scheme, and when a training diverges.
    """
    stream, held_out, _ = load_tokens(tokens, device)
    for budget in budgets:
        torch.manual_seed(seed)
        model = make_model(width, layers).to(device)
        parameters = sum(layer.weight.numel() for layer in linear_layers(model).values())
        to_low_precision(model, scheme)
        if compile:  # one block is compiled, and serves for all: a graph of the whole model takes minutes
            for block in model.model.layers:
                block.compile()
        steps = steps_for(budget, batch)
        schedule = functools.partial(linear, peak=peak_rate(width))
        done = train(model, stream, held_out, None, steps, schedule=schedule, batch=batch, compile=False)
        yield {
            "scheme": scheme,
            "width": width,
            "params": parameters,
            "tokens": steps * batch * CONTEXT,
            "loss": round(held_out_loss(model, held_out), 5),
            "seed": seed,
            "steps": steps,
            "learning_rate": peak_rate(width),
            "seconds": done["seconds"],
            "curve": done["curve"][1::2] if steps > 400 else done["curve"],
        }


def steps_for(budget, batch=BATCH):
    """How many steps a number of tokens is.

    >>> steps_for(50_000_000)
    3052
    """
    return max(1, round(budget / (batch * CONTEXT)))


def run_and_write(width, scheme, options):
    """`run` into the file of this width and scheme, a row at a time; rows that it has are not made again."""
    path = run_file(options.runs, width, scheme, options.seed)
    rows = read_rows(path)
    missing = [n for n in options.budgets if steps_for(n) not in {row["steps"] for row in rows}]
    for row in run(width, scheme, options.tokens, missing, seed=options.seed):
        rows.append(row)
        record = {**provenance("python -m qlearn.bench.fp4_training --tokens tokens.npz --runs runs/"), "rows": rows}
        write(path.stem, record, path.parent)
        print({k: v for k, v in row.items() if k != "curve"}, flush=True)


def read_rows(path):
    """The rows of a run file; none where there is no file yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def run_all(options):
    """Every width and scheme, the longest first, one process on each GPU at a time."""
    jobs = [(width, scheme) for width in sorted(options.widths, reverse=True) for scheme in options.schemes]
    folder = Path(options.runs)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in jobs if len(read_rows(run_file(folder, *job, options.seed))) < len(options.budgets)]
    free, busy, failed = options.each * list(range(torch.cuda.device_count())), {}, []
    while jobs or busy:
        while jobs and free:
            gpu, (width, scheme) = free.pop(), jobs.pop(0)
            busy[_start(options, width, scheme, gpu)] = gpu, (width, scheme)
        time.sleep(1)
        for process in [p for p in busy if p.poll() is not None]:
            gpu, job = busy.pop(process)
            free.append(gpu)
            failed += [job] if process.returncode else []
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, first {failed[0]}; its .log in {folder} says why")


def _start(options, width, scheme, gpu):
    command = [sys.executable, "-m", "qlearn.bench.fp4_training", "--one", str(width), scheme]
    command += ["--tokens", options.tokens, "--runs", options.runs, "--seed", str(options.seed)]
    command += ["--budgets", *map(str, options.budgets)]
    log = run_file(Path(options.runs), width, scheme, options.seed).with_suffix(".log").open("w")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_file(folder, width, scheme, seed=0):
    """The file of one width and scheme."""
    return Path(folder) / f"{width}_{scheme}_{seed}.json"


def merge(folder):
    """All rows of a folder of runs, and where they come from."""
    paths = sorted(Path(folder).glob("*_*_*.json"))
    if not paths:
        raise ValueError(f"there are no runs in {folder}; name the folder that was given as --runs")
    records = [json.loads(path.read_text()) for path in paths]
    rows = [row for record in records for row in record.pop("rows")]
    rows.sort(key=lambda row: (row["width"], row["tokens"], ALL.index(row["scheme"]), row["seed"]))
    return {**records[0], "rows": rows}


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Train small models in FP4, FP8 and bfloat16.")
    parser.add_argument("--tokens", help="the file that `python -m qlearn.training.tokens` has made")
    parser.add_argument("--runs", default="runs", help="folder for one file a width and scheme")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--schemes", choices=ALL, nargs="+", default=COMPARED)
    parser.add_argument("--budgets", type=int, nargs="+", default=TOKENS, help="numbers of tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the weights at the start and of the rounding")
    parser.add_argument("--each", type=int, default=1, help="processes on each GPU at a time")
    parser.add_argument("--one", nargs=2, metavar=("WIDTH", "SCHEME"), help="only this, in this process")
    parser.add_argument("--merge", metavar="RUNS", help="make fp4_training.json of a folder of runs")
    parser.add_argument("--out", help="the folder for it; the package's own results unless given")
    options = parser.parse_args(argv)
    if options.merge:
        write("fp4_training", merge(options.merge), options.out)
        return
    if not options.tokens or not Path(options.tokens).is_file():
        parser.error(f"there is no file {options.tokens}; python -m qlearn.training.tokens tokens.npz makes it")
    if not torch.cuda.is_available():
        parser.error("these trainings need a CUDA GPU; results/fp4_training.json has what came of them")
    if not options.one:
        run_all(options)
        return
    torch.set_float32_matmul_precision("high")
    run_and_write(int(options.one[0]), options.one[1], options)


if __name__ == "__main__":
    main()
