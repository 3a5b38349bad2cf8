"""A layer of W8A8: weights and activations both in 8 bits, multiplied as integers. `w8a8.py` has whole models.

A layer that keeps only its weight in few bits saves memory, but it multiplies in floating point as before. If its
inputs are integers as well, the whole product can be computed with integers, and processors have units that do this
two to four times as fast as 16-bit floats:

    x ≈ s_x · X      X int8 (tokens, in)                  y = x Wᵀ + b ≈ s_x · s_w · (X · Vᵀ) + b
    W ≈ s_w · V      V int8 (out, in)                                            int32

For the scales to come out of the sum, they must not depend on the index that is summed over. So the weight has one
scale for each row, its output channel, and the input one for each token at most. A scale for each input *channel*,
which is what outliers would call for, is impossible; `smoothquant.py` is the way around that.

    dynamic    each token's own scale, from its largest magnitude, found when the token comes. Exact in range, always.
    static     one scale for the layer, chosen beforehand by an observer (`methods/observers.py`). Nothing has to be
               measured at run time, and what lies beyond the range is clipped.

**The integer product** adds up `in` products of two int8 in an int32. Each is at most 128 · 128 = 2**14, so up to
131,071 columns cannot overflow. (Codes of ours are never -128, which would allow 133,144.) torch has this product as
`torch._int_mm`. On CUDA it wants sizes that are multiples of 8 and more than 16 rows, so zeros are added where they are
missing. On a CPU it is tried once, with the largest codes there are: a processor without integer dot products may
saturate halfway, or take many times as long as with floats. There the codes are multiplied as floats, which is exact as
well if no sum gets longer than float32 can hold.

Source: LLM.int8() (arXiv 2208.07339) and SmoothQuant (arXiv 2211.10438) for per-token and static activations.
"""

import functools
import time

import torch
import torch.nn.functional as F

from qlearn.models.linear import QuantLinear

MAX_IN_FEATURES = (2**31 - 1) // 128**2
EXACT_IN_FLOAT32 = 2**24 // 128**2  # columns
QMAX = 127


def int8_matmul(x_codes, w_codes):
    """The product X Vᵀ of two matrices of 8-bit integers, exactly.

    x_codes: int8 (tokens, in).  w_codes: int8 (out, in), on the same device.  Returns int32 (tokens, out).
    Raises ValueError for another dtype, shapes that do not fit, and more than 131,071 columns, which could overflow.

    >>> int8_matmul(torch.tensor([[1, -2], [100, 100]], dtype=torch.int8), torch.tensor([[127, 3]], dtype=torch.int8))
    tensor([[  121],
            [13000]], dtype=torch.int32)
    """
    _check_codes(x_codes, w_codes)
    if x_codes.is_cuda:
        return _padded_int_mm(x_codes, w_codes)
    # With a single column, torch 2.13 returns memory that it never wrote.
    if x_codes.device.type == "cpu" and x_codes.shape[1] > 1 and integers_serve_on_this_cpu():
        return torch._int_mm(x_codes, w_codes.T)
    return float32_matmul(x_codes, w_codes)


def float32_matmul(x_codes, w_codes):
    """The same by floats: a sum of 1024 products is at most 2**24, up to where float32 holds every integer."""
    parts = zip(x_codes.split(EXACT_IN_FLOAT32, 1), w_codes.split(EXACT_IN_FLOAT32, 1), strict=True)
    return sum((x.float() @ w.float().T).to(torch.int32) for x, w in parts)


@functools.cache
def integers_serve_on_this_cpu():
    """Whether torch's integer product is exact on this processor, and no slower than the one by floats."""
    if not hasattr(torch, "_int_mm"):
        return False
    signs = torch.randint(0, 2, (256, 264), generator=torch.Generator().manual_seed(0))
    x = torch.where(signs.bool(), 127, -128).to(torch.int8)
    x[0], x[1] = 127, -128
    by_integers, by_floats = (lambda: torch._int_mm(x, x.T)), (lambda: float32_matmul(x, x))
    return torch.equal(by_integers(), by_floats()) and _seconds(by_integers) <= _seconds(by_floats)


def quantize_tokens(x):
    """Each row on its own grid: dynamic quantization.

    x: floating point (tokens, in).  Returns codes int8 (tokens, in) in -127 ... 127, and float32 scales (tokens, 1).
    A row of zeros gets scale 1; one with NaN or infinity gets a scale that is not finite, and so does its output.

    >>> quantize_tokens(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]))
    (tensor([[  64, -127,   32],
            [   0,    0,    0]], dtype=torch.int8), tensor([[0.0079],
            [1.0000]]))
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / QMAX
    scale = torch.where(scale == 0, 1.0, scale)
    return quantize_with(x, scale), scale


def quantize_with(x, scale):
    """The codes of x on a given grid, clipped at its ends: int8, as x in shape.  scale: float32, broadcast over x."""
    return (x.float() / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)


def int8_linear(x, w_codes, w_scale, input_scale=None, bias=None):
    """A linear layer with integers: s_x · s_w · (X · Vᵀ) + b.

    x: floating point (tokens, in).  w_codes: int8 (out, in).  w_scale: floating point (out,).  bias: (out,) or None.
    input_scale: float32 scalar for static activations, None for dynamic ones.
    Returns (tokens, out) in the dtype of x; sums are int32, all else is float32.
    """
    if input_scale is None:
        codes, scale = quantize_tokens(x)
    else:
        codes, scale = quantize_with(x, input_scale), input_scale
    y = int8_matmul(codes, w_codes).float().mul_(scale).mul_(w_scale.float())  # in place: a copy costs more than this
    return (y if bias is None else y.add_(bias.float())).to(x.dtype)


class Int8Linear(QuantLinear):
    """Takes the place of nn.Linear and multiplies integers.

    quantized: QuantizedTensor (out_features, in_features), int8 with one scale for each row, as `absmax(weight, 8)`
    makes it.  bias: tensor (out_features,) or None.
    input_scale: None for dynamic activations; for static ones the scale, a positive number.
    Raises ValueError for any other quantized weight, and for an input scale that is not positive and finite.

    No gradient passes through. A static layer does not look for NaN: it turns into an arbitrary code.

    >>> import qlearn
    >>> layer = Int8Linear(qlearn.quantize(torch.eye(3), "absmax", bits=8))
    >>> layer(torch.tensor([[1.0, -2.0, 0.5]]))
    tensor([[ 1.0088, -2.0018,  0.5044]])
    """

    def __init__(self, quantized, bias=None, input_scale=None):
        if quantized.format.name != "int8" or quantized.block != (1, quantized.shape[1]):
            raise ValueError(f"{quantized} is not int8 with a scale for each row; make it with absmax(weight, bits=8)")
        super().__init__(quantized, bias)
        if input_scale is not None:
            input_scale = torch.as_tensor(input_scale, dtype=torch.float32, device=quantized.device)
            if not (input_scale > 0 and torch.isfinite(input_scale)):
                raise ValueError(f"input_scale={input_scale.item()} is no scale; give a positive number, or None")
        self.register_buffer("input_scale", input_scale)

    @torch.no_grad()
    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features) in the dtype of x."""
        rows = x.reshape(-1, self.in_features)
        y = int8_linear(rows, self.weight_codes(), self.scales.flatten(), self.input_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def weight_codes(self):
        """The codes, int8 (out_features, in_features). At 8 bits the packed bytes are the codes; nothing is copied."""
        return self.packed.view(torch.int8).view(self.out_features, self.in_features)

    def _apply(self, fn, recurse=True):
        """The input scale stays float32, as the scales of the weight stay what they are."""
        kept = self.input_scale
        super()._apply(fn, recurse)
        if kept is not None:
            self.input_scale = kept.to(self.packed.device)
        return self

    def extra_repr(self):
        """What print(model) shows."""
        inputs = "dynamic" if self.input_scale is None else f"static, scale {self.input_scale.item():.3g}"
        return f"{super().extra_repr()}, inputs int8 {inputs}"


def _check_codes(x_codes, w_codes):
    for codes in (x_codes, w_codes):
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; give two int8 matrices")
    if x_codes.shape[1] != w_codes.shape[1]:
        raise ValueError(
            f"codes of {x_codes.shape[1]} and {w_codes.shape[1]} columns do not fit; both need the layer's in_features"
        )
    if x_codes.shape[1] > MAX_IN_FEATURES:
        raise ValueError(
            f"{x_codes.shape[1]} columns could overflow the 32-bit sum; split them into at most {MAX_IN_FEATURES}"
        )


def _seconds(function, times=3):
    """The least of a few runs."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return min(found)


def _padded_int_mm(x_codes, w_codes):
    """torch._int_mm with zeros added up to the sizes that it takes on CUDA."""
    tokens, columns = x_codes.shape
    rows = len(w_codes)
    more, below = -columns % 8, max(24 - tokens, -tokens % 8)
    x = F.pad(x_codes, (0, more, 0, below)) if more or below else x_codes  # to pad by nothing would copy
    w = F.pad(w_codes, (0, more, 0, -rows % 8)) if more or rows % 8 else w_codes
    return torch._int_mm(x, w.T)[:tokens, :rows]
