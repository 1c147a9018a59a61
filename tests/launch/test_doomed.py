"""Tasks that wait in SLURM's queue for one that failed: cancelled, and submitted again."""

import os
from pathlib import Path

import pytest

from bip.files import read_jsonl
from launch.__main__ import main
from launch.slurm import arrays
from launch.status import status
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS
from tests.launch.test_doctor import FakeCluster
from tests.launch.test_sbatch import SBATCH, finish

# As far as pending tasks go: they leave the queue at once.
SCANCEL = """#!/bin/bash
cd "$(dirname "$0")"
echo "$@" >>cancelled
for task; do sed -i "/^$task|/d" queue; done
"""


class Chain:
    """d -> p of each k -> f of each k, submitted by `series`: arrays 101, 102 and 103."""

    def __init__(
        self, folder: Path, *, per_task: int = 1, series: str = "0.5,0.1", seeds: str = "0"
    ) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        cluster = self.cluster = FakeCluster(self.bin)
        test_only = "#!/bin/bash\n[[ $1 != --test-only ]] || exit 0"
        cluster.file("sbatch", SBATCH.replace("#!/bin/bash", test_only))
        cluster.file("scancel", SCANCEL)
        profile = folder / "profile.yml"
        profile.write_text(f"executor: slurm\nsignal_lead: 60\nruns_per_task: {per_task}\n")
        self.sweep = Sweep(folder / "out" / "hand")
        self.argv = ["--configs", str(DIGITS / "bip.yml"), "--profile", str(profile), "--no-wait"]
        self.argv += ["--result-dir", str(folder / "out"), "--exp-name", "hand", "--no-snapshot"]
        self.argv += ["--seeds", seeds]
        assert self.series(series) == 0

    def series(self, series: str = "0.5,0.1", stages: str = "pretrain,prune,finetune") -> int:
        return main(["series", *self.argv, "--series", series, "--stages", stages])

    def resume(self) -> int:
        return main(["resume", str(self.sweep.folder), "--no-wait", "--no-snapshot"])

    def queue(self, **states: str) -> None:
        """Given as t102_0="PENDING"."""
        lines = [f"{task[1:]}|{state}|Dependency|0:00\n" for task, state in states.items()]
        (self.bin / "queue").write_text("".join(lines))

    def ids(self, stage: str) -> list[str]:
        return [record.run_id for record in self.sweep.runs() if record.stage == stage]

    @property
    def cancelled(self) -> list[str]:
        path = self.bin / "cancelled"
        return path.read_text().split() if path.exists() else []

    def submitted(self, after: int = 103) -> list[tuple[str, list[list[str]], str]]:
        found = list(read_jsonl(self.sweep.jobs / "arrays.jsonl"))
        new = [array for array in found if int(array["job"]) > after]
        return [(array["stage"], array["tasks"], array["dependency"]) for array in new]


@pytest.fixture(autouse=True)
def in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(arrays, "ENDING_SECONDS", 0.6)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


PENDING = dict.fromkeys(("t102_0", "t102_1", "t103_0", "t103_1"), "PENDING")


def each(run_ids: list[str]) -> list[list[str]]:
    return [[run_id] for run_id in run_ids]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_what_waits_for_a_failed_run_is_submitted_anew(
    chain: Chain, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pruned, tuned = map(chain.ids, ("pretrain", "prune", "finetune"))
    chain.sweep.fail(dense[0], "ValueError: bug")
    chain.queue(**PENDING)
    states = [(row.state, row.reason) for row in status(chain.sweep.folder)]
    blocked = ("blocked", "its task in the queue waits for one that failed")
    assert states == [("failed", "ValueError: bug"), *4 * [blocked]]
    assert getattr(chain, command)() == 0
    told = "cancelled 4 tasks (4 runs) that waited for what failed; they are submitted again"
    assert told in capsys.readouterr().out.splitlines()
    assert chain.cancelled == ["102_0", "102_1", "103_0", "103_1"]
    assert chain.submitted() == [
        ("pretrain", each(dense), ""),
        ("prune", each(pruned), "afterok:104_0"),
        ("finetune", each(tuned), "aftercorr:105"),
    ]
    chain.queue(
        t104_0="RUNNING", **{f"t{job}_{at}": "PENDING" for job in (105, 106) for at in "01"}
    )
    assert chain.resume() == chain.series() == 0
    assert chain.submitted(106) == []


@pytest.mark.parametrize("command", ["resume", "series"])
def test_one_that_only_left_the_queue_dooms_too(chain: Chain, command: str) -> None:
    chain.queue(**PENDING)
    assert getattr(chain, command)() == 0
    assert len(chain.cancelled) == 4
    assert [len(tasks) for _, tasks, _ in chain.submitted()] == [1, 2, 2]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_only_what_waits_for_the_failed_one(chain: Chain, command: str) -> None:
    """One pruning runs and its fine-tuning waits; the other failed."""
    dense, pruned, tuned = map(chain.ids, ("pretrain", "prune", "finetune"))
    finish(chain.sweep, dense[0])
    chain.queue(t102_0="RUNNING", t103_0="PENDING", t103_1="PENDING")
    chain.sweep.fail(pruned[1], "bug")
    assert getattr(chain, command)() == 0
    assert chain.cancelled == ["103_1"]
    assert chain.submitted() == [
        ("prune", [pruned[1:]], ""),
        ("finetune", [tuned[1:]], "aftercorr:104"),
    ]


@pytest.mark.parametrize("command", ["resume", "series"])
def test_a_healthy_chain_is_left_alone(chain: Chain, command: str) -> None:
    chain.queue(t101_0="RUNNING", **PENDING)
    assert getattr(chain, command)() == 0
    finish(chain.sweep, chain.ids("pretrain")[0])
    chain.queue(t102_0="RUNNING", t102_1="PENDING", t103_0="PENDING", t103_1="PENDING")
    assert getattr(chain, command)() == 0
    assert chain.cancelled == []
    assert chain.submitted() == []


def test_slurm_may_say_that_a_task_will_never_start(chain: Chain) -> None:
    """Its need was submitted once more meanwhile, and is done."""
    dense, pruned, _ = map(chain.ids, ("pretrain", "prune", "finetune"))
    finish(chain.sweep, dense[0])
    never = "102_0|PENDING|DependencyNeverSatisfied|0:00\n"
    (chain.bin / "queue").write_text(f"{never}102_1|RUNNING|None|1:00\n103_1|PENDING|x|0:00\n")
    assert chain.resume() == 0
    assert chain.cancelled == ["102_0"]
    assert chain.submitted()[0] == ("prune", [pruned[:1]], "")


def test_a_task_is_doomed_with_all_its_points(tmp_path: Path) -> None:
    """Two prunings in one task, of which one failed and one is done."""
    chain = Chain(tmp_path, per_task=2)
    dense, pruned, tuned = map(chain.ids, ("pretrain", "prune", "finetune"))
    for run_id in (dense[0], pruned[0]):
        finish(chain.sweep, run_id)
    chain.sweep.fail(pruned[1], "bug")
    chain.queue(t103_0="PENDING")
    assert chain.resume() == 0
    assert chain.cancelled == ["103_0"]
    assert sorted(chain.submitted()) == sorted([
        ("prune", [pruned[1:]], ""),
        ("finetune", [tuned[:1]], ""),
        ("finetune", [tuned[1:]], "aftercorr:104"),
    ])  # fmt: skip


def test_of_tasks_of_several_points_only_that_of_the_failed_one(tmp_path: Path) -> None:
    """Tasks of two points: that of the failed one, and that of two which run."""
    chain = Chain(tmp_path, per_task=2, series="0.5,0.4,0.3,0.2")
    dense, pruned, tuned = map(chain.ids, ("pretrain", "prune", "finetune"))
    finish(chain.sweep, dense[0])
    chain.sweep.fail(pruned[1], "bug")
    chain.queue(t102_1="RUNNING", t103_0="PENDING", t103_1="PENDING")
    assert chain.series("0.5,0.4,0.3,0.2") == 0
    assert chain.cancelled == ["103_0"]
    assert chain.submitted() == [
        ("prune", [pruned[:2]], ""),
        ("finetune", [tuned[:2]], "aftercorr:104"),
    ]


def test_an_array_that_waits_for_nothing_that_failed_is_not_cancelled(tmp_path: Path) -> None:
    """Two seeds, of which one's pretraining failed."""
    chain = Chain(tmp_path, seeds="0,1")
    found = list(read_jsonl(chain.sweep.jobs / "arrays.jsonl"))
    jobs = [(array["job"], array["dependency"]) for array in found]
    assert jobs == [
        ("101", ""), ("102", "afterok:101_0"), ("103", "afterok:101_1"),
        ("104", "aftercorr:102"), ("105", "aftercorr:103"),
    ]  # fmt: skip
    chain.sweep.fail(found[0]["tasks"][0][0], "bug")
    both = {f"t{job}_{at}": "PENDING" for job in (102, 103, 104, 105) for at in "01"}
    chain.queue(t101_1="PENDING", **both)
    assert chain.resume() == 0
    assert chain.cancelled == ["102_0", "102_1", "104_0", "104_1"]
    assert [len(tasks) for _, tasks, _ in chain.submitted(105)] == [1, 2, 2]


def test_nothing_is_cancelled_that_cannot_be_submitted_now(chain: Chain) -> None:
    """The failed one's task goes on with others, or another series failed."""
    dense, pruned, _ = map(chain.ids, ("pretrain", "prune", "finetune"))
    finish(chain.sweep, dense[0])
    chain.sweep.fail(pruned[0], "bug")
    chain.queue(t102_0="RUNNING", t102_1="RUNNING", t103_0="PENDING", t103_1="PENDING")
    assert chain.resume() == 0
    assert (chain.cancelled, chain.submitted()) == ([], [])
    chain.queue(t102_1="RUNNING", t103_0="PENDING", t103_1="PENDING")
    assert chain.series(series="0.3") == 0
    assert chain.cancelled == []
    assert [len(tasks) for _, tasks, _ in chain.submitted()] == [1, 1]


def test_a_shorter_series_takes_what_waits_along(chain: Chain) -> None:
    """The same pretraining failed for the points of an earlier command, too."""
    dense, pruned, tuned = map(chain.ids, ("pretrain", "prune", "finetune"))
    chain.sweep.fail(dense[0], "bug")
    chain.queue(**PENDING)
    assert chain.series(stages="pretrain,prune", series="0.5") == 0
    assert len(chain.cancelled) == 4
    assert [tasks for _, tasks, _ in chain.submitted()] == [each(dense), each(pruned), each(tuned)]


def test_a_submission_that_stops_after_the_cancel_loses_nothing(chain: Chain) -> None:
    chain.sweep.fail(chain.ids("pretrain")[0], "bug")
    chain.queue(**PENDING)
    (chain.bin / "refuse-4").touch()
    assert chain.resume() == 2
    assert (len(chain.cancelled), chain.submitted()) == (4, [])
    (chain.bin / "refuse-6").touch()
    assert chain.resume() == 2
    assert [stage for stage, _, _ in chain.submitted()] == ["pretrain"]
    chain.queue(t105_0="PENDING")
    assert chain.resume() == 0
    assert [(stage, len(tasks), after) for stage, tasks, after in chain.submitted(105)] == [
        ("prune", 2, "afterok:105_0"),
        ("finetune", 2, "aftercorr:107"),
    ]
    assert len(chain.cancelled) == 4


def test_cancelled_tasks_count_as_free_places(chain: Chain) -> None:
    chain.sweep.fail(chain.ids("pretrain")[0], "bug")
    chain.cluster.accounting("mine |normal|5|\n", "normal||00:00:00|cluster|\n")
    chain.queue(**PENDING)
    assert chain.resume() == 0
    assert [len(tasks) for _, tasks, _ in chain.submitted()] == [1, 2, 2]


def test_a_folder_with_a_percent_sign_is_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word if word != "hand" else "50%" for word in chain.argv]
    assert main(["series", *argv, "--series", "0.5", "--stages", "pretrain,prune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: result_dir, exp_name: {tmp_path / 'out' / '50%'} has a %")
    assert not (tmp_path / "out" / "50%").exists()
