"""Fixtures of several files."""

from collections.abc import Iterator

import pytest

from bip.pruning import passes, state
from bip.pruning.select_cuda import CudaSelector
from bip.training import fused


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too, what a GPU runs."""
    what_a_gpu_runs(monkeypatch)


@pytest.fixture(scope="module", params=["CPU", "GPU"])
def both_devices(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tests of a file twice: with the compiled passes, and with what a GPU runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "GPU":
            what_a_gpu_runs(patch)
        yield


def what_a_gpu_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(passes, "is_compiled", lambda *_: False)
    patch.setattr(fused, "lower_step", lambda *_: False)
    patch.setattr(fused, "upper_step", lambda *_: False)
    patch.setattr(state, "make_selector", CudaSelector)
