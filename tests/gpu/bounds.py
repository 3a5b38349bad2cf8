"""How far a product may be off whose sums are float32: what the tests of products compare with."""

import torch

UNIT = 2.0**-23  # of a sum in float32. A tensor core cuts off where others round to the nearest: twice 2**-24


def check(y, exact, error):
    """y, of any dtype, against the exact result, float64; error: what may be lost before y is rounded to its dtype."""
    info = torch.finfo(y.dtype)
    bound = error + (exact.abs() + error) * info.eps / 2 + info.smallest_normal * info.eps
    assert y.shape == exact.shape
    off = (y.double() - exact).abs()
    wrong = ~(off <= bound)  # so NaN is wrong, too
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {y.numel()} numbers are off by more than they may; the first at {at}: "
            f"{y[at].item()} for {exact[at].item()}, bound {bound[at].item():.2g}"
        )


def check_product(y, x, weight, additions, above=None):
    """y against x W^T, where a product passes through so many additions.

    weight: (rows, columns), each good to a few float32 roundings.  above: how far codes lie above the weights, if
    sums over codes are made and what is too much is taken off in the end; a number for each weight.
    """
    x, weight = x.double(), weight.double()
    magnitude = weight.abs() if above is None else weight.abs() + 2 * above
    check(y, x @ weight.T, additions * UNIT * (x.abs() @ magnitude.T))
