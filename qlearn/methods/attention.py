"""Quantized attention: both of its matrix products in few bits, the ideas of SageAttention 1 to 3.

    S = Q Kᵀ / √d        P = softmax(S)        O = P V            Q, K, V: (tokens, d), of one head

Neither product has a weight in it. All operands are made while the model runs, so they are rounded while it runs, with
nothing calibrated beforehand. What makes that work are a few observations about them.

**K has outliers, and softmax does not mind losing them.** Some channels of K are far from zero for every token, and the
scale has to reach them. But they are nearly the same for every token, so most of an outlier is the mean over tokens, k̄.
Without it,

    q · (k_j - k̄) = q · k_j - q · k̄

each row of S has lost one and the same number, q · k̄, in all columns j, and softmax of a row does not change when a
number is subtracted from all of it. So K is *smoothed*: its mean is subtracted, and never needs to be put back. (Where
something stands between S and softmax that does notice, a soft cap or a sink, q · k̄ is added again, in floats.)

**Q can be smoothed too**, block by block of its tokens, but its mean q̄ does change the scores, by a different number in
each column: q̄ · (k_j - k̄). That is one row for a whole block of queries, computed in floats and added.

**P lies in 0 ... 1.** Attention is computed in tiles, some queries by 64 keys at a time, so S never exists as a whole.
A row keeps the largest score m that it has met so far, the sum l of all P = exp(S - m), and the output O. When a tile
raises m, the old l and O shrink by exp(m_old - m_new); at the end, O is divided by l. In every tile P is at most 1. So
8-bit floats for P need no measured scale, 1/448 is right for all. In NVFP4, where each 16 numbers have a scale in E4M3,
it is trouble: the scales of numbers below 1 are below 1/6, where E4M3 has little left. From 2**-6 on it loses its last
bits, at 2**-9 it ends, and numbers below 2**-11 become zero. The remedy is a scale on two levels: each row of the tile
is first stretched so that its largest number is 448 · 6, the largest that NVFP4 can hold; a float32 for each row takes
that back.

The schemes, `SCHEMES`:

    int8         SageAttention     Q Kᵀ in int8, a scale for each block of 128 queries and 64 keys; K smoothed; P V in
                                   float16
    int8_fp8     SageAttention2    the same, P V in FP8 (E4M3): P with the scale 1/448, V with one for each channel
    int4_fp8     SageAttention2    Q Kᵀ in int4, with a scale for each token here; Q smoothed too; P V in FP8
    nvfp4        SageAttention3    both products in FP4, in blocks of 16 along what is summed up; Q and K smoothed
    mxfp4        SageAttention3    in blocks of 32 with a power of two as scale: what the paper compares NVFP4 with
    float                          nothing rounded: the same algorithm, to compare with

A `Scheme` of your own is any other combination.

**What this is, and is not.** The rounding is exact, the codes are those that a kernel would multiply. The products are
computed from them in float32, in which integers are exact anyway, so nothing here is faster than ordinary attention;
int8 and FP4 units in a GPU would do that. Kernels differ in the last bits of their sums: SageAttention adds up P V in
float16, SageAttention2 in 22 bits. int4's scales are shared by several tokens in SageAttention2 ("per thread").
`tests/peers/test_attention.py` compares int8 with SageAttention's own kernel, and `bench/attention.py` measures each
idea by itself on the bundled model.

**Rounding looks ahead.** k̄ is the mean over all keys, later ones included, and a block of 64 keys shares a scale. Masks
hold: a later token gets no weight. But the rounding of an earlier one may depend on it, and so a text that is read at
once, and one that is generated token by token, differ by about the rounding error.

Sources: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958), SageAttention3 (arXiv 2505.11594).
"""

from dataclasses import dataclass

import torch

from qlearn.methods.attention_operands import FP4, P_BITS, Q_BITS, round_p, round_qk, round_v, smooth


@dataclass(frozen=True)
class Scheme:
    """Which of the ideas to use.

    qk: "float", "int8", "int4", "mxfp4" or "nvfp4", how Q and K are rounded.
    pv: "float", "fp16", "fp8", "mxfp4" or "nvfp4", how P and V are rounded.
    smooth_k, smooth_q: subtract the mean of K, and of each block of Q.
    per: "block" or "token", what shares a scale in the integer formats.
    two_level: stretch the rows of P before they go to FP4.
    q_block, k_block: how many queries and keys make a block; a tile of P is as wide as a block of keys.
    Raises ValueError for anything else, and for FP4 with a k_block that is no multiple of 32.
    """

    qk: str = "float"
    pv: str = "float"
    smooth_k: bool = False
    smooth_q: bool = False
    per: str = "block"
    two_level: bool = True
    q_block: int = 128
    k_block: int = 64

    def __post_init__(self):
        for name, known in (("qk", Q_BITS), ("pv", P_BITS), ("per", ("block", "token"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        for name in ("q_block", "k_block"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is no number of tokens; choose 1 or more")
        if self.pv in FP4 and self.k_block % 32:
            raise ValueError(f"k_block={self.k_block} cuts blocks of {self.pv} in two; choose a multiple of 32")


SCHEMES = {
    "float": Scheme(),
    "int8": Scheme("int8", "fp16", smooth_k=True),
    "int8_fp8": Scheme("int8", "fp8", smooth_k=True),
    "int4_fp8": Scheme("int4", "fp8", smooth_k=True, smooth_q=True, per="token"),
    "mxfp4": Scheme("mxfp4", "mxfp4", smooth_k=True, smooth_q=True),
    "nvfp4": Scheme("nvfp4", "nvfp4", smooth_k=True, smooth_q=True),
}


@torch.no_grad()
def attention(q, k, v, scheme="int8", mask=None, scaling=None, softcap=None, sinks=None):
    """softmax(Q Kᵀ · scaling) V, with the products of a scheme.

    q: floating point (batch, heads, queries, d).  k: (batch, kv_heads, keys, d).  v: (batch, kv_heads, keys, d_v).
    kv_heads divides heads; consecutive heads of q share one of k and v.
    scheme: a name in SCHEMES, or a Scheme.
    mask: None; or bool, True where a query may look; or floating point, added to the scores. It is broadcast to
    (batch, heads, queries, keys).  scaling: None for 1/√d.
    softcap: None, or c: the scores become c · tanh(score / c).  sinks: None, or (heads,), a further score for each
    row that takes part in the softmax and has no value.
    Returns (batch, heads, queries, d_v) in the dtype of q; the arithmetic is float32 (float64 for float64). A row that
    may look nowhere gets the mean of V from a mask of bools or of the dtype's lowest number, and 0 from one of -inf.
    No gradient passes through.
    Raises ValueError for shapes that do not fit, an unknown scheme, and NaN or infinity.

    A channel of K that is near 50 for every key takes the grid from all others, and smoothing gives it back:

    >>> q, k, v = torch.randn(3, 1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    >>> k[..., 7] += 50
    >>> exact = attention(q, k, v, "float")
    >>> for scheme in Scheme("int8"), Scheme("int8", smooth_k=True):
    ...     error = (attention(q, k, v, scheme) - exact).norm() / exact.norm()
    ...     print(scheme.smooth_k, f"{error:.2f}")
    False 0.11
    True 0.01
    """
    scheme = as_scheme(scheme)
    _check(q, k, v, scheme)
    out, (heads, queries), keys = q.dtype, q.shape[1:3], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, heads that share one, queries, d)
    k, v = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    mask = _grouped(mask, q, keys)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling

    scores = Scores(q, k, scheme, keep_row_constant=softcap is not None or sinks is not None)
    v, v_scale = round_v(v, scheme.pv)
    m = q.new_full((*q.shape[:-1], 1), torch.finfo(dtype).min)
    l, o = torch.zeros_like(m), q.new_zeros(*q.shape[:-1], v.shape[-1])
    if sinks is not None:
        m, l = sinks.to(m).view(*q.shape[1:3], 1, 1).expand_as(m), torch.ones_like(l)
    for start in range(0, keys, scheme.k_block):
        tile = slice(start, start + scheme.k_block)
        s = scores(tile) * scaling
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s = _masked(s, mask, tile)
        m_old, m = m, torch.maximum(m, s.amax(-1, keepdim=True))
        p, shrink = torch.exp(s - m), torch.exp(m_old - m)
        l = l * shrink + p.sum(-1, keepdim=True)
        p, p_scale = round_p(p, scheme.pv, scheme.two_level)
        o = o * shrink + p @ v[..., tile, :] * p_scale
    o = o * v_scale / l.clamp(min=1)  # below 1 only where nothing was added up: the largest score alone makes 1
    return o.view(-1, heads, queries, o.shape[-1]).to(out)


class Scores:
    """Q Kᵀ of one call, tile by tile of keys.

    q: (..., queries, d).  k: (..., keys, d), both float32 or float64.
    keep_row_constant: add q · k̄ again, which a plain softmax would not notice.
    """

    def __init__(self, q, k, scheme, keep_row_constant=False):
        self.constant = 0.0
        if scheme.smooth_k:
            k, k_mean = smooth(k, k.shape[-2])
            self.constant = q @ k_mean[..., :1, :].mT if keep_row_constant else 0.0
        self.q_mean, self.k = None, k
        if scheme.smooth_q:
            q, self.q_mean = smooth(q, scheme.q_block)
        per_token = scheme.per == "token"
        self.q_codes, self.q_scale = round_qk(q, scheme.qk, 1 if per_token else scheme.q_block)
        self.k_codes, self.k_scale = round_qk(k, scheme.qk, 1 if per_token else scheme.k_block)

    def __call__(self, tile):
        """The scores of some keys, a slice: (..., queries, keys of the tile)."""
        s = self.q_codes @ self.k_codes[..., tile, :].mT * self.q_scale * self.k_scale[..., tile, :].mT
        if self.q_mean is not None:
            s = s + self.q_mean @ self.k[..., tile, :].mT
        return s + self.constant


def as_scheme(scheme):
    """A Scheme for its name; a Scheme as it is. Raises ValueError for an unknown name."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; choose from {', '.join(SCHEMES)}, or pass a Scheme")
    return SCHEMES[scheme]


def _grouped(mask, q, keys):
    """A mask as q's scores are shaped: broadcastable to (batch, kv_heads, heads that share one, queries, keys)."""
    if mask is None:
        return None
    batch, kv_heads, group, queries, _ = q.shape
    try:
        mask = mask.broadcast_to(batch, mask.shape[1] if mask.dim() == 4 else 1, queries, keys)
        return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, group))
    except RuntimeError as error:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit scores of shape "
            f"{(batch, kv_heads * group, queries, keys)}; give one that broadcasts to it"
        ) from error


def _masked(s, mask, tile):
    if mask is None:
        return s
    part = mask[..., tile]
    return s.masked_fill(~part, torch.finfo(s.dtype).min) if part.dtype == torch.bool else s + part


def _check(q, k, v, scheme):
    """Raise ValueError for what cannot be multiplied."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"{shapes}: give three tensors (batch, heads, tokens, d), none of them empty")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{shapes} do not fit: q and k need the same d, k and v the same heads and tokens, and q a multiple of the "
            "heads of k"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; give floating point")
        bad = x.numel() - int(torch.isfinite(x).sum())
        if bad:
            raise ValueError(f"{bad} of {x.numel()} numbers in {name} are NaN or infinite; they cannot be rounded")
