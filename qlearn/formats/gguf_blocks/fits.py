"""The functions that find scales and codes, in one place: a compiled version has to provide the same names.

`fit_scale`, `fit_scale_min`, `fit_stepwise`, `fit_positive` and `round_again` search; `absmax_8`, `min_max`,
`signed_max` and `nearest_e2m1` have nothing to search for.
"""

from qlearn.formats.gguf_blocks.mxfp4 import nearest_e2m1
from qlearn.formats.gguf_blocks.search import fit_positive, fit_scale, fit_scale_min, fit_stepwise, round_again
from qlearn.formats.gguf_blocks.signed_max import signed_max
from qlearn.formats.gguf_blocks.simple import absmax_8, min_max

__all__ = [
    "absmax_8",
    "fit_positive",
    "fit_scale",
    "fit_scale_min",
    "fit_stepwise",
    "min_max",
    "nearest_e2m1",
    "round_again",
    "signed_max",
]
