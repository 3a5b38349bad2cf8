"""Does the bandwidth decide? Layers left in main memory, predicted and run.

    python -m qlearn.bench.offload [--out FOLDER]

A model is divided between the GPU and main memory as `models/memory.py` plans it, for several amounts of GPU memory,
and accelerate runs it: what stays in main memory is copied to the GPU for every token. Two models: the bundled one, and
one of random weights in the shape of Llama-3.1-8B, in bfloat16, 16 GB. Speed does not depend on the values.

First the bandwidths are measured: of the GPU's memory by copying within it, of the bus as accelerate uses it, by
copying different tensors of a layer's size from ordinary main memory, none of which is in a cache. (From memory that is
pinned, which accelerate does not ask for, the bus is several times as fast; the record has both.) Then, for each plan,
the seconds of a token: the median over some tokens after a prompt, one text at a time, with a key-value cache.

The prediction counts bytes only. transformers also takes time to start each of its kernels from Python; where a whole
model takes a few milliseconds to be read, that is most of the time. It is what the plan with everything on the GPU
takes; what layers left behind add to it is the bus.
"""

import argparse
import gc
import statistics
import time

import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, LlamaConfig

from qlearn.bench.llama_block import LLAMA_8B
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.models import load_model, memory

SHAPE = {**LLAMA_8B, "vocab_size": 128256, "num_hidden_layers": 32}
LEFT = (0, 1, 2, 4, 8, 16, 32)  # decoder layers in main memory
PROMPT, UNCOUNTED, TOKENS = 16, 3, 8
GB = 1e9


def measure(name, build, machine, left=LEFT, tokens=TOKENS, device="cuda"):
    """Run one model under several plans.

    build: () -> the model on the device.  left: how many decoder layers stay in main memory.
    Returns a list of dicts: model, left, n_gpu_layers, gpu_bytes, other_bytes, seconds (of a token), predicted.
    """
    rows = []
    for count in left:
        model = build()
        plan = plan_with(model, count)
        model = dispatch(model, plan, device)
        rows.append(
            {
                "model": name,
                "left": count,
                "n_gpu_layers": plan.n_gpu_layers,
                "gpu_bytes": plan.gpu_bytes,
                "other_bytes": plan.other_bytes,
                "seconds": seconds_of_a_token(model, tokens, device),
                "predicted": 1 / plan.tokens_per_second(machine),
            }
        )
        print(describe(rows[-1]), flush=True)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def dispatch(model, plan, device="cuda"):
    """Let accelerate divide the model by the plan. It takes what stays behind from where it finds it, so that has to be
    in main memory already."""
    gpu = "cpu" if device == "cpu" else 0
    places = plan.device_map(gpu)
    for name, place in places.items():
        if place == "cpu":
            model.get_submodule(name).to("cpu")
    return dispatch_model(model, places, main_device=gpu, force_hooks=device == "cpu")


def plan_with(model, left):
    """The plan that leaves this many decoder layers in main memory: the GPU is given just enough."""
    parts = memory.pieces(model)
    context = PROMPT + UNCOUNTED + TOKENS
    cache = context * memory.cache_bytes_per_token(model.config)
    vram = parts.embedding + parts.head + sum(parts.layers[left:]) + len(parts.layers) * cache
    return memory.plan(model, vram, parts.total + 1, offload="copy", context=context, reserve=0)


@torch.no_grad()
def seconds_of_a_token(model, tokens=TOKENS, device="cuda"):
    """The median over some tokens after a prompt and three tokens that are not counted."""
    ids = torch.arange(1, PROMPT + 1, device=device)[None]
    out = model(input_ids=ids, use_cache=True)
    times = []
    for _ in range(tokens + UNCOUNTED):
        ids = out.logits[:, -1:].argmax(-1)
        wait(device)
        started = time.perf_counter()
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[UNCOUNTED:])


def bandwidths(device="cuda", nbytes=2**32, at_a_time=2**26):
    """What was measured here: (a memory.Machine, the bandwidth of the bus from pinned memory)."""
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    here = [torch.full((at_a_time,), 1, dtype=torch.uint8) for _ in range(nbytes // at_a_time)]
    pinned = here[0].pin_memory() if device == "cuda" else here[0]
    machine = memory.Machine(
        vram_bandwidth=2 * nbytes / shortest(lambda: there.clone(), device),  # read once, written once
        ram_bandwidth=2 * nbytes / shortest(lambda: [tensor.clone() for tensor in here], "cpu"),
        bus_bandwidth=nbytes / shortest(lambda: [tensor.to(device, copy=True) for tensor in here], device),
    )
    return machine, at_a_time / shortest(lambda: pinned.to(device, copy=True), device)


def shortest(action, device, repeats=5):
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        action()
        wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def wait(device):
    """Until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def describe(row):
    """A row as a line.

    >>> row = {"model": "8B", "left": 2, "n_gpu_layers": 31, "gpu_bytes": 15e9, "other_bytes": 1e9}
    >>> describe({**row, "seconds": 0.05, "predicted": 0.04})
    '8B: 2 layers left, 15.00 GB on the GPU, 1.00 GB beside it: 20.0 tokens a second, 25.0 predicted'
    """
    return (
        f"{row['model']}: {row['left']} layers left, {row['gpu_bytes'] / GB:.2f} GB on the GPU, "
        f"{row['other_bytes'] / GB:.2f} GB beside it: {1 / row['seconds']:.1f} tokens a second, "
        f"{1 / row['predicted']:.1f} predicted"
    )


def random_model(shape, device="cuda", dtype=torch.bfloat16):
    """A Llama of random weights, made where it is to lie."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype).eval()


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Run models with a part of their layers in main memory.")
    parser.add_argument("--out", help="folder for the results instead of the package's own")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to leave layers out of")
    machine, pinned = bandwidths()
    seconds_of_a_token(random_model({**SHAPE, "num_hidden_layers": 1}), 64)  # whatever is loaded at first use
    print({name: f"{value / GB:.1f} GB/s" for name, value in vars(machine).items()}, flush=True)
    bundled = measure(
        "bundled", lambda: load_model(dtype=torch.bfloat16, progress=False)[0].cuda(), machine, left=(0, 1, 2, 4, 8)
    )
    eight = measure("Llama-8B shape", lambda: random_model(SHAPE), machine)
    record = {
        **provenance("python -m qlearn.bench.offload"),
        "bandwidths": {**vars(machine), "bus_bandwidth_pinned": pinned},
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rows": [*bundled, *eight],
    }
    write("offload_h200", record, options.out)


if __name__ == "__main__":
    main()
