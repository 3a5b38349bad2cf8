"""Showing a model some text, and looking at what its layers are given to read.

Methods such as GPTQ and AWQ choose the codes of a layer by what they do to its outputs, so they must know its inputs.
Those come from running the model over a few thousand tokens of ordinary text, the **calibration** text.

A transformer is a chain of equal blocks, and the output of one is the input of the next. So the model need not be run
from the start for every block: the hidden states of all calibration tokens stand in front of a block, the block is
worked on, and then they pass through it and stand in front of the next one. That keeps two promises:

* **Quantized inputs.** The hidden states pass through each block as it has become. A layer is calibrated on what it
  will really be given, the errors of all layers below it included.
* **One block at a time.** What is held beside the model are the hidden states, tokens x width, and the statistics of
  the layers at hand, whatever the number of blocks.

What else a block is called with, and what happens where a model is no such chain, is in `recording.py`.

    ids = calibration_ids(tokenizer)
    for block in walk(model, ids):
        for group in block.groups(layers):      # q, k, v | o | gate, up | down
            statistics = block.collect(...)     # the inputs of these layers, the groups before them as they are now
            ...                                 # replace the layers by quantized ones
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from qlearn.evaluate import calibration_text
from qlearn.evaluate.windows import context_length
from qlearn.methods.statistics import InputStatistics
from qlearn.models import recording
from qlearn.models.linear import QuantLinear
from qlearn.models.recording import Enough, call, hidden_states, watching

WINDOW = 512  # tokens
LINEAR = (nn.Linear, QuantLinear)


def calibration_ids(tokenizer, texts=None, tokens=16384, window=WINDOW):
    """Text as windows of tokens.

    texts: str, or a list of them, which are joined one after another; None takes `evaluate.calibration_text()`.
    tokens: use only so many of the first tokens.  window: tokens in a window, fewer if the text is shorter than one.
    Returns int64 (windows, window); the rest that does not fill a window is dropped.
    Raises ValueError for something else than texts, and for texts without two tokens.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> calibration_ids(tokenizer, tokens=2000, window=256).shape
    torch.Size([7, 256])
    """
    texts = [calibration_text()] if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        kind = next(type(text).__name__ for text in texts if not isinstance(text, str))
        raise ValueError(f"a calibration text is of type {kind}; give a str, a list of str, or a matrix of token ids")
    if tokens < 2 or window < 2:
        raise ValueError(f"tokens={tokens} in windows of {window} is too little to calibrate on; ask for more")
    ids = []
    for text in texts:
        ids += tokenizer(text, verbose=False, split_special_tokens=True)["input_ids"] if text else []
        if len(ids) >= tokens:
            break
    ids = torch.tensor(ids[:tokens], dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(f"the calibration texts have {len(ids)} tokens; give a few thousand words")
    window = min(window, len(ids))
    return ids[: len(ids) // window * window].view(-1, window)


def blocks(model):
    """The repeated blocks of a model: dict name -> module, in order.

    They are the nn.ModuleList whose linear layers hold the most weights, if its items are more than such layers
    themselves; empty for a model without one.

    >>> import qlearn
    >>> list(blocks(qlearn.load_model()[0]))[:2]
    ['model.layers.0', 'model.layers.1']
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(isinstance(item, LINEAR) for item in module)
    }
    name = max(lists, key=lambda name: _linear_weights(lists[name]), default=None)  # of equals, the outermost
    if name is None or not _linear_weights(lists[name]):
        return {}
    return {f"{name}.{i}" if name else str(i): block for i, block in enumerate(lists[name])}


@dataclass
class Block:
    """A block of a model and what it is called with. When the next one is asked for, this one's `calls` are gone.

    name: its name in the model.  module: the block itself.
    calls: one (args, kwargs) for each batch of calibration windows, the hidden states as the blocks below, as they are
    now, have made them.
    """

    name: str
    module: nn.Module
    calls: list = field(repr=False)

    def run(self):
        """What the block makes of the hidden states as it is now: a list of tensors, one for each call."""
        return [hidden_states(call(self.module, arguments)) for arguments in self.calls]

    def collect(self, layers, **options):
        """Run the block and gather what the given layers read.

        layers: dict name -> layer of this block, with `in_features`.  options: of `InputStatistics`.
        Returns dict name -> InputStatistics; its `count` is 0 for a layer that was given nothing, such as an expert
        that no token was sent to.  Layers of one of the `groups` read the same: it is enough to ask for one of them.
        """
        statistics = {name: InputStatistics(layer.in_features, **options) for name, layer in layers.items()}
        seen, may_stop = Counter(), False

        def see(name, x):
            statistics[name].add(x)
            seen[name] += 1
            if may_stop and len(seen) == len(layers):
                raise Enough  # the rest of the block is of no interest

        with watching(layers, see):
            for arguments in self.calls:
                seen.clear()
                call(self.module, arguments)
                may_stop = len(seen) == len(layers) and set(seen.values()) == {1}
        return statistics

    def groups(self, layers):
        """Names of the layers that read the very same tensor, in the order in which the block runs them.

        layers: dict name -> layer of this block.  Returns a list of lists of names.  A layer that is never run is in a
        group of its own, at the end.
        """
        inputs = {}
        for number, arguments in enumerate(self.calls):  # the first shows all, but for experts it has no tokens for
            for name, keys in self._reads(layers, arguments).items():
                inputs.setdefault(name, (number, *keys))
            if len(inputs) == len(layers):
                break
        groups = {}
        for name, keys in inputs.items():
            groups.setdefault(keys, []).append(name)
        return [*groups.values(), *([name] for name in layers if name not in inputs)]

    def _reads(self, layers, arguments):
        """What each layer reads in one call: dict name -> list of keys, equal for the very same tensor."""
        alive, keys = [], {}  # the tensors are kept alive, so that no two of them can have one address

        def see(name, x):
            if x.numel():
                alive.append(x)
                version = 0 if x.is_inference() else x._version  # counts changes in place
                keys.setdefault(name, []).append((x.data_ptr(), version, x.numel(), x.shape[-1]))

        with watching(layers, see):
            call(self.module, arguments)
        return keys


def walk(model, ids, batch=8, progress=False):
    """Go through the blocks of a model, from the first to the last, with calibration text.

    ids: int64 (windows, window), as from `calibration_ids`.  batch: windows that are run together.
    Returns an iterator of `Block`. When the next one is asked for, the hidden states pass through this one as it has
    become by then.
    Raises ValueError for ids that are no matrix of the model's tokens, a model in training mode, one without blocks.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> block = next(walk(model, calibration_ids(tokenizer, tokens=64, window=32)))
    >>> block.name, [tuple(hidden.shape) for hidden in block.run()]
    ('model.layers.0', [(2, 32, 256)])
    """
    check_ids(model, ids)
    named = blocks(model)
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList with linear layers, so no blocks to walk through"
        )
    if model.training:
        raise ValueError("the model is in training mode, so dropout may be on; call model.eval() first")
    batches = ids.to(next(model.parameters()).device).split(batch)
    order = recording.order(model, named, ids)
    recorded = recording.record(model, named, batches) if order == list(named) else None
    steps = _rerun(model, named, batches, Counter(order)) if recorded is None else _chain(named, recorded)
    return iter(tqdm(steps, total=len(named), desc="calibrating", unit=" blocks", disable=not progress))


def check_ids(model, ids):
    """Raise ValueError unless ids are an int64 matrix (windows, window) of tokens that the model knows and can read."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64:
        what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"calibration ids are {what}; give an int64 tensor (windows, window), as calibration_ids does")
    vocabulary, longest = model.config.get_text_config().vocab_size, context_length(model)
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"calibration ids go from {ids.min()} to {ids.max()}, but the model knows 0 to {vocabulary - 1}; make them "
            "with its own tokenizer"
        )
    if ids.shape[1] > longest:
        raise ValueError(
            f"calibration windows of {ids.shape[1]} tokens are too long; this model reads up to {longest} at once"
        )


def whole(model, ids):
    """A whole model as one `Block`, for layers outside of its repeated blocks; one window a call, for it has a head."""
    check_ids(model, ids)
    return Block("", model, [recording.model_arguments(model, one) for one in ids.split(1)])


def resolve_ids(model, calibration=None, tokenizer=None):
    """The calibration argument of `quantize_model` as ids, checked.

    calibration: str, list of str, ids (windows, window), or None for `evaluate.calibration_text()`.
    tokenizer: None loads the one that lies with the model, from local files.
    Returns int64 (windows, window).  Raises ValueError for ids that do not fit the model, and when there is text but
    no tokenizer.
    """
    if not isinstance(calibration, torch.Tensor):
        tokenizer = _own_tokenizer(model) if tokenizer is None else tokenizer
        calibration = calibration_ids(tokenizer, calibration, window=min(WINDOW, context_length(model)))
    check_ids(model, calibration)
    return calibration


def _own_tokenizer(model):
    """The tokenizer in the folder, or in the local cache of the id, that the model was loaded from."""
    from transformers import AutoTokenizer

    place = getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration text needs a tokenizer, and none lies at {place!r}, where the model comes from; pass "
            "tokenizer=, or token ids as calibration="
        ) from error


def _linear_weights(module):
    """How many weights the linear layers in a module have."""
    layers = (m for m in module.modules() if isinstance(m, LINEAR))
    return sum(layer.in_features * layer.out_features for layer in layers)


def _chain(named, recorded):
    """The blocks one after another, the outputs of one being the inputs of the next."""
    hidden = None
    for name, module in named.items():
        calls = recorded.pop(name)
        if hidden is not None:
            calls = [recording.swap(c, recording.HIDDEN, states) for c, states in zip(calls, hidden, strict=True)]
        block, hidden = Block(name, module, calls), []
        del calls
        yield block
        if not recorded:
            return
        while block.calls:  # each batch is let go as soon as it has passed
            hidden.append(hidden_states(call(module, block.calls.pop(0))))
        del block.calls  # to use it by mistake is an error now


def _rerun(model, named, batches, times):
    """The blocks one after another, each with the arguments that a run of the model from its start gives it."""
    for name, module in named.items():
        yield Block(name, module, recording.arguments(model, module, batches, times[name]))
