"""The Walsh-Hadamard transform: a rotation that needs nothing but additions.

The Hadamard matrix of size 2n is made of four copies of the one of size n, the last with its sign turned:

    H_1 = [1]        H_2n = [ H_n   H_n ]        H_4 = [ 1  1  1  1 ]
                            [ H_n  -H_n ]              [ 1 -1  1 -1 ]
                                                       [ 1  1 -1 -1 ]
                                                       [ 1 -1 -1  1 ]

Its rows are at right angles to each other, so divided by the square root of the size it is a rotation, and as it is
symmetric, it is also its own inverse: transform twice, and the numbers are back.

What quantization wants of it: each result is a sum of *all* the numbers, with signs. One outlier among them is spread
evenly over all results, and what comes out looks like a bell curve, whatever went in. A matrix product does not notice:
(x H)(W H)^T = x H H W^T = x W^T.

A product with H takes n**2 multiplications. The copies inside of H save nearly all of them: sums and differences of
numbers at distance 1, then 2, then 4 ... make n log2(n) additions, and one multiplication for each result at the end.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456; Fino and Algazi, Unified Matrix Treatment of the Fast Walsh-Hadamard
Transform, IEEE Transactions on Computers, 1976.
"""

import math

import torch


def hadamard(x, size):
    """Rotate each run of `size` consecutive numbers of the last axis by the normalized Hadamard matrix.

    x: floating point (..., n).  size: a power of two that divides n.
    Returns the same shape and dtype; computed in the dtype of x. Applied twice, it gives x back.
    Raises ValueError for a size that is no power of two, or does not divide n.

    >>> hadamard(torch.tensor([8.0, 0.0, 0.0, 0.0]), 4)          # an outlier, spread over all four
    tensor([4., 4., 4., 4.])
    >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]), 4).tolist(), hadamard(torch.tensor([5.0, -1, -2, 0]), 4).tolist()
    ([5.0, -1.0, -2.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    """
    check_size(size, x.shape[-1])
    y, distance = x.unflatten(-1, (-1, size)), 1
    while distance < size:
        pairs = y.unflatten(-1, (-1, 2, distance))
        first, second = pairs.unbind(-2)
        y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        distance *= 2
    return (y * (1 / math.sqrt(size))).flatten(-2)


def hadamard_matrix(size, dtype=torch.float32, device=None):
    """The normalized Hadamard matrix (size, size): what `hadamard` multiplies by.

    >>> hadamard_matrix(4) * 2
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]])
    """
    check_size(size, size)
    return hadamard(torch.eye(size, dtype=dtype, device=device), size)


def largest_size(n, most=None):
    """The largest power of two that divides n; no larger than `most`.

    >>> largest_size(768), largest_size(4096, most=128), largest_size(77)
    (256, 128, 1)
    """
    size = n & -n
    while most is not None and size > most:
        size //= 2
    return size


def check_size(size, n):
    """Raise ValueError unless `size` is a power of two that divides n."""
    if not isinstance(size, int) or size < 1 or size & (size - 1):
        raise ValueError(f"size={size} is no power of two, and the transform is defined for no other; take 32, say")
    if n % size:
        raise ValueError(f"size={size} does not divide the {n} numbers of an axis; {largest_size(n)} does")
