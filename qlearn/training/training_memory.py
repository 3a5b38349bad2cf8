"""What a training step has to hold in memory: by formula, and as it is.

    weights        all of them, at the bits they are stored in
    gradients      one number for each parameter that learns, in its own type
    optimizer      AdamW: two numbers for each parameter that learns, the means of the gradient and of its square
    activations    what the forward pass leaves for the backward pass: grows with the texts, not with what learns

The first three follow from counting. The QLoRA paper's example is a Llama of 65.2 billion parameters. Trained in full,
with 16-bit weights, 16-bit gradients and 32-bit states, it takes 2 + 2 + 8 bytes for each parameter, 782 GB. At 4.127
bits (NF4 and double quantization) the weights take 33.6 GB. Adapters of rank 64 on all linear layers are another 0.8
billion parameters, and they alone have gradients and states. So it fits in the 48 GB of one card.

Activations depend on the architecture, the texts and on what is kept, so here they are measured: on a GPU they are what
the peak has above the rest. With a small model and long texts they are most of it, and to store weights in 4 bits saves
little. Gradient checkpointing (`finetune.py`) is the remedy for that.

Source: QLoRA, arXiv 2305.14314, sections 1 and 3 ("more than 780 GB" to "less than 48 GB").
"""

from dataclasses import dataclass

import torch

ADAMW_STATES = 2  # numbers for each parameter that learns


@dataclass(frozen=True)
class Memory:
    """Bytes of what a training step holds, activations left out."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self):
        """All three."""
        return self.weights + self.gradients + self.optimizer


def by_formula(parameters, bits=16, learning=None, learning_bits=32, gradient_bits=None, state_bits=32):
    """Bytes of a training step with AdamW for a model that need not exist: a Memory.

    parameters: how many the model has.  bits: true bits of each, scales counted.
    learning: how many parameters learn beside these; None for full fine-tuning, where the parameters do themselves.
    learning_bits: of a parameter that learns beside.  gradient_bits: None for those of what learns.  state_bits: of a
    number of the optimizer.

    >>> full = by_formula(65.2e9, bits=16)
    >>> adapters = by_formula(65.2e9, bits=4.127, learning=0.8e9, learning_bits=16)
    >>> [round(memory.total / 1e9, 1) for memory in (full, adapters)]
    [782.4, 43.2]
    """
    weights, learned, learned_bits = parameters * bits / 8, parameters, bits
    if learning is not None:
        weights, learned, learned_bits = weights + learning * learning_bits / 8, learning, learning_bits
    gradients = learned * (gradient_bits or learned_bits) / 8
    return Memory(round(weights), round(gradients), round(learned * ADAMW_STATES * state_bits / 8))


def of_model(model):
    """The same for a model as it is: everything it holds, and what those of its parameters that learn will need.

    The states of torch's AdamW have the type of the parameter.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    >>> model[0].requires_grad_(False)
    Linear(in_features=10, out_features=10, bias=False)
    >>> of_model(model)
    Memory(weights=440, gradients=40, optimizer=80)
    """
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Memory(_held(model), learned, ADAMW_STATES * learned)


def measured(model, optimizer):
    """What is really there after backward() and a step, before the gradients are dropped: a Memory."""
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if _is_moment(t)}
    return Memory(_held(model), gradients, sum(states.values()))


def peak(step, device=None):
    """Bytes of a GPU's memory at the highest point of a function's run: torch.cuda.max_memory_allocated.

    step: a function without arguments, best run once before, so that what stays is there already.
    Raises ValueError without a CUDA GPU: what a process holds in main memory does not tell its tensors from the rest.
    """
    if not torch.cuda.is_available():
        raise ValueError("the peak is measured on a CUDA GPU, and there is none; of_model counts all but activations")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _held(model):
    """Bytes of parameters and buffers, each counted once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def _is_moment(tensor):
    """Whether a tensor is more than the count of steps."""
    return isinstance(tensor, torch.Tensor) and tensor.dim() > 0
