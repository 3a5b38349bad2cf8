"""Independent implementations of the float formats, and inputs that are hard to round."""

import ml_dtypes
import numpy as np

from qlearn.formats import floats

# Two layouts that the package does not name, to show that a format is nothing but its description.
FP8_E3M4 = floats.FloatFormat("fp8_e3m4", 1, 3, 4, 3, "ieee")
FP8_E4M3_IEEE = floats.FloatFormat("fp8_e4m3", 1, 4, 3, 7, "ieee")

ORACLES = {
    floats.FP32: np.float32,
    floats.FP16: np.float16,
    floats.BF16: ml_dtypes.bfloat16,
    floats.FP8_E4M3FN: ml_dtypes.float8_e4m3fn,
    floats.FP8_E5M2: ml_dtypes.float8_e5m2,
    floats.FP6_E3M2: ml_dtypes.float6_e3m2fn,
    floats.FP6_E2M3: ml_dtypes.float6_e2m3fn,
    floats.FP4_E2M1: ml_dtypes.float4_e2m1fn,
    floats.E8M0: ml_dtypes.float8_e8m0fnu,
    FP8_E3M4: ml_dtypes.float8_e3m4,
    FP8_E4M3_IEEE: ml_dtypes.float8_e4m3,
}
EVERY_BF16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
EVERY_FP16 = np.arange(2**16, dtype=np.uint16).view(np.float16)


def name_of(format):
    return format.name


def code_type(format):
    return np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(ORACLES[format]).itemsize])


def oracle_encode(x, format):
    """Codes of the oracle, which must get float32 or less: ml_dtypes rounds float64 twice."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(ORACLES[format]).view(code_type(format))


def oracle_decode(codes, format):
    with np.errstate(invalid="ignore"):
        return codes.astype(code_type(format)).view(ORACLES[format]).astype(np.float32)


def some_codes(format):
    """Every code; of FP32, 50,000 at random and all around its landmarks."""
    if format.bits <= 16:
        return format.codes
    landmarks = np.array([0, 1, 2, 2**23 - 1, 2**23, 2**23 + 1, 127 << 23, 0x7F7FFFFE, 0x7F7FFFFF], dtype=np.uint32)
    random = np.random.default_rng(0).integers(0, 0x7F800000, 25_000, dtype=np.uint32)
    magnitudes = np.concatenate([landmarks, random, [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]]).astype(np.uint32)
    return np.concatenate([magnitudes, magnitudes | np.uint32(2**31)])


def oracle_max(format):
    finfo = np.finfo if ORACLES[format] in (np.float16, np.float32) else ml_dtypes.finfo
    return float(finfo(ORACLES[format]).max)


def cells(format):
    """Neighbours among the positive numbers: float64 arrays (low, high), and int64 arrays of their codes.

    From the oracle alone. The last cell begins at the largest number and is as wide as the one before it (twice as wide
    in E8M0); whatever is rounded up in it overflows.
    """
    numbers = oracle_decode(some_codes(format), format)
    largest = oracle_max(format)
    low = np.append(numbers[~np.signbit(numbers) & (numbers < largest)], np.float32(largest))
    low_code = oracle_encode(low, format).astype(np.int64)
    high_code = np.append(low_code[:-1] + 1, oracle_encode(np.float32([np.inf]), format))
    high = oracle_decode(high_code, format).astype(np.float64)
    before_last = float(oracle_decode(low_code[-1:] - 1, format)[0])
    high[-1] = largest + (largest - before_last) * (1 if format.mantissa_bits else 2)
    return low.astype(np.float64), high, low_code, high_code
