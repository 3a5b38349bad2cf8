"""Quantized attention on the bundled model: what each idea of SageAttention is worth, one at a time.

    python -m qlearn.bench.attention --device cuda

Four tables, written to one file:

    operands     what K of each layer is like: how much of it is its mean over the tokens, how far its largest channel
                 lies above the median. The larger the mean, the more smoothing helps.
    outputs      the error of the attention output for each variant: relative, |o' - o| / |o|, and the cosine, both as
                 the mean over the layers and for the worst one. Twice: for q, k and v as the layers make them; and with
                 an outlier, a constant on one channel of K, OUTLIER times as large as K is on average. Exact attention
                 does not notice it.
    sinks        the same for random operands of which the first key is a sink, as large models have them: every query
                 scores it higher than the others by so much, and its value is zero. Then all of P that counts is small,
                 which is what the second level of the scales of P is for.
    rows         perplexity, divergence and flips of the whole model on the evaluation text.

q, k and v are those of the unquantized model, after the rotary embedding, for the first TOKENS tokens of the
evaluation text in one window. The variants say what is rounded: "qk" the scores only, "pv" the second product only.

This is an emulation, so no time is reported but that of measuring. It takes one minute on an H200, and long on a CPU.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from qlearn import evaluate
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.evaluate.windows import passage
from qlearn.methods.attention import SCHEMES, Scheme, attention
from qlearn.models import load_model
from qlearn.models.attention import operands, quantize_attention

TOKENS = 1024
OUTLIER = 30
OUTLIER_CHANNEL = 7
SINKS = (0, 2, 4, 6, 8, 10)  # how much higher the first key scores
SINK_SHAPE = (1, 1, 8192, 64)


def variants():
    """dict name of a row -> Scheme, in the order of the tables."""
    both, k_only = {"smooth_k": True, "smooth_q": True}, {"smooth_k": True}
    rows = {
        "float": SCHEMES["float"],
        "int8 qk, block, not smoothed": Scheme("int8"),
        "int8 qk, block, K smoothed": Scheme("int8", **k_only),
        "int8 qk, token, not smoothed": Scheme("int8", per="token"),
        "int8 qk, token, K smoothed": Scheme("int8", per="token", **k_only),
        "int4 qk, token, not smoothed": Scheme("int4", per="token"),
        "int4 qk, token, K smoothed": Scheme("int4", per="token", **k_only),
        "int4 qk, token, Q and K smoothed": Scheme("int4", per="token", **both),
        "fp16 pv": Scheme(pv="fp16"),
        "fp8 pv": Scheme(pv="fp8"),
    }
    for name in ("mxfp4", "nvfp4"):
        rows |= {
            f"{name} qk, not smoothed": Scheme(name),
            f"{name} qk, K smoothed": Scheme(name, **k_only),
            f"{name} qk, Q and K smoothed": Scheme(name, **both),
            f"{name} pv, one level": Scheme(pv=name, two_level=False),
            f"{name} pv, two levels": Scheme(pv=name),
            f"{name} whole, not smoothed, one level": Scheme(name, name, two_level=False),
            f"{name} whole, one level": Scheme(name, name, two_level=False, **both),
        }
    rows |= {f"SageAttention: {name}": SCHEMES[name] for name in ("int8", "int8_fp8", "int4_fp8", "mxfp4", "nvfp4")}
    return rows


@torch.no_grad()
def outlying(layer, factor=OUTLIER, channel=OUTLIER_CHANNEL):
    """The operands of a layer, with a constant on one channel of K: `factor` times the root mean square of K."""
    k = layer["k"].clone()
    k[..., channel] += factor * k.square().mean().sqrt()
    return layer | {"k": k}


def sinking(score):
    """Random operands, one head of SINK_SHAPE; the first key scores `score` with every query, and its value is 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SINK_SHAPE, generator=generator) for _ in range(3))
    q = q[:, :, :128]
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, 0] = 0
    k[:, :, 0, 0] = score * SINK_SHAPE[-1] ** 0.5
    v += 1  # else the sum over thousands of keys would be next to nothing
    v[:, :, 0] = 0
    return {"q": q, "k": k, "v": v}


@torch.no_grad()
def describe(layer):
    """What K of one layer is like: a dict.

    mean_share: how much of the sum of its squares is that of the mean over the tokens.
    largest: its largest magnitude.  largest_smoothed: that of K without its mean.
    outlier_ratio: the largest magnitude of a channel of a head, as a multiple of the median channel's.
    """
    k = layer["k"].float()
    mean = k.mean(2, keepdim=True)
    channels = k.abs().amax((0, 2))
    return {
        "mean_share": (mean.expand_as(k).square().sum() / k.square().sum()).item(),
        "largest": k.abs().max().item(),
        "largest_smoothed": (k - mean).abs().max().item(),
        "outlier_ratio": (channels.max() / channels.median()).item(),
    }


def errors(layers, scheme):
    """The error of the outputs of some layers: a dict.

    layers: list of the operands of each.
    Returns relative_error and cosine, the means over the layers, and those of the worst layer.
    """
    relative, cosine = [], []
    for layer in layers:
        exact, rounded = (attention(**layer, scheme=s).double().flatten() for s in (SCHEMES["float"], scheme))
        relative.append(((rounded - exact).norm() / exact.norm()).item())
        cosine.append(torch.nn.functional.cosine_similarity(rounded, exact, dim=0).item())
    return {
        "relative_error": sum(relative) / len(relative),
        "worst_relative_error": max(relative),
        "cosine": sum(cosine) / len(cosine),
        "worst_cosine": min(cosine),
    }


def measure_operands(model, tokenizer, schemes, tokens=TOKENS):
    """(what K is like, layer by layer; the errors of each scheme, as it is and with an outlier): two lists of dicts."""
    layers = operands(model, passage(model, tokenizer, tokens=tokens).ids[None])
    outliers = [outlying(layer) for layer in layers]
    rows = [
        {"name": name, "as_it_is": errors(layers, scheme), "with_outlier": errors(outliers, scheme)}
        for name, scheme in schemes.items()
    ]
    return [describe(layer) for layer in layers], rows


def measure_sinks(schemes, scores=SINKS):
    """The errors of each scheme that rounds P V only, for sinks of growing scores: a list of dicts."""
    return [
        {"name": name, "score": score} | errors([sinking(score)], scheme)
        for name, scheme in schemes.items()
        for score in scores
        if scheme.qk == "float" != scheme.pv
    ]


def measure_model(model, tokenizer, schemes, tokens=None):
    """Yield the figures of the whole model for each scheme, a dict; those of the model as it was come first."""
    model.set_attn_implementation("sdpa")
    reference = evaluate.Reference(model, tokenizer, tokens=tokens)
    yield _figures(evaluate.report(model, tokenizer, reference, name="unquantized"))
    for name, scheme in schemes.items():
        quantize_attention(model, scheme)
        yield _figures(evaluate.report(model, tokenizer, reference, name=name))
    model.set_attn_implementation("sdpa")


def _figures(row):
    kept = ("name", "perplexity", "kl_divergence", "flip_rate", "same_top_p", "seconds")
    return {name: value for name, value in row.as_dict().items() if name in kept}


def main(argv=None):
    """Measure everything, print each row as it comes, write the results."""
    parser = argparse.ArgumentParser(description="Quantize the attention of the bundled model and measure it.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder to write; the package's results by default")
    options = parser.parse_args(argv)
    model, tokenizer = load_model()
    model.to(options.device)
    schemes = variants()
    record = provenance(f"python -m qlearn.bench.attention --device {options.device}") | {
        "tokens": TOKENS,
        "outlier": OUTLIER,
        "schemes": {name: asdict(scheme) for name, scheme in schemes.items()},
    }
    record["operands"], record["outputs"] = measure_operands(model, tokenizer, schemes)
    record["sinks"] = measure_sinks(schemes)
    for row in record["operands"] + record["outputs"] + record["sinks"]:
        print(row, flush=True)
    record["rows"] = []
    for row in measure_model(model, tokenizer, schemes):
        record["rows"].append(row)
        write("attention", record, options.out)
        print(row, flush=True)


if __name__ == "__main__":
    main()
