"""How fast does a Llama of 8 billion weights write, with 16 and with 4 bits? On any NVIDIA GPU with room for it.

    python -m qlearn.bench.decode [--layers N] [--out FOLDER]

A model of Llama 3.1 8B's shape with random weights (speed does not depend on their values) decodes one token after
another: a static cache, the whole step of the model recorded in a CUDA graph, batches of 1, 4 and 16. First as it is,
in bfloat16; then with its 224 linear layers rounded to 4 bits, one scale for 128 weights, as QuantLinear. The output
layer and the embedding stay in bfloat16 (2 of the 15 GiB), and everything between the products is torch's.

Reported: tokens per second (median of 9 runs of 32 tokens), the peak of memory while decoding, what the weights take,
and how far the 4-bit model's logits are from those of the same 4-bit weights multiplied as floats.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.kernels import dispatch
from qlearn.models.linear import QuantLinear

BATCHES = (1, 4, 16)
CONTEXT, TOKENS, RUNS = 1024, 32, 9


def main(arguments=None):
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description="Tokens per second of a Llama 8B in 16 and in 4 bits.")
    parser.add_argument("--layers", type=int, default=32, help="fewer make a smaller model (default 32)")
    parser.add_argument("--out", type=Path, help="a folder for decode.json; the package's results by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise RuntimeError("there is no NVIDIA GPU that torch can use; this benchmark needs one")
    record = {**provenance("python -m qlearn.bench.decode"), "layers": options.layers, "context": CONTEXT}
    model = make_model(options.layers)
    record["bfloat16"] = measure(model)
    quantize_layers(model)
    record["4 bit"] = measure(model)
    record["logits"] = compare(model)
    write("decode", record, options.out)


def make_model(layers):
    """A Llama of the 8B's shape with random weights, in bfloat16 on the GPU."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=CONTEXT, rope_theta=500000.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def quantize_layers(model):
    """Replace the linear layers of all blocks, one after another, by 4-bit ones."""
    from qlearn.kernels.cuda.rtn import quantize_absmax

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, QuantLinear(quantize_absmax(layer.weight.data, 4, 128)))
    torch.cuda.empty_cache()


@torch.inference_mode()
def measure(model):
    """Tokens per second and peak memory for each batch, and the bytes of the weights."""
    found = {"weight_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), "batches": {}}
    for batch in BATCHES:
        step, _ = recorded(model, batch)
        torch.cuda.reset_peak_memory_stats()
        rates = sorted(_rate(step, batch) for _ in range(RUNS))
        peak = torch.cuda.max_memory_allocated()
        found["batches"][batch] = {"tokens_per_s": round(rates[RUNS // 2], 1), "peak_bytes": peak}
        print(f"batch {batch:2}: {rates[RUNS // 2]:7.1f} tokens/s, {peak / 2**30:.2f} GiB", flush=True)
    return found


def recorded(model, batch, context=CONTEXT):
    """(a function that makes one step for `batch` sequences, its logits): a CUDA graph with a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    position = torch.full((1,), context // 2, device="cuda", dtype=torch.long)

    def forward():
        return model(token, past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward().logits
        token.copy_(logits[:, -1:].argmax(-1))

    def step():
        graph.replay()

    step.holds = graph, cache, token, position
    return step, logits


def _rate(step, batch):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TOKENS):
        step()
    end.record()
    torch.cuda.synchronize()
    return batch * TOKENS / begin.elapsed_time(end) * 1000


@torch.inference_mode()
def compare(model):
    """The 4-bit model's logits for some tokens, by the kernel and by the float matrices of the same weights."""
    tokens = torch.randint(0, model.config.vocab_size, (1, 16), device="cuda")
    ours = model(tokens).logits.float()
    with dispatch.use("reference"):
        reference = model(tokens).logits.float()
    error = ((ours - reference).norm() / reference.norm()).item()
    same = (ours.argmax(-1) == reference.argmax(-1)).float().mean().item()
    print(f"logits differ by {error:.1e} of their norm; the same best token for {same:.0%}")
    return {"relative_error": error, "same_best_token": same}


if __name__ == "__main__":
    main()
