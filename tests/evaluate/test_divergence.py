"""Divergence and flips, against the definitions written out in float64."""

import math

import numpy as np
import pytest
import torch

from qlearn.evaluate import Reference, compare, flip_rate, kl_divergence, perplexity, same_top_p
from qlearn.evaluate.divergence import position_divergences
from qlearn.evaluate.windows import passage, predict


def all_logits(model, tokenizer, text, **options):
    return (
        torch.cat([logits for logits, _ in predict(model, passage(model, tokenizer, text, **options))]).double().numpy()
    )


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(model, tokenizer, text, dtype):
    model = model.to(dtype)
    reference = Reference(model, tokenizer, text, window=16)
    assert kl_divergence(model, reference) == 0.0
    assert flip_rate(model, reference) == 0.0
    assert same_top_p(model, reference) == 100.0


@pytest.mark.parametrize("options", [{"window": 16, "stride": 8}, {"window": 16, "convention": "llama.cpp"}])
def test_compare_equals_the_definitions(model, other_model, tokenizer, text, options):
    p, q = (softmax(all_logits(m, tokenizer, text, **options)) for m in (model, other_model))
    compared = compare(other_model, Reference(model, tokenizer, text, **options))
    assert compared.kl_divergence == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-10)
    flips = p.argmax(-1) != q.argmax(-1)
    assert 0 < flips.sum() < len(flips)
    assert compared.flip_rate == flips.mean()
    assert compared.same_top_p == pytest.approx(100 * (~flips).mean())
    assert compared.perplexity == pytest.approx(perplexity(other_model, tokenizer, text, **options), rel=1e-12)


def test_the_reference_knows_its_own_perplexity_and_memory(model, tokenizer, text):
    reference = Reference(model, tokenizer, text, tokens=40)
    assert reference.perplexity == pytest.approx(perplexity(model, tokenizer, text, tokens=40), rel=1e-12)
    assert reference.tokens == 40
    assert reference.nbytes == 8 * 257 * 38  # float64, the two windows' first tokens not scored
    assert Reference(model.float(), tokenizer, text, tokens=40).nbytes == 4 * 257 * 38


def test_the_reference_outlives_a_change_of_the_model(model, tokenizer, text):
    reference = Reference(model, tokenizer, text)
    model.model.layers[0].mlp.down_proj.weight *= 2
    assert kl_divergence(model, reference) > 0


def test_divergence_is_never_negative_and_zero_only_where_equal():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(500, 64, generator=generator)
    nearly = logits + 1e-6 * torch.randn(500, 64, generator=generator)
    assert (position_divergences(logits, nearly) >= 0).all()
    assert (position_divergences(logits, logits) == 0).all()
    assert (position_divergences(logits, logits.roll(1, -1)) > 0.1).all()
    # Adding a constant to all logits of a position changes no probability.
    torch.testing.assert_close(position_divergences(logits, logits + 1), torch.zeros(500).double(), rtol=0, atol=1e-5)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]])
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert position_divergences(p.double().log(), q.double().log()).item() == pytest.approx(by_hand, rel=1e-12)


def test_a_reference_of_another_vocabulary_is_refused(model, tokenizer, text):
    reference = Reference(model, tokenizer, text)
    model.resize_token_embeddings(260)
    with pytest.raises(ValueError, match="compare a model with the one it was made of"):
        compare(model.eval(), reference)


def test_nan_is_reported(model, tokenizer, text):
    reference = Reference(model, tokenizer, text)
    model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        compare(model, reference)
