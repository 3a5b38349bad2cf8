"""Quantized models go through transformers' own from_pretrained and save_pretrained and come back bit for bit."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import qlearn
from qlearn.methods import CALIBRATED, METHODS
from qlearn.models import QuantizationConfig, QuantLinear, load_model, quantize_model
from qlearn.models.int8 import Int8Linear
from qlearn.models.loading import BUNDLED
from qlearn.models.plugin import VERSION, CheckpointError
from qlearn.models.w8a8 import quantize_w8a8

INPUT = torch.arange(24).view(2, 12)
load = AutoModelForCausalLM.from_pretrained


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT).logits


def quantized(model, method="absmax", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize_model(model, method, progress=False, **{"bits": 4, "group_size": 16, **options})


@pytest.fixture
def floats(make_model, tmp_path):
    """A function: name of a family -> the folder of a float model, its biases filled."""

    def save(family="llama"):
        model = make_model(family)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
        model.save_pretrained(tmp_path / "floats")
        return tmp_path / "floats"

    return save


@pytest.fixture
def saved(floats, tmp_path):
    """The folder of a tiny model that was quantized at 4 bits, with the bundled tokenizer."""
    folder = tmp_path / "saved"
    quantized(load(floats("llama with bias"))).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def config_of(folder):
    """The quantization_config, its names sorted: two stacks of experts may be replaced in either order."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config | {"storage": [kind | {"layers": sorted(kind["layers"])} for kind in config["storage"]]}


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method, dtype", [("absmax", torch.float32), ("zero_point", torch.bfloat16)])
def test_each_family_comes_back_bit_for_bit(floats, family, dtype, method, tmp_path):
    folder = floats(family)
    in_place = quantized(load(folder, dtype=dtype), method, bits=3)
    while_loading = load(folder, dtype=dtype, quantization_config=QuantizationConfig(method, bits=3, group_size=16))
    assert torch.equal(logits(while_loading), logits(in_place))
    for model, name in ((in_place, "a"), (while_loading, "b")):
        model.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(model))
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method, options",
    [
        ("hadamard", {}),
        ("hqq", {}),
        ("hqq", {"axis": 0}),
        ("sinq", {}),
        ("sinq", {"small_scales": True}),
        ("sinq", {"hqq": True, "small_scales": True}),
        ("sinq", {"tile_rows": 16}),
        ("sinq", {"normal_float": True}),
        ("nf4", {"double_quant": True}),
    ],
    ids=str,
)
def test_each_way_of_storing_comes_back(floats, method, options, tmp_path):
    model = quantized(load(floats()), method, **options)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[1].mlp.up_proj.quantized.nbytes == model.model.layers[1].mlp.up_proj.quantized.nbytes
    assert config_of(tmp_path / "saved")["options"] == options


def test_what_was_loaded_can_be_saved_again(saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_fresh_process_reads_it(saved):
    code = f"""
import sys, qlearn
assert "transformers" not in sys.modules
model, _ = qlearn.load_model({str(saved)!r}, progress=False)
import torch
torch.save(model(input_ids=torch.arange(24).view(2, 12)).logits, {str(saved / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(saved / "logits.pt"), logits(load(saved)))


def test_the_bundled_model(tmp_path):
    config = QuantizationConfig("absmax", bits=4, group_size=64)
    model = load(BUNDLED, quantization_config=config, dtype=torch.bfloat16)
    in_place = quantize_model(load_model(dtype=torch.bfloat16)[0], bits=4, group_size=64, progress=False)
    assert torch.equal(logits(model), logits(in_place))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    counted = qlearn.evaluate.model_bytes(model, torch.bfloat16)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert on_disk == counted + header
    assert header < 0.01 * on_disk


def test_the_file_holds_the_packed_tensors_and_no_float_matrix(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        names = {name.removeprefix("model.layers.0.mlp.up_proj.") for name in tensors if "layers.0.mlp.up_proj" in name}
        assert names == {"packed", "scales", "bias"}
        assert tensors["model.layers.0.mlp.up_proj.packed"].get_dtype() == "U8"
        assert tensors["model.layers.0.mlp.up_proj.scales"].get_dtype() == "F16"
    (kind,) = config_of(saved)["storage"]
    assert (kind["format"], kind["block"], kind["tensors"]) == (
        "int4",
        [1, 16],
        {"packed": "uint8", "scales": "float16"},
    )
    assert len(kind["layers"]) == 14


class Made(TorchDispatchMode):
    """Notes the shapes of all floating-point tensors with values that come into being."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta":
                self.shapes.add(tuple(tensor.shape))
        return result


def test_no_float_matrix_is_made_on_the_way_back(floats, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads would not be seen
    folder = floats("qwen3")
    with Made() as floating:
        model = load(folder)
    matrices = {tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert matrices and matrices <= floating.shapes
    quantized(model).save_pretrained(tmp_path / "saved")
    with Made() as floating:
        load(tmp_path / "saved")
    assert (128, 32) in floating.shapes  # the embedding
    assert not matrices & floating.shapes


def test_layers_may_differ(floats, tmp_path):
    model = load(floats("qwen3"))
    quantized(model, "zero_point", bits=2, skip=("lm_head", "*.self_attn.*"))
    quantized(model, "absmax", bits=8, group_size=None, scale_dtype=torch.float32, skip=("lm_head", "model.layers.1.*"))
    quantized(model, "absmax", bits=3, per="tensor", group_size=None, skip=("model.layers.1.self_attn.q_proj",))
    model.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed")
    assert torch.equal(logits(again), logits(model))
    assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear
    formats = {n: m.quantized.format.name for n, m in again.named_modules() if isinstance(m, QuantLinear)}
    assert {formats["model.layers.0.mlp.up_proj"], formats["model.layers.1.mlp.up_proj"]} == {"uint2"}
    assert formats["model.layers.0.self_attn.q_proj"] == "int8"
    assert formats["model.layers.1.self_attn.k_proj"] == formats["lm_head"] == "int3"
    scales = again.model.layers[0].self_attn.q_proj.scales
    assert scales.dtype == torch.float32 and again.model.layers[0].mlp.up_proj.scales.dtype == torch.float16


def test_column_scales_and_float_zeros_come_back(floats, tmp_path):
    model = load(floats())
    quantized(model, "zero_point")
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.quantized
    columns = torch.linspace(0.5, 2, 32).half()
    zeros = weight.zero_points().half() + 0.25
    changed = qlearn.QuantizedTensor(
        weight.packed, weight.scales, weight.format, weight.shape, weight.block, zeros, columns
    )
    model.model.layers[0].mlp.up_proj = QuantLinear(changed)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.model.layers[0].mlp.up_proj.column_scales, columns)


def test_the_dtype_of_the_model_is_not_that_of_the_scales(saved):
    for dtype in (torch.bfloat16, torch.float64):
        model = load(saved, dtype=dtype)
        assert model.dtype == model.model.layers[0].mlp.up_proj.bias.dtype == dtype
        assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
        assert not list(model.model.layers[0].mlp.up_proj.parameters())[1:]
        assert logits(model).dtype == dtype


def test_a_device_map(floats, saved):
    pytest.importorskip("accelerate")
    assert torch.equal(logits(load(saved, device_map="cpu")), logits(load(saved)))
    config = QuantizationConfig(group_size=16)
    folder = floats("qwen3")
    on_device = load(folder, device_map="cpu", quantization_config=config)
    assert torch.equal(logits(on_device), logits(load(folder, quantization_config=config)))


def test_shards(floats, tmp_path):
    model = quantized(load(floats()))
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "shards")), logits(model))


def test_a_whole_matrix_at_a_time(floats, monkeypatch):
    """Each float matrix is let go before the next one is read."""
    import weakref

    alive, most = weakref.WeakSet(), 0
    original = QuantizationConfig.quantize

    def watch(config, weight):
        nonlocal most
        alive.add(weight)
        most = max(most, len(alive))
        return original(config, weight)

    monkeypatch.setattr(QuantizationConfig, "quantize", watch)
    model = load(floats("qwen3"), quantization_config=QuantizationConfig(group_size=16))
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    assert most == 1


def test_options_and_calibration_in_the_config(floats, tmp_path):
    options = {"scale_dtype": torch.float32, "clip": "mse"}
    config = QuantizationConfig("absmax", bits=5, group_size=8, skip="down_proj", calibration=["a text"], **options)
    model = load(floats(), quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    written = config_of(tmp_path / "saved")
    assert "calibration" not in written and "a text" not in json.dumps(written)
    read = QuantizationConfig.from_dict(written)
    assert read.options == options
    assert (read.method, read.bits, read.group_size, read.skip) == ("absmax", 5, 8, ["down_proj"])
    assert read.to_dict() == written
    assert type(load(tmp_path / "saved").model.layers[0].mlp.down_proj) is nn.Linear


def test_what_names_the_method_can_be_a_dict(floats):
    folder = floats()
    config = {"quant_method": "qlearn", "method": "zero_point", "bits": 4, "group_size": 16}
    expected = load(folder, quantization_config=QuantizationConfig("zero_point", bits=4, group_size=16))
    assert torch.equal(logits(load(folder, quantization_config=config)), logits(expected))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "absmaxx"}, "method 'absmaxx' is unknown; choose from absmax, "),
        ({"bits": 9}, "bits=9 "),
        ({"clip": "never"}, "clip='never' is unknown"),
    ],
)
def test_a_config_that_no_model_could_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_size": 48}, r"layer model\.layers\.0\.\S+ \(\d+ x 32\): group_size=48 does not divide the 32 columns"),
        ({"group_size": 16, "skip": ["lm_haed"]}, "skip='lm_haed' fits no layer of LlamaForCausalLM"),
    ],
)
def test_a_config_that_does_not_fit_the_model(floats, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(floats(), quantization_config=QuantizationConfig(**arguments))
    assert "\n" not in str(caught.value)


def test_a_broken_weight_is_named(floats):
    folder = floats()

    def break_it(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")

    edit_weights(folder, break_it)
    message = (
        r"^layer model\.layers\.1\.mlp\.down_proj \(32 x 64\): 1 of 2048 weights .* nan at row 3, column 5; [^\n]*$"
    )
    with pytest.raises(ValueError, match=message):
        load(folder, quantization_config=QuantizationConfig(group_size=16))


def first_kind(change):
    return lambda folder: edit_config(folder, lambda config: change(config["storage"][0]))


DAMAGES = [
    (
        lambda f: edit_config(f, lambda c: c.update(version=VERSION + 1)),
        f"saved by a newer qlearn .*version {VERSION + 1}.* upgrade",
    ),
    (
        first_kind(lambda kind: kind.update(format="int99")),
        "config.json is wrong about how .* format 'int99' is unknown",
    ),
    (first_kind(lambda kind: kind.update(block=[1, 24])), "config.json is wrong about how .* do not divide"),
    (first_kind(lambda kind: kind["tensors"].pop("scales")), "config.json is wrong about how .* is stored: .*scales"),
    (
        first_kind(lambda kind: kind.update({"class": "Linear9"})),
        "config.json is wrong about how .* is stored: .*Linear9",
    ),
    (
        first_kind(lambda kind: kind["layers"].append("model.layers.7.mlp.up_proj")),
        "LlamaForCausalLM has no linear layer",
    ),
    (first_kind(lambda kind: kind["layers"].append("model.norm")), "LlamaForCausalLM has no linear layer"),
    (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.0.mlp.up_proj.scales")),
        r"lack model\.layers\.0\.mlp\.up_proj\.scales",
    ),
    (
        lambda f: edit_weights(f, lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.ones(3, 2)})),
        "do not fit its config.json: in model.layers.0.mlp.up_proj, scales has shape",
    ),
    (lambda f: edit_config(f, lambda c: c.pop("storage")), "without its storage; save the model again"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(saved, damage, message):
    damage(saved)
    for read in (load, load_model):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(saved)
        assert "\n" not in str(caught.value)


def test_a_truncated_file(saved):
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ValueError, match=r"^a weight file of '.*saved' is incomplete \([^\n]*; fetch it again$"):
        load_model(saved, progress=False)


@pytest.mark.parametrize("method", sorted(METHODS.keys() & CALIBRATED))
def test_a_method_that_learns_from_inputs(method, tmp_path):
    text = "def area(width, height):\n    return width * height\n\n\n" * 20
    arguments = {"bits": 3, "group_size": 64, "skip": ["lm_head", "model.layers.[1-7].*"]}
    rounded = quantize_model(load_model()[0], "zero_point", progress=False, **arguments)
    arguments["calibration"] = text
    model = load(BUNDLED, dtype=torch.float32, quantization_config=QuantizationConfig(method, **arguments))
    in_place = quantize_model(load_model()[0], method, progress=False, **arguments)
    assert torch.equal(logits(model), logits(in_place))
    assert not torch.equal(logits(model), logits(rounded))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_integer_activations_come_back_too(activations, tmp_path):
    arguments = {"skip": ["lm_head", "model.layers.[1-7].*"], "calibration": torch.arange(128).view(2, 64)}
    model = quantize_w8a8(load_model(dtype=torch.bfloat16)[0], activations, progress=False, **arguments)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is Int8Linear
    assert torch.equal(logits(again), logits(model))


def test_a_layer_that_could_not_be_loaded_is_not_saved(model, tmp_path):
    class Other(QuantLinear):
        pass

    quantized(model)
    model.model.layers[0].mlp.up_proj = Other(model.model.layers[0].mlp.up_proj.quantized)
    with pytest.raises(ValueError, match=r"layer \S+\.0\.mlp\.up_proj is of .*Other.*, which cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())
