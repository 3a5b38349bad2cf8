"""BitLinear: a linear layer that is trained with one bit, or one of three values, for each weight.

Quantization after training asks what is lost when a finished weight is rounded. BitNet never had more: from the first
step on, the layer computes with rounded weights and rounded inputs, and the float weights behind them only remember
where each one is heading. In the paper's symbols, with Q_b = 127 and rows x of the input:

    gamma = max|x|        X = clip(round(x * Q_b / gamma), -128, 127)        one scale for each token
    beta = mean|W|        V = clip(round(W / beta), -1, 1)                   b1.58: one scale for the matrix
                          V = sign(W - mean(W))                              the first BitNet

    y = (X V^T) * beta * gamma / Q_b

X and V hold small integers, so X V^T needs no multiplication (`kernels/cpu/ternary.py`); in training it is computed by
bfloat16 units, which hold all these integers exactly and sum in float32. The scales come afterwards. To leave them
out, says the paper on training, costs nearly everything: a loss of 7.5 in place of 2.5.

**Backward** both roundings are passed straight through (`fake_quant.py`): dx and dW are those of a plain layer that was
given the rounded values, and the scales count as constants.

A sum of many products has a known spread only if its inputs have a known size. So each BitLinear stands right behind an
RMSNorm. Before q, k, v, gate and up a Llama has one anyway; the ones before o and down are new, the SubLN of
transformers' `BitNetForCausalLM`.

Source: BitNet, arXiv 2310.11453, equations 1 to 11; b1.58, arXiv 2402.17764, equations 1 to 3; The Era of 1-bit LLMs:
Training Tips, Code and FAQ (microsoft/unilm, 2024).
"""

import torch
import torch.nn.functional as F
from torch import nn

from qlearn.methods.ternary import EPSILON, absmean, signs
from qlearn.models.layers import SKIP, turn_linear_layers

ROUNDING = {"b158": absmean, "b1": signs}
QMIN, QMAX = -128, 127


class BitLinear(nn.Linear):
    """Takes the place of nn.Linear in training. kind: "b158" for ternary weights, "b1" for binary ones.

    Raises ValueError for another kind.

    >>> layer = BitLinear(4, 1)
    >>> layer.weight.data = torch.tensor([[0.9, -0.2, 0.1, -0.8]])       # V = 1 0 0 -1, beta = 0.5
    >>> layer(torch.tensor([[127.0, 1.0, 2.0, 3.4]])).item()             # X = 127 1 2 3
    62.0
    """

    def __init__(self, in_features, out_features, bias=False, kind="b158", device=None, dtype=None):
        check_kind(kind)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.kind = kind

    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features), in the dtype of a plain linear layer."""
        V, beta = self.rounded()
        V = straight_through(self.weight.float() * (1 / beta), V)
        scale = QMAX / x.detach().float().abs().amax(-1, keepdim=True).clamp(min=EPSILON)
        scaled = x.float() * scale
        X = straight_through(scaled, scaled.round().clamp(QMIN, QMAX))
        y = F.linear(X.to(x.dtype), V.to(x.dtype))
        y = (y.float() * (beta / scale)).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def rounded(self):
        """What the layer computes with: (V, float32 (out_features, in_features); beta, float32 scalar)."""
        V, beta = ROUNDING[self.kind](self.weight.float().flatten())
        return V.view(self.weight.shape), beta.squeeze()

    def extra_repr(self):
        """What print(model) shows."""
        return f"{super().extra_repr()}, {self.kind}"


def to_bitlinear(model, kind="b158", skip=SKIP):
    """Turn the linear layers of a model into BitLinear, in place; their weights become the float weights behind.

    kind: "b158" or "b1".  skip: layers to leave out, as for `quantize_model`.
    Returns the model.  Raises ValueError for another kind, and for a model without linear layers.
    """
    check_kind(kind)
    turn_linear_layers(model, BitLinear, skip, kind=kind)
    return model


def straight_through(x, rounded):
    """`rounded` forward, exactly, and the gradient of x backward.

    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> straight_through(x, x.round()).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    return x - x.detach() + rounded.detach()


def check_kind(kind):
    """Raise ValueError unless there is such a rounding."""
    if kind not in ROUNDING:
        raise ValueError(f"kind={kind!r} is unknown; choose from {', '.join(ROUNDING)}")
