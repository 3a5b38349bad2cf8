"""Matrices of every kind that blocks meet, the same ones on every machine.

RandomState is frozen: NumPy promises that its numbers never change. Each family is a matrix of an odd number of rows of
768 weights, three super-blocks, float32.
"""

import numpy as np

ROWS, COLUMNS = 5, 768


def _random(seed):
    return np.random.RandomState(seed)


def _normal(seed=0):
    return _random(seed).standard_normal((ROWS, COLUMNS))


def _with_blocks(value):
    """Normal numbers in which some sub-blocks hold one value only; the last row does throughout."""
    x = _normal(1).reshape(ROWS, -1, 16)
    x[_random(2).rand(*x.shape[:2]) < 0.3] = value
    x[-1] = value
    return x.reshape(ROWS, COLUMNS)


def families():
    """name -> float32 (5, 768)."""
    normal, sign = _normal(), np.sign(_normal(3))
    matrices = {
        "normal": normal,
        "zeros": np.zeros((ROWS, COLUMNS)),
        "sub-blocks of zeros": _with_blocks(0),
        "constant sub-blocks": _with_blocks(0.3),
        "constant negative sub-blocks": _with_blocks(-0.7),
        "all positive": abs(normal),
        "all negative": -abs(normal),
        "times 1e-12": normal * 1e-12,
        "times 1e-8": normal * 1e-8,
        "times 1e-5": normal * 1e-5,
        "times 1e4": normal * 1e4,
        "mixed magnitudes": normal * 10.0 ** _random(4).randint(-8, 4, (ROWS, COLUMNS)),
        "sub-blocks of mixed magnitudes": normal
        * 10.0 ** _random(5).randint(-6, 4, (ROWS, COLUMNS // 16)).repeat(16, 1),
        "heavy tails": _random(6).standard_t(2, (ROWS, COLUMNS)),
        "outliers": normal + 50 * sign * (_random(7).rand(ROWS, COLUMNS) < 0.01),
        "shifted": normal * 0.01 + 3,
        "ternary": _random(8).randint(-1, 2, (ROWS, COLUMNS)) * 0.02,
        "ties in magnitude": sign * 1.0,
        "halves of a grid": _random(9).randint(-16, 17, (ROWS, COLUMNS)) / 2,
        "powers of two": sign * 2.0 ** _random(10).randint(-20, 10, (ROWS, COLUMNS)),
        "one weight": np.where(np.arange(COLUMNS) % 256 == 77, normal, 0),
    }
    matrices = {name: matrix.astype(np.float32) for name, matrix in matrices.items()}
    matrices["bfloat16 grid"] = (matrices["normal"].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    matrices["just below powers of two"] = np.nextafter(matrices["powers of two"], np.float32(0))
    matrices["negative zeros"] = np.where(normal > 0, matrices["normal"], np.float32(-0.0))
    matrices["only negative zeros"] = np.full((ROWS, COLUMNS), -0.0, np.float32)
    matrices["zeros of both signs"] = np.where(
        abs(normal) < 1, np.float32(0) * matrices["normal"], abs(matrices["normal"])
    )
    return matrices


def importances():
    """name -> float32 (768,), or None."""
    random = _random(11)
    spread = random.lognormal(0, 2, COLUMNS)
    return {
        "none": None,
        "spread": spread.astype(np.float32),
        "with zeros": np.where(random.rand(COLUMNS) < 0.4, 0, spread).astype(np.float32),
        "equal": np.ones(COLUMNS, np.float32),
    }
