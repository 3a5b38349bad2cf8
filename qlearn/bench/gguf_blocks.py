"""How fast are GGUF blocks encoded, and are they ggml's? Ours beside ggml's own function, on one thread.

    python -m qlearn.bench.gguf_blocks [--ggml build/llama.cpp] [--out FILE]

`llama-quantize` calls `ggml_quantize_chunk` for pieces of a tensor, in as many threads as it is told to use. Here the
same function is called for a whole matrix in one thread, beside the two versions of this package: the readable one of
`formats/gguf_blocks`, and the compiled one of `kernels/cpu/gguf`. What they return is compared block by block.

Megabytes a second are of float32 weights that go in. The matrix is the bundled model's: all of its linear layers'
weights, in rows of 256, repeated with small random changes until there are 16 million weights, so that the figures do
not depend on what a cache can hold. A time is the best of three calls.

It needs ggml, which is built from source where it is not there yet (`bench/ggml.py`).
"""

import argparse
import time
from pathlib import Path

import numpy as np

from qlearn.bench import ggml
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.formats import gguf_blocks
from qlearn.kernels.cpu import gguf as compiled

COLUMNS = 256


def weights(count=1 << 24):
    """float32 (count / 256, 256): the bundled model's linear layers, over and over, each time disturbed by 1 %."""
    from qlearn.models.layers import linear_layers
    from qlearn.models.loading import load_model

    model, _ = load_model(progress=False)
    pieces = [layer.weight.detach().numpy().reshape(-1, COLUMNS) for layer in linear_layers(model).values()]
    once = np.concatenate(pieces)
    rows = np.resize(once, (count // COLUMNS, COLUMNS))
    noise = np.random.RandomState(0).standard_normal((1024, COLUMNS)).astype(np.float32)
    return rows * (1 + np.float32(0.01) * np.resize(noise, rows.shape))


def measure(library, x, repeats=3):
    """A list of dicts: type, imatrix, blocks, differing (ours from ggml's), and megabytes a second of each version."""
    imatrix = np.random.RandomState(1).lognormal(0, 1, COLUMNS).astype(np.float32)
    rows = []
    for block_type, kind in gguf_blocks.BLOCK_TYPES.items():
        for given in (None, imatrix) if kind.uses_importance else (None,):
            versions = {
                "ggml": lambda part, t=block_type, i=given: library.quantize(part, t, i),
                "compiled": lambda part, t=block_type, i=given: compiled.quantize(part, t, i),
                "readable": lambda part, t=block_type, i=given: gguf_blocks.quantize(part, t, i),
            }
            results, speeds = {}, {}
            for name, encode in versions.items():
                results[name], seconds = best_of(encode, x, repeats)
                speeds[name] = x.nbytes / seconds / 1e6
            rows.append(
                {
                    "type": block_type,
                    "imatrix": given is not None,
                    "blocks": x.size // kind.weights,
                    "differing": {
                        name: differing(results["ggml"], results[name], kind) for name in ("compiled", "readable")
                    },
                    "megabytes_per_second": speeds,
                }
            )
            print(describe(rows[-1]), flush=True)
    return rows


def best_of(encode, x, repeats):
    """(what it returns, the shortest time of some calls in seconds), after one call with little to do."""
    encode(x[:16])
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = encode(x)
        times.append(time.perf_counter() - started)
    return result, min(times)


def differing(one, other, kind):
    """How many blocks are not the same bytes."""
    return int((one != other).reshape(-1, kind.nbytes).any(-1).sum())


def describe(row):
    """A row as a line.

    >>> speeds = {"ggml": 50.0, "compiled": 150.0, "readable": 25.0}
    >>> row = {"type": "Q4_K", "imatrix": True, "blocks": 7, "differing": {"compiled": 0, "readable": 1}}
    >>> describe({**row, "megabytes_per_second": speeds})
    'Q4_K with imatrix: ggml 50 MB/s, compiled 150 (3.0 x), readable 25 (0.5 x); differing 0 and 1 of 7'
    """
    speeds = row["megabytes_per_second"]
    ours = [f"{name} {speeds[name]:.0f} ({speeds[name] / speeds['ggml']:.1f} x)" for name in ("compiled", "readable")]
    name = row["type"] + (" with imatrix" if row["imatrix"] else "")
    wrong = row["differing"]
    return (
        f"{name}: ggml {speeds['ggml']:.0f} MB/s, {', '.join(ours)}; "
        f"differing {wrong['compiled']} and {wrong['readable']} of {row['blocks']}"
    )


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Time the encoding of GGUF blocks.")
    parser.add_argument("--ggml", default="build/llama.cpp", help="folder of ggml, built there if need be")
    parser.add_argument("--out", help="folder for the results instead of the package's own")
    options = parser.parse_args(argv)
    x = weights()
    rows = measure(ggml.load(Path(options.ggml)), x)
    record = {**provenance("python -m qlearn.bench.gguf_blocks"), "ggml": ggml.SDIST, "weights": x.size, "rows": rows}
    write("gguf_blocks", record, options.out)


if __name__ == "__main__":
    main()
