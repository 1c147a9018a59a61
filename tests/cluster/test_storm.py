"""A series under everything a cluster does to it: nothing is lost, nothing runs twice."""

import itertools
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.plan import UNSTRUCTURED
from tests.cluster.cluster import Cluster
from tests.cluster.sweeps import ClusterSweep, high, interrupted

pytestmark = pytest.mark.cluster
KINDS = {"preempt", "fail_first_node", "requeue", "fail_second_node", "restart_controller"}


class Storm:
    """What befalls the runs of a sweep, one blow at a time, at random moments."""

    def __init__(self, sweep: ClusterSweep) -> None:
        self.cluster, self.sweep = sweep.cluster, sweep
        self.random = random.Random(4)
        self.blows: Iterator[Callable[[], None]] = itertools.chain(
            [self.preempt, self.fail_first_node, self.requeue, self.fail_second_node],
            [self.restart_controller, self.time_limit],
            itertools.repeat(self.preempt),
        )
        self.dealt: list[str] = []
        self.lost: list[tuple[str, int]] = []  # run, and how many attempts it had begun by then
        self.limited: str | None = None  # the run whose time limit is near

    def preempt(self) -> None:
        """All that run, where one is not struck yet; else all, or one of them."""
        everything = bool(self.untouched()) or self.random.random() < 0.5
        high(self.cluster, 1, None if everything else 1)

    def requeue(self) -> None:
        """The scheduler's operator requeues one task."""
        self.cluster.run("scontrol", "requeue", self.sweep.task(self.victim()))

    def fail_first_node(self) -> None:
        """With the batch shells and the ranks 0."""
        self.fail("n1")

    def fail_second_node(self) -> None:
        self.fail("n2")

    def fail(self, node: str) -> None:
        """Raises LookupError if it hit no run: the last ones had just ended."""
        training = self.sweep.training()
        self.cluster.control("fail", node)
        self.cluster.control("recover", node)
        attempts = {name: self.sweep.attempts(name) for name in training}
        lost = [
            (name, sum(record["event"] == "start" for record in records))
            for name, records in attempts.items()
            if not self.sweep.result(name) and records[-1]["event"] != "requeue"
        ]
        self.lost += lost
        if not lost:
            raise LookupError("no run was on the node")

    def restart_controller(self) -> None:
        self.cluster.control("restart", "slurmctld")

    def time_limit(self) -> None:
        """A running task's limit is moved to its next minute. Until then nothing else strikes the
        run, which may be done before: so it is one struck already. Raises LookupError if none is.
        """
        untouched = self.untouched()
        struck = [name for name in self.sweep.training() if name not in untouched]
        run_id = self.random.choice(struck)
        task = self.sweep.task(run_id)
        seconds = self.cluster.run("squeue", "-h", "-j", task, "-o", "%M").split(":")
        self.set_limit(task, int(seconds[-2]) + 1)
        self.limited = run_id

    def limit_has_struck(self) -> bool:
        """Whether the run of `time_limit` has ended since. A quick one was done before it: then
        another one is to be limited.
        """
        assert self.limited is not None
        causes = [record["cause"] for record in self.sweep.attempts(self.limited, "requeue")]
        if "timed_out" not in causes:
            if not self.sweep.result(self.limited):
                return False
            self.blows = itertools.chain([self.time_limit], self.blows)
        else:
            self.set_limit(self.sweep.task(self.limited), 30)
        self.limited = None
        return True

    def set_limit(self, task: str, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"JobId={task}", f"TimeLimit={minutes}")

    def victim(self) -> str:
        """A run that trains, rather one not struck yet. Raises LookupError if there is none."""
        names = [name for name in self.sweep.training() if name != self.limited]
        untouched = [name for name in self.untouched() if name in names]
        if not names:
            raise LookupError("no run trains")
        return self.random.choice(untouched or names)

    def untouched(self) -> list[str]:
        names = self.sweep.training()
        return [name for name in names if not interrupted(self.sweep.attempts(name))]

    def rage(self, seconds: float) -> None:
        """Until every run was interrupted, several of them twice, and all are done."""
        deadline = time.monotonic() + seconds
        while not self.sweep.all_done():
            assert time.monotonic() < deadline, self.cluster.run("squeue")
            self.sweep.wait(lambda: True, "no failure")
            counts = {name: interrupted(self.sweep.attempts(name)) for name in self.sweep.runs()}
            twice = sum(count >= 2 for count in counts.values()) >= len(counts) // 3
            over = twice and min(counts.values()) >= 1 and set(self.dealt) >= KINDS
            passed = not self.cluster.run("squeue", "-h", "-p", "high")
            if not over and passed and self.sweep.training():
                time.sleep(self.random.uniform(0, 1.5))
                self.strike()
            time.sleep(0.3)

    def strike(self) -> None:
        # Runs beside the one with the near limit would be done before their turn.
        waiting = self.limited is not None and not self.limit_has_struck()
        blow = self.requeue if waiting else next(self.blows)
        try:
            blow()
            self.dealt.append(blow.__name__)
        except (LookupError, subprocess.CalledProcessError):  # it has just ended
            if not waiting:  # a limit may wait for a struck run: there has to be one
                first = [self.preempt] if blow == self.time_limit else []
                self.blows = itertools.chain(first, [blow], self.blows)


def storm(sweep: ClusterSweep, source: Path, series: tuple[str, ...], epochs: int,
          seconds: float) -> None:  # fmt: skip
    settings = ["--epochs", epochs, "--print-freq", 4, "--eval-every", 10]
    settings += ["--checkpoint-minutes", 0.02, "--source-net", source]
    assert sweep.series("Digits/bip.yml", "--series", ",".join(series), *settings) == 0
    began = time.monotonic()
    weather = Storm(sweep)
    weather.rage(seconds)
    took = time.monotonic() - began
    (array,) = sweep.arrays()
    assert [len(task) for task in array["tasks"]] == [1] * len(series)
    sweep.assert_as_undisturbed(*sweep.runs())
    counts = {c.k_text: interrupted(sweep.attempts(name)) for name, c in sweep.runs().items()}
    causes = [cause for run_id in sweep.runs() for cause in sweep.causes(run_id, "requeue")]
    print(f"{weather.dealt}: interruptions {counts} in {took:.0f} s; requeued: {causes}")
    assert min(counts.values()) >= 1
    assert sum(count >= 2 for count in counts.values()) >= len(series) // 3
    assert set(weather.dealt) >= KINDS
    for run_id, number in weather.lost:  # that attempt ended without an agreed stop
        records = sweep.attempts(run_id)
        begun = [at for at, record in enumerate(records) if record["event"] == "start"]
        after = records[begun[number - 1] : begun[number]]
        assert not any(r["event"] == "end" and r["cause"].startswith("SIG") for r in after)
    assert "preempted" in causes
    if len(series) > 5:  # of few quick runs none may last until its limit
        assert "timed_out" in causes


@pytest.fixture
def stormy(
    start_cluster: Callable[..., Cluster], sweep_on: Callable[..., ClusterSweep]
) -> ClusterSweep:
    """Room for two runs at once; 15 s to save when preempted."""
    cluster = start_cluster(cpus=2, **{"grace-time": 15, "kill-wait": 5})
    return sweep_on(cluster, partition="low", parallelism=2)


def test_five_values_in_a_storm(stormy: ClusterSweep, source: Path) -> None:
    storm(stormy, source, ("0.5", "0.2", "0.1", "0.05", "0.02"), 20, 1200)


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_the_whole_series_in_a_storm(stormy: ClusterSweep, source: Path) -> None:
    storm(stormy, source, UNSTRUCTURED, 30, 3000)
