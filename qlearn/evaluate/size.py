"""What a model weighs when everything is counted.

"4 bits" is a nominal figure: the scales, and the zeros of a method that has them, are stored as well. The true one is

    bits per weight = 8 * bytes of codes, scales, zeros, column scales / number of weights

over the quantized layers, and that is the axis on which methods should be compared. The size of a whole model also
holds what was not quantized: embeddings, norms, biases. Those are counted at 16 bits, the type in which checkpoints
store them, whatever type they are computed in here; the bundled model, computed in float32, weighs the 14.7 MB of its
file. Tied tensors are counted once.
"""

import torch

from qlearn.tensor import QuantizedTensor


def quantized_layers(model):
    """The weights of the modules whose attribute `quantized` is a QuantizedTensor: dict name -> QuantizedTensor."""
    found = {}
    for name, module in model.named_modules():
        quantized = getattr(module, "quantized", None)
        if isinstance(quantized, QuantizedTensor):
            found[name] = quantized
    return found


def bits_per_weight(model, dtype=torch.bfloat16, whole=False):
    """True bits stored for each weight.

    dtype: the type in which unquantized tensors are stored.
    whole: False counts the quantized layers alone (all parameters where there are none), True the whole model.
    """
    quantized = list(quantized_layers(model).values())
    if whole or not quantized:
        weights = sum(q.shape[0] * q.shape[1] for q in quantized) + sum(p.numel() for p in model.parameters())
        return 8 * model_bytes(model, dtype) / weights
    return 8 * sum(q.nbytes for q in quantized) / sum(q.shape[0] * q.shape[1] for q in quantized)


def model_bytes(model, dtype=torch.bfloat16):
    """Bytes of a file that holds the model.

    dtype: the type in which unquantized floating-point tensors are stored, unless their own is smaller.
    """
    exact = {id(tensor) for q in quantized_layers(model).values() for tensor in q.state_tensors().values()}
    distinct = {
        id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)
    }
    total = 0
    for key, tensor in distinct.items():
        narrowed = tensor.is_floating_point() and key not in exact
        total += tensor.numel() * (min(tensor.itemsize, dtype.itemsize) if narrowed else tensor.itemsize)
    return total
