"""How fast is a product without multiplications? Ternary weights against float32, on a CPU.

    python -m qlearn.bench.ternary_cpu [--threads 1 2] [--out FILE]

For each shape and number of tokens, with one thread and with two:

    float32     torch's product of floats
    1.6 bits    `kernels.cpu.ternary`, five trits in a byte
    2 bits      the same, four in a byte

The ternary products take int8 inputs and give int32 sums; a layer (`models.bitlinear`) rounds the inputs before, and
scales the sums after. So the last rows time whole models of the bundled one's size, random weights and all: one more
token behind 64 others, and 64 tokens at once.

Each call takes the next of several copies of its weight, together larger than any cache, for in a model all the other
layers come in between. Figures are medians of the time of one call, after a warm-up. About three minutes on two cores.
"""

import argparse
import itertools
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qlearn.bench.int8 import cpu_times, describe
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.kernels.cpu.ternary import pack_tiles, ternary_matmul
from qlearn.models.bitnet import pack_bitnet
from qlearn.training.bitnet import make_model

SHAPES = ((256, 256), (256, 768), (768, 256), (4096, 4096), (4096, 14336))  # in, out: the bundled model's; Llama-8B's
TOKENS = (1, 8, 64)
THREADS = (1, 2)
BITS = {"1.6 bits": 5, "2 bits": 4}  # -> trits in a byte
MORE_THAN_CACHES = 2**28  # bytes


def measure(shapes=SHAPES, tokens=TOKENS, threads=THREADS, seconds=0.3):
    """Time the products.

    seconds: how long to repeat each variant, about.
    Returns a list of dicts: threads, in, out, tokens, and seconds, a dict variant -> seconds of one call.
    """
    rows = []
    for columns, outputs in shapes:
        weights = make_weights(columns, outputs)
        for count, used in itertools.product(tokens, threads):
            torch.set_num_threads(used)
            timed = cpu_times(variants(weights, columns, count, used), seconds)
            rows.append({"threads": used, "in": columns, "out": outputs, "tokens": count, "seconds": timed})
            print(f"{used} threads: {describe(rows[-1])}", flush=True)
    return rows


def make_weights(columns, outputs):
    """Copies of a random ternary matrix: dict variant -> list of matrices as the variant takes them."""
    trits = np.random.default_rng(0).integers(-1, 2, (outputs, columns), dtype=np.int8)
    floats = torch.from_numpy(trits).float()
    return {
        "float32": list(floats.repeat(_copies(floats.nbytes), 1, 1)),
        **{name: _repeated(pack_tiles(trits, per_byte)) for name, per_byte in BITS.items()},
    }


def variants(weights, columns, tokens, threads):
    """What is timed: dict name -> list of functions without arguments, each with its own copy of the weight."""
    x = np.random.default_rng(1).integers(-127, 128, (tokens, columns), dtype=np.int8)
    calls = {"float32": [partial(F.linear, torch.from_numpy(x).float(), w) for w in weights["float32"]]}
    for name, per_byte in BITS.items():
        calls[name] = [partial(ternary_matmul, x, w, per_byte, threads) for w in weights[name]]
    return calls


@torch.no_grad()
def measure_models(threads=THREADS, seconds=2.0, **sizes):
    """Time whole models: a list of dicts threads, tokens, behind (tokens seen before), and seconds by kind of model."""
    models = {"float32": make_model("bf16", **sizes).eval(), "packed": pack_bitnet(make_model("b158", **sizes))}
    rows = []
    for (tokens, behind), used in itertools.product(((1, 64), (64, 0)), threads):
        torch.set_num_threads(used)
        calls = {name: [_forward(model, tokens, behind)] for name, model in models.items()}
        rows.append({"threads": used, "tokens": tokens, "behind": behind, "seconds": cpu_times(calls, seconds)})
        print({**rows[-1], "seconds": {n: f"{1e3 * s:.2f} ms" for n, s in rows[-1]["seconds"].items()}}, flush=True)
    return rows


def _forward(model, tokens, behind):
    """A function that runs the model over tokens after those that were seen before, again and again."""
    ids = torch.arange(behind + tokens)[None] % model.config.vocab_size
    if not behind:
        return lambda: model(ids, use_cache=False)
    cache = model(ids[:, :behind], use_cache=True).past_key_values

    def run():
        logits = model(ids[:, behind:], past_key_values=cache, use_cache=True).logits
        cache.crop(-tokens)
        return logits

    return run


def _copies(nbytes):
    """How many copies are larger than the caches together, at least two."""
    return max(2, -(-MORE_THAN_CACHES // nbytes))


def _repeated(array):
    """Copies of an array, one behind the other in memory."""
    return list(np.repeat(array[None], _copies(array.nbytes), axis=0))


def main(argv=None):
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m qlearn.bench.ternary_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--out", type=Path, help="the file to write; else one among the package's results")
    options = parser.parse_args(argv)
    before, load = torch.get_num_threads(), os.getloadavg()[0]
    try:
        rows, models = measure(threads=options.threads), measure_models(options.threads)
    finally:
        torch.set_num_threads(before)
    command = f"python -m qlearn.bench.ternary_cpu --threads {' '.join(map(str, options.threads))}"
    out = options.out or Path("ternary_cpu.json")
    # load: how many processes, on the average of a minute, wanted the processor before this one did
    record = provenance(command) | {"load": load, "rows": rows, "models": models}
    write(out.stem, record, out.parent if options.out else None)


if __name__ == "__main__":
    main()
