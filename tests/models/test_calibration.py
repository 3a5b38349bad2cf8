"""Walking through the blocks of a model gives each the inputs that the model, as it is by then, would give it."""

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Gemma3ForCausalLM, Gemma3TextConfig, PretrainedConfig

import qlearn
from qlearn.methods.statistics import InputStatistics
from qlearn.models.calibration import Block, blocks, calibration_ids, resolve_ids, walk, whole
from qlearn.models.recording import watching
from tests.models.conftest import SIZES

IDS = torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def linear(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def inputs_of(model, modules, ids=IDS, batch=2):
    """What each module is given when the whole model runs: dict name -> list of tensors."""
    seen = {name: [] for name in modules}
    with watching(modules, lambda name, x: seen[name].append(x.clone())):
        for windows in ids.split(batch):
            model(input_ids=windows)
    return seen


def hidden_of(block):
    return [next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)) for args, kwargs in block.calls]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return qlearn.load_model()[1]


def test_windows_lie_side_by_side_and_a_rest_is_dropped(tokenizer):
    text = qlearn.evaluate.calibration_text()
    whole_text = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ids = calibration_ids(tokenizer, tokens=1000, window=300)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, whole_text[:900].view(3, 300))
    assert calibration_ids(tokenizer).shape == (32, 512)


def test_texts_are_joined(tokenizer):
    a, b = (tokenizer(text)["input_ids"] for text in ("import os", "x = 1\n"))
    assert calibration_ids(tokenizer, ["import os", "", "x = 1\n"]).tolist() == [a + b]
    assert calibration_ids(tokenizer, "import os").tolist() == [a]
    assert calibration_ids(tokenizer, ["import os"] * 9, tokens=2 * len(a), window=len(a)).tolist() == [a, a]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"texts": []}, "the calibration texts have 0 tokens"),
        ({"texts": ""}, "the calibration texts have 0 tokens"),
        ({"texts": ["fine", 3]}, "a calibration text is of type int"),
        ({"texts": [[1, 2]]}, "a calibration text is of type list"),
        ({"tokens": 1}, "tokens=1 in windows of 512 is too little"),
        ({"window": 0}, "in windows of 0 is too little"),
    ],
)
def test_ids_that_cannot_be_made(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibration_ids(tokenizer, **arguments)


def test_the_tokenizer_that_lies_with_the_model(tokenizer):
    model, _ = qlearn.load_model()
    assert torch.equal(resolve_ids(model), calibration_ids(tokenizer))
    assert torch.equal(resolve_ids(model, ["import os\n"] * 9), calibration_ids(tokenizer, ["import os\n"] * 9))


def test_ids_and_windows_fit_the_model(model, tokenizer):
    assert resolve_ids(model, IDS) is IDS
    with pytest.raises(ValueError, match=r"a tokenizer, and none lies at ''.*pass tokenizer="):
        resolve_ids(model, "import os")
    with pytest.raises(ValueError, match="but the model knows 0 to 127; make them with its own tokenizer"):
        resolve_ids(model, tokenizer=tokenizer)
    model.resize_token_embeddings(4096, mean_resizing=False)
    assert resolve_ids(model, tokenizer=tokenizer).shape == (256, 64)  # max_position_embeddings is 64


@pytest.mark.parametrize(
    "ids, message",
    [
        (IDS.float(), r"calibration ids are torch.float32 \(5, 24\)"),
        (IDS[0], r"calibration ids are torch.int64 \(24,\)"),
        (IDS[:0], r"calibration ids are torch.int64 \(0, 24\)"),
        ([[1, 2]], "calibration ids are list"),
        (IDS - 1, "calibration ids go from -1 to"),
        (IDS + 1, "to 128, but the model knows 0 to 127"),
        (IDS.repeat(1, 3), "windows of 72 tokens are too long; this model reads up to 64"),
    ],
)
def test_ids_that_do_not_fit(model, ids, message):
    for take in (walk, whole):
        with pytest.raises(ValueError, match=message):
            take(model, ids)


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_the_blocks_of_each_family(make_model, family):
    model = make_model(family)
    assert list(blocks(model).items()) == [(f"model.layers.{i}", model.model.layers[i]) for i in (0, 1)]


def test_the_blocks_of_a_quantized_model_are_the_same(model):
    before = list(blocks(model))
    assert list(blocks(qlearn.quantize_model(model, group_size=16, progress=False))) == before


def test_lists_of_linear_layers_are_no_blocks():
    layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    inner = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
    assert list(blocks(nn.ModuleDict({"heads": layers, "body": inner}))) == ["body.0", "body.1"]
    assert list(blocks(nn.ModuleDict({"outer": nn.ModuleList([nn.ModuleDict({"inner": inner})])}))) == ["outer.0"]
    assert blocks(nn.Sequential(nn.Linear(4, 4))) == blocks(nn.ModuleList([nn.ReLU()])) == {}


def test_a_model_without_blocks_cannot_be_walked(model):
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no nn\.ModuleList with linear layers"):
        walk(model, IDS)


def test_a_model_in_training_mode_cannot_be_walked(model):
    with pytest.raises(ValueError, match="training mode"):
        walk(model.train(), IDS)


# --- walk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_gets_what_the_model_gives_it(make_model, family, dtype):
    model = make_model(family).to(dtype)
    expected = inputs_of(model, {**blocks(model), "norm": model.model.norm})
    for block in walk(model, IDS, batch=2):
        assert equal(hidden_of(block), expected[block.name])
        outputs = block.run()
    assert equal(outputs, expected["norm"])


def test_masks_may_differ_between_blocks():
    config = Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    expected = inputs_of(model, {"norm": model.model.norm})["norm"]
    masks = []
    for block in walk(model, IDS, batch=2):
        masks.append(block.calls[0][1]["attention_mask"])
        outputs = block.run()
    assert masks[0] is not None and (masks[1] is None or not torch.equal(masks[0], masks[1]))
    assert equal(outputs, expected)


def test_a_change_of_a_block_reaches_the_next_one(make_model, family):
    model = make_model(family)
    for block in walk(model, IDS, batch=2):
        assert equal(hidden_of(block), inputs_of(model, blocks(model))[block.name])
        for layer in linear(block.module).values():
            layer.weight.mul_(1.5)


def test_an_encoder():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    expected = inputs_of(model, {"pooler": model.pooler})["pooler"]
    names = []
    for block in walk(model, IDS, batch=2):
        names.append(block.name)
        outputs = block.run()
    assert names == ["encoder.layer.0", "encoder.layer.1"]
    assert equal(outputs, expected)


def test_hidden_states_are_let_go(model):
    steps = walk(model, IDS, batch=2)
    block = next(steps)
    first = [weakref.ref(hidden) for hidden in hidden_of(block)]
    assert all(ref() is not None for ref in first)
    next(steps)
    assert not any(ref() is not None for ref in first)
    with pytest.raises(AttributeError, match="calls"):
        block.run()


def test_the_head_is_never_run_on_whole_batches(model):
    seen = []
    with watching({"head": model.lm_head}, lambda name, x: seen.append(tuple(x.shape))):
        assert len(list(walk(model, IDS, batch=2))) == 2
    assert seen == [(1, 16, 32)]  # the glance at the order of the blocks


def test_no_hooks_stay_behind(make_model, family):
    model = make_model(family)
    for block in walk(model, IDS):
        block.groups(linear(block.module))
        block.collect(linear(block.module))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_progress_bar(model, capsys):
    list(walk(model, IDS))
    assert capsys.readouterr().err == ""
    list(walk(model, IDS, progress=True))
    assert "calibrating: 100%" in capsys.readouterr().err


# --- models that are no chain ---------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A model of blocks that are not simply called one after another; `between` says what it does."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.config = PretrainedConfig(vocab_size=128, max_position_embeddings=64)
        self.embed = nn.Embedding(128, 8)
        self.layers = nn.ModuleList(OddBlock() for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, input_ids):
        x, bias = self.embed(input_ids), None
        a, b, c = self.layers
        if self.between == "a sum":
            x = c(b(a(x)[0] + 1)[0])[0]
        elif self.between == "a block twice":
            x = c(a(b(a(x)[0])[0])[0])[0]
        elif self.between == "another order":
            x = b(c(a(x)[0])[0])[0]
        elif self.between == "a second output":
            for layer in self.layers:
                x, bias = layer(x, bias)
        elif self.between == "a block left out":
            x = c(a(x)[0])[0]
        return self.head(x)


class OddBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, bias=None):
        return self.linear(x) + (0 if bias is None else bias), x * 0.1


@pytest.mark.parametrize(
    "between, calls",
    [
        ("a sum", [3, 3, 3]),
        ("a block twice", [6, 3, 3]),
        ("another order", [3, 3, 3]),
        ("a second output", [3, 3, 3]),
        ("a block left out", [3, 0, 3]),
    ],
)
def test_where_blocks_are_no_chain_the_model_is_run_up_to_each(between, calls):
    torch.manual_seed(0)
    model = Odd(between).eval().requires_grad_(False)
    counts = []
    for block in walk(model, IDS, batch=2):
        counts.append(len(block.calls))
        now = inputs_of(model, {"at": block.module, "within": block.module.linear})
        assert equal(hidden_of(block), now["at"])
        statistics = block.collect({"linear": block.module.linear})["linear"]
        assert statistics.count == sum(x.shape[0] * x.shape[1] for x in now["within"])
        block.module.linear.weight.mul_(2)
    assert counts == calls


# --- groups and statistics ------------------------------------------------------------------------------------------

LLAMA = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
LATENT = [
    ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
    ["self_attn.q_b_proj"],
    ["self_attn.kv_b_proj"],
    ["self_attn.o_proj"],
]


def mlp(prefix):
    return [[f"{prefix}.gate_proj", f"{prefix}.up_proj"], [f"{prefix}.down_proj"]]


def test_layers_that_read_the_same_tensor(make_model, family):
    attention = LATENT if family == "deepseek v3" else LLAMA
    experts = "mlp.shared_experts" if family == "deepseek v3" else "mlp"
    found = [block.groups(linear(block.module)) for block in walk(make_model(family), IDS)]
    assert found == [attention + mlp("mlp"), attention + mlp(experts)]


class Reads(nn.Module):
    """A block whose layers read a tensor, a view of it, a copy of it, and the tensor again after a change in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.rare, self.never = (nn.Linear(4, 4) for _ in range(6))

    def forward(self, x, rare):
        x = x + 1
        self.b(x.view(-1, 4))
        self.a(x)
        self.c(x.clone())
        x += 1
        self.d(x)
        self.rare(x[:1] if rare else x[:0])
        return x


def test_views_are_the_same_tensor_and_copies_are_not():
    module = Reads()
    calls = [((torch.zeros(2, 3, 4), rare), {}) for rare in (False, True)]
    block = Block("block", module, calls)
    assert block.groups(linear(module)) == [["b", "a"], ["c"], ["d"], ["rare"], ["never"]]
    statistics = block.collect(linear(module), hessian=False)
    counts = {name: one.count for name, one in statistics.items()}
    assert counts == {"a": 12, "b": 12, "c": 12, "d": 12, "rare": 3, "never": 0}
    assert statistics["a"].hessian is None


def test_statistics_are_those_of_the_inputs(make_model, family):
    model = make_model(family)
    for block in walk(model, IDS, batch=2):
        layers = linear(block.module)
        expected = inputs_of(model, layers)
        for names in (list(layers), *([name] for name in layers)):
            for name, statistics in block.collect({name: layers[name] for name in names}).items():
                own = InputStatistics(layers[name].in_features)
                for x in expected[name]:
                    own.add(x)
                assert statistics.count == own.count == IDS.numel()
                assert torch.equal(statistics.hessian, own.hessian)
                assert torch.equal(statistics.sample, own.sample)


def test_a_run_ends_when_all_has_been_seen(model):
    block = next(walk(model, IDS, batch=2))
    runs = []
    with watching({"down": block.module.mlp.down_proj}, lambda name, x: runs.append(name)):
        block.collect({"q": block.module.self_attn.q_proj})
    assert len(block.calls) == 3 and runs == ["down"]  # the first call shows that q is run once in each


def test_a_whole_model_is_a_block_as_well(make_model):
    model = make_model("qwen3")
    block = whole(model, IDS)
    statistics = block.collect({"lm_head": model.lm_head})["lm_head"]
    final = torch.cat(inputs_of(model, {"head": model.lm_head}, batch=1)["head"])
    assert torch.equal(statistics.hessian, _hessian(final))
    assert block.groups({"lm_head": model.lm_head}) == [["lm_head"]]


def _hessian(windows):
    statistics = InputStatistics(windows.shape[-1])
    for window in windows:
        statistics.add(window)
    return statistics.hessian


def test_the_model_is_as_it_was(make_model, family):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    for block in walk(model, IDS):
        block.collect(linear(block.module))
        block.run()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
