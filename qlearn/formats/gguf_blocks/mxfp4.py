"""MXFP4: 32 weights of four-bit floating point and one power of two, 17 bytes, 4.25 bits per weight.

    e           the scale 2**(e - 127), eight bits of exponent and nothing else (E8M0)
    codes       E2M1: a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6

    e = floor(log2(max|w|)) - 2 + 127        the largest weight lands between 4 and 8, the grid ends at 6
    code = the nearest of the sixteen numbers, the lower code when two are equally near

Ties make the difference between the implementations of MXFP4: here the number of lower code wins, which is the one
nearer to zero, while the OCP standard rounds ties to even. log2 is computed in float32, as ggml's is: a number just
below a power of two counts as that power.

Source: quantize_row_mxfp4_ref in ggml/src/ggml-quants.c.
"""

import numpy as np

from qlearn.formats.gguf_blocks.layout import BlockType, Field, stack, unstack

WEIGHTS = 32
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # E2M1 times 2, by code
CHUNK = 2048  # blocks at a time: sixteen distances for each weight


class _MXFP4(BlockType):
    name, weights, uses_importance = "MXFP4", WEIGHTS, False
    layout = (
        Field("e", 1, "the exponent of the scale, 127 added"),
        Field("qs", 16, "codes of 4 bits: weight j in the low half of byte j, weight j + 16 in its high half"),
    )

    def search(self, x, importance, fit):
        groups = x.reshape(-1, WEIGHTS)
        e = exponent(abs(groups).max(-1))
        return {"e": e, "codes": fit.nearest_e2m1(groups, half_scale(e))}

    def values(self, fields):
        return DOUBLED[fields["codes"]] * half_scale(fields["e"])[:, None]

    def pack(self, fields):
        return self.join(e=fields["e"][:, None], qs=stack(fields["codes"].reshape(-1, 2, 16), 4))

    def unpack(self, blocks):
        parts = self.split(blocks)
        return {"e": parts["e"][:, 0], "codes": unstack(parts["qs"], 4).reshape(-1, WEIGHTS)}


def exponent(largest):
    """The stored exponent for the largest magnitude of a block: float32 (m,) -> uint8 (m,); 0 for a block of zeros.

    Below 2**-125 ggml's conversion to a byte is undefined; here the exponent stays 0.

    >>> exponent(np.float32([0, 6, 8, 2**-126])).tolist()
    [0, 127, 128, 0]
    """
    with np.errstate(divide="ignore"):
        power = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    return (power - 2 + 127).clip(0, 254).astype(np.uint8)


def half_scale(e):
    """2**(e - 128), half the scale, because the table of numbers is doubled: uint8 (m,) -> float32 (m,).

    >>> half_scale(np.uint8([127, 0])).tolist() == [0.5, 2.0**-128]
    True
    """
    return np.ldexp(np.float32(1), e.astype(np.int32) - 128)


def nearest_e2m1(x, half):
    """The code of the nearest number: float32 (m, n), half_scale (m,) -> uint8 (m, n).

    >>> nearest_e2m1(np.float32([[0.25, -1.75, 7]]), np.float32([0.5])).tolist()     # ties go towards zero
    [[0, 11, 7]]
    """
    codes = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        numbers = DOUBLED * half[rows, None]
        codes[rows] = abs(numbers[:, None, :] - x[rows, :, None]).argmin(-1)
    return codes


MXFP4 = _MXFP4()
