"""NF4, QLoRA's 4-bit NormalFloat: sixteen values where normally distributed weights are, and scales that are quantized.

Evenly spaced values waste codes on weights that hardly occur: of a normal distribution, two thirds lie in the inner
third of the range that a group of 64 takes up. NF4 has its sixteen values so that each is used about equally often
(`formats/codebooks.py`); they go from -1 to 1, and a block is divided by its largest magnitude to fit:

    scale = max|w|        code = place of the value nearest to w / scale        w' = value(code) · scale

The largest weight of a block comes back exactly, and so does 0.

**Blocks** are 64 consecutive weights of a row, and the scale is a float32: 4 + 32/64 = 4.5 bits a weight; or 4.25, if
`scale_dtype` is float16.

**Double quantization** has the scales quantized too. Their mean is taken off, then 256 of them share a float32, their
largest magnitude, and each is a code of the dynamic map, 8 bits:

    scale  ≈  dynamic(code) · largest + mean          4 + 8/64 + 32/(64 · 256) = 4.127 bits a weight

**NF3** is the same with eight values.

**What it is best at.** QLoRA calls the values information-theoretically optimal, meaning that they are used equally
often. That is not the least squared error. On normally distributed weights, in groups of 64, NF4 errs less than
`absmax`, but no less than `zero_point`, whose grid ends at the smallest weight too: 9.2 % of the weights' size against
10.8 % and 9.1 %, at 4.25 bits a weight, 4.25 and 4.31.

Codes and scales are those of bitsandbytes, bit for bit, and so is what is read back. Only its CPU version looks up the
code of a *scale* in a table of 65,536 entries, and so takes the neighbour of the nearest code for one scale in 700.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3; bitsandbytes: `functional.py`, `backends/default/ops.py`.
"""

import torch

from qlearn.formats.codebooks import DYNAMIC8, NF3, NF4
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.methods.storing import stored
from qlearn.scales import QuantizedScales
from qlearn.tensor import QuantizedTensor

BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales that share a step
SMALLEST = 1e-38  # no block is divided by less


def nf4(weight, bits=4, group_size=None, *, double_quant=False, scale_dtype=torch.float32):
    """Quantize a matrix to NF4.

    weight: (rows, columns), floating point.  bits: 4.
    group_size: consecutive weights of a row that share a scale; None for 64.
    double_quant: whether to store the scales in 8 bits.  scale_dtype: of the scales otherwise.
    Returns a QuantizedTensor.
    Raises ValueError for a weight that is not a finite matrix, for other bits, for a group size that does not divide
    the columns, and for a scale that `scale_dtype` cannot hold.

    >>> qt = nf4(torch.tensor([[0.5, -1.0, 0.1, 2.0]]), group_size=4)
    >>> qt.codes().tolist(), qt.dequantize()
    ([[10, 2, 8, 15]], tensor([[ 0.4922, -1.0501,  0.1592,  2.0000]]))
    """
    return _quantize(weight, "nf4", NF4, bits, group_size, double_quant, scale_dtype)


def nf3(weight, bits=3, group_size=None, *, double_quant=False, scale_dtype=torch.float32):
    """Quantize a matrix to NF3: all as for `nf4`, with 3 bits.

    >>> nf3(torch.tensor([[0.5, -1.0, 0.1, 2.0]]), group_size=4).dequantize()
    tensor([[ 0.3667, -1.0700,  0.0000,  2.0000]])
    """
    return _quantize(weight, "nf3", NF3, bits, group_size, double_quant, scale_dtype)


def double_quantized(scales):
    """Scales (block rows, block columns), float32, by the dynamic map: QuantizedScales of 8 bits.

    >>> double_quantized(torch.tensor([[1.0, 1.5, 2.0, 3.5]])).float()
    tensor([[0.9957, 1.5020, 2.0000, 3.5000]])
    """
    offset = scales.mean()
    centred = scales.flatten() - offset
    rows = -(-centred.numel() // SCALES_BLOCK)
    table = torch.nn.functional.pad(centred, (0, rows * SCALES_BLOCK - centred.numel())).view(rows, SCALES_BLOCK)
    steps = table.abs().amax(1, keepdim=True)
    codes = DYNAMIC8.encode(table / torch.where(steps == 0, 1, steps)).flatten()[: centred.numel()]
    layout = (rows, SCALES_BLOCK)
    return QuantizedScales.from_codes(codes.view(scales.shape), DYNAMIC8, steps, offset.view(1, 1), layout)


def _quantize(weight, name, codebook, bits, group_size, double_quant, scale_dtype):
    if bits != codebook.bits:
        raise ValueError(f"bits={bits} is not what {name} stores; pass bits={codebook.bits}")
    weight = check_weight(weight)
    block = block_shape(weight.shape, BLOCK if group_size is None else group_size)
    blocks = to_blocks(weight, block)
    scales = blocks.abs().amax(-1)
    codes = _codes(blocks * (1 / scales.clamp(min=SMALLEST))[..., None], codebook)
    scales = double_quantized(scales) if double_quant else stored(scales, scale_dtype)
    return QuantizedTensor.from_codes(from_blocks(codes, weight.shape, block), scales, codebook, block)


def _codes(x, codebook):
    """As `codebook.encode`, but the midpoints between values are rounded to float32, as in bitsandbytes."""
    values = torch.tensor(codebook.values, device=x.device)
    return torch.bucketize(x.clamp(-1, 1), (values[:-1] + values[1:]) / 2).to(torch.uint8)
