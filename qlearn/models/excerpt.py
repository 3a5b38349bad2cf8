"""A part of the calibration text, for what has to be tried many times.

The calls of a block hold some ten thousand tokens. To compare twenty candidates, or to see whether two ways of
computing come to the same, a few windows do as well, if they come from all over the text. The windows of a call lie
side by side along the first dimension of the hidden states, and of all other tensors that differ between windows; so a
call becomes smaller when that dimension is cut.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_map


def excerpt(calls, tokens):
    """Some windows of each of some calls.

    calls: list of (args, kwargs), as in `Block.calls`.  tokens: about how many are wanted; one window is the least.
    Returns a list of (args, kwargs), from first to last as evenly spread as can be. Calls in which no window can be
    told from the next, because the hidden states have no dimension for them, are taken whole.

    >>> calls = [((torch.zeros(8, 512, 4),), {"position_ids": torch.arange(512)[None]})] * 4
    >>> [(len(args[0]), len(kwargs["position_ids"])) for args, kwargs in excerpt(calls, tokens=4096)]
    [(2, 1), (2, 1), (2, 1), (2, 1)]
    """
    if not calls:
        return []
    wanted = max(1, tokens // _size(calls[0])[1])
    number = min(wanted, len(calls))
    return [_first(calls[i * len(calls) // number], wanted // number) for i in range(number)]


def _size(call):
    """(windows, tokens in a window) of a call; the hidden states are its first floating-point tensor with a width."""
    floating = (x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor) and x.is_floating_point())
    shape = next((x.shape for x in floating if x.dim() >= 2), (1, 1))
    return tuple(shape[:2]) if len(shape) == 3 else (1, shape[0])


def _first(call, windows):
    """A call with its first windows only."""
    size = _size(call)[0]
    return tree_map(
        lambda x: x[:windows] if isinstance(x, torch.Tensor) and x.dim() >= 2 and len(x) == size > 1 else x, call
    )
