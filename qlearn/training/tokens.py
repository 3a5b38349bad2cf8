"""The corpus as one file of tokens, made once for all runs of an experiment.

    python -m qlearn.training.tokens tokens.npz

To collect the files and to tokenize them takes about as long as a short training, and several trainings that are to be
compared have to see the same tokens in the same order. The tokenizer is the bundled model's; so are the corpus and the
modules that are held out (`corpus.py`), and so perplexities can be compared with its own.
"""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from qlearn.models.loading import BUNDLED
from qlearn.training import corpus
from qlearn.training.pretrain import encode


def prepare(path):
    """Tokenize the corpus of this machine with the bundled model's tokenizer into an .npz file.

    It holds `stream` and `held_out`, uint16, and `about`, JSON: what the record says of the corpus.
    """
    files, _ = corpus.collect()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True).backend_tokenizer
    learned, held = ([f.text for f in files if f.held_out is held_out] for held_out in (False, True))
    random.Random(0).shuffle(learned)
    stream, held_out = encode(tokenizer, learned), encode(tokenizer, held)
    about = {
        "files": len(learned),
        "characters": sum(map(len, learned)),
        "tokens": len(stream),
        "held_out_tokens": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held),
    }
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, stream=stream, held_out=held_out, about=np.array(json.dumps(about)))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(about, flush=True)


def load_tokens(path, device):
    """(stream, held-out stream, about) of a prepared file; the streams int32 on the device."""
    with np.load(path) as file:
        streams = [torch.from_numpy(file[name].astype(np.int32)).to(device) for name in ("stream", "held_out")]
        return *streams, json.loads(str(file["about"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tokenize the corpus of this machine.")
    parser.add_argument("path", help="the .npz file to write")
    prepare(parser.parse_args().path)
