"""fold: the block computes what it did, or not a bit of it has changed."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlearn import quantize
from qlearn.models.calibration import Block, walk
from qlearn.models.folding import fold
from qlearn.models.layers import linear_layers
from qlearn.models.linear import QuantLinear
from tests.models.conftest import SIZES

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
MLP = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MIXTURE = [["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"], ["mlp.shared_experts.down_proj"]]
LATENT = [["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"], ["self_attn.q_b_proj"], ["self_attn.kv_b_proj"]]


def liven(model):
    """Make all of a random model matter: weights ten times as large, and norms and biases that are no constants."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "embed" not in name:
            parameter.mul_(1 if parameter.dim() == 1 else 10)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * (parameter.dim() == 1))
    return model


def blocks(model):
    """The blocks of a model, each with its groups of layers."""
    for block in walk(model, IDS):
        prefix = block.name + "."
        layers = {n.removeprefix(prefix): m for n, m in linear_layers(model).items() if n.startswith(prefix)}
        yield block, block.groups(layers)


def random_scale(columns, low=0.2, high=5.0, seed=2):
    return torch.empty(columns).log_normal_(generator=torch.Generator().manual_seed(seed)).clamp(low, high)


def state(block):
    return copy.deepcopy(block.module.state_dict())


def differing(block, before):
    return {
        name.rpartition(".")[0] for name, x in block.module.state_dict().items() if not torch.equal(x, before[name])
    }


def off(block, before):
    """The largest change of the outputs, in units of the largest output."""
    now = block.run()
    return max((a - b).abs().max() / b.abs().max() for a, b in zip(now, before, strict=True))


def try_group(block, group, **options):
    """Fold a random scale and check what must hold either way; returns the names of the modules that have changed."""
    layers = {name: block.module.get_submodule(name) for name in group}
    scale = random_scale(layers[group[0]].in_features)
    before, outputs = state(block), block.run()
    folded = fold(block, group, scale, **options)
    changed = differing(block, before)
    if not folded:
        assert not changed
        assert all(torch.equal(a, b) for a, b in zip(block.run(), outputs, strict=True))
        return changed
    assert off(block, outputs) < 1e-5  # some tens of float32 roundings, of 6e-8 each
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, before[f"{name}.weight"] * scale, rtol=1e-5, atol=0)
    return changed - set(group)


EXPECTED = {  # what each group is folded into, by family and block
    "llama": {QKV[0]: "input_layernorm", MLP[0][0]: "post_attention_layernorm", MLP[1][0]: "mlp.up_proj"},
    "gemma3": {QKV[0]: "input_layernorm", MLP[0][0]: "pre_feedforward_layernorm", MLP[1][0]: "mlp.up_proj"},
    "deepseek v3": {
        LATENT[0][0]: "input_layernorm",
        LATENT[1][0]: "self_attn.q_a_layernorm",
        LATENT[2][0]: "self_attn.kv_a_layernorm",
        MLP[0][0]: "post_attention_layernorm",
        MLP[1][0]: "mlp.up_proj",
        MIXTURE[1][0]: "mlp.shared_experts.up_proj",
    },
}
REFUSED = {"self_attn.o_proj", MIXTURE[0][0]}  # fewer heads of v than of q; a norm that the router reads as well


def test_every_family(make_model, family):
    expected = EXPECTED.get(family, EXPECTED["llama"])
    seen = set()
    for block, groups in blocks(liven(make_model(family))):
        for group in groups:
            seen.add(group[0])
            assert try_group(block, group) == ({expected[group[0]]} if group[0] in expected else set())
    assert seen == set(expected) | (REFUSED & seen)
    assert "self_attn.o_proj" in seen


def test_the_unlivened_model_too(make_model, family):
    """Norms of ones and weights of 0.02, as initialized: what a group does is small beside the residual stream."""
    expected = EXPECTED.get(family, EXPECTED["llama"])
    for block, groups in blocks(make_model(family)):
        for group in groups:
            assert try_group(block, group) == ({expected[group[0]]} if group[0] in expected else set())


@pytest.fixture
def llama(make_model):
    """The first block of a tiny Llama."""
    block, _ = next(blocks(liven(make_model())))
    return block


class TestAttention:
    def test_o_is_folded_into_v_when_each_head_has_its_own(self):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 2})).eval().requires_grad_(False)
        block, groups = next(blocks(liven(model)))
        assert ["self_attn.o_proj"] in groups
        assert try_group(block, ["self_attn.o_proj"]) == {"self_attn.v_proj"}

    def test_a_norm_that_another_layer_reads_is_left_alone(self, llama):
        assert try_group(llama, QKV[1:]) == set()

    def test_a_norm_that_a_quantized_layer_reads_is_left_alone(self, llama):
        quantized = quantize(llama.module.self_attn.q_proj.weight, "absmax", 8)
        llama.module.self_attn.q_proj = QuantLinear(quantized)
        assert try_group(llama, QKV[1:]) == set()

    def test_quantized_rows_are_left_alone(self, llama):
        llama.module.mlp.up_proj = QuantLinear(quantize(llama.module.mlp.up_proj.weight, "absmax", 8))
        assert try_group(llama, ["mlp.down_proj"]) == set()

    def test_norms_only(self, llama):
        assert try_group(llama, ["mlp.down_proj"], norms_only=True) == set()
        assert try_group(llama, QKV, norms_only=True) == {"input_layernorm"}


class Toy(nn.Module):
    """A layer in front, something between, and a layer behind, beside a residual stream."""

    def __init__(self, front, between=lambda front: front):
        super().__init__()
        self.front, self.between, self.behind, self.other = front, between, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.behind(self.between(self.front(x)))


class ReadsFront(Toy):
    def forward(self, x):
        front = self.front(x)
        return front + self.behind(front)


class NeverReached(Toy):
    def forward(self, x):
        return self.front(x) if len(x) else self.behind(self.front(x))


def toy(kind, *arguments):
    torch.manual_seed(0)
    module = kind(*arguments).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-1, 1)
    return Block("toy", module, [((torch.randn(3, 5, 8),), {})])


@pytest.mark.parametrize(
    "block, into",
    [
        (lambda: toy(Toy, nn.LayerNorm(8)), {"front"}),
        (lambda: toy(Toy, nn.LayerNorm(8, bias=False)), {"front"}),
        (lambda: toy(Toy, nn.RMSNorm(8)), {"front"}),
        (lambda: toy(Toy, nn.Linear(8, 8)), {"front"}),
        (lambda: toy(Toy, nn.Linear(8, 8), torch.relu), {"front"}),  # relu(x / s) = relu(x) / s
        (lambda: toy(Toy, nn.Linear(8, 8), nn.functional.gelu), set()),
        (lambda: toy(Toy, nn.LayerNorm(8), lambda x: x.flip(-1)), set()),
        (lambda: toy(Toy, nn.LayerNorm(8), lambda x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]]), set()),
        (lambda: toy(Toy, nn.LayerNorm(8), lambda x: x + 1e-3), set()),
        (lambda: toy(Toy, nn.LayerNorm(8, elementwise_affine=False)), set()),
        (lambda: toy(Toy, nn.Linear(8, 8), lambda x: x.view(*x.shape[:-1], 4, 2).mT.flatten(-2)), set()),
        (lambda: toy(ReadsFront, nn.LayerNorm(8)), set()),
        (lambda: toy(NeverReached, nn.LayerNorm(8)), set()),
        (lambda: toy(Toy, nn.Identity()), set()),
    ],
    ids=[
        "LayerNorm with bias", "LayerNorm", "RMSNorm", "Linear with bias", "relu", "gelu", "flipped", "two swapped",
        "shifted", "no weight", "other layout", "residual behind the norm", "never run", "nothing in front",
    ],
)  # fmt: skip
def test_what_lies_between(block, into):
    assert try_group(block(), ["behind"]) == into


def test_no_influence_no_proof(llama):
    """Outputs that do not depend on the group cannot show that a fold is right."""
    llama.module.mlp.down_proj.weight.zero_()
    assert try_group(llama, MLP[0]) == set()


def test_a_large_residual_stream_hides_nothing(llama):
    """Some channels of hidden states are thousands of times as large as the others in real models."""
    states = llama.calls[0][0][0]
    states[:, 0, 5] = 3000.0
    assert try_group(llama, QKV[1:]) == set()
    assert try_group(llama, MLP[0]) == {"post_attention_layernorm"}
    assert try_group(llama, ["self_attn.o_proj"]) == set()


def test_the_latest_that_fits_is_taken():
    """Two linear layers in a row: both could divide, and the one in front of the group does."""
    block = toy(Toy, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert try_group(block, ["behind"]) == {"front.1"}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bfloat16(make_model, name):
    """Column times norm is off by no more than the rounding of the columns, 2**-8 of each."""
    block, _ = next(blocks(liven(make_model(name)).bfloat16()))
    offset = name == "gemma3"
    norm = block.module.input_layernorm.weight
    norm[0] = 0.1 - offset  # 1 + weight is small where weight has few bits left for it
    q = block.module.self_attn.q_proj.weight
    before = (norm.float() + offset) * q.float()
    assert fold(block, QKV, random_scale(32))
    torch.testing.assert_close((norm.float() + offset) * q.float(), before, rtol=1.001 * 2**-8, atol=0)
    assert norm.dtype == q.dtype == torch.bfloat16


def test_a_channel_that_is_switched_off_stays_off(llama):
    llama.module.input_layernorm.weight[3] = 0
    assert try_group(llama, QKV) == {"input_layernorm"}


def test_what_float16_cannot_hold_is_not_written():
    block = toy(Toy, nn.LayerNorm(8))
    block.module.half()
    block.calls = [((block.calls[0][0][0].half(),), {})]
    before = state(block)
    assert not fold(block, ["behind"], torch.full((8,), 1e-6))
    assert not differing(block, before)


@pytest.mark.parametrize(
    "names, scale, message",
    [
        (["mlp.down_proj"], torch.ones(32), r"scale of shape \(32,\) does not fit mlp.down_proj with 64 columns"),
        (["mlp.down_proj"], torch.zeros(64), "is not positive"),
        (["mlp.down_proj"], torch.full((64,), torch.nan), "is not positive"),
        (["input_layernorm"], torch.ones(32), "input_layernorm is a LlamaRMSNorm; only the columns of an nn.Linear"),
    ],
)
def test_a_refusal_says_why(llama, names, scale, message):
    before = state(llama)
    with pytest.raises(ValueError, match=message):
        fold(llama, names, scale)
    assert not differing(llama, before)
