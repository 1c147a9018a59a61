"""Tasks that wait in SLURM's queue for one that failed: cancelled, and submitted again."""

from pathlib import Path

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
        self.before = 0
        assert self.series(series) == 0
        self.before = 100 + len(self.submitted())
        names = ("pretrain", "prune", "finetune")
        self.dense, self.pruned, self.tuned = (
            [run.run_id for run in self.sweep.runs() if run.stage == stage] for stage in names
        )

    def series(self, series: str = "0.5,0.1", stages: str = "pretrain,prune,finetune") -> int:
        return main(["series", *self.argv, "--series", series, "--stages", stages])

    def resume(self) -> int:
        return main(["resume", str(self.sweep.folder), "--no-wait", "--no-snapshot"])

    def submitted(self, after: int = 0) -> list[tuple[str, list[list[str]], str]]:
        """Since the chain, or an array."""
        found = list(read_jsonl(self.sweep.jobs / "arrays.jsonl"))
        new = [array for array in found if int(array["job"]) > max(after, self.before)]
        return [(array["stage"], array["tasks"], array["dependency"]) for array in new]

    @property
    def sizes(self) -> list[int]:
        return [len(tasks) for _, tasks, _ in self.submitted()]


@pytest.fixture
def chain(cluster: FakeCluster) -> Chain:
    return Chain(cluster)


PENDING = dict.fromkeys(("t102_0", "t102_1", "t103_0", "t103_1"), "PENDING")


def each(run_ids: list[str]) -> list[list[str]]:
    return [[run_id] for run_id in run_ids]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_what_waits_for_a_failed_run_is_submitted_again(
    chain: Chain, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.sweep.fail(chain.dense[0], "ValueError: bug")
    chain.cluster.queue(**PENDING)
    assert main(["status", str(chain.sweep.folder)]) == 0
    assert "1 failed, 4 blocked" in " ".join(capsys.readouterr().out.split())
    assert getattr(chain, command)() == 0
    assert "cancelled 4 tasks (4 runs)" in capsys.readouterr().out
    assert chain.cluster.cancelled == ["102_0", "102_1", "103_0", "103_1"]
    assert chain.submitted() == [
        ("pretrain", each(chain.dense), ""),
        ("prune", each(chain.pruned), "afterok:104_0"),
        ("finetune", each(chain.tuned), "aftercorr:105"),
    ]
    waiting = {f"t{job}_{at}": "PENDING" for job in (105, 106) for at in "01"}
    chain.cluster.queue(t104_0="RUNNING", **waiting)
    assert chain.resume() == chain.series() == 0
    assert chain.submitted(106) == []


def test_one_that_only_left_the_queue_dooms_too(chain: Chain) -> None:
    chain.cluster.queue(**PENDING)
    assert chain.resume() == 0
    assert len(chain.cluster.cancelled) == 4
    assert chain.sizes == [1, 2, 2]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_only_what_waits_for_the_failed_one(chain: Chain, command: str) -> None:
    """One pruning runs and its fine-tuning waits; the other failed."""
    finish(chain.sweep, *chain.dense)
    chain.cluster.queue(t102_0="RUNNING", t103_0="PENDING", t103_1="PENDING")
    chain.sweep.fail(chain.pruned[1], "bug")
    assert getattr(chain, command)() == 0
    assert chain.cluster.cancelled == ["103_1"]
    assert chain.submitted() == [
        ("prune", [chain.pruned[1:]], ""),
        ("finetune", [chain.tuned[1:]], "aftercorr:104"),
    ]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_a_healthy_chain_is_left_alone(chain: Chain, command: str) -> None:
    chain.cluster.queue(t101_0="RUNNING", **PENDING)
    assert getattr(chain, command)() == 0
    finish(chain.sweep, *chain.dense)
    chain.cluster.queue(**PENDING | {"t102_0": "RUNNING"})
    assert getattr(chain, command)() == 0
    assert (chain.cluster.cancelled, chain.submitted()) == ([], [])


def test_slurm_may_report_that_a_task_will_never_start(chain: Chain) -> None:
    """Its need was submitted once more meanwhile, and is done."""
    finish(chain.sweep, *chain.dense)
    never = "PENDING|DependencyNeverSatisfied"
    chain.cluster.queue(t102_0=never, t102_1="RUNNING", t103_1="PENDING")
    assert chain.resume() == 0
    assert chain.cluster.cancelled == ["102_0"]
    assert chain.submitted()[0] == ("prune", [chain.pruned[:1]], "")


def test_a_task_is_doomed_with_all_its_runs(cluster: FakeCluster) -> None:
    """Two prunings in one task, of which one failed and one is done."""
    chain = Chain(cluster, per_task=2)
    finish(chain.sweep, chain.dense[0], chain.pruned[0])
    chain.sweep.fail(chain.pruned[1], "bug")
    cluster.queue(t103_0="PENDING")
    assert chain.resume() == 0
    assert cluster.cancelled == ["103_0"]
    assert chain.submitted() == [
        ("prune", [chain.pruned[1:]], ""),
        ("finetune", [chain.tuned[:1]], ""),
        ("finetune", [chain.tuned[1:]], "aftercorr:104"),
    ]


def test_of_tasks_of_several_runs_only_that_of_the_failed_one(cluster: FakeCluster) -> None:
    """Tasks of two runs: that of the failed one, and that of two which run."""
    values = "0.5,0.4,0.3,0.2"
    chain = Chain(cluster, per_task=2, series=values)
    finish(chain.sweep, *chain.dense)
    chain.sweep.fail(chain.pruned[1], "bug")
    cluster.queue(t102_1="RUNNING", t103_0="PENDING", t103_1="PENDING")
    assert chain.series(values) == 0
    assert cluster.cancelled == ["103_0"]
    assert chain.submitted() == [
        ("prune", [chain.pruned[:2]], ""),
        ("finetune", [chain.tuned[:2]], "aftercorr:104"),
    ]


def test_an_array_that_waits_for_nothing_that_failed_is_not_cancelled(cluster: FakeCluster) -> None:
    """Two seeds, of which one's pretraining failed. (102 and 104 are of the first seed.)"""
    chain = Chain(cluster, seeds="0,1")
    first = next(read_jsonl(chain.sweep.jobs / "arrays.jsonl"))
    chain.sweep.fail(first["tasks"][0][0], "bug")
    both = {f"t{job}_{at}": "PENDING" for job in (102, 103, 104, 105) for at in "01"}
    cluster.queue(t101_1="PENDING", **both)
    assert chain.resume() == 0
    assert cluster.cancelled == ["102_0", "102_1", "104_0", "104_1"]
    assert chain.sizes == [1, 2, 2]


def test_nothing_is_cancelled_that_cannot_be_submitted_now(chain: Chain) -> None:
    """The failed one's task goes on with others, or another series failed."""
    finish(chain.sweep, *chain.dense)
    chain.sweep.fail(chain.pruned[0], "bug")
    tuned = {"t103_0": "PENDING", "t103_1": "PENDING"}
    chain.cluster.queue(t102_0="RUNNING", t102_1="RUNNING", **tuned)
    assert chain.resume() == 0
    assert (chain.cluster.cancelled, chain.submitted()) == ([], [])
    chain.cluster.queue(t102_1="RUNNING", **tuned)
    assert chain.series(series="0.3") == 0
    assert (chain.cluster.cancelled, chain.sizes) == ([], [1, 1])


def test_a_shorter_series_takes_what_waits_along(chain: Chain) -> None:
    """The same pretraining failed for the runs of an earlier command, too."""
    chain.sweep.fail(chain.dense[0], "bug")
    chain.cluster.queue(**PENDING)
    assert chain.series(stages="pretrain,prune", series="0.5") == 0
    assert len(chain.cluster.cancelled) == 4
    tasks = [tasks for _, tasks, _ in chain.submitted()]
    assert tasks == [each(chain.dense), each(chain.pruned), each(chain.tuned)]


def test_a_submission_that_stops_after_the_cancel_loses_nothing(chain: Chain) -> None:
    """Nor do cancelled tasks take places: five jobs may be in the queue."""
    chain.sweep.fail(chain.dense[0], "bug")
    chain.cluster.accounting("mine |normal|5|\n", "normal||00:00:00|cluster|\n")
    chain.cluster.queue(**PENDING)
    chain.cluster.file("refuse-4")
    assert chain.resume() == 2
    assert (len(chain.cluster.cancelled), chain.submitted()) == (4, [])
    chain.cluster.file("refuse-6")
    assert chain.resume() == 2
    assert chain.submitted() == [("pretrain", each(chain.dense), "")]
    chain.cluster.queue(t105_0="PENDING")
    assert chain.resume() == 0
    assert [(stage, len(tasks), after) for stage, tasks, after in chain.submitted(105)] == [
        ("prune", 2, "afterok:105_0"),
        ("finetune", 2, "aftercorr:107"),
    ]
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
