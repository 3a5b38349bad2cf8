"""Quantized attention in whole models: with nothing rounded it is eager attention, whatever the masks and caches."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)

import qlearn
from qlearn import evaluate
from qlearn.methods.attention import SCHEMES, Scheme
from qlearn.models.attention import attention_forward, quantize_attention
from tests.models.conftest import FAMILIES, SIZES

IDS = torch.arange(40).view(2, 20) * 3 % 127 + 1
SPECIAL = {
    "a soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=0.5)),
    "sinks": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)),
    "a sliding window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=4)),
}


@pytest.fixture(params=[*FAMILIES, *SPECIAL])
def any_model(request):
    """A tiny model whose scores are large enough for attention to matter."""
    torch.manual_seed(0)
    model = {**FAMILIES, **SPECIAL}[request.param]().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "sinks")):
            weight.normal_(std=0.3)
    return model


def logits(model, implementation, ids=IDS, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- nothing is rounded: eager attention -----------------------------------------------------------------------------


class TestFloat:
    def test_every_family(self, any_model):
        close(logits(any_model, "qlearn_float"), logits(any_model, "eager"))

    def test_it_matters(self, any_model):
        """Else the test above would say nothing: another scaling of the scores is another model."""
        before = logits(any_model, "eager")
        for module in any_model.modules():
            if hasattr(module, "scaling"):
                module.scaling *= 2
        assert (logits(any_model, "qlearn_float") - before).abs().max() > 1e-3

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, any_model, side):
        mask = torch.ones_like(IDS)
        mask[1, :7] = 0
        mask = mask.flip(1) if side == "right" else mask
        mine, eager = (logits(any_model, name, attention_mask=mask) for name in ("qlearn_float", "eager"))
        close(mine[mask.bool()], eager[mask.bool()])

    def test_a_padded_text_is_the_text_alone(self, model):
        mask = torch.ones_like(IDS)
        mask[1, :7] = 0
        close(logits(model, "qlearn_float", attention_mask=mask)[1, 7:], logits(model, "eager", IDS[1:, 7:])[0])

    def test_generating_with_a_cache(self, any_model):
        """Token by token: one query, and one more key each time. What a window has passed is not in the cache."""
        whole = logits(any_model, "eager")
        any_model.set_attn_implementation("qlearn_float")
        cache, found = None, []
        for ids in (IDS[:, :9], *IDS[:, 9:].split(1, 1)):
            out = any_model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        close(torch.cat(found, 1), whole)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generate(self, model, cache):
        texts, options = [], {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        for name in ("eager", "qlearn_float"):
            model.set_attn_implementation(name)
            texts.append(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options))
        assert torch.equal(*texts)

    @pytest.mark.parametrize(
        "mask",
        [
            pytest.param(torch.zeros(2, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(3) > 0, -1e9), id="added"),
            pytest.param(torch.ones(2, 1, 20, 20, dtype=torch.bool).tril(2), id="bool"),
        ],
    )
    def test_a_mask_of_the_users_own(self, model, mask):
        added = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        close(logits(model, "qlearn_float", attention_mask=mask), logits(model, "eager", attention_mask=added))

    def test_packed_texts(self, model):
        """Two texts side by side, told apart by their positions."""
        positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
        packed = logits(model, "qlearn_float", IDS[:1], position_ids=positions, use_cache=False)
        close(packed[0, 8:], logits(model, "eager", IDS[:1, 8:])[0])

    def test_half_precision(self, model):
        model.bfloat16()
        mine, eager = logits(model, "qlearn_float"), logits(model, "eager")
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, eager, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("queries, keys", [(5, 5), (1, 5), (2, 5)])
    def test_without_a_mask_it_is_causal(self, model, queries, keys):
        q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 1, keys, 16), torch.randn(1, 1, keys, 16)
        layer = model.model.layers[0].self_attn
        out, weights = attention_forward(layer, q, k, v, None, scheme=Scheme())
        mask = torch.ones(queries, keys).tril(keys - queries).bool()
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, wanted.transpose(1, 2))
        assert weights is None
        out, _ = attention_forward(layer, q, k, v, None, is_causal=False, scheme=Scheme())
        torch.testing.assert_close(
            out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        )


# ---- with rounding ---------------------------------------------------------------------------------------------------


class TestSchemes:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_every_name_is_known_to_transformers(self, model, scheme):
        out = logits(model, f"qlearn_{scheme}")
        assert torch.isfinite(out).all()
        assert torch.equal(out, logits(model, "eager")) is False

    @pytest.mark.parametrize("name", ["int8", "nvfp4"])
    def test_every_family(self, any_model, name):
        exact, rounded = logits(any_model, "eager"), logits(any_model, f"qlearn_{name}")
        error = (rounded - exact).norm() / exact.norm()
        assert 1e-5 < error < {"int8": 0.05, "nvfp4": 0.5}[name]

    def test_the_cache_holds_what_it_held(self, model):
        caches = []
        for name in ("eager", "qlearn_nvfp4"):
            model.set_attn_implementation(name)
            caches.append(model(input_ids=IDS, use_cache=True).past_key_values.layers[0])
        assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)

    def test_rounding_looks_ahead(self, model):
        """A later token gets no weight, but it shares in the mean and the scales: earlier logits move, a little."""
        other = IDS.clone()
        other[:, 12:] = other[:, 12:].flip(1)
        float_moves, int8_moves = (
            (logits(model, name) - logits(model, name, other))[:, :12].abs().max()
            for name in ("qlearn_float", "qlearn_int8")
        )
        assert float_moves < 1e-6 < int8_moves < 0.01 * logits(model, "eager").abs().max()

    def test_there_and_back(self, model):
        before = logits(model, "sdpa")
        assert quantize_attention(model, "int8") is model
        assert not torch.equal(model(input_ids=IDS).logits, before)
        assert torch.equal(logits(model, "sdpa"), before)

    def test_a_scheme_of_ones_own(self, model):
        out = quantize_attention(model, Scheme("int8", "float")).config._attn_implementation, model(IDS).logits
        assert out[0] == "qlearn_int8_float_False_False_block_True_128_64"
        assert not torch.equal(out[1], logits(model, "qlearn_int8"))

    def test_saving_and_loading(self, model, tmp_path):
        """The choice is no part of a saved model, and can be made while loading."""
        wanted = quantize_attention(model, "int8")(IDS).logits
        model.save_pretrained(tmp_path)
        assert "qlearn" not in (tmp_path / "config.json").read_text()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="qlearn_int8")
        assert torch.equal(loaded(IDS).logits, wanted)

    def test_with_quantized_weights(self, model):
        quantize_attention(qlearn.quantize_model(model, "absmax", bits=8, group_size=16, progress=False), "int8")
        assert torch.isfinite(model(IDS).logits).all()


class TestRefused:
    def test_an_unknown_scheme(self, model):
        with pytest.raises(ValueError, match="scheme 'int3' is unknown; choose from float, int8"):
            quantize_attention(model, "int3")

    def test_a_model_of_another_kind(self):
        with pytest.raises(ValueError, match="the attention of Linear cannot be exchanged"):
            quantize_attention(torch.nn.Linear(2, 2))

    def test_training(self, model):
        quantize_attention(model).train()
        with pytest.raises(ValueError, match=r"no gradient passes.*call model\.eval"):
            model(IDS)

    @pytest.mark.parametrize("name, what", [("cache", "a paged cache"), ("position_bias", "a position bias")])
    def test_what_is_not_emulated(self, model, name, what):
        q = torch.randn(1, 2, 3, 16)
        with pytest.raises(ValueError, match=f"does not work with {what}"):
            attention_forward(model.model.layers[0].self_attn, q, q, q, None, scheme=Scheme(), **{name: object()})


# ---- the bundled model -----------------------------------------------------------------------------------------------


class TestOnTheBundledModel:
    @pytest.fixture(scope="class")
    @staticmethod
    def divergence():
        model, tokenizer = qlearn.load_model()
        reference = evaluate.Reference(model, tokenizer, tokens=256)
        return lambda scheme: evaluate.kl_divergence(quantize_attention(model, scheme), reference)

    def test_fewer_bits_cost_more(self, divergence):
        costs = [divergence(name) for name in ("float", "int8", "int8_fp8", "nvfp4", "mxfp4")]
        assert costs == sorted(costs) and costs[0] < 1e-6 and costs[1] < 1e-3 < costs[3] < 0.2

    def test_generation(self):
        model, tokenizer = qlearn.load_model()
        exact = qlearn.generate(model, tokenizer, "import os\n", max_new_tokens=12)
        assert qlearn.generate(quantize_attention(model, "int8"), tokenizer, "import os\n", max_new_tokens=12) == exact
