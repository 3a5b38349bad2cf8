"""SINQ without its second scale: what balances the columns goes into the operation in front, and any format will do.

SINQ (`methods/sinq.py`) divides the columns of a weight by mu1 and stores mu1 with the matrix. A file format that knows
one scale for each group, such as Q4_0, has no place for it. But the columns can be divided for good, if whatever made
the inputs multiplies them by mu1 instead:

    W x  =  (W / mu1) (mu1 · x)

and a norm, or a linear layer, does that at no cost, by other weights (`folding.py`). The result is an ordinary float
model that computes what it did, whose matrices are better balanced. Quantize it with any method, or write it to a GGUF
file: there is nothing to tell it from another model.

**Layers that read the same tensor** (q, k and v; gate and up) must share mu1. So it is found for the matrix that has
the rows of all of them. mu1 is divided by its median first, so that most of the inputs stay as large as they were.

**Where nothing can multiply** (o under grouped-query attention), the layer stays as it was.

Folding into a linear layer multiplies its rows, so after `down` has been balanced, `up` is another matrix; `repeats`
goes over the model again. No calibration text is needed. Some tokens are run through each block, any tokens, to see
which operation it is that can multiply.

Source: SINQ (arXiv 2509.22944), the section on SINQ without overhead; the authors' repository has it as Pre-SINQ, with
4 states of each tile instead of the 16 of SINQ itself.
"""

import torch

from qlearn.evaluate.windows import context_length
from qlearn.methods.blocking import block_shape
from qlearn.methods.sinkhorn import sinkhorn
from qlearn.models.calibration import walk
from qlearn.models.folding import fold
from qlearn.models.layers import SKIP, check_skip, linear_layers

TOKENS = 64  # that each block is tried with


def presinq(model, group_size=64, *, order=4, repeats=1, norms_only=False, skip=SKIP, progress=True):
    """Balance the columns of a model's linear layers, in place; the model computes what it did, but for rounding.

    group_size: columns of a tile; best what the weights will be quantized with, 32 for Q4_0; None for whole rows.
    order: of `sinkhorn`.  repeats: how many times to go through the model.
    norms_only: do not let a linear layer multiply.  skip: layers to leave alone, as for `quantize_model`.
    progress: show a bar.
    Returns the factors: dict name of a layer -> mu1, float32 (in_features,), for the layers whose columns were divided.
    Raises ValueError for a group size that does not divide a layer's columns, and for an order or repeats below 1; the
    model is unchanged then.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> factors = presinq(model, progress=False)
    >>> [name.removeprefix("model.layers.0.") for name in factors][:6]
    ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
    """
    if order < 1 or repeats < 1:
        raise ValueError(f"order={order} and repeats={repeats} must be at least 1; usually they are 4, and 1 to 3")
    layers = linear_layers(model, check_skip(model, skip))
    for name, layer in layers.items():
        try:
            block_shape(layer.weight.shape, group_size)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    factors = {}
    for _ in range(repeats):
        for block in walk(model, _any_ids(model), progress=progress):
            for group, mu1 in _balance(block, layers, group_size, order, norms_only):
                for name in group:
                    factors[name] = factors.get(name, 1) * mu1
    return factors


def column_factors(weights, group_size=None, order=4):
    """mu1 for matrices that read the same inputs, over its median.

    weights: list of floating point (rows, columns).  group_size, order: as for `presinq`.
    Returns float32 (columns,).

    >>> weight = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 2.0, 4.0])
    >>> column_factors([weight[:30], weight[30:]], order=16)
    tensor([0.9433, 1.0000, 1.6523, 2.9044])
    """
    stacked = torch.cat([weight.detach().float() for weight in weights])
    width = block_shape(stacked.shape, group_size)[1]
    mu1 = sinkhorn(stacked.unflatten(1, (-1, width)).transpose(0, 1), order).mu1.flatten()
    return mu1 / mu1.median()


def _balance(block, layers, group_size, order, norms_only):
    """Fold what can be folded in a block; yields (names in the model, mu1) of each group that was."""
    prefix = f"{block.name}."
    own = {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
    for group in block.groups(own):
        mu1 = column_factors([own[name].weight for name in group], group_size, order)
        if fold(block, group, 1 / mu1, norms_only):
            yield [prefix + name for name in group], mu1


def _any_ids(model):
    """Token ids (1, tokens), one after another from 0."""
    config = model.config.get_text_config()
    return (torch.arange(min(TOKENS, context_length(model))) % config.vocab_size)[None]
