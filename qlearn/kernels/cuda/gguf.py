"""y = x W^T for up to 8 rows of x, straight from the blocks of a GGUF file.

`formats/gguf_blocks` says what the bytes mean. Nothing is moved or unpacked beforehand: the tensor of bytes that was
read from the file is the argument. `row_stream.py` brings the bytes; here is what a warp does with 256 columns of them.

**Bytes.** What has to be read, for 28,672 x 8,192 weights and one row of x, and the time that takes at 4.1 TB/s:

    Q4_0, Q4_K  4.5 bits     132 MB   32.2 µs          Q8_0   8.5 bits     250 MB   60.9 µs
    MXFP4       4.25 bits    125 MB   30.4 µs          Q6_K   6.5625 bits  193 MB   47.0 µs

What 256 columns are to a warp is told in two places: `block_codes.py`, how a lane gets numbers out of the bytes, one
mask for two codes; and `block_products.py`, how the scales are applied, eight blocks at a time. Counted in the machine
code, for 16 rows of 256 columns and one row of x, that is 229 instructions for Q4_0, 263 for Q4_K, 324 for Q8_0, 382
for MXFP4 and 421 for Q6_K. The four schedulers of a multiprocessor carry out one each in a cycle, of which there are
1,750 in a microsecond: so 28,672 x 8,192 weights of Q4_0 keep them busy for 14 µs of the 32.

Other shapes and GPUs: the kernel asks for compute capability 9.0, and for rows that are a multiple of 16 bytes.
"""

import torch

from qlearn.formats.gguf_blocks import BLOCK_TYPES
from qlearn.kernels.cuda.block_codes import BLOCKS
from qlearn.kernels.cuda.block_products import WARPS, check_x, compiled, launches


def gguf_matmul(x, blocks, block_type="Q4_0", *, overlap=False):
    """x W^T for a matrix that lies in the blocks of a GGUF file.

    x: (tokens, K) float16, bfloat16 or float32 on a GPU, 1 to 8 tokens.
    blocks: uint8 (N, bytes of a row) on the same GPU, in the order of the file.  block_type: one of `BLOCKS`.
    overlap: begin while the kernel before still runs; it must not be the one that writes the blocks.
    Returns (tokens, N) in the dtype of x; sums are float32.  A token with NaN or infinity gets no finite outputs.
    Raises ValueError for other types, dtypes and shapes, for rows that are no multiple of 16 bytes (K a multiple of
    256; of 512 for MXFP4; of 2048 for Q6_K), and for a GPU below compute capability 9.0.

    The same, readable: x @ dequantize(blocks, block_type).T, of `formats.gguf_blocks`.
    """
    y = torch.empty(x.shape[0], blocks.shape[0], dtype=x.dtype, device=x.device) if x.dim() == 2 else x
    for run in prepared(x, blocks, y, block_type, overlap=overlap):
        run()
    return y


def prepared(x, blocks, y, block_type="Q4_0", *, overlap=False, warps=WARPS, per_stage=None, stages=None):
    """The launches that `gguf_matmul` makes, as functions without arguments, for matrices that stay where they are.

    There is more than one where the rows of x do not fit into shared memory side by side: 4 of 14,336 numbers do.
    warps, per_stage, stages: as in `row_stream.Plan`; what is not given is chosen.
    """
    if block_type not in BLOCKS:
        raise ValueError(f"there is no kernel for blocks of type {block_type!r}; choose from {', '.join(BLOCKS)}")
    kind = BLOCK_TYPES[block_type]
    check_x(x)
    K = x.shape[1]
    if K % kind.weights or blocks.dtype != torch.uint8 or blocks.shape[1:] != (K // kind.weights * kind.nbytes,):
        raise ValueError(
            f"{blocks.dtype} {tuple(blocks.shape)} is no matrix of {block_type} blocks for {K} inputs; a row of them "
            f"has {K / kind.weights * kind.nbytes:g} bytes"
        )
    what = BLOCKS[block_type]
    return launches(block_type.lower(), what, x, blocks, blocks, y, overlap, warps, per_stage, stages)


COMPILED = [entry for name, what in BLOCKS.items() for entry in compiled(name.lower(), what)]
