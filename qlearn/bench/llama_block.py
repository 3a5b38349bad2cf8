"""What does it cost to quantize one block of Llama-3.1-8B, by each method?

    python -m qlearn.bench.llama_block [--device cpu|cuda] [--tokens N] [--out FILE]

A model with a single block of the true sizes (218 million weights) is quantized by `quantize_model`, as any model would
be, calibration included, to 4 bits in groups of 128. Measured are the seconds, and the memory at its peak, over what
was there before. A whole model takes about 32 times as long, and no more memory than one block beside the model itself.

The weights and the hidden states are random: the first of the size they have in language models, the second correlated
and with a few channels much larger than the others, as is known from language models. Costs do not depend on the
values. The error of the block's output does, so it says that the methods work, and no more.

Each method has a process of its own, and its peak is no other's: on a CPU that of the whole process, on a GPU that of
the tensors. The method is first run on a tiny block, so that what is loaded and set up once is not counted.

On two CPU cores GPTQ takes about two minutes, for the Hessian of the last projection is 14336 x 14336, and is
factorized in float32. AWQ takes longer still: it runs the MLP anew for each scale that it tries.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.models import quantize_model
from qlearn.models.calibration import walk
from qlearn.models.linear import QuantLinear

METHODS = ("absmax", "zero_point", "gptq", "awq")
BITS, GROUP_SIZE = 4, 128
WINDOW, HELD_OUT = 512, 512  # tokens
TOKENS = {"cpu": 2048, "cuda": 16384}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def measure(method, device="cpu", tokens=2048, shape=LLAMA_8B):
    """Quantize one block.

    tokens: of calibration text, a multiple of 512.  shape: what LlamaConfig is to be given.
    Returns a dict: method, bits_per_weight, seconds, peak_bytes (over what was there before), and output_error, the
    error of the block's output relative to what the block adds to its input, on tokens that it was not calibrated on.
    """
    model, ids = build(tokens + HELD_OUT, device, shape)
    ids, held_out = ids.split([tokens // WINDOW, 1])
    states, before = model.get_input_embeddings()(held_out).float(), output(model, held_out)
    memory = _Memory(device)
    started = time.perf_counter()
    quantize_model(model, method, bits=BITS, group_size=GROUP_SIZE, calibration=ids, progress=False)
    memory.wait()
    seconds, peak = time.perf_counter() - started, memory.peak()
    off = output(model, held_out) - before
    return {
        "method": method,
        "bits_per_weight": bits_per_weight(model),
        "seconds": seconds,
        "peak_bytes": peak,
        "output_error": (off.norm() / (before - states).norm()).item(),
    }


def build(tokens, device, shape, seed=0):
    """A Llama of one block and as many different tokens as asked for, and all of them as windows.

    Returns the model (float32 on a CPU, bfloat16 on a GPU) and int64 (windows, 512).
    """
    torch.manual_seed(seed)
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=tokens, tie_word_embeddings=True)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        model.get_input_embeddings().weight.copy_(hidden_states(tokens, config.hidden_size))
    return model, torch.arange(tokens, device=device).view(-1, WINDOW)


def hidden_states(tokens, channels):
    """Random hidden states (tokens, channels): a sixteenth as many causes as channels, noise, and eight outliers."""
    causes = torch.randn(tokens, channels // 16) @ torch.randn(channels // 16, channels) / (channels // 16) ** 0.5
    states = causes + 0.5 * torch.randn(tokens, channels)
    states[:, :: channels // 8] *= 20
    return states


@torch.no_grad()
def output(model, ids):
    """What the block makes of the tokens as it is now: float32 (windows, window, channels)."""
    return torch.cat(next(walk(model, ids)).run()).float()


def bits_per_weight(model):
    """Bits stored for each weight of the block's linear layers."""
    quantized = [module.quantized for module in model.modules() if isinstance(module, QuantLinear)]
    return 8 * sum(qt.nbytes for qt in quantized) / sum(qt.shape[0] * qt.shape[1] for qt in quantized)


class _Memory:
    """The memory that is used at the most from now on, over what was used at the most before."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.cuda else _peak_of_process()

    def wait(self):
        """Until all that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self):
        """Bytes."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _peak_of_process()) - self.before


def _peak_of_process():
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_all(device="cpu", tokens=2048, shape=LLAMA_8B, methods=METHODS):
    """Every method, each in a process of its own. Yields what `measure` returns."""
    for method in methods:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(_warm_and_measure, method, device, tokens, shape).result()
        print(describe(row), flush=True)
        yield row


def _warm_and_measure(method, device, tokens, shape):
    measure(method, device, tokens=WINDOW, shape=TINY)
    return measure(method, device, tokens, shape)


def describe(row):
    """A row as one line."""
    return (
        f"{row['method']:10}  {row['bits_per_weight']:.3f} bits  {row['seconds']:7.2f} s  "
        f"{row['peak_bytes'] / 1e9:6.2f} GB  error {row['output_error']:.4f}"
    )


def main():
    """Measure all methods on the chosen device and write the results."""
    parser = argparse.ArgumentParser(prog="python -m qlearn.bench.llama_block", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help=f"of calibration, a multiple of {WINDOW}; by default {TOKENS}")
    parser.add_argument("--out", type=Path, help="the file to write; by default one among the package's results")
    options = parser.parse_args()
    tokens = options.tokens or TOKENS[options.device]
    if tokens < WINDOW or tokens % WINDOW:
        parser.error(f"--tokens {tokens} is no multiple of {WINDOW}")
    chip = "cpu" if options.device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
    out = options.out or Path(f"llama_block_{chip}.json")
    record = provenance(f"python -m qlearn.bench.llama_block --device {options.device} --tokens {tokens}") | {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "shape": LLAMA_8B,
        "tokens": tokens,
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "rows": [],
    }
    for row in measure_all(options.device, tokens):
        record["rows"].append(row)
        write(out.stem, record, out.parent if options.out else None)


if __name__ == "__main__":
    main()
