"""A linear layer whose weight stays quantized.

    y = x W^T + b        with W = dequantize(codes, scales, ...) made anew in every forward pass, and dropped after it

Between two passes only the packed tensors exist, so the memory is really saved; the backward pass of a training makes
the matrix once more (`product.py`). What is computed is exactly F.linear with the dequantized weight, but for a few
tokens at a time, as text is generated: then a kernel multiplies with the codes directly, if there is one that gains by
it (`kernels.dispatch` says when), and its sums are rounded in another order.

The tensors are buffers, so `state_dict()`, `load_state_dict()` and `.to(device)` do what they do for any module. With
one exception: a change of dtype (`model.half()`, `model.to(torch.bfloat16)`) leaves them alone. A scale that is
stored as float16 is part of a format, and rounding it to another type would silently change every weight it belongs
to.
"""

import torch
from torch import nn

from qlearn.models.product import product
from qlearn.tensor import QuantizedTensor, sizes

_UNCOMMON = ("scales", "zeros", "bands", "hadamard")  # what the metadata of a weight has only for some methods


class QuantLinear(nn.Module):
    """Takes the place of nn.Linear.

    quantized: QuantizedTensor (out_features, in_features).  bias: tensor (out_features,) or None, kept in its own
    dtype.

    >>> import qlearn, torch
    >>> layer = QuantLinear(qlearn.quantize(torch.eye(4), "absmax", bits=4))
    >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).round(decimals=2)
    tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, quantized, bias=None):
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self._metadata_of_weight = quantized.metadata()
        self._tensor_names = tuple(quantized.state_tensors())
        for name, tensor in quantized.state_tensors().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def without_values(cls, storage, weight, bias=None):
        """A layer whose tensors have sizes and types, but no values yet.

        storage: what `storage()` gave.  weight, bias: what it replaces, for its size and its device.
        Raises ValueError when the two do not belong together.
        """
        metadata = {n: storage[n] for n in ("format", "block", *_UNCOMMON) if n in storage}
        metadata["shape"] = tuple(weight.shape)
        types = {name: getattr(torch, type_name) for name, type_name in storage["tensors"].items()}
        shapes = sizes(metadata, zeros_are_packed=types.get("zeros") == torch.uint8)
        tensors = {n: torch.empty(shapes[n], dtype=types[n], device=weight.device) for n in shapes if n in types}
        layer = cls(QuantizedTensor.from_state(tensors, metadata), bias)
        for name in storage["tensors"].keys() - tensors.keys():  # a subclass may have a number of its own beside them
            setattr(layer, name, torch.empty((), dtype=types[name], device=weight.device))
        return layer

    def storage(self):
        """What a file has to say beside the tensors, when the size of the layer is known.

        >>> import qlearn, torch
        >>> QuantLinear(qlearn.quantize(torch.eye(4), "zero_point", bits=3, group_size=2)).storage()
        {'format': 'uint3', 'block': [1, 2], 'tensors': {'packed': 'uint8', 'scales': 'float16', 'zeros': 'uint8'}}
        """
        types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self.named_buffers()}
        metadata = self._metadata_of_weight
        return {n: metadata[n] for n in ("format", "block", *_UNCOMMON) if n in metadata} | {"tensors": types}

    @property
    def quantized(self):
        """The weight as a QuantizedTensor; it shares memory with the buffers."""
        return QuantizedTensor.from_state({n: getattr(self, n) for n in self._tensor_names}, self._metadata_of_weight)

    def forward(self, x):
        """x: floating point (..., in_features).  Returns (..., out_features) in the dtype of x."""
        return product(x, self.quantized, self.bias)

    def _apply(self, fn, recurse=True):
        """Every `.to(...)` of a module ends here; the quantized tensors follow to the device and keep their dtype."""
        kept = {name: getattr(self, name) for name in self._tensor_names}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def extra_repr(self):
        """What print(model) shows."""
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.quantized.format.name}, {self.quantized.bits_per_weight:.3g} bits"
