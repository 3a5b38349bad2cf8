"""Weights on which methods are compared with other packages: the matrices of a block of the bundled model, and more."""

import torch

import qlearn


def normal(rows=128, columns=256, scale=0.05):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def weights():
    """dict name -> float32 (rows, columns)."""
    block = qlearn.load_model()[0].model.layers[3]
    layers = {name: m.weight.detach().float() for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    outliers = normal()
    outliers[3, 7], outliers[100, 200] = 5.0, -8.0
    return {
        **layers,
        "normal": normal(),
        "outliers": outliers,
        "large": normal() * 100,
        "heavy tails": normal() ** 3 * 100,
    }


def difference(ours, theirs):
    """The relative difference of two matrices."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def rounding(qt):
    """How far each weight may move when scales, column scales and zeros are rounded to float16: (rows, columns).

    Each is off by at most 2**-11 of itself, or by 2**-25 where it is too small for that.
    """
    scales, zeros = (x.repeat_interleave(qt.block[1], 1) for x in (qt.scales.float(), qt.zero_points()))
    back, columns = qt.dequantize().abs(), qt.column_scales
    columns = torch.ones(qt.shape[1]) if columns is None else columns.float()
    moved = 2 * back * 2**-11 + (zeros.abs() * 2**-11 + 2**-25) * scales * columns + back / scales * 2**-25
    return moved * (1 + 2**-9) + back * 2**-20
