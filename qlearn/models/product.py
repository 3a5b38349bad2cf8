"""The product with a quantized weight, in a training that leaves the weight alone.

    y = x W^T + b            dL/dx = dL/dy W            W = dequantize(codes, scales, ...)

The codes learn nothing, but gradients have to pass through: to adapters, or to layers below. dL/dx needs W once more,
so autograd, which sees an ordinary product, keeps the float matrix of every layer from the forward pass to the backward
pass. Then the whole model lies in memory in floats at the end of each forward pass, and the four bits saved nothing.

Here the packed weight is kept instead, and the matrix is made a second time when the gradient arrives. That costs one
more dequantization for each layer and step. Numbers do not change: forward and backward compute what they would have.

Where no gradient is wanted, `kernels.dispatch` finds the fastest way to the product; for a few tokens at a time, that
is from the packed codes.

Source: QLoRA, arXiv 2305.14314, section 3, "double dequantization"; bitsandbytes does the same in `MatMul4Bit`.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qlearn.kernels import dispatch


def product(x, quantized, bias=None):
    """x W^T + b, keeping for the backward pass nothing but the packed weight.

    x: floating point (..., in_features).  quantized: QuantizedTensor (out_features, in_features), which gets no
    gradient.  bias: tensor (out_features,) or None.
    Returns (..., out_features), in the dtype that F.linear would have.

    >>> import qlearn
    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> y = product(x, qlearn.quantize(torch.tensor([[3.0, -7.0]]), "absmax", bits=4, scale_dtype=torch.float32))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([[-4.0]], [[3.0, -7.0]])
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Product.apply(x, quantized, bias)
    return dispatch.matmul(x, quantized, bias)


class _Product(torch.autograd.Function):
    """See the top of this file."""

    @staticmethod
    def forward(ctx, x, quantized, bias):
        ctx.quantized, ctx.dtype = quantized, x.dtype
        return F.linear(x, quantized.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ ctx.quantized.dequantize(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_x, None, of_bias
