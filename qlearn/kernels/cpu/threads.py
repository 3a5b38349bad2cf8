"""Threads for compiled loops: a loop that does not hold Python's lock can run in several at once.

Each thread is given its own part of the rows, and a row is always computed by one of them, in one order. So the numbers
do not depend on how many there are.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def share(work, first, last, threads):
    """Call work(start, end) for parts of first ... last that together are all of it, the first of them in this thread.

    >>> found = []
    >>> share(lambda start, end: found.append((start, end)), 0, 5, threads=2)
    >>> sorted(found)
    [(0, 3), (3, 5)]
    """
    size = -(-(last - first) // threads) or 1
    starts = range(first, last, size)
    others = [pool(threads - 1).submit(work, start, min(start + size, last)) for start in starts[1:]]
    if len(starts):
        work(first, min(first + size, last))
    for other in others:
        other.result()


@functools.cache
def pool(threads):
    """Threads that wait for work: to start them takes longer than many a product."""
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # the threads themselves stay behind in the parent
