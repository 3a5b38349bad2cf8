"""Perplexity, against a loop that asks the model about one token at a time, in float64."""

import math

import pytest
import torch

from qlearn.evaluate import perplexity


def next_token_loss(model, context, token):
    """-log p(token | context), from the context alone."""
    logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return -(logits[token] - logits.logsumexp(-1)).item()


def slow_sliding(model, ids, width, stride):
    losses = []
    for t in range(1, len(ids)):
        starts = [s for s in range(0, len(ids), stride) if s < t < s + width]
        if starts:  # else the token starts a window and nothing stands before it
            losses.append(next_token_loss(model, ids[starts[0] : t], ids[t]))
    return math.exp(sum(losses) / len(losses))


def slow_llama_cpp(model, ids, n_ctx, bos):
    losses = []
    for chunk in range(len(ids) // n_ctx):
        tokens = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        if bos is not None:
            tokens = [bos, *tokens[1:]]
        for position in range(n_ctx // 2, n_ctx - 1):
            losses.append(next_token_loss(model, tokens[: position + 1], tokens[position + 1]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("width, stride", [(32, 32), (16, 16), (16, 8), (16, 5), (7, 1), (3, 3)])
def test_sliding_equals_the_slow_loop(model, tokenizer, text, width, stride):
    expected = slow_sliding(model, tokenizer(text)["input_ids"], width, stride)
    assert perplexity(model, tokenizer, text, window=width, stride=stride) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("length", [64, 65, 66, 77])
def test_sliding_equals_the_slow_loop_at_ragged_ends(model, tokenizer, text, length):
    expected = slow_sliding(model, tokenizer(text)["input_ids"][:length], 16, 16)
    assert perplexity(model, tokenizer, text, window=16, tokens=length) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n_ctx", [32, 16, 15, 3])
@pytest.mark.parametrize("length", [32, 63, 64, 77])
def test_llama_cpp_equals_the_slow_loop(model, tokenizer, bos_tokenizer, text, n_ctx, length):
    for tok, bos in ((tokenizer, None), (bos_tokenizer, 0)):
        expected = slow_llama_cpp(model, tok(text)["input_ids"][:length], n_ctx, bos)
        measured = perplexity(model, tok, text, "llama.cpp", tokens=length, window=n_ctx)
        assert measured == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("convention", ["sliding", "llama.cpp"])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, tokenizer, text, convention):
    model.model.norm.weight.zero_()  # all logits are 0
    assert perplexity(model, tokenizer, text, convention) == pytest.approx(257, rel=1e-12)


def test_a_hopeless_model_has_infinite_perplexity(model, tokenizer, text):
    model.model.norm.weight *= 1e9
    assert perplexity(model, tokenizer, text) == math.inf


def test_a_model_that_answers_nan_is_reported(model, tokenizer, text):
    model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        perplexity(model, tokenizer, text)
