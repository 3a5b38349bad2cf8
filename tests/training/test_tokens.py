"""The token file: what `prepare` writes is what a training reads."""

import torch

from qlearn.training import corpus
from qlearn.training.tokens import load_tokens, prepare


def test_prepare_writes_what_a_run_reads(tmp_path, monkeypatch):
    text = "def f(x):\n    return x + 1\n\n\n" * 200
    files = [corpus.SourceFile(text + f"# {n}\n", "p", held_out=n == 0) for n in range(4)]
    monkeypatch.setattr(corpus, "collect", lambda: (files, []))
    prepare(tmp_path / "tokens.npz")
    stream, held_out, about = load_tokens(tmp_path / "tokens.npz", "cpu")
    assert stream.dtype == held_out.dtype == torch.int32
    assert (about["files"], about["tokens"], about["held_out_tokens"]) == (3, len(stream), len(held_out))
    assert (stream == 0).sum() == 3 and held_out[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]
