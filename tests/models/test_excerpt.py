"""excerpt: fewer windows, from all over the text, and calls that can still be made."""

import pytest
import torch

from qlearn.models.excerpt import excerpt


def call(number, windows=4, window=8):
    """A call as a Llama's block gets it; each hidden state says which call and window it is from."""
    hidden = torch.empty(windows, window, 3)
    hidden[:] = 10.0 * number + torch.arange(windows)[:, None, None]
    rotary = torch.zeros(1, window, 2), torch.zeros(windows, window, 2)
    return (hidden,), {"mask": torch.zeros(windows, 1, window, window), "rotary": rotary, "cache": None, "at": rotary}


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (1, [[0]]),
        (8, [[0]]),
        (16, [[0], [20]]),
        (24, [[0], [10], [20]]),
        (32, [[0], [10], [20], [30]]),
        (63, [[0], [10], [20], [30]]),
        (64, [[0, 1], [10, 11], [20, 21], [30, 31]]),
        (10**6, [[10 * i + j for j in range(4)] for i in range(4)]),
    ],
)
def test_windows_from_all_over(tokens, expected):
    taken = excerpt([call(i) for i in range(4)], tokens)
    assert [args[0][:, 0, 0].tolist() for args, _ in taken] == expected
    for (hidden,), kwargs in taken:
        windows = len(hidden)
        assert hidden.shape == (windows, 8, 3)
        assert kwargs["mask"].shape == (windows, 1, 8, 8)
        assert [x.shape for x in kwargs["rotary"]] == [(1, 8, 2), (windows, 8, 2)]
        assert kwargs["cache"] is None


def test_hidden_states_by_keyword():
    (_, kwargs), *_ = excerpt([((), {"ids": torch.arange(8), "hidden_states": torch.zeros(4, 8, 3)})], tokens=8)
    assert kwargs["hidden_states"].shape == (1, 8, 3)


@pytest.mark.parametrize("shape", [(32, 3), (1, 32, 3)])
def test_what_has_no_windows_is_taken_whole(shape):
    calls = [((torch.zeros(shape),), {"lengths": torch.zeros(5, 2)})] * 3
    assert [args[0].shape for args, _ in excerpt(calls, tokens=8)] == [shape]
    assert len(excerpt(calls, tokens=64)) == 2


def test_the_calls_stay_as_they_are():
    calls = [call(0)]
    excerpt(calls, tokens=8)
    assert calls[0][0][0].shape == (4, 8, 3)


def test_no_calls():
    assert excerpt([], tokens=8) == []
