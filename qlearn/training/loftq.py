"""LoftQ: let the adapter begin with what the quantization lost.

In QLoRA the first forward pass is that of the quantized model, for B is zero. With 2 bits that model is a wreck, and
the adapter spends its training on repairs. LoftQ gives it a head start. For each weight W it looks for codes and thin
matrices that are W together:

    min  || W - Q - s B A ||       over Q on the grid of the method, A of r rows, B of r columns;  s = alpha / r

and improves one of the two at a time, T times:

    Q := quantize(W - s B A)       the method rounds what the adapter does not hold          (at first B A = 0)
    s B A := the best matrix of rank r for W - Q:  its r largest singular values and vectors

The second step is optimal: it can only lower the norm. The first one is not, for a method chooses its scales by rules
of its own, so the norm may rise again; the best pair of all T is kept. The singular values are divided evenly, the root
of each to A and to B, so that both learn at the same pace.

**How much a low rank can hold.** Rounding errors are nearly noise, and the singular values of noise fall slowly. On the
bundled model (`zero_point`, groups of 64, T = 5), before any training:

    bits   r            ||W - Q - s B A|| / ||W||       perplexity, 7.2 in floats
    4      0  4  16  64       .092 .084 .072 .051          7.51  7.52  7.49  7.31
    2      0  4  16  64       .460 .429 .381 .269          612   383   102   21

A rank of 64 is not low here: beside matrices of 256 rows it is a third of all weights, in float32.

The factors of the paper are for a scale of 1; here they are divided by s, so that any alpha may be chosen, which peft
0.21 leaves to the user.

**The price**: Q is no longer the quantization of W, but of what the adapter leaves of it. Adapter and codes belong
together for good (`merging.py`): save both.

Source: LoftQ, arXiv 2310.08659, algorithm 1; its `utils.py`, where the roots of the singular values are split.
"""

import torch
from tqdm.auto import tqdm

from qlearn.methods import CALIBRATED, quantize
from qlearn.models.layers import SKIP, check_skip, linear_layers, replace_layers
from qlearn.models.linear import QuantLinear
from qlearn.models.plugin import mark_quantized
from qlearn.training.lora import LoraLinear, check_rank, lora_layers


def add_loftq(
    model,
    method="zero_point",
    bits=2,
    group_size=64,
    r=16,
    alpha=16,
    dropout=0.0,
    iterations=5,
    skip=SKIP,
    progress=True,
    **options,
):
    """Quantize the linear layers of a float model and give them adapters that hold a part of what is lost, in place.

    method, bits, group_size, options: as for `qlearn.quantize`; no method that learns from inputs.
    r, alpha, dropout: as for `LoraLinear`.  iterations: T.  skip: layers that stay as they are, and get no adapter.
    progress: show a bar.
    Returns (model, dict name -> list of floats: ||W - Q - s B A|| / ||W|| before, that is with B A = 0, and after each
    iteration).
    Raises ValueError for a method that needs inputs, for fewer iterations than 1, for a model without linear layers
    or with adapters already, and what the method raises, naming the layer; the model is unchanged then.

    >>> from qlearn import load_model
    >>> model, residuals = add_loftq(load_model()[0], bits=2, r=4, iterations=1, skip=("lm_head", "*layers.[1-7].*"))
    >>> before, after = residuals["model.layers.0.mlp.down_proj"]
    >>> after < before
    True
    """
    check_rank(r, alpha, dropout)
    if method in CALIBRATED:
        raise ValueError(f"{method!r} learns from inputs, which change with the adapters; choose a method without them")
    if lora_layers(model):
        raise ValueError("the model has adapters already; give the float model")
    layers = linear_layers(model, check_skip(model, skip))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no float linear layer with skip={skip}; give the float model")
    new, residuals = {}, {}
    for name, layer in tqdm(layers.items(), desc="LoftQ", unit=" layers", disable=not progress):
        rounded = lambda w: quantize(w, method, bits=bits, group_size=group_size, **options)  # noqa: E731
        try:
            quantized, A, B, residuals[name] = loftq(layer.weight, rounded, r, iterations)
        except ValueError as error:
            raise ValueError(f"layer {name} ({layer.out_features} x {layer.in_features}): {error}") from error
        new[layer] = _adapter(QuantLinear(quantized, layer.bias), A, B, alpha, dropout).train(model.training)
    model.requires_grad_(False)
    replace_layers(model, new)
    mark_quantized(model, method, bits, group_size, skip, **options)
    return model, residuals


@torch.no_grad()
def loftq(weight, rounded, r, iterations=5):
    """The alternation for one matrix.

    weight: floating point (out, in).  rounded: a function, matrix -> QuantizedTensor.  r: rank, at most min(out, in).
    Returns (quantized, A, B, residuals): QuantizedTensor; float32 (r, in) and (out, r), of the iteration with the
    smallest norm, for a scale of 1; and ||W - Q - B A|| / ||W|| with B A = 0, and after each iteration.
    Raises ValueError for a rank that the matrix does not have, and for fewer iterations than 1.

    >>> from qlearn import quantize
    >>> W = torch.tensor([[1.0, 0.2], [0.0, 0.4]])
    >>> rounded = lambda w: quantize(w, "absmax", bits=2)                     # -1, 0, 1 times the largest magnitude
    >>> quantized, A, B, residuals = loftq(W, rounded, r=1, iterations=2)
    >>> torch.allclose(quantized.dequantize() + B @ A, W, atol=1e-6)               # an error of rank 1: nothing is lost
    True
    """
    W = weight.detach().float()
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"r={r} is no rank of a matrix {tuple(W.shape)}; choose 1 to {min(W.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} quantizes nothing; give at least 1")
    size = W.norm().clamp(min=torch.finfo(W.dtype).tiny)
    change, residuals, best = torch.zeros_like(W), [], None
    for _ in range(iterations):
        quantized = rounded(W - change)
        left = W - quantized.dequantize()
        if not residuals:
            residuals.append((left.norm() / size).item())
        A, B = low_rank(left, r)
        change = B @ A
        residuals.append(((left - change).norm() / size).item())
        if best is None or residuals[-1] < min(residuals[1:-1]):
            best = quantized, A, B
    return *best, residuals


def low_rank(matrix, r):
    """The best approximation of rank r in the Frobenius norm (Eckart and Young): A (r, in), B (out, r), B A ~ matrix.

    >>> A, B = low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), r=1)
    >>> (B @ A).abs().round(decimals=4).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _adapter(base, A, B, alpha, dropout):
    """A LoraLinear whose change is B A."""
    layer = LoraLinear(base, A.shape[0], alpha, dropout)
    by = layer.scale**-0.5
    layer.A.data.copy_(A * by)
    layer.B.data.copy_(B * by)
    return layer
