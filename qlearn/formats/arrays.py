"""What comes in decides what goes out.

Every format accepts Python numbers, lists, NumPy arrays and torch tensors, and answers in kind: a Python number for a
Python number, a tensor on the same device for a tensor, a NumPy array for everything else. The arithmetic in between
is NumPy's, which reads a tensor on the CPU where it lies. A tensor on another device stays there to be packed, unpacked
or decoded, which a model does at every step; to be encoded (or decoded from FP32), it is copied to the CPU and back.

torch is looked up, not imported: a tensor can only come from someone who has imported torch already.
"""

import sys

import numpy as np

# Elements that are worked on at a time, so that the intermediate arrays stay in the processor's cache. Measured on two
# cores: encoding a million float32 to FP8 takes 13 ms in blocks of this size, 15 ms in blocks half as large, and 42 ms
# in one piece. A loop compiled by Numba takes 8 to 11 ms, too little gained for a second version. To measure again:
#   python -m timeit -s "from qlearn.formats.floats import FP8_E4M3FN as f; import numpy as np" \
#       -s "x = np.random.randn(10**6).astype('f')" "f.encode(x)"
BLOCK = 16384


def is_tensor(x):
    """True when x is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def to_numpy(x):
    """Return x as a NumPy array, and the function that turns a NumPy result into the kind that x was.

    >>> array, restore = to_numpy(2.5)
    >>> array.dtype, restore(array + 1)
    (dtype('float64'), 3.5)
    """
    if is_tensor(x):
        torch = sys.modules["torch"]
        numpy_has = x.dtype in (torch.float16, torch.float32, torch.float64) or not x.is_floating_point()
        plain = x.detach() if numpy_has else x.detach().float()  # bfloat16, float8: exact in float32
        return plain.cpu().numpy(), lambda result: torch.from_numpy(np.asarray(result, order="C")).to(x.device)
    return np.asarray(x), lambda result: like(x, result)


def native(x):
    """As to_numpy, but leave a tensor where it is when that is not the CPU."""
    return (x, lambda result: result) if is_tensor(x) and x.device.type != "cpu" else to_numpy(x)


def like(x, result):
    """Return a NumPy result as a Python or NumPy number when x is one, else as an array, even if without dimensions."""
    result = np.asarray(result)
    if isinstance(x, np.generic):
        return result[()]
    return result.item() if isinstance(x, (bool, int, float)) else result


@np.errstate(invalid="ignore")  # a signalling NaN is a NaN, and no reason to warn
def as_floats(array):
    """Return real numbers as float32 or float64, whichever holds them exactly (of integers, those up to 2**53)."""
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    if array.dtype.kind in "fV" and array.dtype.itemsize <= 2:  # float16, and the small floats of ml_dtypes
        return array.astype(np.float32)
    raise ValueError(f"cannot encode values of dtype {array.dtype}: give real numbers of at most 64 bits")


def check_codes(codes, low, high):
    """Return codes, as an array or tensor, if all are integers in low..high; else the ValueError names one that is not.

    >>> check_codes(np.array([3, 9]), 0, 7)
    Traceback (most recent call last):
        ...
    ValueError: code 9 is out of range: codes here run from 0 to 7
    """
    if is_tensor(codes):
        torch = sys.modules["torch"]
        integral = not (codes.is_floating_point() or codes.is_complex())
        if codes.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has no arithmetic for these
            codes = codes.to(torch.int64)
    else:
        codes = np.asarray(codes)
        codes = codes if codes.size else codes.astype(np.uint8)  # an empty list is float to NumPy
        integral = codes.dtype.kind in "iub"
    if 0 in codes.shape:
        return codes
    if not integral:
        raise ValueError(f"codes must be integers, not {codes.dtype}: encode the values first")
    for extreme in (int(codes.min()), int(codes.max())):
        if not low <= extreme <= high:
            raise ValueError(f"code {extreme} is out of range: codes here run from {low} to {high}")
    return codes


def check_stored(codes, low, high):
    """As check_codes, but codes that lie on another device are trusted.

    Looking at them would wait for all the work that is queued there, each time that a layer decodes its weights. They
    were checked when they were made, on the CPU.
    """
    return codes if is_tensor(codes) and codes.device.type != "cpu" else check_codes(codes, low, high)


class Table:
    """A number for each code. A copy stays on every device that has asked: sending it anew would wait for the device.

    numbers: 1-D NumPy array.

    >>> Table(np.array([0.5, 2.0])).look_up([1, 0]).tolist()
    [2.0, 0.5]
    """

    def __init__(self, numbers):
        self.numbers = numbers
        self._copies = {}

    def look_up(self, codes):
        """Return the number of each code, of the kind and on the device of the codes. ValueError as `check_stored`."""
        codes, restore = native(codes)
        codes = check_stored(codes, 0, len(self.numbers) - 1)
        if is_tensor(codes):
            return self._on(codes.device)[codes.long()]
        return restore(np.take(self.numbers, codes))

    def _on(self, device):
        if device not in self._copies:
            self._copies[device] = sys.modules["torch"].from_numpy(self.numbers).to(device)
        return self._copies[device]


def blockwise(function, x, dtype):
    """Apply function, which maps a 1-D array to one of the same length, to x of any shape, BLOCK elements at a time."""
    flat = x.reshape(-1)
    out = np.empty(flat.shape, dtype)
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        out[block] = function(flat[block])
    return out.reshape(x.shape)
