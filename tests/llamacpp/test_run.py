"""llama.cpp runs the files: the same tokens, the same perplexity, the same text."""

import numpy as np
import pytest

from qlearn.bench import gguf_files
from qlearn.bench.llamacpp import FLOAT32
from qlearn.evaluate import evaluation_text, perplexity
from qlearn.export import read_gguf, write_gguf
from qlearn.models import generate
from qlearn.training.bitnet import checkpoint
from tests.export import tiny, tokens

pytestmark = pytest.mark.llamacpp


@pytest.fixture(scope="module", params=["bundled", *tokens.KINDS])
def vocabulary(request, tmp_path_factory):
    """(tokenizer, a file that has it)."""
    tokenizer = tiny.tokenizer() if request.param == "bundled" else tokens.KINDS[request.param]()
    model = tiny.build(tiny.config("qwen2", vocab_size=len(tokenizer) + 3))
    path = tmp_path_factory.mktemp("vocabulary") / "model.gguf"
    return tokenizer, write_gguf(model, tokenizer, path, "F16", progress=False)


@pytest.mark.parametrize("text", tokens.NASTY, ids=[f"{text[:12]!a}" for text in tokens.NASTY])
def test_the_same_tokens(llama, vocabulary, text):
    tokenizer, path = vocabulary
    assert llama.tokenize(path, text) == tokens.ids(tokenizer, text)


def test_the_same_tokens_of_a_long_text(llama, vocabulary):
    tokenizer, path = vocabulary
    text = evaluation_text()[:50_000]
    assert llama.tokenize(path, text) == tokens.ids(tokenizer, text)


def test_special_tokens_are_found_when_asked_for(llama, vocabulary):
    tokenizer, path = vocabulary
    text = f"one{tokenizer.eos_token}two"
    assert llama.tokenize(path, text, parse_special=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_same_perplexity(llama, unquantized, text, name):
    """Weights and attention in float32: what differs is the order of sums."""
    ours = perplexity(tiny.model(name), tiny.tokenizer(), convention="llama.cpp", tokens=1024)
    assert llama.perplexity(unquantized(name), text, chunks=2, options=FLOAT32) == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
     "original_max_position_embeddings": 256},
], ids=["linear", "llama3"])  # fmt: skip
def test_the_same_perplexity_with_a_stretched_rotary_embedding(llama, text, tmp_path, rope):
    changes = {"rope_parameters": rope, "hidden_size": 256}
    model = tiny.build(tiny.config("biased", **changes))
    plain = tiny.build(tiny.config("biased", hidden_size=256))
    path = write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32", progress=False)
    ours, without = (perplexity(m, tiny.tokenizer(), convention="llama.cpp", tokens=1024) for m in (model, plain))
    assert llama.perplexity(path, text, chunks=2, options=FLOAT32) == pytest.approx(ours, rel=1e-4)
    assert abs(np.log(ours / without)) > 1e-3  # it does make a difference


@pytest.mark.parametrize("scheme", ["Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "Q4_0", "MXFP4"])
def test_the_perplexity_of_quantized_files_is_within_one_percent(llama, text, tmp_path, scheme):
    path = write_gguf(tiny.model("bundled"), tiny.tokenizer(), tmp_path / "model.gguf", scheme, progress=False)
    ours = perplexity(*read_gguf(path), convention="llama.cpp", tokens=2048)
    assert llama.perplexity(path, text, chunks=4) == pytest.approx(ours, rel=0.01)


def test_the_bitnet_that_ships(llama, text):
    """Both round the inputs to 8 bits, this package for each token, llama.cpp for each 256 numbers of it."""
    path = checkpoint("b158")
    ours = perplexity(*read_gguf(path), convention="llama.cpp", tokens=8 * 512)
    assert ours < 20 and llama.perplexity(path, text, chunks=8) == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("prompt", gguf_files.PROMPTS)
def test_the_same_greedy_text(llama, tmp_path, prompt):
    path = write_gguf(tiny.model("bundled"), tiny.tokenizer(), tmp_path / "model.gguf", "F16", progress=False)
    assert llama.complete(path, prompt, 48) == generate(*read_gguf(path), prompt, max_new_tokens=48)


@pytest.mark.parametrize("scheme", ["Q8_0", "Q6_K", "Q4_K_M", "Q4_0"])
def test_the_same_greedy_text_of_a_quantized_file_that_llama_cpp_has_decoded(llama, tmp_path, scheme):
    """Its own tool makes a float file of ours, so that nothing but the weights is rounded: then no choice differs."""
    path = write_gguf(tiny.model("bundled"), tiny.tokenizer(), tmp_path / "model.gguf", scheme, progress=False)
    llama.run("llama-quantize", "--allow-requantize", path, tmp_path / "floats.gguf", "F32", 1)
    model, tokenizer = read_gguf(path)
    for prompt in gguf_files.PROMPTS:
        assert llama.complete(tmp_path / "floats.gguf", prompt, 48) == generate(model, tokenizer, prompt, 48)


def test_the_same_greedy_text_of_a_quantized_file_but_for_close_decisions(llama, tmp_path):
    """llama.cpp rounds inputs to 8 bits; that turns a decision only where two tokens are almost equally likely."""
    path = write_gguf(tiny.model("bundled"), tiny.tokenizer(), tmp_path / "model.gguf", "Q8_0", progress=False)
    model, tokenizer = read_gguf(path)
    gaps = [gguf_files.gap(llama, path, model, tokenizer, prompt, 48) for prompt in gguf_files.PROMPTS]
    assert gaps.count(0.0) >= 8 and max(gaps) < np.log(1.1)


def test_llama_cpp_does_not_write_the_same_greedy_text_twice_either(llama, tmp_path):
    """Attention in float16, its default, or in float32: as many of the texts part as between it and this package."""
    path = write_gguf(tiny.model("bundled"), tiny.tokenizer(), tmp_path / "model.gguf", "Q8_0", progress=False)
    texts = [[llama.complete(path, prompt, 48, options) for prompt in gguf_files.PROMPTS] for options in ((), FLOAT32)]
    assert 0 < sum(a != b for a, b in zip(*texts, strict=True)) <= 4
