"""Limits that runs meet: of memory, of a QOS, of the disk that takes the results."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.sweeps import ClusterSweep

pytestmark = pytest.mark.cluster
DIGITS = ("Digits/pretrain.yml", "--stages", "pretrain", "--series", "1")
CGROUP = "CgroupPlugin=cgroup/v{}\nConstrainRAMSpace=yes\n"


@pytest.fixture(scope="module")
def limited(start_cluster: Callable[..., Cluster]) -> Cluster:
    """A node that enforces memory limits by cgroups, and a QOS `small`, enforced too."""
    cluster = start_cluster(nodes=1)
    conf = cluster.directory / "etc" / "slurm.conf"
    text = conf.read_text().replace("TaskPlugin=task/none", "TaskPlugin=task/cgroup")
    conf.write_text(text + "AccountingStorageEnforce=limits,qos\n")
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    (conf.parent / "cgroup.conf").write_text(CGROUP.format(version))
    for line in ("add qos small", "add account lab", "add user root account=lab qos=small,normal"):
        cluster.run("sacctmgr", "-i", *line.split())
    for daemon in ("slurmctld", "n1"):
        cluster.control("restart", daemon)
    return cluster


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of results, on a disk of 40 MB."""
    place = tmp_path / "out"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def ended(sweep: ClusterSweep, capsys: Any) -> str:
    """Why the only run of the sweep has failed, when it has."""

    def row() -> dict[str, Any]:
        (found,) = sweep.status(capsys)
        return found

    sweep.cluster.wait(lambda: row()["state"] == "failed", "the run has failed", 300)
    return str(row()["reason"])


def test_a_memory_limit_that_was_hit_is_final_and_named(
    limited: Cluster, sweep_on: Callable[..., ClusterSweep], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_on(limited, nodes=1, mem="150M")
    assert sweep.series(*DIGITS) == 0
    reason = ended(sweep, capsys)
    assert "memory limit of 150 MB was hit" in reason
    assert "give more mem" in reason
    assert limited.job(sweep.task(*sweep.runs()))["Restarts"] == "0"


def test_a_limit_of_the_qos_is_refused_before_and_named_while_waiting(
    limited: Cluster, sweep_on: Callable[..., ClusterSweep], capsys: pytest.CaptureFixture[str]
) -> None:
    def limit(cpus: int) -> None:
        limited.run("sacctmgr", "-i", *f"modify qos small set MaxTRESPerJob=cpu={cpus}".split())

    sweep = sweep_on(limited, nodes=1, qos="small", account="lab", cpus_per_task=2, mem="2G")
    limit(1)
    assert sweep.series(*DIGITS) == 2
    assert "qos" in capsys.readouterr().err.lower()
    limit(4)
    blocker = limited.submit("sleep 600", "--exclusive", "--account=lab")
    limited.wait_for_state(blocker, "RUNNING")
    assert sweep.series(*DIGITS) == 0
    limit(1)
    limited.run("scancel", blocker)

    def reason() -> str:
        (row,) = sweep.status(capsys)
        assert row["state"] == "waiting"
        return str(row["reason"])

    limited.wait(lambda: "limit of its QOS" in reason(), "the reason is named", 60)
    assert "change the profile" in reason()
    limited.run("scancel", sweep.task(*sweep.runs()))


def test_a_full_disk_bounds_the_restarts_and_is_the_reason(
    limited: Cluster, sweep_on: Callable[..., ClusterSweep], small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sweep = sweep_on(limited, nodes=1, mem="2G", retries={"lost": 1})
    assert sweep.results == small_disk
    assert sweep.series(*DIGITS, "--epochs", 5000, "--checkpoint-minutes", 0.01) == 0
    sweep.wait(sweep.training, "it trains")
    fill = ["dd", "if=/dev/zero", f"of={small_disk}/filler", "bs=4k"]
    assert subprocess.run(fill, capture_output=True).returncode == 1
    assert "No space left" in ended(sweep, capsys)
    assert int(limited.job(sweep.task(*sweep.runs()))["Restarts"]) <= 1
