"""SageAttention itself, its first version (int8, Triton), against our emulation of it. Needs a GPU, and the package:

    pip install --no-deps sageattention==1.0.6

Its codes are ours, but for two things. Halves of integers go away from zero there. And Q is multiplied by 1/√d and
log2(e) before it is rounded, which moves a number that is nearly a half to the other side now and then. Its sum over
P V is float16, so the outputs agree to what that leaves, far closer than either is to exact attention.
"""

from dataclasses import replace

import pytest
import torch

from qlearn.methods.attention import SCHEMES, attention
from qlearn.methods.attention_operands import round_qk

sageattention = pytest.importorskip("sageattention", reason="pip install --no-deps sageattention==1.0.6")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels need a GPU"),
]


def qkv(tokens, d, outlier=0.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, d, generator=g).cuda() for heads in (4, 2, 2))
    k[..., 3] += outlier
    return q, k, v


@pytest.mark.parametrize("d", [64, 128])
def test_codes(d):
    q, k, _ = qkv(512, d)
    theirs_q, scale_q, theirs_k, scale_k = sageattention.quant_per_block.per_block_int8(q, k)
    for x, theirs, scale, block, factor in (
        (q, theirs_q, scale_q, 128, d**-0.5 * 1.44269504),
        (k, theirs_k, scale_k, 64, 1),
    ):
        ours, our_scale = round_qk(x, "int8", block)
        torch.testing.assert_close(scale.repeat_interleave(block, 2), our_scale * factor, rtol=1e-6, atol=0)
        differ = ours != theirs
        to_half = ((x / our_scale).abs() % 1 - 0.5).abs()
        assert (to_half[differ] < 1e-4).all() and differ.float().mean() < 1e-3
        assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("tokens, d, outlier", [(512, 64, 0.0), (512, 128, 0.0), (512, 64, 10.0), (300, 64, 0.0)])
def test_outputs(tokens, d, outlier, smooth, causal):
    q, k, v = qkv(tokens, d, outlier)
    theirs = sageattention.sageattn(q.clone(), k.clone(), v.clone(), is_causal=causal, smooth_k=smooth)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril() if causal else None
    if not causal:
        k, v = with_its_padding(k, v, smooth)
    exact = attention(q, k, v, "float", mask)
    ours = attention(q, k, v, replace(SCHEMES["int8"], smooth_k=smooth), mask)
    apart, error = ((x - y).norm() / exact.norm() for x, y in ((ours, theirs), (ours, exact)))
    assert apart < 1e-3 and 10 * apart < error


def with_its_padding(k, v, smooth):
    """Without a causal mask, 1.0.6 counts the places behind the last key of the last tile, as keys that score 0."""
    places = -k.shape[2] % 64
    key = k.mean(2, keepdim=True) if smooth else torch.zeros_like(k[:, :, :1])
    return torch.cat([k, key.expand(-1, -1, places, -1)], 2), torch.cat([v, torch.zeros_like(v[:, :, :places])], 2)
