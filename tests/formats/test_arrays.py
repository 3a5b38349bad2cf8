"""What comes in decides what goes out, for every family of formats."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qlearn.formats import get
from qlearn.formats.arrays import BLOCK, as_floats, to_numpy

NAMES = ["int4", "uint4", "nf4", "bf16", "fp32", "fp4_e2m1", "e8m0"]
VALUES = [0.25, 0.5, 1.0, 2.0]
every_format = pytest.mark.parametrize("format", [get(name) for name in NAMES], ids=NAMES)


@pytest.fixture
def numbers():
    return np.array(VALUES, dtype=np.float32).reshape(2, 2)


@every_format
def test_numpy_in_numpy_out(format, numbers):
    codes = format.encode(numbers)
    assert type(codes) is np.ndarray and codes.shape == (2, 2)
    assert codes.dtype == {8: np.uint8, 16: np.uint16, 32: np.uint32}[max(8, format.bits)]
    back = format.decode(codes)
    assert type(back) is np.ndarray and back.dtype == np.float32 and back.shape == (2, 2)
    assert np.array_equal(format.round(numbers), back)


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_torch_in_torch_out(format, numbers, dtype):
    x = torch.from_numpy(numbers).to(dtype).requires_grad_()
    codes = format.encode(x)
    assert isinstance(codes, torch.Tensor) and codes.dtype == getattr(torch, f"uint{max(8, format.bits)}")
    assert not codes.requires_grad and codes.device == x.device
    assert np.array_equal(codes.numpy(), format.encode(numbers))
    back = format.decode(codes)
    assert isinstance(back, torch.Tensor) and back.dtype == torch.float32 and back.shape == (2, 2)
    assert np.array_equal(back.numpy(), format.round(numbers))
    assert torch.equal(format.decode(codes.to(torch.int64)), back)


@every_format
def test_python_numbers_in_python_numbers_out(format):
    for x, code in zip(VALUES, format.encode(VALUES).tolist(), strict=True):
        assert type(format.encode(x)) is int and format.encode(x) == code
        assert type(format.decode(code)) is float and type(format.round(x)) is float
    assert format.encode(1) == format.encode(1.0)
    assert format.encode(True) == format.encode(1.0)


@every_format
def test_numpy_scalars_and_arrays_without_dimensions_keep_their_kind(format):
    scalar, array = np.float32(1.0), np.array(1.0)
    assert isinstance(format.encode(scalar), np.integer)
    assert isinstance(format.decode(format.encode(scalar)), np.float32)
    assert isinstance(format.encode(array), np.ndarray) and format.encode(array).shape == ()
    assert isinstance(format.decode(format.encode(array)), np.ndarray)
    assert format.decode(format.encode(torch.tensor(1.0))).shape == ()


@every_format
@pytest.mark.parametrize("empty", [[], np.zeros((0, 3)), torch.zeros(2, 0)], ids=["list", "numpy", "torch"])
def test_nothing_in_nothing_out(format, empty):
    codes = format.encode(empty)
    assert tuple(codes.shape) == np.shape(empty)
    assert tuple(format.decode(codes).shape) == np.shape(empty)
    assert tuple(format.decode(empty).shape) == np.shape(empty)


@every_format
def test_strides_do_not_matter(format):
    x = np.random.default_rng(0).uniform(0.1, 3, (6, 8)).astype(np.float32)
    for view in (x.T, x[::-2, 1::3], np.broadcast_to(x[0], (3, 8))):
        assert np.array_equal(format.encode(view), format.encode(view.copy()))
        assert torch.equal(format.encode(torch.from_numpy(x).T), torch.from_numpy(format.encode(x)).T)
    codes = format.encode(x)
    assert np.array_equal(format.decode(codes.T), format.decode(codes).T)


@every_format
def test_blocks_do_not_show(format):
    x = np.random.default_rng(1).uniform(0.1, 3, 2 * BLOCK + 3)
    pieces = [format.encode(x[i : i + 1000]) for i in range(0, len(x), 1000)]
    assert np.array_equal(format.encode(x), np.concatenate(pieces))
    assert np.array_equal(format.decode(format.encode(x)), np.concatenate([format.decode(p) for p in pieces]))


@every_format
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint16, np.int64, np.bool_, ml_dtypes.bfloat16])
def test_dtypes_of_the_same_values_give_the_same_codes(format, dtype):
    ones_and_twos = np.array([1, 2, 1]).astype(dtype)
    assert np.array_equal(format.encode(ones_and_twos), format.encode(ones_and_twos.astype(np.float32)))


def test_a_cpu_tensor_is_read_where_it_lies():
    x = torch.arange(4.0).reshape(2, 2)
    array, _ = to_numpy(x)
    assert array.ctypes.data == x.data_ptr()
    assert as_floats(array) is array
