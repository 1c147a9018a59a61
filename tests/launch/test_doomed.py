"""Tasks that wait in SLURM's queue for one that failed: cancelled, and submitted again."""

from pathlib import Path
from typing import Any

import pytest

from bip.files import read_jsonl
from launch.__main__ import main
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, finish
from tests.launch.fake_cluster import FakeCluster


class Chain:
    """d -> p of each k -> f of each k, submitted by `series`: arrays 101, 102 and 103."""

    def __init__(
        self, cluster: FakeCluster, *, per_task: int = 1, series: str = "0.5,0.1", seeds: str = "0"
    ) -> None:
        self.cluster, folder = cluster, cluster.folder.parent
        profile = folder / "profile.yml"
        profile.write_text(f"executor: slurm\nsignal_lead: 60\nruns_per_task: {per_task}\n")
        self.sweep = Sweep(folder / "out" / "hand")
        self.argv = ["--configs", str(DIGITS / "bip.yml"), "--profile", str(profile), "--no-wait"]
        self.argv += ["--result-dir", str(folder / "out"), "--exp-name", "hand", "--no-snapshot"]
        self.argv += ["--seeds", seeds]
        self.before, self.values = 0, series
        assert self.series() == 0
        self.before = 100 + len(self.submitted())

    def series(self, series: str = "", stages: str = "pretrain,prune,finetune") -> int:
        values = series or self.values
        return main(["series", *self.argv, "--series", values, "--stages", stages])

    def resume(self) -> int:
        return main(["resume", str(self.sweep.folder), "--no-wait", "--no-snapshot"])

    def names(self) -> dict[str, str]:
        """RUN_ID -> d0, p0, p1 ..., f0 ..., in the ledger's order."""
        runs, letters = self.sweep.runs(), {"pretrain": "d", "prune": "p", "finetune": "f"}
        by_stage = {s: [run.run_id for run in runs if run.stage == s] for s in letters}
        return {r: f"{letters[s]}{at}" for s, ids in by_stage.items() for at, r in enumerate(ids)}

    def run_id(self, name: str) -> str:
        return {name: run_id for run_id, name in self.names().items()}[name]

    def submitted(self, after: int = 0) -> list[str]:
        """Since the chain, or an array: `prune: p0, p1 afterok:101_0`, the tasks by their runs."""
        names, lines = self.names(), []
        for array in read_jsonl(self.sweep.jobs / "arrays.jsonl"):
            if int(array["job"]) > max(after, self.before):
                tasks = ", ".join(" ".join(names[one] for one in task) for task in array["tasks"])
                lines.append(f"{array['stage']}: {tasks} {array['dependency']}".rstrip())
        return lines


@pytest.fixture
def chain(cluster: FakeCluster) -> Chain:
    return Chain(cluster)


PENDING = dict.fromkeys(("t102_0", "t102_1", "t103_0", "t103_1"), "PENDING")
TUNED = {"t103_0": "PENDING", "t103_1": "PENDING"}
NEVER = "PENDING|DependencyNeverSatisfied"
ALL_AGAIN = ["pretrain: d0", "prune: p0, p1 afterok:104_0", "finetune: f0, f1 aftercorr:105"]


# (the chain's options, what is done, what failed, SLURM's queue; tasks cancelled, arrays submitted)
SITUATIONS: dict[str, tuple[dict[str, Any], str, str, dict[str, str], str, list[str]]] = {
    "what waits for a failed run": (
        {}, "", "d0", PENDING, "102_0 102_1 103_0 103_1", ALL_AGAIN),
    "one that only left the queue dooms too": (
        {}, "", "", PENDING, "102_0 102_1 103_0 103_1", ALL_AGAIN),
    "only what waits for the failed one; the other runs": (
        {}, "d0", "p1", TUNED | {"t102_0": "RUNNING"}, "103_1",
        ["prune: p1", "finetune: f1 aftercorr:104"]),
    "a healthy chain": ({}, "", "", PENDING | {"t101_0": "RUNNING"}, "", []),
    "a healthy chain, later": ({}, "d0", "", PENDING | {"t102_0": "RUNNING"}, "", []),
    "SLURM reports that it never starts; its need was submitted again, and is done": (
        {}, "d0", "", {"t102_0": NEVER, "t102_1": "RUNNING", "t103_1": "PENDING"},
        "102_0", ["prune: p0", "finetune: f0 aftercorr:104"]),
    "a task of a failed and a done run": (
        {"per_task": 2}, "d0 p0", "p1", {"t103_0": "PENDING"}, "103_0",
        ["prune: p1", "finetune: f0", "finetune: f1 aftercorr:104"]),
    "of tasks of two runs that of the failed one": (
        {"per_task": 2, "series": "0.5,0.4,0.3,0.2"}, "d0", "p1", TUNED | {"t102_1": "RUNNING"},
        "103_0", ["prune: p0 p1", "finetune: f0 f1 aftercorr:104"]),
    "one seed of two; 102 and 104 are its": (
        {"seeds": "0,1"}, "", "d0",
        {f"t{job}_{at}": "PENDING" for job in (102, 103, 104, 105) for at in "01"}
        | {"t101_1": "PENDING"},
        "102_0 102_1 104_0 104_1",
        ["pretrain: d0", "prune: p0, p1 afterok:106_0", "finetune: f0, f1 aftercorr:107"]),
    "what cannot be submitted now: the failed one's task goes on": (
        {}, "d0", "p0", TUNED | {"t102_0": "RUNNING", "t102_1": "RUNNING"}, "", []),
}  # fmt: skip


@pytest.mark.parametrize("command", ["resume", "series"])
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_situation(situation: Any, command: str, cluster: FakeCluster) -> None:
    options, done, failed, queue, cancelled, submitted = situation
    chain = Chain(cluster, **options)
    finish(chain.sweep, *map(chain.run_id, done.split()))
    for name in failed.split():
        chain.sweep.fail(chain.run_id(name), "bug")
    cluster.queue(**queue)
    assert getattr(chain, command)() == 0
    assert (cluster.cancelled, chain.submitted()) == (cancelled.split(), submitted)


def test_what_was_cancelled_is_reported_and_waits_in_the_new_arrays(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.sweep.fail(chain.run_id("d0"), "ValueError: bug")
    chain.cluster.queue(**PENDING)
    assert main(["status", str(chain.sweep.folder)]) == 0
    assert "1 failed, 4 blocked" in " ".join(capsys.readouterr().out.split())
    assert chain.resume() == 0
    assert "cancelled 4 tasks (4 runs)" in capsys.readouterr().out
    waiting = {f"t{job}_{at}": "PENDING" for job in (105, 106) for at in "01"}
    chain.cluster.queue(t104_0="RUNNING", **waiting)
    assert chain.resume() == chain.series() == 0
    assert chain.submitted(106) == []


def test_another_series_leaves_what_waits_for_a_failed_one(chain: Chain) -> None:
    finish(chain.sweep, chain.run_id("d0"))
    chain.sweep.fail(chain.run_id("p0"), "bug")
    chain.cluster.queue(t102_1="RUNNING", **TUNED)
    assert chain.series("0.3") == 0
    assert (chain.cluster.cancelled, len(chain.submitted())) == ([], 2)


def test_a_shorter_series_takes_what_waits_along(chain: Chain) -> None:
    """The same pretraining failed for the runs of an earlier command, too."""
    chain.sweep.fail(chain.run_id("d0"), "bug")
    chain.cluster.queue(**PENDING)
    assert chain.series("0.5", "pretrain,prune") == 0
    assert len(chain.cluster.cancelled) == 4
    assert chain.submitted() == ALL_AGAIN


def test_a_submission_that_stops_after_the_cancel_loses_nothing(chain: Chain) -> None:
    """Nor do cancelled tasks take places: five jobs may be in the queue."""
    chain.sweep.fail(chain.run_id("d0"), "bug")
    chain.cluster.accounting("mine |normal|5|\n", "normal||00:00:00|cluster|\n")
    chain.cluster.queue(**PENDING)
    chain.cluster.file("refuse-4")
    assert chain.resume() == 2
    assert (len(chain.cluster.cancelled), chain.submitted()) == (4, [])
    chain.cluster.file("refuse-6")
    assert chain.resume() == 2
    assert chain.submitted() == ["pretrain: d0"]
    chain.cluster.queue(t105_0="PENDING")
    assert chain.resume() == 0
    again = ["prune: p0, p1 afterok:105_0", "finetune: f0, f1 aftercorr:107"]
    assert chain.submitted(105) == again
    assert len(chain.cluster.cancelled) == 4


def test_a_folder_with_a_percent_sign_is_refused(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yml").write_text("executor: slurm\n")
    argv = ["--configs", str(DIGITS / "pretrain.yml"), "--profile", str(tmp_path / "p.yml")]
    assert main(["series", *argv, "--result-dir", str(tmp_path), "--exp-name", "50%"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: result_dir, exp_name: ")
    assert not (tmp_path / "50%").exists()
