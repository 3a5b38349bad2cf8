"""Memory, warps and barriers for kernels that run in Numba's simulator.

The simulator runs a block as one Python thread for each thread of the GPU. It knows arrays, `syncthreads` and atomic
additions. It does not know addresses, nor anything that a warp does as one. Both are added here:

**Addresses.** A kernel that uses instructions of its own asks for the address of an array and adds bytes to it. Here an
array gets a range of numbers, far from those of other arrays. Every access is looked up in these ranges. Outside of
them, or not a multiple of its own size, it raises IndexError: on a GPU the first might go unnoticed, and the second
ends the program.

**Warps.** A warp instruction needs the values of all 32 lanes. Each thread lays down its own, waits for the others, and
then takes what it needs. When not all 32 arrive, the wait ends after `PATIENCE` seconds with an error: on a GPU such a
kernel hangs, or its result is undefined.

**Copies that run by themselves** (`cp.async.bulk`) are carried out as late as can be: when a thread first asks whether
they are done. A kernel that reads without asking reads what was there before.
"""

import threading
import time

import numpy as np

LANES = 32
PATIENCE = 60  # seconds
_SPACING = 1 << 26  # between the addresses of two shared arrays
_create = threading.Lock()


class _Block:
    """What the threads of a block have in common."""

    def __init__(self):
        self.lock = threading.RLock()
        self.spaces = []  # (first address, bytes as uint8, the array itself, so that it lives)
        self.warps = {}  # number -> (barrier, the lanes' values)
        self.arrivals = {}  # address of an mbarrier -> _Arrivals


class _Arrivals:
    """An mbarrier: counts arrivals and bytes, and turns over when none of either is missing."""

    def __init__(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = 0
        self.copies = []


def block():
    """The state of the block that the calling thread belongs to."""
    manager = threading.current_thread()._manager
    with _create:
        if not hasattr(manager, "qlearn"):
            manager.qlearn = _Block()
    return manager.qlearn


def lane():
    """The number of the calling thread in its warp."""
    return threading.current_thread().thread_id % LANES


def exchange(value):
    """Lay down a value, wait for the other lanes, and return all 32 values as a list."""
    here, number = block(), threading.current_thread().thread_id // LANES
    with here.lock:
        if number not in here.warps:
            here.warps[number] = threading.Barrier(LANES), [None] * LANES
        barrier, values = here.warps[number]
    values[lane()] = value
    try:
        barrier.wait(PATIENCE)
        everyone = list(values)
        barrier.wait(PATIENCE)
    except threading.BrokenBarrierError:
        message = f"not all 32 lanes of warp {number} came to a warp instruction; let every lane execute it"
        raise RuntimeError(message) from None
    return everyone


def address_of(array, width):
    """The address of the first byte of an array, as a numpy integer of `width` bits."""
    while not isinstance(array, np.ndarray):  # the simulator wraps arrays
        array = array._item if hasattr(array, "_item") else array._ary
    here = block()
    place = array.ctypes.data if array.size else None
    with here.lock:
        for first, held, _ in here.spaces:
            if held.ctypes.data == place:
                return (np.uint32 if width == 32 else np.uint64)(first)
        first = _SPACING * (1 + len(here.spaces))
        if width == 64:
            first += 1 << 40
        here.spaces.append((first, array.reshape(-1).view(np.uint8), array))
    return (np.uint32 if width == 32 else np.uint64)(first)


def bytes_at(address, count, aligned=None):
    """The bytes of an array that lie at an address, as a view that can be read and written."""
    address = int(address)
    for first, held, _ in block().spaces:
        offset = address - first
        if 0 <= offset < _SPACING and (address < 1 << 40) == (first < 1 << 40):
            if offset + count > len(held):
                break
            if offset % (aligned or count):
                raise IndexError(f"{count} bytes at offset {offset}, which is no multiple of {aligned or count}")
            return held[offset : offset + count]
    ends = ", ".join(f"{len(held)}" for _, held, _ in block().spaces)
    raise IndexError(f"{count} bytes at address {address:#x} lie in no array (sizes in bytes: {ends})")


def load(address, dtype, count=1):
    """Numbers at an address."""
    size = np.dtype(dtype).itemsize * count
    return bytes_at(address, size).view(dtype).copy()


def store(address, *values):
    """Write numpy numbers to an address."""
    data = np.array(values)
    bytes_at(address, data.nbytes)[:] = data.view(np.uint8)


def barrier_init(address, count):
    """mbarrier.init"""
    bytes_at(address, 8)
    with block().lock:
        block().arrivals[int(address)] = _Arrivals(int(count))


def barrier_arrive(address, more_bytes=0):
    """mbarrier.arrive, with bytes that are still to come."""
    here = block()
    with here.lock:
        arrivals = here.arrivals[int(address)]
        arrivals.missing -= 1
        arrivals.bytes += int(more_bytes)
        _turn(arrivals)


def copy_later(to, source, count, address):
    """cp.async.bulk: note what is to be copied, and at which barrier it has to be counted."""
    if int(to) % 16 or int(source) % 16 or int(count) % 16:
        raise IndexError(f"a bulk copy of {count} bytes from {source:#x} to {to:#x}: all three must be multiples of 16")
    here = block()
    with here.lock:
        here.arrivals[int(address)].copies.append((int(to), int(source), int(count)))


def barrier_done(address, parity):
    """mbarrier.try_wait.parity: has the phase of this parity been completed? Copies are made now."""
    here = block()
    with here.lock:
        arrivals = here.arrivals[int(address)]
        for to, source, count in arrivals.copies:
            bytes_at(to, count, 16)[:] = bytes_at(source, count, 16)
            arrivals.bytes -= count
        arrivals.copies = []
        _turn(arrivals)
        done = (arrivals.phase & 1) != (int(parity) & 1)
    if not done:
        time.sleep(1e-5)
    return np.uint32(done)


def _turn(arrivals):
    """Begin the next phase, if nothing is missing."""
    if arrivals.missing == 0 and arrivals.bytes == 0 and not arrivals.copies:
        arrivals.phase += 1
        arrivals.missing = arrivals.count
