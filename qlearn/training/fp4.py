"""FP4 training: a linear layer whose three products are all made of rounded numbers.

A linear layer y = x W^T asks for three matrix products in a training step, one forward and two backward. With E the
gradient of the loss with respect to y:

    y  = x W^T        sums over the inputs of the layer
    dx = E W          sums over its outputs
    dW = E^T x        sums over the tokens

A unit for FP4 multiplies each of them two or more times as fast, and wants both factors in FP4, in groups *along the
axis that is summed over*. So each matrix is rounded twice, along different axes. Three things go wrong when that is
done naively, and **Quartet** answers each:

- An outlier sets the scale of its group, and the other 31 numbers share what is left. *Forward*, both factors are
  rotated by a Hadamard matrix of size 32 (`rotation.py`), which spreads the outlier; the product does not notice:
  (x H)(W H)^T = x W^T.
- A scale that covers the largest number is not the one with the smallest error. QuEST takes the latter, and gives no
  gradient to what is cut off. The rounded numbers live in the rotated space, and so do mask and gradient:
  dx = (mask * (E W_q)) H.
- Gradients are summed up over thousands of steps, so an error that is always to the same side adds up. *Backward*,
  all four factors are rotated by diag(s) H, s random signs drawn anew in every step, and rounded without clipping;
  stochastically in the first draft of the paper, which makes the gradient unbiased, and to nearest in the published
  version.

A **scheme** says which rounding stands where. Here are the ones that the course compares, all with bfloat16 for
everything outside of the linear layers, and for the embedding and the head:

    bf16           no rounding but bfloat16's
    fp8            E4M3 forward, E5M2 for gradients, one factor for a matrix; on a GPU with FP8 units, by those
    mxfp8          E4M3 in groups of 32, everywhere
    quartet_sr     QuEST forward; stochastic backward (arXiv 2505.14669, first version)
    quartet_rtn    QuEST forward; nearest backward (fourth version, which withdraws the reason for the first)
    quartet_nvfp4  the same with NVFP4: nearest and rotated forward, stochastic backward
    naive_fp4      MXFP4 to nearest everywhere, no rotation
    luq            like LUQ: whole numbers of 4 bits forward, powers of two for gradients, stochastically

Source: Castro et al., Quartet, arXiv 2505.14669, algorithm 1.
"""

from dataclasses import dataclass

import torch
from torch import nn

from qlearn.models.layers import SKIP, turn_linear_layers
from qlearn.rotation import hadamard_matrix
from qlearn.training.low_precision import FP8, MXFP4, MXFP8, NVFP4, Int4, LogFP4, QuEST, Rounded, Unclipped

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Scheme:
    """Which rounding stands where; quantizers as in `low_precision.py`.

    forward: for x and W.  error: for E.  saved: for W and x in the backward products, which are rounded a second time;
    None to take them as the forward product had them.
    rotate: size of the Hadamard rotation forward, or None.  rotate_back: the same for the backward products.
    """

    forward: object
    error: object
    saved: object = None
    rotate: int | None = None
    rotate_back: int | None = None


SCHEMES = {
    "fp8": Scheme(FP8(E4M3), FP8(E5M2)),
    "mxfp8": Scheme(MXFP8(E4M3), MXFP8(E4M3), MXFP8(E4M3)),
    "quartet_sr": Scheme(QuEST(), Unclipped(), Unclipped(), rotate=32, rotate_back=32),
    "quartet_rtn": Scheme(QuEST(), Unclipped(False), Unclipped(False), rotate=32, rotate_back=32),
    "quartet_nvfp4": Scheme(NVFP4(), NVFP4(True), NVFP4(True), rotate=16, rotate_back=16),
    "naive_fp4": Scheme(MXFP4(), MXFP4(), MXFP4()),
    "luq": Scheme(Int4(), LogFP4()),
}


class LowPrecisionLinear(nn.Linear):
    """Takes the place of nn.Linear in training. scheme: a name of SCHEMES, or a Scheme.

    Raises ValueError for an unknown name, and in a pass for sizes that the groups do not divide.

    >>> torch.manual_seed(0); layer = LowPrecisionLinear(64, 32, scheme="quartet_sr")
    <...>
    >>> x = torch.randn(32, 64, requires_grad=True)
    >>> layer(x).square().mean().backward()
    >>> x.grad.shape, layer.weight.grad.shape
    (torch.Size([32, 64]), torch.Size([32, 64]))
    """

    def __init__(self, in_features, out_features, bias=False, scheme="quartet_sr", device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scheme = scheme
        self.make_rotations(device)

    def make_rotations(self, device):
        """Keep the two Hadamard matrices of +1 and -1 on that device; they belong to no checkpoint."""
        scheme = get_scheme(self.scheme)
        self.register_buffer("H", signs_of_hadamard(scheme.rotate, device), persistent=False)
        self.register_buffer("H_back", signs_of_hadamard(scheme.rotate_back, device), persistent=False)
        self.draw_signs()

    def draw_signs(self):
        """New random signs for the rotation of the backward pass: its matrix becomes diag(signs) H.

        Before each step, and not within a pass: a compiled layer that drew its own gave wrong gradients (torch 2.11
        and 2.13), and nothing said so.
        """
        if self.H_back is not None and not self.H_back.is_meta:
            signs = torch.randint(0, 2, (len(self.H_back), 1), device=self.H_back.device) * 2.0 - 1
            self.H_back = signs * signs_of_hadamard(len(self.H_back), self.H_back.device)

    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features), in the dtype of a plain linear layer."""
        rows = x.reshape(-1, self.in_features)
        y = low_precision_linear(rows, self.weight, get_scheme(self.scheme), self.H, self.H_back)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        """What print(model) shows."""
        return f"{super().extra_repr()}, scheme={self.scheme!r}"


def low_precision_linear(x, weight, scheme, H=None, H_back=None):
    """x W^T with rounded factors, and a backward pass with rounded factors.

    x: (tokens, inputs).  weight: (outputs, inputs).  scheme: Scheme.  H, H_back: what `signs_of_hadamard` gives for
    its two rotations.
    Returns (tokens, outputs), in the dtype of autocast, else of x.
    """
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if isinstance(scheme.forward, FP8) and has_fp8_units(x.device):
        return _Fp8Linear.apply(x, weight, kind)
    return _Linear.apply(x, weight, scheme, kind, H, H_back)


def to_low_precision(model, scheme, skip=SKIP):
    """Turn the linear layers of a model into LowPrecisionLinear, in place; they keep their parameters.

    scheme: a name of SCHEMES, or "bf16", which leaves the model as it is.  skip: layers to leave out, as for
    `quantize_model`.
    Returns the model.  Raises ValueError for an unknown scheme, and for a model without linear layers.
    """
    if scheme == "bf16":
        return model
    get_scheme(scheme)
    for layer in turn_linear_layers(model, LowPrecisionLinear, skip, scheme=scheme):
        layer.make_rotations(layer.weight.device)
    model.register_forward_pre_hook(draw_signs)
    return model


def draw_signs(model, *_):
    """New random signs in every layer of a model that is being trained; `to_low_precision` has it called."""
    for layer in model.modules() if model.training else ():
        if isinstance(layer, LowPrecisionLinear):
            layer.draw_signs()


def get_scheme(scheme):
    """The Scheme of that name (or the Scheme itself). Raises ValueError, listing them, when there is none."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown; choose from bf16, {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


def signs_of_hadamard(size, device=None):
    """The Hadamard matrix of that size without its factor, all +1 and -1; None for None."""
    return None if size is None else (hadamard_matrix(size, device=device) * size**0.5).round()


def rotate(x, H):
    """Rotate the numbers of a row, as many at a time as H has.

    H: what `signs_of_hadamard` gives; None for no rotation. A GPU makes this product in one pass.
    Returns float32.  Raises ValueError for rows that H does not divide.

    >>> rotate(torch.tensor([[8.0, 0, 0, 0]]), signs_of_hadamard(4))
    tensor([[4., 4., 4., 4.]])
    """
    if H is None:
        return x
    if x.shape[-1] % len(H):
        raise ValueError(f"rotations of {len(H)} do not divide the {x.shape[-1]} numbers of a row; pad them with zeros")
    with torch.autocast(x.device.type, enabled=False):
        return (x.reshape(-1, len(H)) @ H.to(x.dtype)).view(x.shape).float() * len(H) ** -0.5


def rounded(x, quantizer, H=None):
    """What a matrix goes through before it is multiplied: rotation, and rounding along the last axis.

    Returns Rounded, its values in the dtype of x.
    """
    done = quantizer(rotate(x, H))
    return Rounded(done.values.to(x.dtype), done.factor, done.mask)


def matmul(a, b, kind):
    """a b^T of two Rounded matrices, multiplied as `kind`, with their factors; returns float32."""
    with torch.autocast(a.values.device.type, enabled=False):
        y = (a.values.to(kind) @ b.values.to(kind).T).float()
    for factor in (a.factor, b.factor):
        y = y if factor is None else y * factor
    return y


def backward_product(E, saved, scheme, kind, H_back):
    """E S^T with both factors rounded along the axis that is summed over: (p, n) and (q, n) -> (p, q).

    saved: Rounded (q, n), as the forward product had it.  H_back: of the rotation, or None.
    """
    if scheme.saved is None:
        return matmul(rounded(E, scheme.error), saved, kind)
    product = matmul(rounded(E, scheme.error, H_back), rounded(saved.values, scheme.saved, H_back), kind)
    return product if saved.factor is None else product * saved.factor


class _Linear(torch.autograd.Function):
    """The three products; see the top of this file."""

    @staticmethod
    def forward(ctx, x, weight, scheme, kind, H, H_back):
        X, W = (rounded(m.to(kind), scheme.forward, H) for m in (x, weight))
        ctx.save_for_backward(*X, *W, H, H_back)
        ctx.scheme, ctx.kind, ctx.dtypes = scheme, kind, (x.dtype, weight.dtype)
        return matmul(X, W, kind).to(kind)

    @staticmethod
    def backward(ctx, E):
        *parts, H, H_back = ctx.saved_tensors
        X, W = Rounded(*parts[:3]), Rounded(*parts[3:])
        dx = backward_product(E, transposed(W), ctx.scheme, ctx.kind, H_back)
        dW = backward_product(E.T, transposed(X), ctx.scheme, ctx.kind, H_back)
        dx, dW = (_to_plain(g, m, H, t) for g, m, t in zip((dx, dW), (X, W), ctx.dtypes, strict=True))
        return dx, dW, None, None, None, None


def transposed(m):
    """A Rounded matrix, transposed; its mask is not needed then."""
    return Rounded(m.values.T, m.factor)


def _to_plain(gradient, rounded, H, dtype):
    """A gradient of rotated numbers as one of plain numbers, without what was cut off."""
    gradient = gradient if rounded.mask is None else gradient * rounded.mask
    return rotate(gradient.float(), H).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """The scheme fp8 with the units that multiply FP8: torch._scaled_mm, which takes the second factor transposed."""

    @staticmethod
    def forward(ctx, x, weight, kind):
        (X, x_factor), (W, w_factor) = FP8(E4M3).codes(x), FP8(E4M3).codes(weight)
        ctx.save_for_backward(X, x_factor, W, w_factor)
        ctx.kind, ctx.dtypes = kind, (x.dtype, weight.dtype)
        return scaled_mm(X, W, x_factor, w_factor, kind)

    @staticmethod
    def backward(ctx, E):
        X, x_factor, W, w_factor = ctx.saved_tensors
        codes, factor = FP8(E5M2).codes(E)
        dx = scaled_mm(codes, W.T.contiguous(), factor, w_factor, ctx.kind)
        dW = scaled_mm(codes.T.contiguous(), X.T.contiguous(), factor, x_factor, torch.float32)
        return dx.to(ctx.dtypes[0]), dW.to(ctx.dtypes[1]), None


def scaled_mm(a, b, a_factor, b_factor, kind):
    """a b^T on FP8 units: FP8 (p, n) and (q, n), p and n and q multiples of 16, float32 factors -> `kind` (p, q)."""
    return torch._scaled_mm(a, b.T, scale_a=a_factor, scale_b=b_factor, out_dtype=kind)


def has_fp8_units(device):
    """Whether that device multiplies FP8: NVIDIA's from Ada and Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
