"""The exercise of lesson 01: taking a floating-point number apart, putting it together, and rounding to it.

The references are the package's own formats. Fields come as int64 arrays or Python ints, so that no subtraction wraps
around. NaN appears only in `bits.bf16`, whose text says what becomes of it.
"""

import numpy as np

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats.floats import (
    BF16,
    E8M0,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3FN,
    FP8_E5M2,
    FP16,
    FP32,
    ROUNDING,
)

# ---- references: the package's formats, with the arguments of the exercise ------------------------------------------


def _fields(code, fmt):
    return tuple(fmt.fields(code)[:3])


def _decode(sign, exponent, mantissa, fmt):
    return fmt.decode((((sign << fmt.exponent_bits) | exponent) << fmt.mantissa_bits) | mantissa)


def _encode(x, fmt):
    return fmt.encode(x, overflow="saturate")


def _bf16(x):
    return BF16.round(x)


def _stochastic(x, fmt, u):
    step = fmt.ulp(x)
    return np.copysign(ROUNDING["stochastic"](np.abs(x) / step, lambda shape: u) * step, x)


# ---- cases ----------------------------------------------------------------------------------------------------------


def _finite_codes(fmt):
    codes = np.arange(2**fmt.bits)
    return codes[np.isfinite(fmt.decode(codes))]


def _field_cases():
    random = np.random.default_rng(1)
    return [
        Case("6.5 in FP8 E4M3", (0b0_1001_101, FP8_E4M3FN)),
        Case("a negative number in FP16", (0b1_10001_1010000000, FP16)),
        Case("all 16 codes of FP4 E2M1", (np.arange(16), FP4_E2M1)),
        Case("the same bits in FP6 E3M2", (np.array([0, 1, 31, 32, 42, 63]), FP6_E3M2)),
        Case("the same bits in FP6 E2M3", (np.array([0, 1, 31, 32, 42, 63]), FP6_E2M3)),
        Case("all 256 codes of FP8 E5M2, as uint8", (np.arange(256, dtype=np.uint8), FP8_E5M2)),
        Case("a matrix of FP32 codes", (random.integers(0, 2**32, (2, 3)), FP32)),
        Case("E8M0, which has neither sign nor mantissa", (np.array([0, 127, 128, 255]), E8M0)),
        Case("zero", (0, BF16)),
    ]


def _decode_cases():
    random = np.random.default_rng(2)
    cases = [
        ("6.5 in FP8 E4M3", 0b0_1001_101, FP8_E4M3FN),
        ("the smallest normal number of FP8 E4M3", 0b0_0001_000, FP8_E4M3FN),
        ("the smallest subnormal number of FP8 E4M3", 0b0_0000_001, FP8_E4M3FN),
        ("both zeros of FP4 E2M1", np.array([0b0000, 0b1000]), FP4_E2M1),
        ("all 16 codes of FP4 E2M1", np.arange(16), FP4_E2M1),
        ("all 64 codes of FP6 E3M2", np.arange(64), FP6_E3M2),
        ("all 64 codes of FP6 E2M3", np.arange(64), FP6_E2M3),
        ("all finite codes of FP8 E4M3, up to 448", _finite_codes(FP8_E4M3FN), FP8_E4M3FN),
        ("all finite codes of FP8 E5M2", _finite_codes(FP8_E5M2), FP8_E5M2),
        ("some codes of FP16, as a matrix", random.choice(_finite_codes(FP16), (3, 4)), FP16),
        ("subnormal numbers of BF16", np.array([1, 127, 128, 0x8001]), BF16),
    ]
    return [Case(name, (*_fields(code, fmt), fmt)) for name, code, fmt in cases]


def _midpoints(fmt):
    values = np.sort(fmt.decode(_finite_codes(fmt)).astype(np.float64))
    return (values[:-1] + values[1:]) / 2


def _encode_cases():
    random = np.random.default_rng(3)
    beyond = np.array([1.01, 1.5, 2.0, 1e30, np.inf])
    return [
        Case("a number that E4M3 has", (6.5, FP8_E4M3FN)),
        Case("a negative number", (-0.3, FP8_E4M3FN)),
        Case("both zeros", (np.array([0.0, -0.0]), FP8_E4M3FN)),
        Case("numbers of FP4 E2M1, and some between", (np.linspace(-6, 6, 49), FP4_E2M1)),
        Case("ties of FP8 E4M3", (_midpoints(FP8_E4M3FN), FP8_E4M3FN)),
        Case("ties of FP6 E2M3", (_midpoints(FP6_E2M3), FP6_E2M3)),
        Case("a mantissa that rounds up into the next binade", (np.array([1.95, 0.99, 15.6, -3.9]), FP8_E4M3FN)),
        Case("subnormal numbers", (np.arange(-9, 10) * 2.0**-9 * 0.9, FP8_E4M3FN)),
        Case("too small for the smallest step", (np.array([1e-12, -1e-12, 2.0**-11]), FP8_E4M3FN)),
        Case("too large: saturates", (np.concatenate([beyond, -beyond]) * 448, FP8_E4M3FN)),
        Case("too large for FP8 E5M2, which has infinity", (np.concatenate([beyond, -beyond]) * 57344, FP8_E5M2)),
        Case("too large for FP4 E2M1", (np.array([6.0, 7.0, 7.5, 100.0, -8.0]), FP4_E2M1)),
        Case("a hair above a tie", (np.array([1, -1]) * (1 + 2.0**-4 + 2.0**-40), FP8_E4M3FN)),
        Case("FP16, whose codes have 16 bits", (np.array([0.3, -0.3, 1e6, -1e-6]), FP16)),
        Case("weights, in FP6 E3M2", (random.normal(0, 0.5, (4, 5)), FP6_E3M2)),
        Case("weights in float32, in FP8 E5M2", (random.normal(0, 0.05, 64).astype(np.float32), FP8_E5M2)),
    ]


def _bf16_cases():
    random = np.random.default_rng(4)
    bits = random.integers(0, 2**32, 256, dtype=np.uint64).astype(np.uint32)
    ties = (random.integers(0, 0x7F7F, 32).astype(np.uint32) << 16) | 0x8000
    numbers = {
        "numbers that BF16 has": np.array([1.0, -2.5, 0.15625, 384.0]),
        "weights": random.normal(0, 0.05, 32),
        "ties, to the even neighbour": np.concatenate([ties, ties | 2**31]).view(np.float32),
        "just above and just below a tie": np.concatenate([ties + 1, ties - 1]).view(np.float32),
        "both zeros": np.array([0.0, -0.0]),
        "rounds up into the next binade": np.array([1.999, 255.9, -0.49999]),
        "both infinities": np.array([np.inf, -np.inf]),
        "the largest FP32 numbers round to infinity": np.array([3.4028235e38, -3.4028235e38, 3.39e38]),
        "subnormal numbers": np.array([1, 0x8000, 0x8001, 0x18000, 0x7FFFFF], dtype=np.uint32).view(np.float32),
        "NaN": np.array([np.nan, 1.0, -np.nan]),
        "NaN whose payload is in the lower bits": np.array([0x7F800001, 0xFF800001], dtype=np.uint32).view(np.float32),
        "NaN of all ones": np.array([0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32),
        "a matrix of random bits": bits.view(np.float32).reshape(16, 16),
    }
    return [Case(name, (np.asarray(x, dtype=np.float32),)) for name, x in numbers.items()]


def _stochastic_cases():
    random = np.random.default_rng(5)
    return [
        Case("a quarter of a step above 1.0", (np.full(4, 1.03125), FP8_E4M3FN, np.array([0.1, 0.24, 0.26, 0.9]))),
        Case("negative numbers that go to zero", (np.array([-0.1, -0.2]), FP4_E2M1, np.array([0.9, 0.5]))),
        Case("numbers the format has stay, whatever u", (np.array([1.0, 0.5, -6.0, 0.0]), FP4_E2M1, np.zeros(4))),
        Case("u equal to the fraction", (np.array([1.25, 2.5]), FP4_E2M1, np.array([0.5, 0.5]))),
        Case("negative numbers", (np.array([-1.1, -2.2, -3.3, -0.1]), FP4_E2M1, np.array([0.1, 0.1, 0.4, 0.1]))),
        Case("up into the next binade", (np.array([1.99, -3.9]), FP8_E4M3FN, np.array([0.5, 0.5]))),
        Case("subnormal numbers", (np.array([0.3, 0.7, -0.2]) * 2.0**-6, FP8_E4M3FN, np.array([0.3, 0.8, 0.1]))),
        Case("a matrix of weights, in BF16", (random.normal(0, 0.05, (8, 8)), BF16, random.random((8, 8)))),
        Case("weights, in FP8 E5M2", (random.normal(0, 1, 64), FP8_E5M2, random.random(64))),
    ]


# ---- the mistakes: `fields` and `decode` ----------------------------------------------------------------------------


def _split(code, low, high):
    """(all above the two fields, the field of `high` bits, the field of the `low` lowest bits)."""
    return code >> (low + high), (code >> low) & (2**high - 1), code & (2**low - 1)


def _mask_is_power(code, fmt):
    return (
        code >> (fmt.exponent_bits + fmt.mantissa_bits),
        (code >> fmt.mantissa_bits) & 2**fmt.exponent_bits,
        code & 2**fmt.mantissa_bits,
    )


FIELD_MUTANTS = (
    Mutant(
        "widths exchanged",
        lambda code, fmt: _split(code, fmt.exponent_bits, fmt.mantissa_bits),
        "This is what you get when the exponent is taken from the lowest bits: the mantissa is the lowest field.",
    ),
    Mutant(
        "sign left in the exponent",
        lambda code, fmt: (_fields(code, fmt)[0], code >> fmt.mantissa_bits, _fields(code, fmt)[2]),
        "This is what you get when the exponent is shifted down but not masked: the sign bit is still above it.",
    ),
    Mutant(
        "the top bit is always a sign",
        lambda code, fmt: (code >> (fmt.bits - 1), *_fields(code, fmt)[1:]),
        "Only E8M0 is wrong: it has no sign bit, and what is above the exponent of an unsigned format is nothing, 0.",
    ),
    Mutant(
        "a power of two as the mask",
        _mask_is_power,
        "This is what you get when the mask is 2**n: that is one single bit, above the field. The n ones are 2**n - 1.",
    ),
    Mutant(
        "bias taken off",
        lambda code, fmt: (_fields(code, fmt)[0], _fields(code, fmt)[1] - np.int64(fmt.bias), _fields(code, fmt)[2]),
        "This exponent has had its bias subtracted: return the field as it is stored, the bias comes with the value.",
    ),
    Mutant(
        "sign as +1 or -1",
        lambda code, fmt: (1 - 2 * _fields(code, fmt)[0], *_fields(code, fmt)[1:]),
        "This sign is +1 or -1: return the bit as it is stored, 0 or 1.",
    ),
    Mutant(
        "mantissa as a fraction",
        lambda code, fmt: (*_fields(code, fmt)[:2], _fields(code, fmt)[2] / 2**fmt.mantissa_bits),
        "This mantissa has been divided by 2**mantissa_bits: return the field as it is stored, a whole number.",
    ),
)


def _value(sign, power, significand):
    return (-1.0) ** sign * 2.0**power * significand


def _one_formula(hidden):
    """A decoder that knows nothing of subnormals: one formula for all codes."""
    return lambda sign, exponent, mantissa, fmt: _value(
        sign, exponent - fmt.bias, hidden + mantissa / 2**fmt.mantissa_bits
    )


def _two_formulas(lowest=lambda fmt: 1 - fmt.bias, bias=0, divisor=lambda fmt: 2**fmt.mantissa_bits):
    """The right way to decode, with one thing exchanged."""

    def decode(sign, exponent, mantissa, fmt):
        fraction = mantissa / divisor(fmt)
        normal = _value(sign, exponent - fmt.bias + bias, 1 + fraction)
        return np.where(exponent > 0, normal, _value(sign, lowest(fmt), fraction))[()]

    return decode


DECODE_MUTANTS = (
    Mutant(
        "no subnormal numbers",
        _one_formula(hidden=1),
        "This is what you get when the hidden 1 is always there: it is absent where the exponent field is 0.",
    ),
    Mutant(
        "subnormal numbers half as large",
        _two_formulas(lowest=lambda fmt: -fmt.bias),
        "Your subnormal numbers are half of what they should be: their power is 1 - bias, not 0 - bias.",
    ),
    Mutant(
        "no hidden 1",
        _one_formula(hidden=0),
        "This is what you get without the hidden 1 that stands, unstored, in front of a normal number's mantissa.",
    ),
    Mutant(
        "bias one too large",
        _two_formulas(bias=-1),
        "Your normal numbers are half of what they should be: the power is exponent - bias, and no less.",
    ),
    Mutant(
        "mantissa divided by its largest value",
        _two_formulas(divisor=lambda fmt: 2**fmt.mantissa_bits - 1),
        "This is what you get when the mantissa is divided by 2**m - 1: its last step would be the next power already.",
    ),
    Mutant(
        "sign ignored",
        lambda sign, exponent, mantissa, fmt: abs(_decode(sign, exponent, mantissa, fmt)),
        "Every number is positive: sign 1 means minus.",
    ),
    Mutant(
        "minus zero lost",
        lambda sign, exponent, mantissa, fmt: _decode(sign, exponent, mantissa, fmt) + 0.0,
        "Only minus zero is wrong: 0 - 0 is +0, and so is a 0.0 put in its place. Multiply by (-1.0)**sign instead.",
    ),
)

# ---- the mistakes: `encode` and `bf16` ------------------------------------------------------------------------------


def _encoder(round_steps=np.round, lowest=lambda fmt: fmt.smallest_normal):
    """The right way to encode, with one thing exchanged."""

    def encode(x, fmt):
        magnitude = np.minimum(np.abs(np.asarray(x, dtype=np.float64)), fmt.max)
        power = np.frexp(np.maximum(magnitude, lowest(fmt)))[1] - 1
        steps = round_steps(np.ldexp(magnitude, fmt.mantissa_bits - power))
        code = steps + (power - 1 + fmt.bias) * 2.0**fmt.mantissa_bits
        return code.astype(np.int64) + np.signbit(x) * 2 ** (fmt.bits - 1)

    return encode


def _flushing(x, fmt):
    tiny = np.abs(x) < fmt.smallest_normal
    return _encode(np.where(tiny, np.copysign(0.0, x), x)[()], fmt)


def _first_nearest(x, fmt):
    """A search in the table of all values: argmin takes the first of two that are equally near."""
    values = np.abs(fmt.decode(_finite_codes(fmt)))[: len(_finite_codes(fmt)) // 2].astype(np.float64)
    nearest = np.abs(np.asarray(np.minimum(np.abs(x), fmt.max))[..., None] - values).argmin(-1)
    return nearest + np.signbit(x) * 2 ** (fmt.bits - 1)


def _all_ones(x, fmt):
    too_large = np.abs(x) > fmt.max
    return np.where(too_large, 2 ** (fmt.bits - 1) * (np.signbit(x) + 1) - 1, _encode(x, fmt))[()]


def _carry_lost(x, fmt):
    """The mantissa is masked after it was rounded up, and the exponent never hears of it."""
    exponent = _fields(fmt.encode(x, mode="zero", overflow="saturate"), fmt)[1]
    return (
        _encode(x, fmt) & ~(exponent * 0 + (2**fmt.exponent_bits - 1) << fmt.mantissa_bits)
        | exponent << fmt.mantissa_bits
    )


ENCODE_MUTANTS = (
    Mutant(
        "truncation",
        _encoder(np.floor),
        "This is what you get when the steps are cut off, not rounded: every number moves toward zero.",
    ),
    Mutant(
        "ties away from zero",
        _encoder(lambda steps: np.floor(steps + 0.5)),
        "Only ties are wrong: floor(x + 0.5) sends every tie away from zero, np.round sends it to the even neighbour.",
    ),
    Mutant(
        "ties to the first",
        _first_nearest,
        "Only ties are wrong: all go toward zero, as with argmin over a table: it takes the first of two.",
    ),
    Mutant(
        "subnormal numbers flushed",
        _flushing,
        "This is what you get when all below the smallest normal number becomes zero: there are subnormal numbers.",
    ),
    Mutant(
        "steps that keep shrinking",
        _encoder(lowest=lambda fmt: 2.0**-40),
        "This is what you get when the step keeps shrinking: below the smallest normal number it stays the same.",
    ),
    Mutant(
        "no saturation",
        lambda x, fmt: fmt.encode(x),
        "What is too large becomes infinity or NaN here: to saturate, clip the magnitude to fmt.max first.",
    ),
    Mutant(
        "saturates at all ones",
        _all_ones,
        "What is too large gets the code of all ones here: that is NaN in E4M3 and E5M2. Clip to fmt.max first.",
    ),
    Mutant(
        "minus zero lost",
        lambda x, fmt: _encode(x + 0.0, fmt),
        "Only minus zero is wrong: x < 0 is False for -0.0. np.signbit sees its sign.",
    ),
    Mutant(
        "carry lost",
        _carry_lost,
        "A mantissa that rounds up beyond its field has to carry into the exponent: add the two, do not mask.",
    ),
    Mutant(
        "by way of float32",
        lambda x, fmt: _encode(np.float32(x), fmt),
        "This number was rounded twice, to float32 first: there it became a tie. Round float64 once.",
    ),
    Mutant(
        "codes in 8 bits",
        lambda x, fmt: np.asarray(_encode(x, fmt)).astype(np.uint8),
        "Only the lowest 8 bits of the codes are left: not every format has 8, so do not cast to uint8.",
    ),
)


def _upper_half(add):
    """Add something to the 32 bits, then keep the upper 16; NaN is kept."""

    def bf16(x):
        bits = x.view(np.uint32)
        upper = ((bits + add(bits)) >> 16 << 16).view(np.float32)
        return np.where(np.isnan(x), x, upper)

    return bf16


def _nan_ignored(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)


def _nan_truncated(x):
    return np.where(np.isnan(x), (x.view(np.uint32) >> 16 << 16).view(np.float32), _bf16(x))


BF16_MUTANTS = (
    Mutant(
        "truncation",
        _upper_half(lambda bits: 0),
        "This is what you get when the lower 16 bits are dropped: that rounds toward zero, always.",
    ),
    Mutant(
        "ties away from zero",
        _upper_half(lambda bits: 0x8000),
        "Only ties are wrong: all go up, as when 0x8000 is added. Add 0x7FFF, one more where the last kept bit is 1.",
    ),
    Mutant(
        "ties down",
        _upper_half(lambda bits: 0x7FFF),
        "Only ties are wrong: 0x7FFF alone leaves every tie below. Add one more where the last kept bit is 1.",
    ),
    Mutant(
        "NaN ignored",
        _nan_ignored,
        "NaN is wrong: adding to its bits can carry into the sign, and what comes out is a zero or an infinity.",
    ),
    Mutant(
        "NaN truncated",
        _nan_truncated,
        "Some NaN become infinity: where only the lower half of the bits says NaN, dropping it leaves infinity.",
    ),
    Mutant(
        "rounded to FP16",
        lambda x: x.astype(np.float16).astype(np.float32),
        "This is FP16, the other 16-bit format: it has 5 exponent bits and 10 mantissa bits, BF16 has 8 and 7.",
    ),
    Mutant(
        "saturates",
        lambda x: BF16.round(x, overflow="saturate"),
        "Infinity is wrong: what is too large rounds to infinity, and the carry into the exponent does so by itself.",
    ),
)

# ---- the mistakes: `stochastic` -------------------------------------------------------------------------------------


def _rounder(up):
    """Round the magnitude down to a multiple of the step, and up by one where `up(fraction, u)` says so."""

    def stochastic(x, fmt, u):
        step = fmt.ulp(x)
        steps = np.abs(x) / step
        down = np.floor(steps)
        return np.copysign((down + up(steps - down, u)) * step, x)

    return stochastic


def _signed_floor(x, fmt, u):
    step = fmt.ulp(x)
    down = np.floor(x / step)
    return (down + (u < x / step - down)) * step


def _one_step_for_all(x, fmt, u):
    steps = np.abs(x) / fmt.ulp(1.0)
    return np.copysign((np.floor(steps) + (u < steps - np.floor(steps))) * fmt.ulp(1.0), x)


STOCHASTIC_MUTANTS = (
    Mutant(
        "to the nearest",
        lambda x, fmt, u: fmt.round(x),
        "This is rounding to the nearest: the same every time, whatever u says.",
    ),
    Mutant(
        "a coin toss",
        _rounder(lambda fraction, u: (u < 0.5) & (fraction > 0)),
        "This is a coin toss: up with probability 1/2, wherever the number lies. It has to be the fraction.",
    ),
    Mutant(
        "the other way round",
        _rounder(lambda fraction, u: u > fraction),
        "Up and down are exchanged: a number just above a value should rarely go up, so go up where u < fraction.",
    ),
    Mutant(
        "u equal to the fraction goes up",
        _rounder(lambda fraction, u: u <= fraction),
        "This is what you get with u <= fraction: a number that the format has would move where u is 0. Use <.",
    ),
    Mutant(
        "noise added, then floor",
        _rounder(lambda fraction, u: fraction + u >= 1),
        "This is unbiased too, but goes up where u >= 1 - fraction; so that results agree, u < fraction is asked for.",
    ),
    Mutant(
        "toward minus infinity",
        _signed_floor,
        "Negative numbers are wrong: np.floor goes away from zero there. Round the magnitude, then give the sign back.",
    ),
    Mutant(
        "one step for all",
        _one_step_for_all,
        "This is what you get when all numbers are rounded with the step at 1.0: the step of x is fmt.ulp(x).",
    ),
)

TASKS = (
    Task(
        name="bits.fields",
        title="Three fields",
        points=1,
        minutes=4,
        difficulty=1,
        importance=4,
        reference=_fields,
        cases=_field_cases,
        hints=(
            "`code >> n` drops the n lowest bits, and `code & (2**n - 1)` keeps them and nothing else.",
            "mantissa = code & (2**m - 1); exponent = (code >> m) & (2**e - 1); sign = code >> (e + m).",
        ),
        mutants=FIELD_MUTANTS,
    ),
    Task(
        name="bits.decode",
        title="From fields to a number",
        points=2,
        minutes=6,
        difficulty=2,
        importance=5,
        reference=_decode,
        cases=_decode_cases,
        hints=(
            "Write down both lines of the value formula; np.where(exponent > 0, normal, subnormal) chooses.",
            "Normal: 2.0**(exponent - bias) * (1 + mantissa / 2**m). Subnormal: 2.0**(1 - bias) * mantissa / 2**m.",
        ),
        mutants=DECODE_MUTANTS,
        tolerance=0.0,
    ),
    Task(
        name="bits.encode",
        title="From a number to its code",
        points=3,
        minutes=12,
        difficulty=4,
        importance=5,
        reference=_encode,
        cases=_encode_cases,
        hints=(
            "Clip the magnitude to fmt.max and divide it by fmt.ulp(magnitude): that is the number in steps.",
            "With power = log2(ulp) + m the code is round(steps) + (power - (1 - bias)) * 2**m; then comes the sign.",
        ),
        mutants=ENCODE_MUTANTS,
    ),
    Task(
        name="bits.bf16",
        title="BF16 by integer arithmetic",
        points=2,
        minutes=8,
        difficulty=3,
        importance=4,
        reference=_bf16,
        cases=_bf16_cases,
        hints=(
            "x.view(np.uint32) shows the bits. Add nearly half of what bit 16 is worth, then clear the lower 16 bits.",
            "Add 0x7FFF + ((bits >> 16) & 1), shift right and left by 16, view as float32; where np.isnan(x), take x.",
        ),
        mutants=BF16_MUTANTS,
        same_dtype=True,
        tolerance=0.0,
    ),
    Task(
        name="bits.stochastic",
        title="Rounding by chance",
        points=2,
        minutes=5,
        difficulty=2,
        importance=3,
        reference=_stochastic,
        cases=_stochastic_cases,
        hints=(
            "Count in steps: abs(x) / fmt.ulp(x). The whole part is where down leads; the rest is the chance of up.",
            "down = np.floor(steps), one more where u < steps - down; times the step; np.copysign gives the sign back.",
        ),
        mutants=STOCHASTIC_MUTANTS,
        tolerance=0.0,
    ),
)
