import pytest

from qlearn.kernels.cuda import SIMULATED


@pytest.fixture(autouse=True)
def quiet_simulator():
    """The simulator leaves the processor to the kernel."""
    if not SIMULATED:
        yield
        return
    from tests.kernels.cuda.quiet import quiet

    with quiet():
        yield


@pytest.fixture
def side_by_side():
    """All blocks of a launch run at once, as they do on a GPU."""
    if not SIMULATED:
        yield
        return
    from tests.kernels.cuda.quiet import side_by_side

    with side_by_side():
        yield
