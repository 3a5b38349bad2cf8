"""What each expert of a mixture is given to read.

The inputs of an nn.Linear are seen by a hook. The experts of a mixture share one three-dimensional parameter, and their
inputs are made, used and forgotten inside of one forward function. But whatever that function does, the parameter takes
part in it. So for as long as inputs are collected, the module is given a parameter that tells of its use: a tensor that
behaves like any other, except that

    w = parameter[3]                 is a tensor that tells of its use, too, and knows that it belongs to expert 3
    F.linear(x, w)   or   x @ w      says that x is an input of expert 3
    torch.bmm(x, parameter)          says that x[e] are inputs of expert e; rows of zeros stand for no token

transformers can compute experts in several ways, some of which hand the whole parameter to a fused kernel. They are
chosen by a decorator around the plain loop over experts, and here the loop is called. A forward function that does
something else altogether tells nothing; then no inputs are known, and the caller has to do without.
"""

import contextlib
import functools
import inspect

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from qlearn.methods.statistics import InputStatistics
from qlearn.models.recording import call

PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


def collect_expert_inputs(block, module, name, in_features, experts):
    """Run a block and gather what some experts read.

    block: `calibration.Block`.  module, name: the module in it that has the experts, and its parameter.
    in_features: width of the inputs.  experts: the numbers of the experts that are of interest.
    Returns dict number -> InputStatistics; the `count` is 0 for an expert that was given nothing.
    """
    statistics = {number: InputStatistics(in_features) for number in experts}

    def see(number, x):
        if number in statistics:
            statistics[number].add(x)

    with _telling(module, name, see):
        for arguments in block.calls:
            call(block.module, arguments)
    return statistics


@contextlib.contextmanager
def _telling(module, name, see):
    """While open, see(number, x) is called whenever a module multiplies x by the matrix of an expert."""
    parameter = module._parameters.pop(name)
    module.__dict__[name] = _Telling.around(parameter, see)
    module.forward = functools.partial(inspect.unwrap(type(module).forward), module)
    try:
        yield
    finally:
        del module.forward, module.__dict__[name]
        module._parameters[name] = parameter


class _Telling(torch.Tensor):
    """A tensor that calls `see` when it is multiplied by something; `number` is the expert it belongs to, or None."""

    @classmethod
    def around(cls, tensor, see, number=None):
        telling = tensor.detach().as_subclass(cls)
        telling.see, telling.number = see, number
        return telling

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, w = args[:2] if len(args) > 1 else (None, None)
        if isinstance(w, cls) and w.number is not None and func in PRODUCTS:
            w.see(w.number, x)
        if isinstance(w, cls) and w.number is None and func in (torch.bmm, torch.Tensor.bmm):
            for number, rows in enumerate(x):
                w.see(number, rows[rows.any(-1)])
        plain, options = tree_map(
            lambda a: a.as_subclass(torch.Tensor) if isinstance(a, cls) else a, (args, kwargs or {})
        )
        result = func(*plain, **options)
        if func is torch.Tensor.__getitem__ and isinstance(x, cls) and result.dim() == 2:
            return cls.around(result, x.see, int(w))
        return result
