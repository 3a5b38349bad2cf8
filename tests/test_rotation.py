"""The Hadamard transform is the product with the Hadamard matrix, a rotation, and its own inverse."""

import pytest
import torch
from scipy.linalg import hadamard as scipys

from qlearn.rotation import hadamard, hadamard_matrix, largest_size


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_it_is_the_product_with_scipys_matrix(size):
    x = torch.randn(3, 2, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = torch.from_numpy(scipys(size)).double() / size**0.5
    assert torch.allclose(hadamard(x, size), (x.view(3, 2, -1, size) @ H).view(3, 2, 512), atol=1e-12)
    assert torch.allclose(hadamard_matrix(size, dtype=torch.float64), H, atol=1e-15)


def test_twice_is_nothing_and_length_is_kept():
    x = torch.randn(7, 96, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x, 32), 32), x, atol=1e-14)
    assert torch.allclose(hadamard(x, 32).norm(dim=-1), x.norm(dim=-1), atol=1e-13)


def test_whole_numbers_stay_exact():
    x = torch.randint(-100, 100, (5, 16)).float()
    assert torch.equal(hadamard(hadamard(x, 16), 16), x)  # sums of whole numbers, and a division by 4, twice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays(dtype):
    assert hadamard(torch.ones(2, 8).to(dtype), 8).dtype == dtype


def test_gradients_are_rotated_too():
    x, g = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)
    hadamard(x, 32).backward(g)
    assert torch.allclose(x.grad, hadamard(g, 32), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "size=3 is no power of two"),
        (0, "size=0 is no power"),
        (2.0, "size=2.0 is no power"),
        (64, "96 numbers.*32 does"),
    ],
)
def test_a_wrong_size_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        hadamard(torch.ones(96), size)


def test_the_largest_size():
    assert [largest_size(n) for n in (1, 2, 6, 96, 256)] == [1, 2, 2, 32, 256]
    assert largest_size(256, most=100) == 64
