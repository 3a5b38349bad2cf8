"""The tensors of a model, one after another, as a file wants them.

Each module that an architecture has gives one tensor or two, a weight and perhaps a bias. A `Source` knows its name and
shape in the file and makes its bytes when it is asked to, so that of a large model only one matrix at a time is held a
second time.

A quantized layer, a `QuantLinear` of any method, is written as it is where the block type holds the same numbers
(`exact.py`), and by its dequantized weights otherwise. A layer that computes something else than x Wᵀ + b with a weight
that can be had is refused: its file would be another model.
"""

from dataclasses import dataclass

import torch
from torch import nn

from qlearn.export import configs, names, tensor_types
from qlearn.export.exact import exact
from qlearn.tensor import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that is to be written.

    name: in the file.  tensor: torch.Tensor, or QuantizedTensor.  heads: see `names.interleave`; None leaves the rows.
    """

    name: str
    tensor: object
    heads: int | None = None

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    def encode(self, type, imatrix=None):
        """The bytes: uint8 (rows, bytes of a row), rows in the order of the file.

        Raises ValueError, naming the tensor, for numbers that the type cannot hold.
        """
        blocks = exact(self.tensor, type) if isinstance(self.tensor, QuantizedTensor) else None
        try:
            blocks = tensor_types.encode(self.numbers(), type, imatrix) if blocks is None else blocks
        except ValueError as error:
            raise ValueError(f"tensor {self.name}: {error}") from error
        return names.interleave(blocks, self.heads) if self.heads else blocks

    def numbers(self):
        """float32 (rows, columns), as the model has them; a vector is one row, or a column where its rows move."""
        if isinstance(self.tensor, QuantizedTensor):
            return self.tensor.dequantize().cpu().numpy()
        numbers = self.tensor.detach().to("cpu", torch.float32).numpy()
        return numbers if numbers.ndim == 2 else numbers.reshape((-1, 1) if self.heads else (1, -1))


def sources(model, architecture):
    """The tensors of a model: list of Source.

    model: a causal language model of transformers.  architecture: names.Architecture.
    Raises ValueError for modules that are missing or unknown to the architecture, and layers that are not linear.
    """
    found, covered = [], set()
    for theirs, ours in architecture.modules(model.config.num_hidden_layers).items():
        module = _module(model, theirs)
        if theirs == "lm_head" and _is_tied(model, module):
            continue
        covered.update(id(tensor) for tensor in module.state_dict(keep_vars=True).values())
        weight, bias = _weight(theirs, module), getattr(module, "bias", None)
        heads = architecture.heads(f"{ours}.weight", model.config)
        found.append(Source(f"{ours}.weight", weight, heads))
        if bias is not None:
            if ours.split(".")[-1] not in architecture.biases:
                raise ValueError(f"llama.cpp's {architecture.name} has no bias in {ours}; the model cannot be exported")
            found.append(Source(f"{ours}.bias", bias, heads))
    _check_covered(model, covered)
    freqs = configs.rope_freqs(model.config)
    return found if freqs is None else [*found, Source(configs.ROPE_FREQS, torch.from_numpy(freqs))]


def _module(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no module {name}, so it is no plain {model.config.model_type}; export the "
            "model that it was made from"
        ) from error


def _is_tied(model, head):
    return getattr(head, "weight", None) is model.get_input_embeddings().weight


def _weight(name, module):
    """The weight that a module computes with."""
    quantized = getattr(module, "quantized", None)
    if isinstance(quantized, QuantizedTensor):
        return quantized
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(module).__name__}, which computes something else than its weight says; replace it by a "
            "QuantLinear with the weights it computes with (BitLinear: qlearn.models.bitnet.pack_bitnet)"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise ValueError(f"{name} is a {type(module).__name__} without a weight that can be read; dequantize it first")
    return weight


def _check_covered(model, covered):
    """Raise ValueError, naming some, when the model has tensors that would be left out."""
    state = model.state_dict(keep_vars=True)
    left = [name for name, tensor in state.items() if id(tensor) not in covered]
    if left:
        raise ValueError(
            f"{type(model).__name__} has {len(left)} tensors that a GGUF file of its architecture has no place for: "
            f"{', '.join(left[:3])}; merge them into the model first"
        )
