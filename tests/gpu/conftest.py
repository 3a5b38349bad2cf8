"""What the tests on a GPU have in common. They need pytest, and the package with its extra `gpu`; nothing else.

Random numbers differ from run to run. A test that fails prints the seed, and the environment variable QLEARN_SEED
repeats it. Each test begins with the same seed, so one of them can be repeated alone.
"""

import os
import secrets

import numpy as np
import pytest
import torch

from qlearn.kernels.cuda import SIMULATED

SEED = os.environ.get("QLEARN_SEED") or str(secrets.randbelow(2**31))
if not SEED.isdecimal() or int(SEED) >= 2**31:
    raise pytest.UsageError(f"QLEARN_SEED={SEED} is no seed; give a whole number from 0 to {2**31 - 1}")


def pytest_report_header():
    return f"QLEARN_SEED={SEED}"


def pytest_make_parametrize_id(val):
    """float16 in the name of a test, where pytest would write dtype0."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Without a GPU, and in the simulator, nothing of this folder runs. A skip from here is reported in one line."""
    if SIMULATED or not torch.cuda.is_available():
        pytest.skip("this needs an NVIDIA GPU; tests/kernels/cuda runs the same kernels in a simulator, at toy size")


@pytest.fixture(autouse=True)
def seed():
    """The seed, with which torch's random numbers begin. A kernel that fails later than its launch fails here."""
    print(f"QLEARN_SEED={SEED}")  # pytest shows it for a test that fails
    torch.manual_seed(int(SEED))
    yield int(SEED)
    torch.cuda.synchronize()


@pytest.fixture
def rng(seed):
    """NumPy's random numbers."""
    return np.random.default_rng(seed)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds bytes of 0xFF, which are NaN in every float."""
    empty = torch.empty

    def full_of_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", full_of_nan)


def _at_least(*wanted):
    """A fixture that skips what older GPUs cannot run."""

    @pytest.fixture(scope="session")
    def check():
        has = torch.cuda.get_device_capability()
        if has < wanted:
            pytest.skip("needs compute capability {}.{}, and this GPU has {}.{}".format(*wanted, *has))

    return check


capability_8 = _at_least(8, 0)
capability_9 = _at_least(9, 0)
