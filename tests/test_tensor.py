"""QuantizedTensor: what is stored is counted, saved and read back; a damaged file is refused in one sentence."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import qlearn
from qlearn.formats.floats import FP4_E2M1
from qlearn.formats.integers import Integers
from qlearn.rotation import hadamard_matrix
from qlearn.scales import QuantizedScales
from qlearn.tensor import QuantizedTensor


def weight(rows=6, columns=32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def samples():
    return [
        qlearn.quantize(weight(), "absmax", bits=3, group_size=8),
        qlearn.quantize(weight(), "zero_point", bits=5, per="column"),
        QuantizedTensor.from_codes(
            torch.arange(64).view(4, 16) % 16, torch.rand(1, 1), FP4_E2M1, (4, 16), column_scales=torch.rand(16)
        ),
        QuantizedTensor.from_codes(
            torch.arange(64).view(4, 16) % 4,
            torch.rand(4, 2),
            Integers(2, signed=False),
            (1, 8),
            zeros=torch.rand(4, 2),
        ),
        with_quantized_scales(),
        replace(qlearn.quantize(weight(), "absmax", bits=4, group_size=8), hadamard=16),
    ]


def with_quantized_scales():
    """Scales as in NF4's double quantization, in a layout with room to spare; zeros as in SINQ with 8-bit scales."""
    codes = torch.arange(6 * 32).view(6, 32) % 16
    table = torch.arange(24).view(6, 4) * 10
    scales = QuantizedScales.from_codes(
        table, Integers(8, signed=False), torch.rand(4, 1), torch.full((1, 1), 0.1), layout=(4, 7)
    )
    zeros = QuantizedScales.from_codes(table, Integers(8, signed=False), torch.rand(1, 12).half(), layout=(2, 12))
    return QuantizedTensor.from_codes(codes, scales, Integers(4, signed=False), (1, 8), zeros=zeros)


def in_tables():
    """Codes that are looked up, and codes packed five to a byte."""
    yield qlearn.quantize(weight(), "nf4", 4, group_size=8, double_quant=True)
    yield qlearn.quantize(weight(), "ternary", bits=1.6, group_size=8)
    yield qlearn.quantize(weight(), "mxfp4", group_size=32)


@pytest.mark.parametrize("qt", samples(), ids=repr)
def test_save_and_load_give_the_same_bytes(qt, tmp_path):
    path = tmp_path / "weight.safetensors"
    qt.save(path)
    back = QuantizedTensor.load(path)
    assert back.metadata() == qt.metadata()
    assert back.state_tensors().keys() == qt.state_tensors().keys()
    for name, tensor in qt.state_tensors().items():
        assert torch.equal(back.state_tensors()[name], tensor) and back.state_tensors()[name].dtype == tensor.dtype
    assert torch.equal(back.dequantize(), qt.dequantize())
    assert [p.name for p in tmp_path.iterdir()] == ["weight.safetensors"]


@pytest.mark.parametrize("qt", samples(), ids=repr)
def test_the_file_is_as_large_as_promised(qt, tmp_path):
    path = tmp_path / "weight.safetensors"
    qt.save(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + qt.nbytes
    assert qt.bits_per_weight == 8 * qt.nbytes / (qt.shape[0] * qt.shape[1])


def test_dequantize_is_the_formula_element_by_element():
    qt = samples()[3]
    codes, zeros = qt.codes(), qt.zero_points()
    for i in range(4):
        for j in range(16):
            expected = (codes[i, j].float() - zeros[i, j // 8]) * qt.scales[i, j // 8]
            assert qt.dequantize()[i, j] == expected
    qt = samples()[2]
    expected = FP4_E2M1.decode(qt.codes()) * qt.scales * qt.column_scales
    assert torch.equal(qt.dequantize(), expected)


def test_quantized_scales_and_zeros_are_used_element_by_element():
    qt = with_quantized_scales()
    codes, scales, zeros = qt.codes(), qt.scales, qt.zeros
    for i in range(6):
        for j in range(32):
            place = i * 4 + j // 8  # of the block, counted row by row
            code = place * 10
            scale = code * scales.steps[place // 7, 0] + scales.offsets[0, 0]
            zero = code * zeros.steps[0, place % 12].float()
            assert qt.dequantize()[i, j] == (codes[i, j].float() - zero) * scale
    assert qt.nbytes == 6 * 32 // 2 + 2 * 24 + 4 * 4 + 4 + 2 * 12


def test_a_rotation_is_taken_back():
    qt = samples()[-1]
    plain = replace(qt, hadamard=None).dequantize()
    H = hadamard_matrix(16)
    assert torch.allclose(qt.dequantize(), torch.cat([plain[:, :16] @ H, plain[:, 16:] @ H], 1), atol=1e-6)
    with pytest.raises(ValueError, match="size=64 does not divide the 32 numbers"):
        replace(qt, hadamard=64)


def test_codes_survive_packing_at_every_width():
    for bits in range(2, 9):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = torch.randint(low, high + 1, (5, 7), generator=torch.Generator().manual_seed(bits))
        qt = QuantizedTensor.from_codes(codes, torch.ones(1, 1), Integers(bits), (5, 7))
        assert torch.equal(qt.codes().long(), codes)
        assert torch.equal(qt.dequantize(), codes.float())
        assert qt.packed.numel() == (35 * bits + 7) // 8


def test_bands_have_column_scales_of_their_own():
    scales = torch.tensor([[1.0, 2.0, 4.0], [0.5, 8.0, 1.0]]).half()
    codes = torch.ones(4, 3, dtype=torch.int8)
    qt = QuantizedTensor.from_codes(codes, torch.ones(1, 1), Integers(4), (4, 3), column_scales=scales)
    assert torch.equal(qt.dequantize(), scales.float().repeat_interleave(2, 0))
    assert qt.nbytes == 6 + 4 + 12 and qt.metadata()["bands"] == 2


def test_to_moves_every_tensor():
    for qt in samples():
        moved = qt.to("meta")
        assert all(t.device.type == "meta" for t in moved.state_tensors().values())
        assert moved.state_tensors().keys() == qt.state_tensors().keys()


@pytest.mark.parametrize("qt", samples() + list(in_tables()), ids=repr)
def test_another_device_is_not_waited_for(qt):
    """The device "meta" has no values, so whoever asks for one fails: here, the same would wait for a GPU."""
    there = qt.to("meta").dequantize()
    assert there.device.type == "meta" and there.shape == qt.shape and there.dtype == torch.float32


def test_dequantize_to_another_dtype():
    qt = samples()[0]
    assert torch.equal(qt.dequantize(torch.bfloat16), qt.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "weight.safetensors"
    samples()[0].save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        QuantizedTensor.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="written by another program"):
        QuantizedTensor.load(path)
    with pytest.raises(FileNotFoundError):
        QuantizedTensor.load(tmp_path / "nowhere.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weight.safetensors"
    samples()[0].save(path)
    before = path.read_bytes()

    def broken(tensors, file, metadata):
        file.write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("qlearn.tensor.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        samples()[1].save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weight.safetensors"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scales": torch.ones(2, 2)}, r"scales has shape \(2, 2\) where \(1, 1\)"),
        ({"block": (3, 7)}, "do not divide"),
        ({"column_scales": torch.ones(3)}, r"column_scales has shape \(3,\) where \(7,\)"),
        ({"column_scales": torch.ones(5, 3)}, r"column_scales has shape \(5, 3\) where \(5, 7\)"),
        ({"column_scales": torch.ones(2, 7)}, "column_scales for 2 bands do not divide 5 rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    parts = {"scales": torch.ones(1, 1), "format": Integers(4), "block": (5, 7)} | changes
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.from_codes(torch.zeros(5, 7, dtype=torch.int8), **parts)
