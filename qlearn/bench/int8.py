"""How fast are 8-bit integers? The products of real layers, in floating point and in W8A8.

    python -m qlearn.bench.int8 [--device cpu|cuda] [--threads N] [--out FILE]

The usual claim is that int8 is two to four times as fast. That is what the multiplying units can do. A layer must also
fetch its weight, quantize its inputs and scale its outputs, so what is left of the claim depends on how many tokens
come at once. For each shape and number of tokens, these are timed:

    float32 or bfloat16     the layer as it was, on a CPU or a GPU
    product                 the bare integer product, `int8_matmul`
    dynamic, static         the whole W8A8 layer, `int8_linear`

On a GPU the eager layer mostly waits for Python, which launches its kernels one by one. So there each variant is also
timed with its kernels recorded once and replayed as a CUDA graph, and W8A8 once more after `torch.compile`, which
merges the small operations before and after the product: that is how such layers are served.

Each call takes the next of several copies of its weight, together larger than any cache, for in a model all the other
layers come in between. Figures are medians of the time of one call, after a warm-up; CUDA events take the time on a
GPU. One or two minutes on two CPU cores, and about one on an H200.

What a CPU gains depends on whether it has instructions that multiply and add 8-bit integers (VNNI, AMX; I8MM on ARM).
The record lists those it has, and says whether torch's integer product was used, or was worse than floats.
"""

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.methods import absmax
from qlearn.models.int8 import int8_linear, int8_matmul, integers_serve_on_this_cpu, quantize_with

SHAPES = ((256, 768), (4096, 4096), (4096, 14336))  # in, out: the bundled model's MLP; Llama-3.1-8B's attention and MLP
TOKENS = (1, 16, 512, 2048)
CLAIM = (2, 4)  # times as fast
MORE_THAN_CACHES = 2**29  # bytes
LEAST_REPEATS = 5


@torch.no_grad()
def measure(device="cpu", shapes=SHAPES, tokens=TOKENS, seconds=0.3):
    """Time everything.

    seconds: how long to repeat each variant, about.
    Returns a list of dicts: in, out, tokens, and seconds, a dict variant -> seconds of one call.
    """
    rows = []
    for (columns, outputs), count in itertools.product(shapes, tokens):
        calls = variants(columns, outputs, count, device)
        timed = gpu_times(calls, seconds) if device == "cuda" else cpu_times(calls, seconds)
        rows.append({"in": columns, "out": outputs, "tokens": count, "seconds": timed})
        print(describe(rows[-1]), flush=True)
    return rows


def variants(columns, outputs, tokens, device):
    """What is timed: dict name -> list of functions without arguments, each with its own copy of the weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator).to(device)
    weight = torch.randn(outputs, columns, generator=generator).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quantized, x_scale = absmax(weight, bits=8), x.abs().max() / 127
    x_codes, w_scale = quantize_with(x, x_scale), quantized.scales.flatten()
    x, floats, codes = x.to(dtype), _copies(weight.to(dtype)), _copies(quantized.codes())
    return {
        str(dtype).removeprefix("torch."): [partial(F.linear, x, w) for w in floats],
        "product": [partial(int8_matmul, x_codes, w) for w in codes],
        "dynamic": [partial(int8_linear, x, w, w_scale) for w in codes],
        "static": [partial(int8_linear, x, w, w_scale, x_scale) for w in codes],
    }


def cpu_times(variants, seconds):
    """Median seconds of one call, by variant. They take turns, so that a busy moment of the machine meets all alike."""
    took, turns = {name: [] for name in variants}, {name: itertools.cycle(calls) for name, calls in variants.items()}
    began = None
    while True:
        for name, calls in turns.items():
            started = time.perf_counter()
            next(calls)()
            took[name].append(time.perf_counter() - started)
        began = began or time.perf_counter()  # the first turn is the warm-up
        if len(took[name]) > LEAST_REPEATS and time.perf_counter() - began > seconds * len(variants):
            return {name: statistics.median(times[1:]) for name, times in took.items()}


def gpu_times(variants, seconds):
    """Median seconds of one call, by variant: eager, as a CUDA graph, and compiled as a CUDA graph."""
    times = {}
    for name, calls in variants.items():
        times[name] = _gpu_seconds(partial(_run, calls), len(calls), seconds)
        times[f"{name}, graph"] = _gpu_seconds(_recorded(calls), len(calls), seconds)
    for name in ("dynamic", "static"):
        torch.compiler.reset()
        compiled = torch.compile(int8_linear, fullgraph=True, dynamic=False)
        calls = [partial(compiled, *call.args) for call in variants[name]]
        times[f"{name}, compiled, graph"] = _gpu_seconds(_recorded(calls), len(calls), seconds)
    return times


def describe(row):
    """A row as one line: microseconds, and how many times as fast as the first variant."""
    first = next(iter(row["seconds"].values()))
    times = "  ".join(f"{name} {1e6 * s:.0f} us ({first / s:.2f} x)" for name, s in row["seconds"].items())
    return f"{row['in']} x {row['out']}, {row['tokens']} tokens:  {times}"


def _copies(matrix):
    """Copies of a matrix, at least two, that together are larger than the caches."""
    return list(matrix.repeat(max(2, -(-MORE_THAN_CACHES // matrix.nbytes)), 1, 1))


def _run(calls):
    for call in calls:
        call()


def _recorded(calls):
    """A function that runs all the calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up at first use (handles, workspaces, compiled code) stays outside
        _run(calls[:3])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls)
    return graph.replay


def _gpu_seconds(run, calls, seconds):
    """Median over repetitions of a run, for one of its calls."""
    run()
    torch.cuda.synchronize()
    took, began = [], time.perf_counter()
    while len(took) < LEAST_REPEATS or time.perf_counter() - began < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(took)


def main():
    """Measure on the chosen device and write the results."""
    parser = argparse.ArgumentParser(prog="python -m qlearn.bench.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as torch chooses")
    parser.add_argument("--out", type=Path, help="the file to write; by default one among the package's results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    chip = "cpu" if options.device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
    out = options.out or Path(f"int8_{chip}.json")
    rows = measure(options.device, seconds=0.3 if options.device == "cpu" else 0.1)
    threads = f" --threads {options.threads}" if options.threads else ""
    record = provenance(f"python -m qlearn.bench.int8 --device {options.device}{threads}") | {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "integers": options.device == "cuda" or integers_serve_on_this_cpu(),
        "claim": CLAIM,
        "rows": rows,
    }
    write(out.stem, record, out.parent if options.out else None)


if __name__ == "__main__":
    main()
