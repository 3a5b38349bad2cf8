"""Kernels: the arithmetic, fast.

Everything here has a readable twin on a lower or higher floor that says what it computes, and a test that holds the two
equal. `cpu/` is compiled by Numba on first use, and kept in a cache beside the source. `dispatch.py` chooses among the
kernels that multiply with a quantized weight. Nothing is imported, and so no compiler either, before it is needed.
"""
