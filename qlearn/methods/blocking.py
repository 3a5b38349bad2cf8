"""Cutting a weight matrix into the blocks that share a scale.

A scale is set by the largest weight it has to cover, so the fewer weights share one, the finer the grid. What is
gained is paid for
in storage: a 16-bit scale costs 16 / n bits per weight when n weights share it.

    per="tensor"        one block, the whole matrix
    per="row"           one block for each row: an output channel of a linear layer
    per="column"        one block for each column: an input channel
    group_size=g        one block for each g consecutive weights of a row
"""

import torch


def check_weight(weight):
    """A weight matrix as float32, or a ValueError that says what is wrong with it.

    weight: (rows, columns), floating point, finite, not empty; a torch tensor or what torch.as_tensor takes.

    >>> check_weight([[1.0, float("inf")]])
    Traceback (most recent call last):
    ...
    ValueError: 1 of 2 weights are not finite, first inf at row 0, column 1; mend them first
    """
    weight = torch.as_tensor(weight).detach()
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} is no matrix; reshape it to (rows, columns), neither zero"
        )
    if not weight.is_floating_point():
        raise ValueError(f"a weight of dtype {weight.dtype} is not floating point; convert it with .float() first")
    weight = weight.float()
    broken = ~torch.isfinite(weight)
    if broken.any():
        row, column = broken.nonzero()[0].tolist()
        raise ValueError(
            f"{int(broken.sum())} of {weight.numel()} weights are not finite, first {weight[row, column].item()} "
            f"at row {row}, column {column}; mend them first"
        )
    return weight


def block_shape(shape, group_size=None, per="row"):
    """The (rows, columns) of a block.

    Raises ValueError when the group size does not divide the columns, or `per` is unknown.

    >>> block_shape((256, 768), per="tensor"), block_shape((256, 768)), block_shape((256, 768), group_size=64)
    ((256, 768), (1, 768), (1, 64))
    """
    rows, columns = shape
    if group_size is not None:
        if per != "row":
            raise ValueError(
                f"group_size={group_size} cuts rows into groups, so it cannot be joined with per={per!r}; drop one"
            )
        if not isinstance(group_size, int) or group_size < 1 or columns % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the {columns} columns; choose a positive divisor"
            )
        return 1, group_size
    shapes = {"tensor": (rows, columns), "row": (1, columns), "column": (rows, 1)}
    if per not in shapes:
        raise ValueError(f"per={per!r} is unknown; choose from {', '.join(shapes)}, or give a group_size")
    return shapes[per]


def to_blocks(matrix, block):
    """(rows, columns) -> (block rows, block columns, weights of a block).

    >>> to_blocks(torch.arange(8.0).view(2, 4), (1, 2)).tolist()
    [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]
    """
    rows, columns = matrix.shape
    r, c = block
    return matrix.view(rows // r, r, columns // c, c).transpose(1, 2).reshape(rows // r, columns // c, r * c)


def from_blocks(blocks, shape, block):
    """The inverse of `to_blocks`."""
    rows, columns = shape
    r, c = block
    return blocks.view(rows // r, columns // c, r, c).transpose(1, 2).reshape(rows, columns)
