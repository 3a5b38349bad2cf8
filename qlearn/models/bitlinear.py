"""A layer of BitNet after training: packed trits, 8-bit inputs, and sums of integers. `bitnet.py` has whole models.

`training/bitlinear.py` trains with rounded weights and rounded inputs, and keeps floats behind the weights. Once it is
done these are of no use. What is stored of a matrix is V, its trits or signs, and one number:

    x ≈ X * gamma / 127      X int8 (tokens, in)             y = (X V^T) * beta * gamma / 127
    W ≈ V * beta             V of -1, 0, 1 (out, in)             int32

at 1.6 bits a weight, or 1 bit for signs.

**The output is that of the training**, bit for bit in float32. Both layers round X alike. Then BitLinear sums X V^T in
float32, which holds every integer up to 2**24; with up to 131,072 inputs no sum can get beyond that, so it is exact in
any order, and this layer sums the same integers in int32. The scales are multiplied in the same order. In bfloat16
BitLinear rounds the sums, and this layer does not.

**On a CPU** the sums come from `kernels/cpu/ternary.py`, without a multiplication. It reads the bytes in an order of
its own, so they are held twice from the first forward pass on: 1.6 bits a weight more. Elsewhere the trits are unpacked
to int8 for every pass, and multiplied by the integer units that W8A8 uses (`int8.py`).

Source: BitNet, arXiv 2310.11453, equation 11; BitNet b1.58, arXiv 2402.17764.
"""

import torch

from qlearn.formats.codebooks import SIGN
from qlearn.methods.ternary import EPSILON
from qlearn.models.int8 import int8_matmul
from qlearn.models.linear import QuantLinear

FORMATS = ("trit", "int2", SIGN.name)
QMIN, QMAX = -128, 127
WORTH_THREADS = 2**25  # products of a weight and an input; below, to hand the work out takes longer than to do it


class PackedBitLinear(QuantLinear):
    """Takes the place of BitLinear after training.

    quantized: QuantizedTensor (out_features, in_features) of trits or signs with one scale, as `ternary(weight)` or
    `binary(weight)` make it.  bias: tensor (out_features,) or None.
    Raises ValueError for any other quantized weight.

    No gradient passes through. A token with NaN or infinity gets an output that is not finite.

    >>> from qlearn.methods import ternary
    >>> layer = PackedBitLinear(ternary(torch.tensor([[0.9, -0.2, 0.1, -0.8]])))
    >>> layer(torch.tensor([[127.0, 1.0, 2.0, 3.4]]))
    tensor([[62.]])
    """

    def __init__(self, quantized, bias=None):
        if quantized.format.name not in FORMATS or quantized.block != quantized.shape or quantized.zeros is not None:
            raise ValueError(f"{quantized} is not ternary or binary with one scale; make it with ternary(weight)")
        super().__init__(quantized, bias)
        self._tiles, self._tiles_of = None, None

    @torch.no_grad()
    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features) in the dtype of x."""
        rows = x.detach().reshape(-1, self.in_features).float()
        y = self._on_cpu(rows) if rows.device.type == "cpu" else self._with_int8(rows)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight_codes(self):
        """V, int8 (out_features, in_features) of -1, 0, 1."""
        codes = self.quantized.codes()
        return (2 * codes.to(torch.int8) - 1) if self.quantized.format is SIGN else codes

    def _on_cpu(self, x):
        """All in one: float32 (tokens, out_features)."""
        from qlearn.kernels.cpu.ternary import bit_linear  # Numba takes a moment to import

        threads = torch.get_num_threads() if x.numel() * self.out_features >= WORTH_THREADS else 1
        return torch.from_numpy(bit_linear(x.numpy(), self._tiled(), self.scales.item(), threads=threads))

    def _with_int8(self, x):
        """The same, step by step."""
        codes, scale = quantize_tokens(x)
        return int8_matmul(codes, self.weight_codes()).float() * (self.scales.float().squeeze() / scale)

    def _tiled(self):
        """The trits as the kernel reads them; made at the first pass, and again when other weights were loaded."""
        from qlearn.kernels.cpu.ternary import pack_tiles

        version = None if self.packed.is_inference() else self.packed._version  # counts changes in place
        now = (self.packed, self.packed.data_ptr(), version)
        if self._tiles is None or self._tiles_of[0] is not now[0] or self._tiles_of[1:] != now[1:]:
            self._tiles, self._tiles_of = pack_tiles(self.weight_codes().numpy()), now
        return self._tiles

    def extra_repr(self):
        """What print(model) shows."""
        return f"{super().extra_repr()}, inputs int8"


def quantize_tokens(x):
    """BitNet's rounding of inputs: each row by its largest magnitude.

    x: float32 (tokens, in).  Returns X, int8, and the scale 127 / gamma, float32 (tokens, 1).

    >>> quantize_tokens(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]))[0]
    tensor([[  64, -127,   32],
            [   0,    0,    0]], dtype=torch.int8)
    """
    scale = QMAX / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)
    return (x * scale).round().clamp(QMIN, QMAX).to(torch.int8), scale
