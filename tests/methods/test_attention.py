"""Quantized attention: against torch's where nothing is rounded, against integers and explicit loops where it is."""

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlearn.methods.attention import SCHEMES, Scheme, Scores, attention

LENGTHS = [(1, 1), (1, 5), (5, 64), (130, 65), (128, 200)]


def qkv(heads=2, kv_heads=1, queries=70, keys=70, d=24, d_v=20, batch=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, d_v)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def expected(q, k, v, mask=None, scaling=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- nothing is rounded ----------------------------------------------------------------------------------------------


class TestFloats:
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("smooth_k, smooth_q", [(False, False), (True, False), (False, True), (True, True)])
    def test_smoothing_changes_nothing(self, lengths, smooth_k, smooth_q):
        q, k, v = qkv(queries=lengths[0], keys=lengths[1])
        k[..., 3] += 50
        close(attention(q, k, v, Scheme(smooth_k=smooth_k, smooth_q=smooth_q)), expected(q, k, v), atol=1e-11)

    @pytest.mark.parametrize("smooth_k", [False, True])
    def test_a_soft_cap_gets_the_mean_back(self, smooth_k):
        q, k, v = qkv()
        k += 3
        p = torch.softmax(5 * torch.tanh(q @ k.mT * 24**-0.5 / 5), -1)
        close(attention(q, k, v, Scheme(smooth_k=smooth_k), softcap=5.0), p @ v)

    @pytest.mark.parametrize("smooth_k", [False, True])
    def test_sinks_get_the_mean_back(self, smooth_k):
        q, k, v = qkv()
        k += 3
        sinks = torch.tensor([-1.0, 30.0], dtype=torch.float64)
        column = sinks.view(1, 2, 1, 1).expand(2, 2, 70, 1)
        p = torch.softmax(torch.cat([q @ k.mT * 24**-0.5, column], -1), -1)[..., :-1]
        close(attention(q, k, v, Scheme(smooth_k=smooth_k), sinks=sinks), p @ v)

    @pytest.mark.parametrize("k_block", [1, 7, 64, 1000])
    def test_the_width_of_tiles_does_not_matter(self, k_block):
        q, k, v = qkv(keys=200)
        close(attention(q, k, v, Scheme(k_block=k_block), causal(70, 200)), expected(q, k, v, causal(70, 200)))

    @pytest.mark.parametrize(
        "mask",
        [
            pytest.param(causal(70, 70), id="(queries, keys)"),
            pytest.param(causal(70, 70)[None, None], id="(1, 1, queries, keys)"),
            pytest.param(torch.rand(2, 1, 70, 70) > 0.3, id="for each text"),
            pytest.param(torch.rand(1, 4, 70, 70) > 0.3, id="for each head"),
            pytest.param(torch.rand(2, 4, 70, 70) > 0.3, id="for each text and head"),
            pytest.param(torch.randn(2, 4, 70, 70, dtype=torch.float64), id="added"),
            pytest.param(torch.zeros(70, 70, dtype=torch.float64).masked_fill(~causal(70, 70), -torch.inf), id="-inf"),
            pytest.param(torch.rand(2, 1, 1, 70) > 0.3, id="padding"),
        ],
    )
    def test_masks(self, mask):
        q, k, v = qkv(heads=4, kv_heads=2)
        close(attention(q, k, v, "float", mask), expected(q, k, v, mask))

    def test_scaling(self):
        q, k, v = qkv()
        close(attention(q, k, v, "float", scaling=0.3), expected(q, k, v, scaling=0.3))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_row_that_may_look_nowhere(self, scheme):
        """Of bools: all keys alike, as in eager attention. Of -inf: nothing, as torch has it."""
        q, k, v = qkv(dtype=torch.float32)
        mask = causal(70, 70)
        mask[9] = False
        out = attention(q, k, v, scheme, mask)
        assert torch.isfinite(out).all()
        if scheme == "float":
            close(out[..., 9, :], v.mean(-2).expand(2, 2, 20), atol=1e-6)
        out = attention(q, k, v, scheme, torch.zeros(70, 70).masked_fill(~mask, -torch.inf))
        assert torch.isfinite(out).all() and not out[..., 9, :].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_answer_has_the_dtype_of_q(self, dtype):
        q, k, v = qkv(dtype=dtype)
        out = attention(q, k, v, "float")
        assert out.dtype == dtype
        sums = 70 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # 70 terms, each rounded
        atol = (sums + torch.finfo(dtype).eps) * v.abs().max().item()
        close(out.double(), expected(q.double(), k.double(), v.double()), atol)


# ---- integers --------------------------------------------------------------------------------------------------------


def integer_scores(q, k, largest, q_block, k_block):
    """Q Kᵀ of one head by int32, with a float32 scale for each block of rows."""

    def quantized(x, block):
        codes, scales = [], []
        for start in range(0, len(x), block):
            rows = x[start : start + block]
            scale = np.abs(rows).max() / np.float32(largest)
            codes.append(np.rint(rows / scale).astype(np.int32))
            scales += [scale] * len(rows)
        return np.concatenate(codes), np.array(scales)

    (q, q_scale), (k, k_scale) = quantized(q, q_block), quantized(k, k_block)
    return (q @ k.T).astype(np.float32) * q_scale[:, None] * k_scale


class TestIntegers:
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("qk, largest", [("int8", 127), ("int4", 7)])
    @pytest.mark.parametrize("per", ["block", "token"])
    def test_scores_are_those_of_int32(self, lengths, qk, largest, per):
        q, k, _ = qkv(queries=lengths[0], keys=lengths[1], d=64, dtype=torch.float32)
        scores = Scores(q[:, :1], k, Scheme(qk, per=per))
        blocks = (128, 64) if per == "block" else (1, 1)
        for text in range(2):
            wanted = integer_scores(q[text, 0].numpy(), k[text, 0].numpy(), largest, *blocks)
            for start in range(0, lengths[1], 64):
                tile = slice(start, start + 64)
                assert np.array_equal(scores(tile)[text, 0].numpy(), wanted[:, tile])

    @pytest.mark.parametrize("d", [1040, 1041, 4000])
    def test_sums_stay_exact(self, d):
        """All codes are 127 but one; float32 would lose it from 2**24 on."""
        q = torch.full((1, 1, 1, d), 127.0)
        k = q.clone()
        k[..., 0] = 126
        assert Scores(q, k, Scheme("int8"))(slice(None)).item() == 127**2 * d - 127

    def test_scores_are_within_their_bound(self):
        """|q·k - q̂·k̂| <= |q|₁ s_k / 2 + |k|₁ s_q / 2 + d s_q s_k / 4, as each number errs by half a step."""
        q, k, _ = qkv()
        scores = Scores(q, k, Scheme("int8"))
        s_q, s_k = scores.q_scale, scores.k_scale.mT
        bound = q.abs().sum(-1, keepdim=True) * s_k / 2 + k.abs().sum(-1).unsqueeze(-2) * s_q / 2 + 24 * s_q * s_k / 4
        tile = slice(0, 64)
        assert ((scores(tile) - q @ k[..., tile, :].mT).abs() <= bound[..., tile] + 1e-12).all()

    @pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "float"])
    def test_a_constant_added_to_all_keys_is_not_seen(self, scheme):
        """All numbers are multiples of 1/16 and the mean is one of 64 tokens, so that no float64 is ever rounded."""
        q, k, v = ((16 * x).round() / 16 for x in qkv(queries=64, keys=64))
        constant = torch.arange(24) * 16.0
        assert torch.equal(attention(q, k + constant, v, scheme), attention(q, k, v, scheme))

    def test_smoothing_saves_an_outlier(self):
        q, k, v = qkv()
        k[..., 3] += 50
        exact = attention(q, k, v, "float")
        plain, smooth = ((attention(q, k, v, Scheme("int8", smooth_k=s)) - exact).norm() for s in (False, True))
        assert 5 * smooth < plain

    def test_one_query_is_its_own_mean(self):
        """With Q smoothed, nothing is left of a single query to be rounded: the scores are exact."""
        q, k, v = qkv(queries=1)
        close(attention(q, k, v, Scheme("int4", smooth_k=True, smooth_q=True)), expected(q, k, v))

    def test_queries_do_not_share_scales_across_blocks(self):
        q, k, v = qkv(queries=200)
        large = q.clone()
        large[:, :, 128:] *= 1000
        for scheme in ("int8", "nvfp4"):
            assert torch.equal(attention(q, k, v, scheme)[:, :, :128], attention(large, k, v, scheme)[:, :, :128])


# ---- 8-bit and 4-bit floats: explicit loops --------------------------------------------------------------------------


def fp4_block(x, name):
    """One block, rounded: numbers of E2M1 times a scale, by ml_dtypes and a formula for the scale."""
    x = np.float32(x)
    largest = np.abs(x).max()
    if name == "nvfp4":
        scale = np.float32(ml_dtypes.float8_e4m3fn(np.minimum(largest / np.float32(6), np.float32(448))))
        scale = max(scale, np.float32(2.0**-9))
        scaled = x * (np.float32(1) / scale)
    else:
        scale = np.float32(2.0 ** (np.floor(np.log2(largest)) - 2)) if largest else np.float32(1)
        scaled = x / scale
    return np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale


def fp4_rows(x, name):
    """Each row in blocks; a shorter last block is rounded as it is."""
    size = {"nvfp4": 16, "mxfp4": 32}[name]
    rows = [[fp4_block(row[i : i + size], name) for i in range(0, len(row), size)] for row in x]
    return np.array([np.concatenate(row) for row in rows])


def sage3(q, k, v, name, mask, two_level, smooth):
    """SageAttention3's Algorithm 1 for one head, blocks of queries and tiles of keys in two loops, in float64."""
    k = k - k.mean(0) if smooth else k
    out = np.zeros((len(q), v.shape[1]))
    for i in range(0, len(q), 128):
        q_i = q[i : i + 128]
        mean = q_i.mean(0) if smooth else np.zeros(q.shape[1])
        m, l, o = np.full(len(q_i), -1e300), np.zeros(len(q_i)), np.zeros((len(q_i), v.shape[1]))
        for j in range(0, len(k), 64):
            k_j, v_j = k[j : j + 64], v[j : j + 64]
            s = (fp4_rows(q_i - mean, name) @ fp4_rows(k_j, name).T + mean @ k_j.T) / np.sqrt(q.shape[1])
            s = np.where(mask[i : i + 128, j : j + 64], s, -1e300)
            m_old, m = m, np.maximum(m, s.max(1))
            p = np.exp(s - m[:, None])
            l = l * np.exp(m_old - m) + p.sum(1)
            stretch = np.ones(len(p))
            if two_level:
                stretch = p.max(1) / {"nvfp4": 448 * 6, "mxfp4": 6}[name]
                stretch[stretch == 0] = 1
            p = fp4_rows(p / stretch[:, None], name)
            o = o * np.exp(m_old - m)[:, None] + p @ fp4_rows(v_j.T, name).T * stretch[:, None]
        out[i : i + 128] = o / l[:, None]
    return out


class TestFloatsOfFewBits:
    @pytest.mark.parametrize("lengths", [(1, 3), (20, 64), (130, 150)], ids=str)
    @pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
    @pytest.mark.parametrize("two_level", [True, False])
    @pytest.mark.parametrize("smooth", [True, False])
    def test_fp4_is_the_algorithm_of_the_paper(self, lengths, name, two_level, smooth):
        q, k, v = qkv(heads=1, batch=1, queries=lengths[0], keys=lengths[1])
        q, k = 2 * q + 1, 2 * k - 1  # scores large enough for some rows to be small in some tiles
        mask = causal(*lengths)
        out = attention(q, k, v, Scheme(name, name, smooth, smooth, two_level=two_level), mask)
        wanted = sage3(*(x[0, 0].numpy() for x in (q, k, v)), name, mask.numpy(), two_level, smooth)
        np.testing.assert_allclose(out[0, 0].numpy(), wanted, rtol=0, atol=1e-11)

    @pytest.mark.parametrize("pv", ["fp8", "fp16"])
    def test_eight_and_sixteen_bits(self, pv):
        """Keys in one tile, so that P is exp(S - the row's maximum)."""
        q, k, v = qkv(keys=64)
        s = q @ k.mT * 24**-0.5
        p = torch.exp(s - s.amax(-1, keepdim=True))
        if pv == "fp8":
            v_scale = v.abs().amax(-2, keepdim=True) / 448
            rounded = [
                torch.from_numpy(x.numpy().astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
                for x in (448 * p, v / v_scale)
            ]
            product = rounded[0] @ rounded[1] / 448 * v_scale
        else:
            product = p.half().double() @ v.half().double()
        close(attention(q, k, v, Scheme(pv=pv)), product / p.sum(-1, keepdim=True))


# ---- all schemes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
class TestEveryScheme:
    def test_heads_that_share_keys(self, scheme):
        q, k, v = qkv(heads=6, kv_heads=2, dtype=torch.float64)
        alone = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), scheme)
        close(attention(q, k, v, scheme), alone, atol=1e-11)

    def test_texts_of_a_batch_do_not_meet(self, scheme):
        q, k, v = qkv(dtype=torch.float64)
        alone = torch.cat([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], scheme) for i in range(2)])
        close(attention(q, k, v, scheme), alone, atol=1e-11)

    def test_what_is_masked_gets_no_weight(self, scheme):
        """The values of later tokens, in a later tile; in FP8 values share a scale, which is left as it is."""
        q, k, v = qkv(keys=128, queries=128)
        changed = v.clone()
        changed[:, :, 64:] = v[:, :, 64:].flip(2)
        mask = causal(128, 128)
        assert torch.equal(
            attention(q, k, changed, scheme, mask)[:, :, :64], attention(q, k, v, scheme, mask)[:, :, :64]
        )

    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-30])
    def test_zeros_and_tiny_numbers(self, scheme, value):
        q, k, v = (torch.full((1, 1, 40, 8), value) for _ in range(3))
        assert (attention(q, k, v, scheme).abs() <= 2 * value).all()

    def test_error(self, scheme):
        """What each scheme costs on normal numbers: the order of its bits."""
        q, k, v = qkv(queries=256, keys=256, d=64, d_v=64)
        exact = attention(q, k, v, "float")
        error = (attention(q, k, v, scheme) - exact).norm() / exact.norm()
        lowest, highest = {
            "float": (0, 1e-12), "int8": (0.005, 0.02), "int8_fp8": (0.02, 0.05), "int4_fp8": (0.08, 0.2),
            "nvfp4": (0.1, 0.25), "mxfp4": (0.15, 0.3),
        }[scheme]  # fmt: skip
        assert lowest <= error < highest


# ---- what is refused -------------------------------------------------------------------------------------------------


def broken(i, value):
    tensors = qkv()
    tensors[i][0, 0, 1, 2] = value
    return tensors


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        pytest.param(qkv(), {"scheme": "int5"}, "scheme 'int5' is unknown; choose from float, int8", id="scheme"),
        pytest.param([x[0] for x in qkv()], {}, r"q \(2, 70, 24\).*give three tensors", id="three dimensions"),
        pytest.param(qkv(keys=0), {}, "none of them empty", id="no keys"),
        pytest.param(qkv(heads=3, kv_heads=2), {}, "q a multiple of the heads of k", id="heads"),
        pytest.param([*qkv()[:2], qkv(keys=71)[2]], {}, "do not fit", id="keys and values"),
        pytest.param([qkv(d=16)[0], *qkv()[1:]], {}, "do not fit", id="d"),
        pytest.param([qkv(batch=1)[0], *qkv()[1:]], {}, "do not fit", id="batch"),
        pytest.param([x.int() for x in qkv()], {}, "q is torch.int32; give floating point", id="integers"),
        pytest.param(broken(0, torch.nan), {}, "1 of 6720 numbers in q are NaN or infinite", id="NaN in q"),
        pytest.param(broken(1, torch.inf), {}, "1 of 3360 numbers in k are NaN or infinite", id="infinity in k"),
        pytest.param(broken(2, torch.nan), {}, "1 of 2800 numbers in v are NaN or infinite", id="NaN in v"),
        pytest.param(broken(2, 1e6), {}, "v reaches 1e.06, too large for float16; choose another pv", id="float16"),
        pytest.param(qkv(), {"mask": causal(70, 69)}, r"mask of shape \(70, 69\) does not fit", id="mask"),
        pytest.param(qkv(), {"mask": torch.ones(2, 3, 70, 70)}, "does not fit scores", id="heads of the mask"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"qk": "int2"}, "qk='int2' is unknown; choose from float, int8, int4, mxfp4, nvfp4"),
        ({"pv": "int8"}, "pv='int8' is unknown; choose from float, fp16, fp8, mxfp4, nvfp4"),
        ({"per": "channel"}, "per='channel' is unknown; choose from block, token"),
        ({"q_block": 0}, "q_block=0 is no number of tokens"),
        ({"k_block": 1.5}, "k_block=1.5 is no number of tokens"),
        ({"pv": "nvfp4", "k_block": 40}, "k_block=40 cuts blocks of nvfp4 in two"),
    ],
)
def test_a_scheme_that_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**options)
