"""Real SLURM clusters on this machine, and sweeps on them."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.sweeps import ClusterSweep

FAST = {"requeue-delay": 5, "kill-wait": 2, "grace-time": 0}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long waits need a longer time-out than the other tests'; the storm, longest, comes first."""
    items.sort(key=lambda item: item.path.name != "test_storm.py")
    for item in items:
        in_here = Path(__file__).parent in item.path.parents
        if in_here and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """Start clusters with given options (over the fast ones); all end with the test session."""
    with ExitStack() as stack:

        def start(**options: object) -> Cluster:
            # Not pytest's temporary folder: its path is too long for a socket's.
            parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-"))
            Path(parent).chmod(0o755)
            cluster = Cluster(Path(parent) / "cluster", **(FAST | options))
            stack.callback(cluster.down)
            return cluster

        yield start


@pytest.fixture(scope="session")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes of 4 CPUs and 2 GPUs that do not exist, GraceTime 0, short waits."""
    return start_cluster(gpus=2)


@pytest.fixture
def sweep_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClusterSweep]:
    """A sweep on a cluster, with keys of its profile; this process uses that cluster's SLURM."""

    def make(cluster: Cluster, **profile: object) -> ClusterSweep:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return ClusterSweep(cluster, tmp_path / "out", **profile)

    return make
