"""FP8 matrix products against bfloat16 ones, on a GPU, at the sizes of a Llama of 8 billion parameters.

    python -m qlearn.bench.fp8_speed --out results/

For each linear layer of a block, and for the three products of a training step (`training/fp4.py`), the median time of:

    bf16       torch.mm of two bfloat16 matrices
    fp8        torch._scaled_mm of two FP8 matrices that are there already: what the units can do
    fp8_all    finding the largest magnitude, rounding both matrices from bfloat16, transposing where the unit asks for
               it, then multiplying: what a training step pays; compiled by torch.compile

and the same for the whole step of a layer. Timed with CUDA events after a warm-up.
"""

import argparse

import torch

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.training.fp4 import E4M3, E5M2, LowPrecisionLinear, has_fp8_units, scaled_mm
from qlearn.training.low_precision import FP8

LAYERS = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}  # out, in
TOKENS = 8192


def median_ms(function, repeats=20, warm=5):
    """Median milliseconds of a function that queues work on the GPU."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def products(tokens, outputs, inputs):
    """The three products of a training step as (name, rows of a, rows of b, what is summed over, kind of a)."""
    return [
        ("y", tokens, outputs, inputs, E4M3),
        ("dx", tokens, inputs, outputs, E5M2),
        ("dW", outputs, inputs, tokens, E5M2),
    ]


@torch.compile
def _round_and_multiply(a, b, kind_a, a_transposed, b_transposed):
    (a, a_factor), (b, b_factor) = FP8(kind_a).codes(a), FP8(E4M3).codes(b)
    a = a.T.contiguous() if a_transposed else a
    b = b.T.contiguous() if b_transposed else b
    return scaled_mm(a, b, a_factor, b_factor, torch.bfloat16)


def measure_product(name, rows_a, rows_b, summed, kind):
    """Times and rates of one product."""
    a = torch.randn(rows_a, summed, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(rows_b, summed, device="cuda", dtype=torch.bfloat16)
    (a8, fa), (b8, fb) = FP8(kind).codes(a), FP8(E4M3).codes(b)
    a_turned, b_turned = name == "dW", name != "y"
    as_it_lies = (a.T.contiguous() if a_turned else a, b.T.contiguous() if b_turned else b)
    times = {
        "bf16": median_ms(lambda: torch.mm(a, b.T)),
        "fp8": median_ms(lambda: scaled_mm(a8, b8, fa, fb, torch.bfloat16)),
        "fp8_all": median_ms(lambda: _round_and_multiply(*as_it_lies, kind, a_turned, b_turned)),
    }
    exact = a.float() @ b.float().T
    error = (scaled_mm(a8, b8, fa, fb, torch.float32) - exact).norm() / exact.norm()
    tera = 2 * rows_a * rows_b * summed / 1e9
    return {
        "product": name,
        "ms": {n: round(t, 4) for n, t in times.items()},
        "tflops": {n: round(tera / t, 1) for n, t in times.items()},
        "relative_error": round(error.item(), 5),
    }


def measure_step(outputs, inputs):
    """Milliseconds of forward and backward of one linear layer, compiled: bfloat16 and FP8."""
    times = {}
    for name in ("bf16", "fp8"):
        layer = torch.nn.Linear(inputs, outputs, bias=False, device="cuda")
        if name == "fp8":
            layer = LowPrecisionLinear(inputs, outputs, scheme="fp8", device="cuda")
        layer = layer.bfloat16()
        x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(TOKENS, outputs, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(layer)
        times[name] = round(median_ms(lambda c=compiled, x=x, g=gradient: c(x).backward(g)), 4)
    return times


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Time FP8 matrix products against bfloat16 ones.")
    parser.add_argument("--out", help="folder for fp8_speed.json; the package's own results unless given")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() or not has_fp8_units(torch.device("cuda")):
        parser.error("this needs a GPU with FP8 units; results/ has what one did")
    torch._dynamo.config.recompile_limit = 64  # for each shape
    layers = {}
    for name, (outputs, inputs) in LAYERS.items():
        rows = [measure_product(*product) for product in products(TOKENS, outputs, inputs)]
        layers[name] = {"shape": [outputs, inputs], "products": rows, "step_ms": measure_step(outputs, inputs)}
        print(name, rows, layers[name]["step_ms"], flush=True)
    record = {**provenance("python -m qlearn.bench.fp8_speed"), "tokens": TOKENS, "layers": layers}
    write("fp8_speed", record, options.out)


if __name__ == "__main__":
    main()
