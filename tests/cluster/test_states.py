"""`launch status` of a real series, taken through the states that SLURM can give it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from tests.cluster.cluster import Cluster
from tests.cluster.sweeps import ClusterSweep, high

pytestmark = pytest.mark.cluster
ENDLESS = ("--epochs", 5000, "--print-freq", 2, "--checkpoint-minutes", 0.01)


def test_the_states_of_a_series(
    cluster: Cluster, sweep_on: Callable[..., ClusterSweep], source: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sweep = sweep_on(cluster, nodes=1, parallelism=1)
    line = ("--series", "0.5,0.2", "--source-net", source, *ENDLESS)
    assert sweep.series("Digits/bip.yml", *line) == 0
    first, second = sorted(sweep.runs(), key=sweep.task)
    tasks = {run_id: sweep.task(run_id) for run_id in (first, second)}

    def row(run_id: str) -> dict[str, Any]:
        (found,) = [row for row in sweep.status(capsys) if row["run_id"] == run_id]
        return found

    def comes_to_be(run_id: str, *states: str) -> dict[str, Any]:
        sweep.wait(lambda: row(run_id)["state"] in states, f"{run_id} is {states}", 120)
        return row(run_id)

    sweep.wait(sweep.training, "it trains")
    running = comes_to_be(first, "running")
    assert (running["task"], running["attempt"]) == (tasks[first], 1)
    assert running["node"]
    assert running["images_per_second"] > 0
    assert running["eta"] > 0
    assert "in the queue" in comes_to_be(second, "waiting")["reason"]

    cluster.run("scontrol", "hold", tasks[second])
    assert f"scontrol release {tasks[second]}" in comes_to_be(second, "held")["reason"]
    cluster.run("scontrol", "release", tasks[second])
    comes_to_be(second, "waiting")
    cluster.run("scontrol", "hold", tasks[second])  # else it would take the node of the first

    cluster.run("scontrol", "suspend", tasks[first])
    comes_to_be(first, "suspended")
    cluster.run("scontrol", "resume", tasks[first])
    comes_to_be(first, "running")

    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", "/nonexistent")
        assert row(first)["state"] == "running"

    blocker = high(cluster, 600)
    # With GraceTime=0 it may have had no time to record the cause.
    back = comes_to_be(first, "preempted", "requeued")
    assert "interrupted 1 time" in back["reason"]
    cluster.run("scancel", blocker)
    sweep.wait(lambda: row(first)["attempt"] == 2, "the second attempt")
    comes_to_be(first, "running")

    assert main(["cancel", str(sweep.folder)]) == 0
    for run_id in (first, second):
        cluster.wait(lambda: row(run_id)["state"] == "cancelled", "it is cancelled", 60)  # noqa: B023
    assert main(["status", str(sweep.folder)]) == 0
    assert "2 cancelled" in capsys.readouterr().out
