"""The compiled loop over columns: the same codes, grids and errors as the readable one, to the last bit."""

import importlib

import pytest
import torch

from qlearn.kernels.cpu import gptq as kernel
from qlearn.kernels.cpu.gptq import ROWS, fused, round_columns
from qlearn.kernels.dispatch import use
from qlearn.methods.gptq import gptq
from tests.methods.test_gptq import problem

method = importlib.import_module("qlearn.methods.gptq")  # the package's own name for it is the function


class Grids(method._Grids):
    """Only its rounding."""

    def __init__(self, bits, sym):
        self.low, self.high = method.integer_range(bits, signed=sym, symmetric=sym)


def block(batch, columns, rows, done, sym, grids=1, seed=0):
    """What is passed to round `done` of the columns of a block; zeros and codes as they are for sym or not."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(batch, columns, rows, generator=generator)
    U = torch.randn(batch, columns, columns, generator=generator).triu() + 2 * torch.eye(columns)
    scale = torch.rand(batch, grids, rows, generator=generator) + 0.1
    zero = torch.zeros_like(scale) if sym else torch.randint(0, 16, scale.shape, generator=generator).float()
    codes = torch.zeros(batch, done, rows, dtype=torch.int8 if sym else torch.uint8)
    return W, U, Grids(4, sym), scale, zero, codes, torch.zeros(batch, done, rows)


@pytest.mark.parametrize("sym", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("batch, columns, rows, done", [
    (1, 1, 1, 1), (1, 5, 3, 2), (1, 128, 70, 64), (2, 16, ROWS, 16), (3, 20, ROWS + 1, 7), (1, 8, 3 * ROWS, 8),
])  # fmt: skip
def test_a_block_is_the_same(batch, columns, rows, done, sym):
    for grids in (1, done):
        ours, readable = (block(batch, columns, rows, done, sym, grids) for _ in range(2))
        round_columns(*ours)
        method._round_columns(*readable)
        for name, a, b in zip(
            ("W", "codes", "errors"), (ours[0], *ours[5:]), (readable[0], *readable[5:]), strict=True
        ):
            assert torch.equal(a, b), name


def test_the_other_way_to_round_is_the_other_way(monkeypatch):
    """What the loop does where addcmul rounds twice: the same as multiplying first, and subtracting then."""
    monkeypatch.setattr(kernel, "fused", lambda: False)
    W, U, *rest, errors = block(1, 2, 50, 1, True)
    first = W.clone()
    round_columns(W, U, *rest, errors)
    assert torch.equal(W[:, 1], first[:, 1] - U[:, 0, 1, None] * errors[:, 0])


def test_fused_says_what_addcmul_does():
    generator = torch.Generator().manual_seed(0)
    w, u, e = (torch.randn(1000, generator=generator) for _ in range(3))
    once = (w.double() - u.double() * e.double()).float()
    assert torch.equal(torch.addcmul(w, u, e, value=-1), once if fused() else w - u * e)
    assert not torch.equal(once, w - u * e)


OPTIONS = [
    {"group_size": 8},
    {"group_size": 8, "sym": True},
    {"group_size": 32, "blocksize": 20},
    {"group_size": None},
    {"group_size": None, "act_order": "static"},
    {"group_size": 8, "act_order": "static"},
    {"group_size": 8, "act_order": "group"},
    {"group_size": 8, "static_groups": True},
    {"group_size": 8, "clip": "mse"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_matrices_are_the_same(bits, options, monkeypatch):
    monkeypatch.setattr(method, "COMPILED_FROM", 1)
    weight, x = problem(70, 96, tokens=400)
    with use("reference"):
        expected = gptq(weight, bits, inputs=x, **options)
    found = gptq(weight, bits, inputs=x, **options)
    for name, tensor in expected.state_tensors().items():
        assert torch.equal(getattr(found, name), tensor), name


def test_a_stack(monkeypatch):
    monkeypatch.setattr(method, "COMPILED_FROM", 1)
    pairs = [problem(5, 32, tokens=100, seed=seed) for seed in range(3)]
    stack = torch.stack([w for w, _ in pairs]), 3, 8
    with use("reference"):
        expected = gptq(*stack, inputs=[x for _, x in pairs])
    for a, b in zip(gptq(*stack, inputs=[x for _, x in pairs]), expected, strict=True):
        assert torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours, readable = (block(1, 12, 3 * ROWS + 5, 12, False) for _ in range(2))
    round_columns(*ours)
    method._round_columns(*readable)
    assert torch.equal(ours[0], readable[0]) and torch.equal(ours[5], readable[5])


def test_where_it_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "round_columns", lambda *of: calls.append(of[0].shape) or method._round_columns(*of))
    weight, x = problem(128, 128, tokens=300)
    with use("reference"):
        gptq(weight, 4, inputs=x)
    gptq(weight[:100], 4, inputs=x)
    assert not calls
    gptq(weight, 4, inputs=x)
    assert calls == [(1, 128, 128)]
