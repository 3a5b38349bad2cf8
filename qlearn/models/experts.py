"""The experts of a mixture: many equal matrices in one parameter.

A mixture-of-experts layer has many small MLPs, and sends each token through a few of them. transformers keeps the same
matrix of all experts in one three-dimensional parameter, (experts, out, in), which no nn.Linear holds. Most weights of
such a model are there, so they must be quantized as well.

Each expert's matrix is quantized on its own, and all of them together, a `QuantExperts`, take the parameter's place.
The module that owned the parameter goes on to compute as before. When it reads the attribute of that name, it is
given a tensor that has not been dequantized yet: indexing it dequantizes the experts that are asked for, as the plain
loop over experts does, and any other operation dequantizes them all, for as long as it lasts.

**Which parameters.** Three dimensions, floating point, and "expert" in the parameter's full name, in the name of its
module's class, or among the attributes of its module. Other three-dimensional parameters are tables of positions,
convolutions and the like, which are not to be rounded like a matrix.

**Which way round.** A row of a weight matrix holds the weights of one output, and groups are cut from rows. Most models
keep (experts, out, in), some (experts, in, out). A module of transformers says so in `is_transposed`. Where a module
does not, the shapes may tell: the first matrix of a gated MLP has twice as many outputs as the second one has inputs.
Where they do not tell either, it is (experts, out, in), as in nn.Linear. To be mistaken would cost some accuracy, for
the groups would run the other way; what is computed stays right.
"""

import functools

import torch
from torch import nn
from torch.utils._pytree import tree_map


class QuantExperts(nn.ModuleList):
    """The quantized matrices that take the place of a three-dimensional parameter; each is a QuantLinear.

    layers: QuantLinears of one shape (out, in), one for each expert.
    dtype: what they are dequantized to; like the dtype of a parameter, `model.half()` changes it.
    transposed: whether the parameter is (experts, in, out) instead of (experts, out, in).

    >>> import qlearn
    >>> layer = qlearn.models.QuantLinear(qlearn.quantize(torch.eye(2, 4), "absmax", bits=4))
    >>> experts = QuantExperts([layer, layer, layer])
    >>> experts.shape, experts.dequantize().shape, experts.matrix(0).round(decimals=2).tolist()
    (torch.Size([3, 2, 4]), torch.Size([3, 2, 4]), [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    """

    def __init__(self, layers, dtype=torch.float32, transposed=False):
        super().__init__(layers)
        self.dtype, self.transposed = dtype, transposed

    @property
    def shape(self):
        """The shape of the parameter."""
        out, inner = self[0].out_features, self[0].in_features
        return torch.Size([len(self), inner, out] if self.transposed else [len(self), out, inner])

    def matrix(self, index):
        """One expert's matrix, dequantized, the way round that the parameter has it."""
        weight = self[index].quantized.dequantize(self.dtype)
        return weight.T if self.transposed else weight

    def dequantize(self, indices=None):
        """The whole parameter, or only some experts of it: a tensor (experts, ...)."""
        indices = range(len(self)) if indices is None else indices
        full = torch.empty(len(indices), *self.shape[1:], dtype=self.dtype, device=self[0].packed.device)
        for place, index in zip(full, indices, strict=True):
            place.copy_(self.matrix(index))
        return full

    def _apply(self, fn, recurse=True):
        """`.to(...)` and the like: the QuantLinears see to themselves; the dtype becomes what a parameter's would."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self[0].packed.device)).dtype
        return self


def expert_parameters(model):
    """The parameters that hold experts: dict full name -> (module that owns it, its name there)."""
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.dim() == 3 and parameter.is_floating_point() and _has_experts(module, full):
                found[full] = module, name
    return found


def is_transposed(module):
    """Whether the expert parameters of a module are (experts, in, out); the rule is at the top of this file."""
    if hasattr(module, "is_transposed"):
        return module.is_transposed
    for done in module.children():
        if isinstance(done, QuantExperts):  # its shapes have been compared before it was replaced
            return done.transposed
    shapes = [tuple(p.shape[1:]) for p in module.parameters(recurse=False) if p.dim() == 3]
    return any(a[1] == 2 * b[0] and a[0] == b[1] for a in shapes for b in shapes)


def expert_matrices(module, name):
    """The matrices (out, in) of the experts in a parameter, one after another."""
    transposed = is_transposed(module)
    for matrix in getattr(module, name).detach():
        yield matrix.T.contiguous() if transposed else matrix


def replace_experts(module, name, layers):
    """Put quantized matrices in the place of a three-dimensional parameter.

    layers: one QuantLinear (out, in) for each expert.
    """
    experts = QuantExperts(layers, getattr(module, name).dtype, is_transposed(module))
    delattr(module, name)
    module.add_module(held_as(name), experts)
    module.__class__ = _reading_experts(type(module), name)


def held_as(name):
    """The name of the QuantExperts that stand for a parameter, whose own name reads as a tensor.

    It must not end in what transformers calls a stack, or it would be split into experts when it is saved.

    >>> held_as("down_proj")
    'quantized_down_proj'
    """
    return f"quantized_{name}"


def _has_experts(module, full_name):
    words = [full_name, type(module).__name__, *vars(module)]
    return any("expert" in word.lower() for word in words)


@functools.cache
def _reading_experts(cls, name):
    """A class like cls, where reading an attribute gives the tensor that a QuantExperts of that name stands for."""
    attribute = property(lambda module: _Undequantized(module._modules[held_as(name)]))
    return type(cls.__name__, (cls,), {name: attribute, "__module__": cls.__module__, "__doc__": cls.__doc__})


class _Undequantized(torch.Tensor):
    """A tensor (experts, ...) that is dequantized by the first operation on it, and no further than that needs."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @staticmethod
    def __new__(cls, experts):
        device = experts[0].packed.device
        return torch.Tensor._make_wrapper_subclass(cls, experts.shape, dtype=experts.dtype, device=device)

    def __init__(self, experts):
        self.experts = experts

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.select.int and args[1] == 0:  # parameter[3]
            return args[0].experts.matrix(args[2])
        if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.int64:
            wanted, places = args[1][0].unique(return_inverse=True)  # parameter[tensor([3, 3, 0])]
            return args[0].experts.dequantize(wanted.tolist())[places]
        args, kwargs = tree_map(lambda x: x.experts.dequantize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self):
        return f"experts {tuple(self.shape)}, not dequantized yet"
