"""Which layers go to the GPU when not all of them fit, and how many tokens a second to expect.

To write a token, a model reads every one of its weights once, and with a single text at a time it does little else. So
speed is a matter of bandwidth:

    seconds for a token  =  bytes on the GPU / bandwidth of its memory  +  bytes elsewhere / bandwidth of the way there

The second bandwidth is the smaller one by far, so a few layers that do not fit decide how long a token takes. An H200
reads its memory at 4,200 GB/s, and accelerate reaches main memory at 7: each of the 32 layers of a Llama of 8 billion
parameters takes 0.1 ms in the first and 60 ms in the second (`bench/results/offload_h200.json`). Halving the bits helps
twice: there is less to read, and more of it fits.

There are two ways of using what stays in main memory:

* **compute**, as llama.cpp does: the processor computes those layers where they lie; the way is that of main memory.
* **copy**, as accelerate does: their weights are copied to the GPU, for every token again; the way is the bus.

llama.cpp calls the decision `n_gpu_layers`. It counts from the end: the head (final norm and output matrix) first,
then the last decoder layer, the one before, ... . The embedding stays in main memory, for of its matrix only one row is
read. accelerate would copy the whole matrix, so there it comes first.

    plan = memory.plan(model, vram=6e9, ram=32e9)
    plan.n_gpu_layers, plan.tokens_per_second(machine)
    accelerate.dispatch_model(model, plan.device_map(), offload_buffers=True)        # with offload="copy"

Sizes are those of the tensors that a model really holds, quantized or not, also on the device "meta", where they have
sizes and no values. The rest of a GPU's memory goes to the key-value cache, which lies beside its layers, and to what a
layer computes in between, the reserve.
"""

from dataclasses import dataclass

from qlearn.models.calibration import blocks

OFFLOADS = ("compute", "copy")


@dataclass(frozen=True)
class Machine:
    """What moves how fast, in bytes a second: the GPU's memory, main memory, and the bus between them."""

    vram_bandwidth: float
    ram_bandwidth: float
    bus_bandwidth: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} moves nothing; give bytes a second")


@dataclass(frozen=True)
class Pieces:
    """Bytes of a model's parts: the embedding, each decoder layer, and the head. `tied`: embedding and head share one
    matrix, whose bytes are the head's. `names`: those of the modules, embedding, layers and head, in that order.
    """

    embedding: int
    layers: tuple[int, ...]
    head: int
    tied: bool
    names: tuple[tuple[str, ...], ...]

    @property
    def total(self):
        """All bytes."""
        return self.embedding + sum(self.layers) + self.head


@dataclass(frozen=True)
class Plan:
    """Where everything goes. n_gpu_layers: decoder layers on the GPU, and one more when the head is there too.

    gpu_bytes, other_bytes: weights on the GPU and elsewhere.  read_gpu, read_other: bytes that a token reads there, the
    key-value cache of `context` tokens included.
    """

    pieces: Pieces
    offload: str
    n_gpu_layers: int
    gpu_bytes: int
    other_bytes: int
    read_gpu: int
    read_other: int

    def tokens_per_second(self, machine, overhead=0.0):
        """The bound that the bandwidths set, for one text at a time: a float.

        overhead: seconds that a token takes besides reading. Programs that start each operation from Python need some
        tens of milliseconds, which is more than a GPU needs to read several GB.

        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)      # a Llama-2-7B
        >>> machine = Machine(vram_bandwidth=1000e9, ram_bandwidth=60e9, bus_bandwidth=25e9)
        >>> whole, half = (plan(model, vram, ram=64e9, reserve=0) for vram in (16e9, 8e9))
        >>> [(p.n_gpu_layers, round(p.tokens_per_second(machine), 1)) for p in (whole, half)]
        [(33, 75.7), (20, 10.5)]
        """
        slow = machine.ram_bandwidth if self.offload == "compute" else machine.bus_bandwidth
        return 1 / (overhead + self.read_gpu / machine.vram_bandwidth + self.read_other / slow)

    def device_map(self, gpu=0):
        """Module name -> device, for accelerate's dispatch_model. gpu: the GPU's number, or a device's name.

        Raises ValueError for a plan of the other way, in which llama.cpp takes `n_gpu_layers` instead.
        """
        if self.offload != "copy":
            raise ValueError("a device map is for offload='copy'; llama.cpp takes n_gpu_layers")
        embedding, *layers, head = self.pieces.names
        first = len(layers) + 1 - self.n_gpu_layers
        places = [True, *(i >= first for i in range(len(layers) + 1))]
        return {
            name: gpu if here else "cpu"
            for names, here in zip((embedding, *layers, head), places, strict=True)
            for name in names
        }


def plan(model, vram, ram, *, offload="compute", context=0, cache_bytes=2, reserve=512 * 2**20):
    """Put as many layers on the GPU as fit, counted from the end of the model.

    model: a causal language model of transformers, on any device.  vram, ram: bytes that are free.
    offload: "compute" or "copy", see the top of the file.  context: tokens of the key-value cache.
    cache_bytes: of a number in it.  reserve: bytes of the GPU's memory that are kept for intermediate results.
    Returns a Plan.
    Raises ValueError for an unknown way, for negative sizes, for a model without decoder layers, and when the machine
    cannot hold the model, saying how much is missing.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload={offload!r} is unknown; choose from {', '.join(OFFLOADS)}")
    for name, value in {"vram": vram, "ram": ram, "context": context, "reserve": reserve}.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} is no size; give a number of at least 0")
    parts = pieces(model)
    cache = context * cache_bytes_per_token(model.config, cache_bytes)
    least = 1 if offload == "copy" and parts.tied else 0  # the embedding, which is there, is the head
    possible = [_arrange(parts, n, cache, offload) for n in range(least, len(parts.layers) + 2)]
    fitting = [option for option in possible if option[1] + (reserve if option[1] else 0) <= vram]
    if not fitting:
        needed = possible[0][1] + reserve
        raise ValueError(
            f"{vram / 1e9:.3g} GB of GPU memory do not hold what must be there, {needed / 1e9:.3g} GB; use "
            "offload='compute', or a smaller context"
        )
    best, _, beside = fitting[-1]
    if beside > ram:
        raise ValueError(
            f"the model needs {(beside - ram) / 1e9:.3g} GB more memory than there is; free some, or store it in fewer "
            "bits"
        )
    return best


def pieces(model):
    """The parts of a model and their bytes, as they are held: a Pieces.

    Raises ValueError when no decoder layers are found.

    >>> from qlearn import load_model
    >>> parts = pieces(load_model(progress=False)[0])
    >>> len(parts.layers), parts.tied, parts.total                # 7.3 million float32, and a table of angles
    (8, True, 29377792)
    """
    layers = blocks(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of decoder layers, so nothing can be divided")
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    others = [other for other in _leaves(model) if not _inside(other, {name, *layers})]
    seen = set()
    head = sum(_nbytes(model.get_submodule(other), seen) for other in others)  # before the embedding: see `tied`
    return Pieces(
        layers=tuple(_nbytes(layer, seen) for layer in layers.values()),
        head=head,
        embedding=_nbytes(embedding, seen),
        tied=output is not None and getattr(output, "weight", None) is embedding.weight,
        names=((name,), *((layer,) for layer in layers), tuple(others)),
    )


def cache_bytes_per_token(config, cache_bytes=2):
    """Bytes of the key-value cache of one decoder layer for each token.

    >>> from transformers import LlamaConfig
    >>> cache_bytes_per_token(LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8))
    4096
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head_dim * cache_bytes


def _arrange(parts, n, cache, offload):
    """The plan with n layers on the GPU, and the bytes of its memory that it takes. cache: bytes of each layer's."""
    count, copied = len(parts.layers), offload == "copy"
    decoder = max(0, n - 1)  # the head is the first to go there
    here = sum(parts.layers[count - decoder :]) + (parts.head if n else 0)
    away = sum(parts.layers) + parts.head - here
    cache_here = cache * (count if copied else decoder)  # the cache lies where its layer computes
    gpu_bytes = here + (parts.embedding if copied else 0)
    read_other = away + cache * count - cache_here
    plan = Plan(parts, offload, n, gpu_bytes, parts.total - gpu_bytes, here + cache_here, read_other)
    return plan, gpu_bytes + cache_here, parts.total - gpu_bytes + cache * count - cache_here


def _leaves(model):
    """Names of the modules that hold tensors themselves."""
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            yield name


def _inside(name, modules):
    """Whether a module is one of those named, or a part of one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _nbytes(module, seen):
    """Bytes of the tensors of a module that were not seen before."""
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.nbytes
    return total
