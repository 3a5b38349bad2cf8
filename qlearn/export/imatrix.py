"""The importance matrix: which columns of a weight matrix matter, and a file that llama.cpp reads.

An error e in a weight w of column j adds e · x_j to an output, x_j being the input that the column is multiplied with.
Over many tokens the squared error is therefore, errors being independent,

    E (Σ_j e_j x_j)²  =  Σ_j e_j² · E x_j²

and the mean square of each input says how much the errors of its column count. It is the diagonal of the Hessian that
GPTQ works with, up to a factor. The K-quants and their relatives weigh the errors by it when they search for scales,
which costs nothing at run time: the file only holds other numbers.

An `Imatrix` holds, for each matrix, the sum of squares `in_sum2` of each input and the number of tokens `counts`; its
quotient is the importance. That is what llama-imatrix writes, a GGUF file of its own kind:

    general.type = imatrix;  imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size
    blk.0.attn_q.weight.in_sum2    F32 (1, columns)
    blk.0.attn_q.weight.counts     F32 (1, 1)

Like llama-imatrix, this collects what flows into the layers of the blocks, not into the head, from chunks of 512 tokens
side by side, each token counted once, the first of a chunk replaced by BOS for a model that begins its texts with it.

Source: tools/imatrix/imatrix.cpp of llama.cpp; its pull request 4861 has the derivation.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from qlearn.evaluate.windows import bos_token
from qlearn.export import names
from qlearn.export.gguf_file import GGUFError, GGUFFile
from qlearn.models import recording
from qlearn.models.calibration import calibration_ids, check_ids
from qlearn.models.linear import QuantLinear

CHUNK = 512
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass
class Imatrix(Mapping):
    """How much each column of each matrix matters: a mapping of names in a GGUF file to float32 arrays (columns,).

    sums: dict name -> float32 (columns,), the sum of the squared inputs.  counts: dict name -> number of tokens.
    datasets: names of the texts.  chunk_size: tokens in a chunk.

    >>> imatrix = Imatrix({"blk.0.attn_q.weight": np.float32([8, 2])}, {"blk.0.attn_q.weight": 4})
    >>> imatrix["blk.0.attn_q.weight"].tolist(), len(imatrix)
    ([2.0, 0.5], 1)
    """

    sums: dict
    counts: dict
    datasets: list = field(default_factory=list)
    chunk_size: int = CHUNK

    def __getitem__(self, name):
        count = np.float32(self.counts[name])
        return self.sums[name] / count if count > 0 else np.ones_like(self.sums[name])

    def __iter__(self):
        return iter(self.sums)

    def __len__(self):
        return len(self.sums)

    @property
    def chunks(self):
        """How many chunks of tokens it was collected from."""
        return round(max(self.counts.values(), default=0) / self.chunk_size)

    def save(self, path):
        """Write a file that llama-quantize takes as --imatrix; an existing one is replaced whole or not at all."""
        from gguf import GGUFWriter

        unfinished = Path(f"{path}.part")
        try:
            writer = GGUFWriter(unfinished, "")
            writer.kv_data[0].clear()  # an imatrix has no general.architecture
            try:
                writer.add_string("general.type", "imatrix")
                writer.add_array("imatrix.datasets", self.datasets or ["unnamed"])
                writer.add_uint32("imatrix.chunk_count", self.chunks)
                writer.add_uint32("imatrix.chunk_size", self.chunk_size)
                for name in sorted(self.sums):
                    writer.add_tensor(name + SUMS, self.sums[name].astype(np.float32)[None])
                    writer.add_tensor(name + COUNTS, np.float32([[self.counts[name]]]))
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read what `save` or llama-imatrix wrote.

        Raises FileNotFoundError for no file, and GGUFError for a damaged one, one that is no imatrix (the old format
        of llama-imatrix, .dat, among them), and one of a mixture of experts.
        """
        file = GGUFFile(path)
        if file.get("general.type", str, "") != "imatrix":
            raise GGUFError(f"{path} is no imatrix; make one with qlearn.export.imatrix or llama-imatrix")
        sums, counts = {}, {}
        for tensor in file.tensors:
            name = tensor.removesuffix(SUMS)
            if name == tensor:
                continue
            sums[name], count = file.weights(tensor), file.weights(name + COUNTS).ravel()
            if len(count) != 1 or sums[name].size != sums[name].shape[-1]:
                raise GGUFError(f"{name} has {len(count)} counts: an imatrix of experts, which is not read here")
            sums[name], counts[name] = sums[name].ravel().copy(), round(float(count[0]))
        datasets = file.get("imatrix.datasets", list, [])
        return cls(sums, counts, datasets, file.get("imatrix.chunk_size", int, CHUNK))

    def __repr__(self):
        return f"Imatrix({len(self)} matrices, {max(self.counts.values(), default=0)} tokens)"


@torch.no_grad()
def imatrix(model, tokenizer, texts=None, tokens=None, batch=8, name="text", progress=False):
    """Collect the importance of all columns of a model.

    model, tokenizer: as for `write_gguf`.  texts: str, or a list of them; None takes the calibration text of the
    package.  tokens: use only so many of the first ones; None uses all.  batch: chunks that are run together.
    name: of the texts, noted in the file.  progress: show a bar.
    Returns an Imatrix.  Raises ValueError for texts shorter than a chunk of 512 tokens, and an unknown architecture.

    >>> import qlearn
    >>> found = imatrix(*qlearn.load_model(), tokens=1024)
    >>> found, found["blk.0.ffn_down.weight"].shape
    (Imatrix(56 matrices, 1024 tokens), (768,))
    """
    layers = _layers(model)
    ids = calibration_ids(tokenizer, texts, tokens=tokens or 2**62, window=CHUNK)
    if ids.shape[1] < CHUNK:
        raise ValueError(f"the texts have {ids.shape[1]} tokens, fewer than the {CHUNK} of a chunk; give more text")
    check_ids(model, ids)
    if (bos := bos_token(tokenizer)) is not None:
        ids[:, 0] = bos
    sums = {layer: torch.zeros(module.in_features, dtype=torch.float64) for layer, module in layers.items()}

    def see(layer, x):
        squares = x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
        sums[layer] += squares.double().cpu()

    with recording.watching(layers, see):
        for some in tqdm(ids.split(batch), desc="imatrix", unit=" batches", disable=not progress):
            recording.forward(model, some)
    broken = [layer for layer, total in sums.items() if not torch.isfinite(total).all()]
    if broken:
        raise ValueError(f"the inputs of {broken[0]} overflow; run the model in float32")
    counts = dict.fromkeys(sums, ids.numel())
    return Imatrix({layer: total.float().numpy() for layer, total in sums.items()}, counts, [name])


def _layers(model):
    """The linear layers of the blocks by the names of their weights in the file."""
    architecture = names.architecture(model.config.model_type)
    found = {}
    for theirs, ours in architecture.modules(model.config.num_hidden_layers).items():
        module = model.get_submodule(theirs)
        if names.layer_number(f"{ours}.") is not None and isinstance(module, (nn.Linear, QuantLinear)):
            found[f"{ours}.weight"] = module
    return found
