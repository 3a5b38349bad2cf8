"""Loops compiled for the processor by Numba.

A compiled loop does what NumPy cannot: it keeps numbers in registers between one operation and the next, and it stops
early. The one rule for all of them: the inner loop runs over independent items (lanes), with no branch that depends on
the data, so that the compiler can put eight or sixteen of them into one vector instruction. Nothing may be computed in
another order than the readable twin computes it: float32 sums depend on it, and the results are compared bit for bit.
(The one exception is the product with packed codes. torch's own product keeps to no order either; there the difference
is bounded instead.)

    packed.py      y = x W^T from packed codes
    ternary.py     the same from packed trits and 8-bit inputs, without multiplications
    sinkhorn.py    the deviations of rows and columns, for SINQ's balancing
    gptq.py        GPTQ's loop over the columns of a block
    gguf.py        the searches for GGUF's blocks
    threads.py     how a loop is shared among threads
"""
