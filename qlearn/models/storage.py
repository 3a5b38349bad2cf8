"""What a file has to say about a quantized model, beside its tensors.

A saved model is a folder with the tensors, by name, and a config.json, from which transformers builds the model without
values. The architecture gives the size of every matrix. What it cannot give is which matrices are quantized, and for
each of those the class of its layer, the format, the block that shares a scale, and the types of its tensors. That is
the `storage`:

    [{"class": "QuantLinear", "format": "int4", "block": [1, 64], "tensors": {"packed": "uint8", "scales": "float16"},
      "layers": ["model.layers.0.self_attn.q_proj", ...]},
     {"class": "QuantLinear", "format": "int8", ...}]

one entry for each kind, with the names of the layers that are stored so. It is read off the layers when a model is
saved. When it is loaded, `place` puts a QuantLinear wherever one was, with tensors that have sizes and no values, and
transformers fills them like any others. The float matrices never exist.

The experts of a mixture are a stack of matrices, and "model.layers.1.mlp.experts.quantized_down_proj.3" is one of them.
"""

import json

from torch import nn

from qlearn.models.bitlinear import PackedBitLinear
from qlearn.models.experts import expert_matrices, expert_parameters, held_as, replace_experts
from qlearn.models.int8 import Int8Linear
from qlearn.models.linear import QuantLinear

CLASSES = {cls.__name__: cls for cls in (QuantLinear, Int8Linear, PackedBitLinear)}


class CheckpointError(ValueError):
    """A saved model that cannot be read: incomplete, changed, or written by a newer version of this package."""


def storage_of(model):
    """How the layers of a model are stored: a list with one dict for each kind, as shown above.

    >>> import qlearn
    >>> model = qlearn.quantize_model(qlearn.load_model()[0], "absmax", bits=4, group_size=64, progress=False)
    >>> (kind,) = storage_of(model)
    >>> kind["format"], kind["block"], kind["tensors"], len(kind["layers"])
    ('int4', [1, 64], {'packed': 'uint8', 'scales': 'float16'}, 56)
    """
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            if type(module) not in CLASSES.values():
                raise ValueError(f"layer {name} is of {type(module)}, which cannot be saved; quantize_model's can")
            kind = {"class": type(module).__name__, **module.storage()}
            kinds.setdefault(json.dumps(kind), {**kind, "layers": []})["layers"].append(name)
    return list(kinds.values())


def place(model, storage):
    """Put QuantLinears without values where `storage` has quantized layers, in a model without values.

    Raises CheckpointError when the model and the storage do not belong together.
    """
    if storage is None:
        raise CheckpointError("config.json has a quantization_config without its storage; save the model again")
    stacks = {_rename(name, held_as): stack for name, stack in expert_parameters(model).items()}
    experts = {}  # name of a stack -> {name of a matrix: its QuantLinear}
    for kind in storage:
        for name in kind["layers"]:
            stack = name.rpartition(".")[0]
            if stack in stacks:
                experts.setdefault(stack, {})[name] = _without_values(name, kind, next(expert_matrices(*stacks[stack])))
            else:
                linear = _find_linear(model, name)
                model.set_submodule(name, _without_values(name, kind, linear.weight, linear.bias))
    for stack, layers in experts.items():
        module, attribute = stacks[stack]
        names = [f"{stack}.{i}" for i in range(len(getattr(module, attribute)))]
        if layers.keys() != set(names):
            raise CheckpointError(
                f"config.json has {len(layers)} of the {len(names)} experts in {stack}; restore it from where it came"
            )
        replace_experts(module, attribute, [layers[name] for name in names])
        keep_as_it_is(module)


def keep_as_it_is(module):
    """Tell transformers that a module needs no random numbers to begin with."""
    module._is_hf_initialized = True


def check(model):
    """Raise CheckpointError unless each tensor of each quantized layer was read, and fits."""
    folder = repr(str(model.name_or_path))
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        for tensor_name, tensor in module.named_buffers():
            if not getattr(tensor, "_is_hf_initialized", False):  # transformers marks what it has read
                raise CheckpointError(f"the weights in {folder} lack {name}.{tensor_name}; fetch or save them again")
        try:
            module.quantized  # noqa: B018 - to build it is to check it
        except ValueError as error:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: in {name}, {error}") from error


def _rename(name, rename):
    """A dotted name with its last part renamed."""
    owner, dot, last = name.rpartition(".")
    return owner + dot + rename(last)


def _find_linear(model, name):
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(
            f"config.json has a quantized layer {name}, and {type(model).__name__} has no linear layer of that name; "
            "load it with the class of model that was saved"
        )
    return layer


def _without_values(name, kind, weight, bias=None):
    try:
        return CLASSES[kind["class"]].without_values(kind, weight, bias)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"config.json is wrong about how {name} is stored: {error}") from error
