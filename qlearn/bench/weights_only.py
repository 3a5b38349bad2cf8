"""Weight-only methods on the bundled model, at equal codes and at equal bits: two tables.

    nice python -m qlearn.bench.weights_only

**rows**: groups of 64, codes of 4, 3 and 2 bits. What is stored beside the codes differs, and is counted: compare
perplexity along `bits_per_weight`, not along the name.

**equal_bits**: the K-quants of llama.cpp, which have scales of 6 and 4 bits, and beside each the groups with which
other methods take as many bits. For K-quants the matrices are replaced by what their blocks decode to, so that only
linear layers are quantized, as everywhere here (llama.cpp's files have other types for some: `gguf_files.json`).

**without_overhead**: formats that know no column scales, before and after the columns have been balanced for good
(`models/presinq.py`).

**layers**: why balancing helps, for each kind of layer. The rank correlation of the columns' deviations with the mean
size of what they read; the relative error of weights and of outputs at 3 bits, with rounding to nearest and with SINQ.

**sizes**: memory of published models (`model_sizes.py`).

**times**: what quantizing all matrices takes of one core, in seconds of that core, the calibration text included; the
better of two runs.

Measured on the whole evaluation text; the calibrated methods learn from the calibration text. `weight_error` is the
relative error of all weights together. Half an hour on two idle cores. `--only times` measures one part anew, and
leaves the others as they are; `--resume FILE` goes on with a run that was cut short.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from qlearn import evaluate
from qlearn.bench import model_sizes
from qlearn.bench.results import read, write
from qlearn.evaluate.provenance import provenance
from qlearn.formats import gguf_blocks
from qlearn.methods import sinq, zero_point
from qlearn.models import load_model, quantize_model
from qlearn.models.calibration import calibration_ids, walk
from qlearn.models.layers import linear_layers
from qlearn.models.presinq import presinq

GROUP_SIZE = 64
BITS = (4, 3, 2)
TIMED = ("zero_point", "absmax", "hadamard", "hqq", "sinq", "nf4", "gptq", "awq", "asinq")
K_QUANTS = {"Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}  # bits a weight: 144, 110 and 84 bytes for 256


def in_place(method, bits, group_size=GROUP_SIZE, before=None, **options):
    """A recipe: model -> model.  before: what is done to it first."""

    def make(model):
        if before:
            before(model)
        return quantize_model(model, method, bits=bits, group_size=group_size, progress=False, **options)

    return make


def k_quant(kind):
    """A recipe that replaces the matrices by what the blocks of a type decode to."""

    def make(model):
        for layer in linear_layers(model).values():
            blocks = gguf_blocks.quantize(layer.weight.detach(), kind)
            layer.weight.data = gguf_blocks.dequantize(blocks, kind)
        return model

    return make


def balanced(group_size, **options):
    """What `presinq` does, as a step before quantizing."""
    return lambda model: presinq(model, group_size, progress=False, **options)


def recipes(bits=BITS):
    """dict name of a row -> recipe: every method at groups of 64."""
    rows = {}
    for b in bits:
        rows[f"RTN, {b} bit"] = in_place("zero_point", b)
        rows[f"absmax, {b} bit"] = in_place("absmax", b)
        rows[f"Hadamard, {b} bit"] = in_place("hadamard", b)
        rows[f"HQQ, {b} bit"] = in_place("hqq", b)
        rows[f"HQQ as described, {b} bit"] = in_place("hqq", b, kappa=1.01)
        rows[f"SINQ, {b} bit"] = in_place("sinq", b)
        rows[f"SINQ with 8-bit scales, {b} bit"] = in_place("sinq", b, small_scales=True)
        rows[f"SINQ with the gate, {b} bit"] = in_place("sinq", b, kurtosis=5.0)
        rows[f"SINQ without shift, {b} bit"] = in_place("sinq", b, shift=False)
        rows[f"SINQ in square tiles, {b} bit"] = in_place("sinq", b, tile_rows=GROUP_SIZE)
        rows[f"SINQ, then HQQ, {b} bit"] = in_place("sinq", b, hqq=True)
        if b in (4, 3):
            rows[f"NF{b}, {b} bit"] = in_place(f"nf{b}", b)
            rows[f"NF{b}, double quantization, {b} bit"] = in_place(f"nf{b}", b, double_quant=True)
            rows[f"SINQ-NF{b}, {b} bit"] = in_place("sinq", b, normal_float=True)
        rows[f"GPTQ, {b} bit"] = in_place("gptq", b)
        rows[f"AWQ, {b} bit"] = in_place("awq", b)
        rows[f"A-SINQ, {b} bit"] = in_place("asinq", b)
    return rows


def equal_bits():
    """dict name of a row -> recipe: each K-quant, and what takes about as many bits, from 3 % less to 1 % more."""
    small = {"small_scales": True}
    return {
        "Q4_K": k_quant("Q4_K"),
        "SINQ with 8-bit scales, 4 bit, groups of 32": in_place("sinq", 4, 32, **small),
        "A-SINQ with 8-bit scales, 4 bit, groups of 32": in_place("asinq", 4, 32, **small),
        "SINQ-NF4 with 8-bit scales, 4 bit, groups of 64": in_place("sinq", 4, normal_float=True, **small),
        "Q3_K": k_quant("Q3_K"),
        "SINQ with 8-bit scales, 3 bit, groups of 32": in_place("sinq", 3, 32, **small),
        "A-SINQ with 8-bit scales, 3 bit, groups of 32": in_place("asinq", 3, 32, **small),
        "Q2_K": k_quant("Q2_K"),
        "SINQ, 2 bit, groups of 32": in_place("sinq", 2, 32),
        "A-SINQ, 2 bit, groups of 32": in_place("asinq", 2, 32),
        "RTN, 2 bit, groups of 32": in_place("zero_point", 2, 32),
    }


def without_overhead():
    """dict name of a row -> recipe: plain formats, as they are and after balancing."""
    rows = {
        "Q4_0": in_place("signed_absmax", 4, 32),
        "balanced, Q4_0": in_place("signed_absmax", 4, 32, balanced(32)),
        "balanced three times, Q4_0": in_place("signed_absmax", 4, 32, balanced(32, repeats=3)),
        "balanced with 16 states, Q4_0": in_place("signed_absmax", 4, 32, balanced(32, order=16)),
    }
    for b in (4, 3):
        rows[f"RTN, {b} bit"] = in_place("zero_point", b)
        rows[f"balanced, RTN, {b} bit"] = in_place("zero_point", b, before=balanced(GROUP_SIZE))
        rows[f"balanced with 16 states, RTN, {b} bit"] = in_place(
            "zero_point", b, before=balanced(GROUP_SIZE, order=16)
        )
    return rows


def measure(recipes, tokens=None):
    """Yield a dict for each recipe: evaluate.Row.as_dict(), and "weight_error" (None where weights were moved)."""
    model, tokenizer = load_model()
    reference = evaluate.Reference(model, tokenizer, tokens=tokens)
    originals = {name: layer.weight.detach() for name, layer in linear_layers(model).items()}
    for name, recipe in recipes.items():
        model = recipe(load_model()[0])
        row = evaluate.report(model, tokenizer, reference, name=name, parse=False).as_dict()
        if name in K_QUANTS:
            row |= _size(model, K_QUANTS[name])
        row |= {"weight_error": None if "balanced" in name else weight_error(model, originals)}
        yield {key: value for key, value in row.items() if key not in ("seconds", "parse_rate")}


def _size(model, bits):
    """What the model would take with linear layers of so many bits a weight."""
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    return {"bits_per_weight": bits, "bytes": evaluate.model_bytes(model) - 2 * weights + int(weights * bits / 8)}


def weight_error(model, originals):
    """The norm of all errors over the norm of all weights."""
    error = size = 0.0
    for name, weight in originals.items():
        layer = model.get_submodule(name)
        now = layer.quantized.dequantize() if hasattr(layer, "quantized") else layer.weight
        error += (now - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
    return (error / size) ** 0.5


def times(methods=TIMED, bits=4, runs=2):
    """Yield {"method", "bits", "seconds"} for each method: the time of one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for method in methods:
            seconds = []
            for _ in range(runs):
                model, _ = load_model()
                started = time.process_time()
                quantize_model(model, method, bits=bits, group_size=GROUP_SIZE, progress=False)
                seconds.append(time.process_time() - started)
            yield {"method": method, "bits": bits, "seconds": min(seconds)}
    finally:
        torch.set_num_threads(threads)


def layers(bits=3, tokens=4096):
    """A dict for each kind of layer, means over the blocks: see above."""
    model, tokenizer = load_model()
    found = {}
    for block in walk(model, calibration_ids(tokenizer, tokens=tokens)):
        own = {n: m for n, m in block.module.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs = block.collect(own, hessian=False, sample=512)
        for name, layer in own.items():
            weight, x = layer.weight.detach(), inputs[name].sample
            figures = [spearmanr(weight.std(0), inputs[name].mean_abs).statistic]
            for method in (zero_point, sinq):
                error = method(weight, bits, GROUP_SIZE).dequantize() - weight
                figures += [error.norm() / weight.norm(), (x @ error.T).norm() / (x @ weight.T).norm()]
            found.setdefault(name.split(".")[-1], []).append(torch.tensor([float(f) for f in figures]))
    names = ("rank_correlation", "rtn_weight_error", "rtn_output_error", "sinq_weight_error", "sinq_output_error")
    means = {name: torch.stack(rows).mean(0).tolist() for name, rows in found.items()}
    return [{"layer": name, "bits": bits, **dict(zip(names, mean, strict=True))} for name, mean in means.items()]


PARTS = {  # name in the results -> (done: the rows there are) -> what yields the dicts of the others
    "unquantized": lambda done: measure({"unquantized": lambda model: model}),
    "sizes": lambda done: model_sizes.sizes(),
    "layers": lambda done: layers(),
    "times": lambda done: times(),
    "rows": lambda done: measure(_without(recipes(), done)),
    "equal_bits": lambda done: measure(_without(equal_bits(), done)),
    "without_overhead": lambda done: measure(_without(without_overhead(), done)),
}


def _without(recipes, done):
    """The recipes that have no row yet."""
    return {name: recipe for name, recipe in recipes.items() if name not in {row["name"] for row in done}}


def main(argv=None):
    """Measure everything, print each row as it comes, write the results."""
    parser = argparse.ArgumentParser(description="Quantize the weights of the bundled model in many ways.")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts, and keep the others")
    parser.add_argument("--resume", type=Path, help="the file of a run that was cut short: what it has is kept")
    parser.add_argument("--out", type=Path, help="folder to write; the package's results by default")
    options = parser.parse_args(argv)
    earlier = json.loads(options.resume.read_text()) if options.resume else {}
    record = read("weights_only") if options.only else {}
    command = "python -m qlearn.bench.weights_only" + (" --resume FILE" if options.resume else "")
    record |= provenance(command) | {"group_size": GROUP_SIZE}
    for part in options.only or PARTS:
        record[part] = list(earlier.get(part, []))
        if record[part] and part in ("unquantized", "sizes", "layers", "times"):
            continue
        for row in PARTS[part](record[part]):
            record[part].append(row)
            write("weights_only", record, options.out)
            print(part, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
