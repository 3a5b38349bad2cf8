"""Memory planning: what goes where, by arithmetic that is done here once more, and by accelerate on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qlearn
from qlearn.models import memory

SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
EMBEDDING, NORM = 1000 * 64 * 2, 64 * 2
LAYER = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) * 2  # bytes in bfloat16
ANGLES = 2 * 8 * 4  # of the rotary embedding, float32, twice
HEAD = EMBEDDING + NORM + ANGLES
MACHINE = memory.Machine(vram_bandwidth=1000e9, ram_bandwidth=50e9, bus_bandwidth=25e9)


def model(tied=False):
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=tied), dtype=torch.bfloat16)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_pieces(tied):
    parts = memory.pieces(model(tied))
    assert parts.layers == (LAYER,) * 4 and parts.head == HEAD and parts.tied == tied
    assert parts.embedding == (0 if tied else EMBEDDING)
    assert parts.names[0] == ("model.embed_tokens",) and parts.names[1] == ("model.layers.0",)
    assert set(parts.names[-1]) >= {"model.norm", "lm_head"}


def test_a_model_without_values_has_the_same_pieces():
    with torch.device("meta"):
        empty = model()
    assert memory.pieces(empty).layers == memory.pieces(model()).layers


def test_quantized_layers_are_counted_as_they_are_stored():
    quantized = qlearn.quantize_model(model(), "absmax", bits=4, group_size=32, progress=False)
    numbers = (LAYER - 2 * 64 * 2) // 2
    assert memory.pieces(quantized).layers[0] == numbers * 4.5 / 8 + 2 * 64 * 2


@pytest.mark.parametrize(
    ("vram", "layers"),
    [(0, 0), (HEAD - 1, 0), (HEAD, 1), (HEAD + LAYER, 2), (HEAD + 4 * LAYER - 1, 4), (HEAD + 4 * LAYER, 5), (1e12, 5)],
)
def test_layers_that_fit(vram, layers):
    plan = memory.plan(model(), vram, ram=1e9, reserve=0)
    decoder = max(0, layers - 1)
    assert plan.n_gpu_layers == layers
    assert plan.gpu_bytes == plan.read_gpu == decoder * LAYER + (HEAD if layers else 0)
    assert plan.gpu_bytes + plan.other_bytes == 4 * LAYER + HEAD + EMBEDDING
    assert plan.read_gpu + plan.read_other == 4 * LAYER + HEAD  # of the embedding a token reads one row


def test_the_reserve_and_the_cache_take_their_share():
    everything = HEAD + 4 * LAYER
    cache = 100 * 2 * 2 * 16 * 2  # tokens, keys and values, heads, their size, bytes
    assert memory.plan(model(), everything + 999, ram=1e9, reserve=1000).n_gpu_layers == 4
    with_cache = memory.plan(model(), everything + 4 * cache, ram=1e9, reserve=0, context=100)
    assert with_cache.n_gpu_layers == 5 and with_cache.read_gpu == everything + 4 * cache
    assert memory.plan(model(), everything + 4 * cache - 1, ram=1e9, reserve=0, context=100).n_gpu_layers == 4


def test_tokens_per_second():
    plan = memory.plan(model(), HEAD + LAYER, ram=1e9, reserve=0)
    assert plan.tokens_per_second(MACHINE) == pytest.approx(1 / ((HEAD + LAYER) / 1000e9 + 3 * LAYER / 50e9))
    copied = memory.plan(model(), EMBEDDING + HEAD + LAYER, ram=1e9, reserve=0, offload="copy")
    assert copied.n_gpu_layers == 2
    assert copied.tokens_per_second(MACHINE) == pytest.approx(1 / ((HEAD + LAYER) / 1000e9 + 3 * LAYER / 25e9))


def test_copied_layers_keep_their_cache_on_the_gpu():
    plan = memory.plan(model(), EMBEDDING + HEAD + 1e5, ram=1e9, reserve=0, offload="copy", context=100)
    assert plan.read_gpu == plan.gpu_bytes - EMBEDDING + 4 * 100 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_accelerate_takes_the_device_map(layers, tied):
    """With the CPU in the GPU's place every module has a device, none has two, and the logits are unchanged."""
    from accelerate import dispatch_model

    net = model(tied).eval()
    parts = memory.pieces(net)
    vram = parts.embedding + HEAD + (layers - 1) * LAYER
    plan = memory.plan(net, vram, ram=1e9, reserve=0, offload="copy")
    assert plan.n_gpu_layers == layers
    places = plan.device_map(gpu="cpu")
    leaves = [name for name, module in net.named_modules() if not list(module.children())]
    for leaf in leaves:
        if list(net.get_submodule(leaf).parameters()):
            assert sum(leaf == name or leaf.startswith(name + ".") for name in places) == 1
    assert [plan.device_map()[f"model.layers.{i}"] for i in range(4)] == ["cpu"] * (5 - layers) + [0] * (layers - 1)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = net(ids).logits
        assert torch.equal(dispatch_model(net, places, main_device="cpu", force_hooks=True)(ids).logits, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory.plan(model(), 1e9, 1e9, offload="swap"), "'swap' is unknown; choose from compute, copy"),
        (lambda: memory.plan(model(), -1, 1e9), "vram=-1 is no size"),
        (lambda: memory.plan(model(), 1e9, 1e9, context=float("nan")), "context=nan is no size"),
        (lambda: memory.plan(model(), 0, 1000), "GB more memory than there is"),
        (lambda: memory.plan(model(), 10, 1e9, offload="copy"), "do not hold what must be there"),
        (lambda: memory.plan(model(), 1e9, 1e9).device_map(), "llama.cpp takes n_gpu_layers"),
        (lambda: memory.plan(torch.nn.Linear(2, 2), 1e9, 1e9), "no nn.ModuleList of decoder layers"),
        (lambda: memory.Machine(1e9, 0, 1e9), "ram_bandwidth=0 moves nothing"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
