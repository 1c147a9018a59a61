"""Runs that share one task or machine: their parts, refusals, and what becomes of the task."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bip.errors import UserError
from launch.__main__ import main
from launch.profile import LocalProfile, SlurmProfile, load_profile
from launch.sharing import Share, share_of
from launch.slurm.arrays import submit_arrays
from tests.launch.conftest import ROOT, FakeSweep, plan_sweep
from tests.launch.fake_cluster import FakeCluster
from tests.launch.fake_slurm import PREEMPTED, RUNNING, FakeSlurm

CPUS = st.sets(st.integers(0, 63), min_size=1)


@given(CPUS, st.integers(1, 8))
def test_parts_are_disjoint_and_equal(cpus: set[int], of: int) -> None:
    if of > len(cpus):
        with pytest.raises(ValueError, match=f"{of} runs at once on {len(cpus)} CPUs"):
            share_of(0, of, cpus, {})
        return
    parts = [{*share_of(number, of, cpus, {}).cpus} for number in range(of)]
    assert {len(part) for part in parts} == {len(cpus) // of}
    assert len(set.union(*parts)) == of * (len(cpus) // of)
    assert set.union(*parts) <= cpus


def test_parts_are_whole_cores_and_gpus_are_dealt() -> None:
    """CPU n and n + 4 are threads of one core, as Linux numbers them."""
    cores = {cpu: cpu % 4 for cpu in range(8)}
    parts = [share_of(number, 4, range(8), cores, ["2", "3"]) for number in range(4)]
    assert [part.cpus for part in parts] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [part.gpu for part in parts] == ["2", "3", "2", "3"]


def test_the_log_names_what_is_shared(tmp_path: Path) -> None:
    env = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert Share(1, 4, (2, 3)).line(env) == "share 2 of 4: CPUs 2,3"
    assert "without MPS" in Share(0, 2, (0,), "0").line(env)
    (tmp_path / "control").touch()
    assert f"through MPS ({tmp_path}/control)" in Share(0, 2, (0,), "0").line(env)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("slurm\nruns_per_task: 2\nruns_at_once: 4\ncpus_per_task: 4", "runs_per_task is 2"),
        ("slurm\nruns_per_task: 4\nruns_at_once: 4\ncpus_per_task: 2", "give 4 CPUs or more"),
        (
            "slurm\nruns_per_task: 4\nruns_at_once: 2\ncpus_per_task: 2\nntasks_per_node: 2",
            "give ntasks_per_node: 1",
        ),
        ("local\nruns_at_once: 4096", "CPUs of this machine; give"),
        ("local\nruns_at_once: 2\nntasks_per_node: 2", "give ntasks_per_node: 1"),
        ("local\nruns_at_once: 2\nparallelism: 3", "leave parallelism out"),
        ("local\nruns_at_once: 2\ncpus_per_task: 2", "leave cpus_per_task out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    text: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yml").write_text(f"executor: {text}\n")
    place = ["--profile", str(tmp_path / "p.yml"), "--result-dir", str(tmp_path / "out")]
    config = str(ROOT / "configs" / "Digits" / "pretrain.yml")
    assert main(["series", "--configs", config, "--exp-name", "s", *place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "p.yml: runs_at_once: " in line
    assert remedy in line
    assert not (tmp_path / "out").exists()


def test_flags_beat_the_profile(tmp_path: Path) -> None:
    local = load_profile(None, runs_at_once=2)  # the shipped one has a parallelism
    assert isinstance(local, LocalProfile)
    assert local.parallelism == 2
    assert LocalProfile(**local.model_dump()) == local, "as `resume` reads it"
    (tmp_path / "p.yml").write_text("executor: slurm\ncpus_per_task: 6\n")
    profile = load_profile(tmp_path / "p.yml", None, runs_per_task=4, runs_at_once=3)
    assert isinstance(profile, SlurmProfile)
    assert (profile.runs_of_stage, profile.threads) == (6, 2)
    with pytest.raises(UserError, match="leave parallelism out"):
        load_profile(None, 3, runs_at_once=2)


def test_the_script_names_how_many_and_their_threads(cluster: FakeCluster, tmp_path: Path) -> None:
    sweep = plan_sweep(tmp_path / "out")
    profile = SlurmProfile(executor="slurm", runs_per_task=2, runs_at_once=2, cpus_per_task=5)
    names = [run.run_id for run in sweep.runs()]
    submit_arrays(sweep, profile, names, 1001, 2, keep_code=False)
    script = cluster.script.read_text()
    assert "export BIP_RUNS_AT_ONCE=2\n" in script
    assert "export OMP_NUM_THREADS=2\n" in script
    assert "#SBATCH --cpus-per-task=5" in script


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_local_runs_at_once_are_bound_to_their_own_cpus(fake: FakeSweep) -> None:
    bound = "import os; env = {**os.environ, 'CPUS': str(sorted(os.sched_getaffinity(0)))}"
    text = fake.script.read_text().replace("dict(os.environ)", "env")
    fake.script.write_text(
        text.replace("stop = ", f"import time; time.sleep(0.2); {bound}\nstop = ")
    )
    words = ("--series", "0.5,0.2", "--runs-at-once", "2", "--stages", "pretrain,prune")
    assert fake.series(*words) == 0
    starts = fake.events("start")[1:]  # the dense run has no other beside it
    parts = [{*json.loads(start["environment"]["CPUS"])} for start in starts]
    logs = [(fake.folder / "jobs" / f"{s['run_id']}.log").read_text() for s in starts]
    for log, part, start in zip(logs, parts, starts, strict=True):
        named = re.search(r"share \d of 2: CPUs ([\d,]+)", log)
        assert named is not None
        assert {*map(int, named[1].split(","))} == part
        assert int(start["threads"]) == len(part) == len(os.sched_getaffinity(0)) // 2


class SharedTask(FakeSlurm):
    """One task with the runs a, b and c, two at once, whose srun ends as `ends` has it."""

    def execute(self, restarts: int = 0, **ends: int) -> int:
        lines = ["#!/bin/bash", 'echo "$BIP_POINT $BIP_SHARE" >>${0%/*}/started; echo ranks']
        lines.append(f"echo $BIP_ATTEMPT >{self.sweep.jobs}/$BIP_POINT.begun")
        # Those that go on see how the other ended.
        lines += [f"[[ $BIP_POINT != {name} ]] || exit {code}" for name, code in ends.items()]
        lines.append("/bin/sleep 0.5; echo $BIP_POINT >>${0%/*}/done")
        self.command("srun", "\n".join(lines) + "\n")
        (self.sweep.jobs / "slurm").mkdir(exist_ok=True)
        (self.bin / "points.txt").write_text("a b c\n")
        words = f"run_points {self.sweep.folder} {self.bin}/points.txt true"
        env = {"BIP_RUNS_AT_ONCE": "2", "SLURM_RESTART_COUNT": str(restarts)}
        return self.bash(f"source {ROOT}/slurm/task.sh\n{words}", **env).returncode

    def listed(self, name: str) -> list[str]:
        path = self.bin / name
        return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.fixture
def task(tmp_path: Path) -> SharedTask:
    return SharedTask(tmp_path)


def test_a_failed_run_leaves_the_others_alone(task: SharedTask) -> None:
    assert task.execute(a=1) == 1
    assert task.listed("done") == ["b", "c"]
    assert task.sweep.failure_path("a").exists()
    assert task.calls("requeue") == 0
    assert {line.split()[1] for line in task.listed("started")} == {"0/2", "1/2"}
    assert task.execute(restarts=1) == 1, "a is not tried again"
    assert len(task.listed("started")) == 3 + 2


def test_a_preempted_task_is_requeued_once_after_the_last_has_saved(task: SharedTask) -> None:
    task.says(PREEMPTED)
    assert task.execute(a=75) == os.EX_TEMPFAIL
    assert task.listed("done") == ["b"], "b goes on to its end, c does not start"
    assert task.calls("requeue") == 1
    assert not [*task.sweep.jobs.glob("*.failed")]


def test_a_killed_run_is_not_mistaken_for_another(task: SharedTask) -> None:
    """Both end together; srun's reports on them are apart, and each is judged by its own."""
    task.says(RUNNING)
    assert task.execute(a=137, b=1) == os.EX_TEMPFAIL
    assert not task.sweep.failure_path("a").exists()
    assert task.sweep.failure_path("b").exists()
    assert task.calls("requeue") == 1


def test_fail_fast_reaches_runs_that_wait_for_the_tasks_requeue(task: SharedTask) -> None:
    """a and b are preempted, and SLURM refuses to requeue: a fails for good, with it b and c."""
    task.says(RUNNING)
    task.refuses("requeue is disabled for this job")
    task.command("scancel", '#!/bin/bash\necho "$@" >"${0%/*}/cancelled"\n')
    array = {"job": 7, "tasks": [["a", "b", "c"]]}
    (task.sweep.jobs / "arrays.jsonl").write_text(json.dumps(array) + "\n")
    task.sweep.fail_fast.touch()
    assert task.execute(a=75, b=75) == 1
    assert task.listed("cancelled") == ["7"]
    reasons = [json.loads(task.sweep.failure_path(n).read_text())["reason"] for n in "abc"]
    others = [reason.startswith("cancelled, as ") for reason in reasons]
    assert sorted(others) == [False, True, True]
    assert others[2], "c has not started"


def test_a_node_with_fewer_cpus_is_a_final_error(task: SharedTask) -> None:
    assert task.rank("finishes", BIP_SHARE="0/4096") == 1
    assert task.note().startswith("error: runs_at_once: 4096 runs at once on ")
