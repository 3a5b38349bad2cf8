"""How a text is cut: every token scored exactly as the convention says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlearn.evaluate.windows import Passage, Window, context_length, passage, predict, second_halves, sliding


@given(count=st.integers(0, 200), width=st.integers(3, 40), data=st.data())
def test_sliding_scores_each_token_once_in_the_first_window_that_holds_it(count, width, data):
    stride = data.draw(st.integers(1, width))
    windows = sliding(count, width, stride)
    scored = [token for window in windows for token in range(window.first, window.end)]
    starts = range(0, count, stride)
    # A token can be scored in a window that holds it and a token before it.
    scorable = [t for t in range(count) if any(start < t < min(start + width, count) for start in starts)]
    assert scored == scorable
    for window in windows:
        assert window.end - window.start <= width
        earlier = [w for w in windows if w.start < window.start]
        assert all(w.end <= window.first for w in earlier)


@given(count=st.integers(0, 200), width=st.integers(3, 40), data=st.data())
def test_sliding_reads_the_windows_of_hugging_faces_loop(count, width, data):
    stride = data.draw(st.integers(1, width))
    expected, previous_end = [], 0
    for begin in range(0, count, stride):
        end = min(begin + width, count)
        new = end - previous_end
        scored = [
            t for t in range(end - new, end) if t > begin
        ]  # the loss has no prediction for a window's first token
        if scored:
            expected.append(Window(begin, scored[0], end))
        previous_end = end
        if end == count:
            break
    assert sliding(count, width, stride) == expected


@pytest.mark.parametrize("width", [3, 4, 7, 512])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_second_halves_score_as_llama_perplexity_does(width, extra):
    # perplexity.cpp: first = n_ctx / 2; logits first ... n_ctx - 2 are held against tokens first + 1 ... n_ctx - 1.
    windows = second_halves(3 * width + extra, width)
    first = width // 2
    assert len(windows) == 3
    for chunk, window in enumerate(windows):
        predicted = [chunk * width + position + 1 for position in range(first, width - 1)]
        assert list(range(window.first, window.end)) == predicted
        assert len(predicted) == width - 1 - first
        assert (window.start, window.end) == (chunk * width, (chunk + 1) * width)


def test_a_text_shorter_than_a_window_is_one_shorter_window(model, tokenizer):
    assert passage(model, tokenizer, "abcde").windows == (Window(0, 1, 5),)


def test_the_window_is_what_the_model_was_made_for_at_most_2048(model, tokenizer):
    assert context_length(model) == 32
    assert passage(model, tokenizer, "a" * 100).windows[0] == Window(0, 1, 32)
    model.config.max_position_embeddings = 100_000
    assert passage(model, tokenizer, "a" * 5000).windows[0] == Window(0, 1, 2048)
    assert passage(model, tokenizer, "a" * 5000, "llama.cpp").windows[0] == Window(0, 257, 512)


def test_tokens_limits_the_text(model, tokenizer, text):
    cut = passage(model, tokenizer, text, tokens=40)
    assert cut.ids.tolist() == tokenizer(text)["input_ids"][:40]
    assert cut.scored == 38  # two windows, and the first token of neither is scored


def test_text_that_looks_like_a_special_token_is_text(model, tokenizer):
    assert 0 not in passage(model, tokenizer, "END = '<|endoftext|>'").ids


def test_bos_replaces_the_first_token_of_each_chunk_where_the_tokenizer_adds_one(model, tokenizer, bos_tokenizer, text):
    without = passage(model, tokenizer, text, "llama.cpp", window=16)
    assert without.bos is None
    with_bos = passage(model, bos_tokenizer, text, "llama.cpp", window=16)
    batch = with_bos.batch(with_bos.windows)
    assert batch[:, 0].tolist() == [0] * len(with_bos.windows)
    # The text itself was given a BOS too, as llama-perplexity's tokenization does; the rest of each chunk is untouched.
    ids = [0, *tokenizer(text)["input_ids"]]
    assert batch[1, 1:].tolist() == ids[17:32]
    assert with_bos.ids[16] == ids[16] != 0
    assert passage(model, bos_tokenizer, text).bos is None


def test_predict_batches_do_not_change_the_logits(model, tokenizer, text, monkeypatch):
    cut = passage(model, tokenizer, text, window=16, stride=8)
    together = list(predict(model, cut))
    monkeypatch.setattr("qlearn.evaluate.windows.LOGITS_AT_ONCE", 1)
    alone = list(predict(model, cut))
    assert len(together) < len(alone) == len(cut.windows)
    torch.testing.assert_close(
        torch.cat([x for x, _ in together]), torch.cat([x for x, _ in alone]), rtol=1e-12, atol=1e-12
    )
    assert torch.cat([t for _, t in together]).tolist() == torch.cat([t for _, t in alone]).tolist()


def test_a_model_that_cannot_compute_some_logits_only_gives_the_same(model, tokenizer, text):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, use_cache=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    cut = passage(model, tokenizer, text, "llama.cpp", window=16)
    for (a, s), (b, t) in zip(predict(model, cut), predict(Plain().eval(), cut), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert s.tolist() == t.tolist()


def test_half_precision_is_widened(tokenizer, model, text):
    cut = passage(model, tokenizer, text)
    logits, _ = next(predict(model.to(torch.bfloat16), cut))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": ""}, "the text is ''"),
        ({"text": 5}, "the text is 5"),
        ({"text": "a"}, "the text has 1 tokens, and sliding needs at least 2"),
        ({"text": "a" * 31, "convention": "llama.cpp"}, "the text has 31 tokens, and llama.cpp needs at least 32"),
        ({"text": "abc", "tokens": 1}, "tokens=1 leaves nothing to score"),
        ({"text": "abc", "convention": "wikitext"}, "convention 'wikitext' is unknown"),
        ({"text": "abc", "window": 33}, "window=33 is out of range; this model reads 3 to 32"),
        ({"text": "abc", "window": 2}, "window=2 is out of range"),
        ({"text": "abc", "stride": 0}, "stride=0 is out of range"),
        ({"text": "abc", "window": 8, "stride": 9}, "stride=9 is out of range; choose 1 to 8"),
        ({"text": "abc", "convention": "llama.cpp", "stride": 256}, "stride=256 does not go with llama.cpp"),
    ],
)
def test_bad_input_is_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        passage(model, tokenizer, **arguments)


def test_a_model_in_training_mode_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        next(predict(model.train(), Passage(torch.tensor([1, 2, 3]), (Window(0, 1, 3),))))
