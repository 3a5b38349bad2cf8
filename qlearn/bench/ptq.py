"""The bundled model quantized every way the course has taught so far: one table.

    python -m qlearn.bench.ptq --device cuda

Round-to-nearest, AWQ and GPTQ put the same grid under the weights (zero-point, one scale for each 64), so their rows
have the same bits per weight, but for the scales that AWQ cannot fold away. SmoothQuant is W8A8: activations in 8 bits
too. Quantization-aware training comes from the checkpoints that ship with the package, on the grid of Q4_0 (one scale
for each 32), with plain rounding on that grid beside it.

Measured on the whole evaluation text and on all prompts of the parse rate; calibrated on the calibration text. The
seconds are those of quantizing, and the peak memory is what it needed at most, the model included (CUDA only).
It takes four minutes on an H200. On a CPU it works as well, and takes long.
"""

import argparse
import time
from pathlib import Path

import torch

from qlearn import evaluate
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.models import load_model, quantize_model
from qlearn.models.w8a8 import quantize_w8a8
from qlearn.training import qat

GROUP_SIZE = 64
BITS = (8, 4, 3, 2)


def in_place(method, bits, group_size=GROUP_SIZE, **options):
    """A recipe: device -> quantized model."""

    def make(device):
        model = load_model()[0].to(device)
        return quantize_model(model, method, bits=bits, group_size=group_size, progress=False, **options)

    return make


def w8a8(**options):
    """A recipe with activations in 8 bits."""
    return lambda device: quantize_w8a8(load_model()[0].to(device), progress=False, **options)


def trained(bits):
    """A recipe that loads a trained checkpoint."""
    return lambda device: load_model(qat.checkpoint(bits), progress=False)[0].to(device)


def recipes(bits=BITS):
    """dict name of a row -> recipe, in the order of the table."""
    rows = {}
    for b in bits:
        rows[f"RTN, {b} bit"] = in_place("zero_point", b)
        rows[f"RTN with clipping, {b} bit"] = in_place("zero_point", b, clip="mse")
        rows[f"AWQ, {b} bit"] = in_place("awq", b)
        rows[f"GPTQ, {b} bit"] = in_place("gptq", b)
        rows[f"GPTQ with order and clipping, {b} bit"] = in_place("gptq", b, act_order="static", clip="mse")
        if b < 8:
            rows[f"Q4_0's rule, {b} bit"] = in_place("signed_absmax", b, 32)
        if b in qat.CHECKPOINTS:
            rows[f"QAT, {b} bit"] = trained(b)
        if b == 8:
            rows["W8A8, dynamic"] = w8a8()
            rows["W8A8, static"] = w8a8(activations="static")
            rows["SmoothQuant W8A8, static"] = w8a8(activations="static", smooth=0.5)
    return rows


def measure(device="cpu", bits=BITS, tokens=None, parse=True):
    """Yield evaluate.Row.as_dict() for each recipe, with "seconds_to_quantize" and "peak_bytes"."""
    model, tokenizer = load_model()
    model.to(device)
    reference = evaluate.Reference(model, tokenizer, tokens=tokens)
    yield evaluate.report(model, tokenizer, reference, name="unquantized", parse=parse).as_dict()
    del model
    for name, recipe in recipes(bits).items():
        model, seconds, peak = _timed(recipe, device)
        row = evaluate.report(model, tokenizer, reference, name=name, parse=parse).as_dict()
        del model  # or it would be counted in the next one's peak
        yield row | {"seconds_to_quantize": seconds, "peak_bytes": peak}


def _timed(recipe, device):
    """(model, seconds, peak bytes on the GPU or None)."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the workspaces of CUDA's libraries
    started = time.perf_counter()
    model = recipe(device)
    if cuda:
        torch.cuda.synchronize()
    return model, time.perf_counter() - started, torch.cuda.max_memory_allocated() - before if cuda else None


def main(argv=None):
    """Measure everything, print each row as it comes, write the results."""
    parser = argparse.ArgumentParser(description="Quantize the bundled model every way and measure it.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder to write; the package's results by default")
    parser.add_argument("--name", default="ptq", help="name of the results file")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS, help="only the rows of these widths")
    options = parser.parse_args(argv)
    _warm_up(options.device)
    widths = " ".join(map(str, options.bits))
    record = provenance(f"python -m qlearn.bench.ptq --device {options.device} --bits {widths}") | {
        "group_size": GROUP_SIZE,
        "rows": [],
    }
    for row in measure(options.device, options.bits):
        record["rows"].append(row)
        write(options.name, record, options.out)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def _warm_up(device):
    """Load what a GPU loads when it is first used, so that no row pays for it."""
    if torch.device(device).type == "cuda":
        a = torch.randn(256, 256, device=device)
        torch.linalg.cholesky(a @ a.T + 256 * torch.eye(256, device=device))


if __name__ == "__main__":
    main()
