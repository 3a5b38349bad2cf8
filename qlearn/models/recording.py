"""How a model calls its blocks: writing down the arguments, with the hooks that torch offers for every module.

The blocks of a transformer are called one after another, and each is given the hidden states that the one before it
returned, along with arguments that differ between architectures, and in some between the blocks of one model: masks,
positions, rotary tables. `record` runs the model once and writes them all down, with a mark where the hidden states
were, so that a block can be called later with other hidden states. What makes that right is checked on the way: each
block is called once, in order, and is given the very tensor that the block before it returned.

Where that does not hold, because the model does something in between, `arguments` runs the model from its start up to
one block: slower, since it must be done for each block anew, and right for any model.
"""

import contextlib
import inspect

import torch

GLANCE = 16  # tokens that are enough to see in which order a model calls its blocks
HIDDEN = object()  # stands where the hidden states go in an argument list


class Enough(Exception):
    """Raised by a hook to end a run that has shown what it was to show."""


class _NoChain(Exception):
    """A block is given something else than what the one before it returned."""


@torch.no_grad()
def call(module, arguments):
    """The output of a module for (args, kwargs); None when a hook has raised `Enough`."""
    with contextlib.suppress(Enough):
        return module(*arguments[0], **arguments[1])


def model_arguments(model, ids):
    """What a model is called with for a batch of token ids (windows, window): (args, kwargs). No cache is kept."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return (), {"input_ids": ids.to(next(model.parameters()).device), **options}


def forward(model, ids):
    """Run a model over a batch of token ids (windows, window); its output, or None when a hook has raised `Enough`."""
    return call(model, model_arguments(model, ids))


def hidden_states(output):
    """The hidden states in what a block returns: the tensor, or the first of several."""
    return output if isinstance(output, torch.Tensor) else output[0]


def swap(arguments, old, new):
    """(args, kwargs) with one object replaced by another wherever it stands."""
    args, kwargs = arguments
    return tuple(new if a is old else a for a in args), {k: new if a is old else a for k, a in kwargs.items()}


@contextlib.contextmanager
def hooks(handles):
    """Take hooks away at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watching(layers, see):
    """While open, see(name, input) is called whenever one of the layers is about to be run."""

    def hook_for(name):
        def hook(layer, args, kwargs):
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    return hooks([layer.register_forward_pre_hook(hook_for(n), with_kwargs=True) for n, layer in layers.items()])


def order(model, blocks, ids):
    """The names of the blocks in the order in which the model calls them; a glance at a few tokens shows it."""
    names = []
    with watching(blocks, lambda name, x: names.append(name)):
        forward(model, ids[:1, :GLANCE])
    return names


def record(model, blocks, batches):
    """The arguments of every block: dict name -> list of (args, kwargs), one for each batch.

    HIDDEN stands for the hidden states; the first block has them whole. None when the blocks do not form a chain.
    """
    recorded, previous = {name: [] for name in blocks}, {}

    def before(name):
        def hook(module, args, kwargs):
            recorded[name].append(_without_hidden((args, dict(kwargs)), previous))

        return hook

    def after(module, args, output):
        previous.update(output=output)
        if module is list(blocks.values())[-1]:
            raise Enough  # before the head, whose logits would be the largest tensor of all

    handles = [block.register_forward_pre_hook(before(name), with_kwargs=True) for name, block in blocks.items()]
    with hooks(handles + [block.register_forward_hook(after) for block in blocks.values()]):
        for ids in batches:
            previous.clear()
            try:
                forward(model, ids)
            except _NoChain:
                return None
    return recorded


def arguments(model, block, batches, times):
    """The arguments of one block, from running the model up to it: list of (args, kwargs).

    times: how often the model calls it in one run.
    """
    found = []

    def hook(module, args, kwargs):
        found.append((args, dict(kwargs)))
        if len(found) % times == 0:
            raise Enough

    with hooks([block.register_forward_pre_hook(hook, with_kwargs=True)]):
        for ids in batches if times else ():
            forward(model, ids)
    return found


def _without_hidden(arguments, previous):
    """Arguments with HIDDEN for the hidden states that the block before returned; nothing else of it may be there."""
    if not previous:
        return arguments
    output = previous["output"]
    states, rest = hidden_states(output), () if isinstance(output, torch.Tensor) else output[1:]
    values = [*arguments[0], *arguments[1].values()]
    others = any(a is b for a in values for b in rest if isinstance(b, torch.Tensor))
    if others or not any(a is states for a in values):
        raise _NoChain
    return swap(arguments, states, HIDDEN)
