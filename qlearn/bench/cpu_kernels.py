"""How fast are the processor's kernels? Products with packed codes, balancing, and GPTQ's columns.

    python -m qlearn.bench.cpu_kernels [--threads 1 2] [--out FILE]

**Products**, for each shape, number of bits and number of rows of x:

    float32       torch's product with the float matrix (torch.mv for one row)
    bfloat16      the same in bfloat16: what is gained by halving the bytes, and with torch's own loops
    packed        `kernels.cpu.packed`, absmax with groups of 64
    packed, zeros the same, zero_point: a zero for each group
    reference     what a QuantLinear does without a kernel: the float matrix is made, and then multiplied with

Each call takes the next of several copies of its weight, together larger than any cache, for in a model all the other
layers come in between. The bytes of a weight over the time of a call are the speed at which memory was read.

**Balancing and GPTQ**: all layers of the bundled model, by the readable loops and by the compiled ones, with one
thread. The results are the same to the last bit, which is checked here too.

Figures are medians of the time of one call, after a warm-up: of 9 calls, or of 3 of the reference, which is slow. About
ten minutes on two cores.
"""

import argparse
import itertools
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import qlearn
from qlearn.bench.results import write
from qlearn.evaluate import calibration_text
from qlearn.evaluate.provenance import provenance
from qlearn.kernels.cpu.packed import packed_matmul
from qlearn.kernels.dispatch import use
from qlearn.methods.gptq import gptq
from qlearn.methods.statistics import InputStatistics
from qlearn.models import load_model

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # out, in: of Llama-8B
BITS = (2, 3, 4, 8)
ROWS = (1, 4, 8)
THREADS = (1, 2)
GROUP = 64
REPEATS, REFERENCE_REPEATS = 9, 3
MORE_THAN_CACHES = 2**28  # bytes
METHODS = {"packed": "absmax", "packed, zeros": "zero_point"}


def measure_products(shapes=SHAPES, bits=BITS, rows=ROWS, threads=THREADS, repeats=REPEATS):
    """Time the products.

    repeats: calls of each, of which the median counts.
    Returns a list of dicts: out, in, bits (32 and 16 for floats), rows, threads, variant, bits_per_weight, seconds, and
    gigabytes_per_second.
    """
    found, before = [], torch.get_num_threads()
    try:
        for (out, columns), width in itertools.product(shapes, (32, 16, *bits)):
            for variant, (weights, call, bits_per_weight) in variants(out, columns, width).items():
                for count, used in itertools.product(rows, threads):
                    torch.set_num_threads(used)
                    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
                    calls = [partial(call, x, w) for w in weights]
                    seconds = _median(calls, repeats if variant != "reference" else min(repeats, REFERENCE_REPEATS))
                    speed = bits_per_weight * out * columns / 8e9 / seconds
                    row = {"out": out, "in": columns, "bits": width, "rows": count, "threads": used, "variant": variant}
                    row |= {"bits_per_weight": bits_per_weight, "seconds": seconds, "gigabytes_per_second": speed}
                    found.append(row)
                    print(describe(row), flush=True)
    finally:
        torch.set_num_threads(before)
    return found


def variants(out, columns, bits):
    """What is timed at so many bits: dict name -> (copies of the weight, function (x, weight), bits a weight)."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    if bits in (16, 32):
        dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
        return {str(dtype).removeprefix("torch."): (_copies(weight.to(dtype), torch.clone), _of_floats, bits)}
    found = {}
    for name, method in METHODS.items():
        quantized = qlearn.quantize(weight, method, bits, GROUP)
        copies = _copies(quantized, lambda one: replace(one, packed=one.packed.clone(), scales=one.scales.clone()))
        found[name] = copies, packed_matmul, quantized.bits_per_weight
    return found | {
        "reference": (copies[:1], _by_reference, quantized.bits_per_weight)
    }  # slow, whatever the cache holds


def _of_floats(x, weight):
    x = x.to(weight.dtype)
    return torch.mv(weight, x[0])[None] if len(x) == 1 else F.linear(x, weight)


def _by_reference(x, quantized):
    return F.linear(x, quantized.dequantize())


def measure_methods(repeats=3):
    """Time sinq and gptq on all layers of the bundled model, by the readable loops and the compiled ones.

    Returns dict method -> dict: reference and cpu, seconds of all layers with one thread; same, whether all stored
    tensors are equal.
    """
    layers, before = layers_and_inputs(), torch.get_num_threads()
    methods = {
        "sinq": lambda weight, _: qlearn.quantize(weight, "sinq", bits=4, group_size=GROUP),
        "gptq": lambda weight, statistics: gptq(weight, 4, GROUP, inputs=statistics),
    }
    found = {}
    torch.set_num_threads(1)
    try:
        for name, method in methods.items():
            taken, results = {"reference": [], "cpu": []}, {}
            for _ in range(repeats + 1):
                for backend, seconds in taken.items():
                    with use(backend):
                        started = time.perf_counter()
                        results[backend] = [method(*layer) for layer in layers]
                        seconds.append(time.perf_counter() - started)
            found[name] = {backend: statistics.median(seconds[1:]) for backend, seconds in taken.items()}
            found[name]["same"] = all(_equal(a, b) for a, b in zip(*results.values(), strict=True))
            print(name, found[name], flush=True)
    finally:
        torch.set_num_threads(before)
    return found


def layers_and_inputs(tokens=2048):
    """(weight, InputStatistics) of every linear layer of the bundled model's blocks."""
    model, tokenizer = load_model(progress=False)
    found = []
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            statistics = InputStatistics(module.in_features, sample=0)
            module.register_forward_pre_hook(lambda _, args, statistics=statistics: statistics.add(args[0]))
            found.append((module.weight.detach(), statistics))
    ids = tokenizer(calibration_text()[: 10 * tokens], verbose=False)["input_ids"][:tokens]
    with torch.no_grad():
        model.model(torch.tensor(ids).view(-1, min(tokens, 512)))
    return found


def describe(row):
    """A row as one line."""
    return (
        f"{row['out']} x {row['in']}, {row['rows']} rows, {row['threads']} threads: {row['variant']} at "
        f"{row['bits_per_weight']:.3g} bits {1e3 * row['seconds']:.2f} ms ({row['gigabytes_per_second']:.1f} GB/s)"
    )


def _equal(a, b):
    return all(torch.equal(tensor, b.state_tensors()[name]) for name, tensor in a.state_tensors().items())


def _copies(weight, copy):
    """Copies that are larger than the caches together, at least two."""
    return [copy(weight) for _ in range(max(2, -(-MORE_THAN_CACHES // weight.nbytes)))]


def _median(calls, repeats):
    """Median seconds of a call; the first is a warm-up."""
    turn, seconds = itertools.cycle(calls), []
    next(turn)()
    for _ in range(repeats):
        call = next(turn)
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(argv=None):
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m qlearn.bench.cpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--out", type=Path, help="the file to write; else one among the package's results")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    methods, rows = measure_methods(), measure_products(threads=options.threads)
    command = f"python -m qlearn.bench.cpu_kernels --threads {' '.join(map(str, options.threads))}"
    out = options.out or Path("cpu_kernels.json")
    # load: how many processes, on the average of a minute, wanted the processor before this one did, and at the end
    record = provenance(command) | {"load": [load, os.getloadavg()[0]], "group_size": GROUP}
    write(out.stem, record | {"methods": methods, "rows": rows}, out.parent if options.out else None)


if __name__ == "__main__":
    main()
