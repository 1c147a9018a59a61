"""Real runs on real clusters, taken away in every way SLURM has."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bip.config import RunConfig, load_config
from bip.data.loaders.dali import is_installed
from bip.files import read_jsonl
from bip.methods import methods
from launch.__main__ import main
from tests.cluster.cluster import Cluster
from tests.cluster.sweeps import (
    CONFIGS,
    ClusterSweep,
    assert_same_outcome,
    assert_story,
    high,
    interrupted,
    is_done,
    train_here,
)
from tests.data.conftest import imagenet  # noqa: F401
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.cluster
ROOT = CONFIGS.parent
LONG = ("--epochs", 25, "--print-freq", 2, "--eval-every", 25)  # some 10 s on one core
ENDLESS = ("--epochs", 5000, "--print-freq", 100)
SweepOn = Callable[..., ClusterSweep]


@pytest.fixture(scope="module")
def patient(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Sends the user signal; does not requeue by itself; arrays of at most 2 tasks."""
    options = {"send-user-signal": True, "grace-time": 30, "job-requeue": 0, "kill-wait": 5}
    return start_cluster(cpus=2, **options, **{"max-array-size": 2})


@pytest.fixture(scope="module")
def merciless(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Ends preempted jobs for good."""
    return start_cluster(nodes=1, cpus=2, **{"preempt-mode": "CANCEL", "kill-wait": 10})


def prune_one(sweep: ClusterSweep, source: Path, *flags: object) -> str:
    """Submit one pruning run; its RUN_ID."""
    line = ("--series", "0.2", "--source-net", source, *flags)
    assert sweep.series("Digits/bip.yml", *line) == 0
    (run_id,) = sweep.runs()
    return run_id


def written(config: RunConfig) -> dict[Path, float]:
    """The files of a run, and when each was written."""
    return {path: path.stat().st_mtime for path in config.run_folder.rglob("*") if path.is_file()}


def test_user_signal_without_requeueing_by_slurm_in_chunks(
    patient: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    """`send_user_signal`, JobRequeue=0, three runs in arrays of at most two tasks.

    Within the GraceTime SLURM requeues nothing itself: the batch script has to, as in a container
    the ranks find none of SLURM's commands.
    """
    hidden = {"srun_args": ["--export=ALL,PATH=/nowhere"]}
    sweep = sweep_on(patient, parallelism=2, nodes=1, ntasks_per_node=2, requeue_by="batch",
                     **hidden)  # fmt: skip
    line = ("--series", "0.5,0.2,0.1", "--source-net", source)
    assert sweep.series("Digits/bip.yml", *line, *LONG) == 0
    assert [len(array["tasks"]) for array in sweep.arrays()] == [2, 1]
    sweep.wait(lambda: len(sweep.training()) == 2, "two runs train")
    struck = sweep.training()
    high(patient, 1)
    sweep.wait(lambda: all(sweep.attempts(name, "requeue") for name in struck), "requeues")
    sweep.wait(sweep.all_done, "all are done")
    for run_id in struck:
        assert sweep.causes(run_id, "end") == ["SIGUSR2", "finished"]
        assert [record["by"] for record in sweep.attempts(run_id, "requeue")] == ["batch"]
    sweep.assert_as_undisturbed(*struck)


def test_runs_that_share_a_task_survive_a_preemption(
    patient: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    """Three runs, two at once: both save, the task is requeued once, and all end as runs alone."""
    sweep = sweep_on(patient, nodes=1, cpus_per_task=2)
    line = ("--series", "0.5,0.2,0.1", "--source-net", source, *LONG)
    assert sweep.series("Digits/bip.yml", *line, "--runs-per-task", 3, "--runs-at-once", 2) == 0
    assert [len(array["tasks"]) for array in sweep.arrays()] == [1]
    task = sweep.task(next(iter(sweep.runs())))
    sweep.wait(lambda: sum(map(sweep.is_training, sweep.runs())) == 2, "two runs train")
    struck = [name for name in sweep.runs() if sweep.attempts(name)]
    assert len(struck) == 2
    parts = [re.search(r"share \d of 2: CPUs ([\d,]+)", sweep.log(name)) for name in struck]
    assert parts[0] is not None is not parts[1]
    assert {*parts[0][1].split(",")}.isdisjoint(parts[1][1].split(","))
    high(patient, 1)
    sweep.wait(sweep.all_done, "all are done")
    patient.wait(lambda: patient.job(task)["JobState"] == "COMPLETED", "the task is done")
    assert patient.job(task)["Restarts"] == "1"
    for run_id in sweep.runs():
        stops = ["SIGUSR2"] if run_id in struck else []
        assert sweep.causes(run_id, "end") == [*stops, "finished"]
        assert [r["by"] for r in sweep.attempts(run_id, "requeue")] == ["batch"] * len(stops)
    sweep.assert_as_undisturbed(*sweep.runs(), ranks=1)


def test_every_method_survives_a_preemption(
    patient: Cluster, sweep_on: SweepOn, source: Path, tmp_path: Path
) -> None:
    """One run of each method, all at once; each is frozen once it trains, so none is too quick."""
    tiny = ("--epochs", 6, "--print-freq", 1, "--eval-every", 6)
    place = ("--exp-name", "pruned", "--result-dir", tmp_path, "--epochs", 1)
    pruned = load_config([str(word) for word in (
        "--configs", CONFIGS / "Digits/omp.yml", "--k", 0.2, "--source-net", source, *place
    )])  # fmt: skip
    run_ranks(1, train_here, pruned.to_yaml(), join=False)
    names = [method.name for method in methods().values() if method.mode == "prune"]
    sweep = sweep_on(patient, nodes=1, parallelism=len(names))
    patient.run("scontrol", "update", "PartitionName=low", "OverSubscribe=FORCE:20")
    try:
        series = ("--series", 0.2, *tiny, "--source-net")
        assert sweep.series("Digits/bip.yml", "--trainers", ",".join(names), *series, source) == 0
        assert sweep.series("Digits/pretrain.yml", *tiny) == 0
        last = pruned.run_folder / "checkpoint" / "model_best.pth.tar"
        assert sweep.series("Digits/finetune.yml", *series, last) == 0
        runs = {run_id: config.method.name for run_id, config in sweep.runs().items()}
        # `transfer` is what `dense` does, from a dense network.
        assert sorted(runs.values()) == sorted({*methods()} - {"transfer"})
        frozen: dict[str, int] = {}

        def all_frozen() -> bool:
            for run_id, method in runs.items():
                assert not sweep.result(run_id), f"{method} was done too early"
                if run_id not in frozen and sweep.is_training(run_id):
                    (frozen[run_id],) = ranks_of(run_id).values()
                    os.kill(frozen[run_id], signal.SIGSTOP)
            return len(frozen) == len(runs)

        sweep.wait(all_frozen, "all train")
        high(patient, 1)  # SLURM sends SIGCONT with its signal
        sweep.wait(sweep.all_done, "all are done")
    finally:
        patient.run("scontrol", "update", "PartitionName=low", "OverSubscribe=NO")
    for run_id, method in runs.items():
        assert sweep.causes(run_id, "end") == ["SIGUSR2", "finished"], method
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda name: sweep.assert_as_undisturbed(name, ranks=1), runs):
            pass


def test_what_never_starts_is_named_before_and_after_submission(
    cluster: Cluster, sweep_on: SweepOn, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sbatch --test-only` accepts it all. A probe may come before there is a result folder."""
    cluster.run("scontrol", "create", "partition=short", "nodes=ALL", "MaxTime=2")
    cluster.run("scontrol", "create", "partition=theirs", "nodes=ALL", "AllowAccounts=other")
    cluster.submit("true", "--partition=short", "--time=60", "--test-only")
    for partition, named in (("short", "MaxTime=00:02:00"), ("theirs", "AllowAccounts=other")):
        sweep = sweep_on(cluster, nodes=1, partition=partition)
        assert sweep.series("Digits/pretrain.yml") == 2
        assert f"partition {partition}: {named}" in capsys.readouterr().err
        assert not sweep.folder.exists()
    sweep = sweep_on(cluster, nodes=1, partition="short", time=2, sbatch={"hold": True})
    doctor = [
        "doctor",
        str(sweep.profile),
        "--probe",
        "--folder",
        str(sweep.folder / "not" / "yet"),
        "--configs",
        "configs/Digits/bip.yml",
    ]
    assert main(doctor) == 0
    out = capsys.readouterr().out
    assert "tasks start on" in out
    for tried in ("ranks: two met by gloo", "of Digits read by the loader memory", "save: 1 MB"):
        assert tried in out, "on a node"
    assert out.splitlines()[-1].startswith("verdict  safe")
    assert sweep.series("Digits/pretrain.yml", "--epochs", 1) == 0
    (row,) = sweep.status(capsys)
    task = sweep.task(row["run_id"])
    assert f"scontrol release {task} " in row["reason"]
    assert main(["resume", str(sweep.folder), "--no-wait"]) == 0
    assert f"scontrol release {task} " in capsys.readouterr().err
    cluster.run("scontrol", "release", task)
    sweep.wait(sweep.all_done, "it is done")


def test_no_grace_and_a_finished_run_that_is_requeued(
    cluster: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    """GraceTime=0 and 2 s to KillWait; then a requeue after the end."""
    sweep = sweep_on(cluster)
    run_id = prune_one(sweep, source, "--checkpoint-minutes", 0.01, *LONG)
    sweep.wait(sweep.training, "it trains")
    high(cluster, 1)
    sweep.wait(lambda: interrupted(sweep.attempts(run_id)) == 1, "the second attempt")
    sweep.wait(sweep.all_done, "it is done")
    sweep.assert_as_undisturbed(run_id)

    task, config, before = sweep.task(run_id), sweep.runs()[run_id], sweep.attempts(run_id)
    cluster.wait_for_state(task, "COMPLETED")
    files = written(config)
    cluster.run("scontrol", "requeue", task)
    sweep.wait(lambda: "already finished" in sweep.log(run_id), "the attempt after the end")
    cluster.wait_for_state(task, "COMPLETED")
    assert sweep.attempts(run_id) == before
    assert written(config) == files


def test_time_limit_is_a_save_and_a_requeue_until_the_budget_is_spent(
    cluster: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    """Signalled 20 to 50 s before the limit; once is allowed, twice is not."""
    sweep = sweep_on(cluster, nodes=1, signal_lead=20, retries={"timed_out": 1})
    run_id = prune_one(sweep, source, *ENDLESS)
    task, note = sweep.task(run_id), sweep.folder / "jobs" / f"{run_id}.failed"
    for number in (1, 2):
        # However slow the machine, each attempt makes steps before its limit comes near.
        cluster.run("scontrol", "update", f"JobId={task}", "TimeLimit=30")
        sweep.wait(sweep.training, f"attempt {number} trains")
        # The next minute that is 45 s away: SLURM looks at limits about every 30 s.
        minutes, seconds = map(int, cluster.run("squeue", "-h", "-j", task, "-o", "%M").split(":"))
        limit = f"TimeLimit={minutes + 1 + (seconds > 15)}"
        cluster.run("scontrol", "update", f"JobId={task}", limit)
        what = f"time-out {number}"
        cluster.wait(lambda: len(sweep.attempts(run_id, "end")) == number, what)  # noqa: B023
        cluster.wait(lambda: note.exists() or sweep.attempts(run_id, "requeue"), what)
    cluster.wait(note.exists, "the second is not requeued")
    assert "retries.timed_out is 1" in note.read_text()
    ends, starts = sweep.attempts(run_id, "end"), sweep.attempts(run_id, "start")
    assert sweep.causes(run_id, "end") == ["SIGUSR2", "SIGUSR2"]
    assert sweep.causes(run_id, "requeue") == ["timed_out"]
    assert 0 < ends[0]["step"] == starts[1]["step"] < ends[1]["step"]


def test_failure_is_not_requeued_blocks_its_stage_and_is_resumed(
    cluster: Cluster, sweep_on: SweepOn, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad ranks in pretraining, two values in one task, resume with the chain rebuilt, cancel."""
    sweep = sweep_on(cluster, nodes=1, runs_per_task=2)
    stages = ("--stages", "pretrain,prune,finetune", "--series", "0.5,0.1", "--epochs", 1)
    good = sweep.profile.read_text()
    sweep.profile.write_text(good + "env: {RANK: spoiled, WORLD_SIZE: '1'}\n")
    assert sweep.series("Digits/bip.yml", *stages) == 0
    assert [a["dependency"].split(":")[0] for a in sweep.arrays()] == ["", "afterok", "aftercorr"]
    assert [len(array["tasks"]) for array in sweep.arrays()] == [1, 1, 1]
    cluster.wait(lambda: {r["state"] for r in sweep.status(capsys)} == {"failed", "blocked"}, "it")
    rows = sweep.status(capsys)
    assert [row["state"] for row in rows] == ["failed"] + 4 * ["blocked"]
    assert rows[0]["reason"].startswith("error: RANK:")
    cluster.wait_for_empty_queue()
    assert not sweep.attempts(rows[0]["run_id"], "requeue")

    sweep.profile.write_text(good)
    resume = ["resume", str(sweep.folder), "--profile", str(sweep.profile), "--no-wait"]
    assert main(resume) == 0
    sweep.wait(sweep.all_done, "all stages are done")
    assert len(sweep.arrays()) == 6
    assert main(resume) == 0
    assert "nothing to resume" in capsys.readouterr().out

    assert sweep.series("Digits/bip.yml", *stages[:2], "--series", "0.3", *LONG) == 0
    sweep.wait(lambda: len(sweep.training()) == 1, "the third series trains")
    (victim,) = sweep.training()
    assert main(["cancel", str(sweep.folder)]) == 0
    cluster.wait_for_empty_queue()
    assert_cancelled(sweep, victim)
    planned = sorted((sweep.folder / "points").glob("*k0.3*"))
    planned[0].write_text(planned[0].read_text().replace("momentum: 0.9", "momentum: 0.8"))
    assert main(resume) == 2
    assert "changed since it was planned" in capsys.readouterr().err


def assert_cancelled(sweep: ClusterSweep, run_id: str) -> None:
    """SLURM signalled it, it saved, and nobody has requeued it."""
    assert sweep.result(run_id) is None
    assert [r["event"] for r in sweep.attempts(run_id)] == ["start", "end"]
    task = sweep.cluster.job(sweep.task(run_id))
    assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "0")
    note = sweep.folder / "jobs" / f"{run_id}.failed"
    assert json.loads(note.read_text())["reason"].startswith("cancelled; python -m launch resume")


def test_fail_fast_cancels_the_others_when_no_launcher_waits(
    cluster: Cluster, sweep_on: SweepOn, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run trains, one waits; the first fails for good."""
    sweep = sweep_on(cluster, nodes=1, parallelism=1, retries={"lost": 0})
    line = ("--series", "0.5,0.2", "--source-net", source, "--fail-fast", *ENDLESS)
    assert sweep.series("Digits/bip.yml", *line) == 0
    first, second = sorted(sweep.runs(), key=sweep.task)
    sweep.wait(sweep.training, "it trains")
    os.kill(ranks_of(first)[0], signal.SIGKILL)
    cluster.wait_for_empty_queue()
    rows = {row["run_id"]: row for row in sweep.status(capsys)}
    assert rows[first]["state"] == "failed"
    assert "SIGKILL" in rows[first]["reason"]
    assert rows[second]["state"] == "cancelled"
    assert f"{first} failed (--fail-fast)" in rows[second]["reason"]
    assert not sweep.attempts(second)


@pytest.mark.parametrize("requeue_by", ["scontrol", "batch"])
def test_scancel_is_not_undone_by_the_run(
    requeue_by: str, cluster: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    sweep = sweep_on(cluster, nodes=1, requeue_by=requeue_by)
    run_id = prune_one(sweep, source, *ENDLESS)
    sweep.wait(sweep.training, "it trains")
    cluster.run("scancel", sweep.task(run_id))
    cluster.wait_for_empty_queue()
    assert_cancelled(sweep, run_id)


def ranks_of(run_id: str) -> dict[int, int]:
    """rank -> process, of a run on this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            lines = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        facts = dict(line.partition(b"=")[::2] for line in lines)
        if facts.get(b"BIP_POINT") == run_id.encode() and b"submitit.core._submit" in command:
            found[int(facts[b"SLURM_PROCID"])] = int(folder.name)
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_its_step(
    blow: signal.Signals, cluster: Cluster, sweep_on: SweepOn, source: Path
) -> None:
    """One of two, killed or frozen: the other ends too, srun clears what is left, and the run is
    tried again."""
    sweep = sweep_on(cluster)
    run_id = prune_one(sweep, source, "--rank-timeout", 10, *LONG, "--epochs", 400)
    sweep.wait(sweep.training, "it trains")
    ranks = ranks_of(run_id)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], blow)
    gone = lambda: not set(ranks.values()) & set(ranks_of(run_id).values())  # noqa: E731
    cluster.wait(gone, "both ranks are gone", 90)
    named = {signal.SIGKILL: "was killed by SIGKILL", signal.SIGSTOP: "has not answered for 10 s"}
    last = lambda: sweep.log(run_id).splitlines()[-1]  # noqa: E731
    retried = lambda: last().startswith("to be requeued: ")  # noqa: E731
    cluster.wait(retried, "the log's tail is the reason", 240)
    note = (sweep.folder / "jobs" / f"{run_id}.failed.before").read_text()
    for text in ("rank 1 ", named[blow]):
        assert text in last()
        assert text in note, "it is counted as lost"
    assert main(["cancel", str(sweep.folder)]) == 0
    cluster.wait_for_empty_queue()
    assert not sweep.result(run_id)
    if blow == signal.SIGSTOP:  # only its silence shows it
        assert "has not answered for 10 s" in sweep.log(run_id)


def test_preempted_for_good_it_saves_and_is_resumed(
    merciless: Cluster, sweep_on: SweepOn, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PreemptMode=CANCEL, of which doctor warns. While its grace lasts a run can still requeue
    itself; without one SLURM has ended its task before it is signalled."""
    sweep = sweep_on(merciless, nodes=1, ntasks_per_node=2)
    assert main(["doctor", str(sweep.profile)]) == 0
    assert "PreemptMode=CANCEL" in capsys.readouterr().out
    run_id = prune_one(sweep, source, *LONG)
    for number, grace in enumerate((30, 0), 1):
        sweep.wait(sweep.training, f"attempt {number} trains")
        merciless.run("scontrol", "update", "PartitionName=low", f"GraceTime={grace}")
        merciless.submit("true", "--partition=high", "--exclusive", "--mem-per-cpu=10")
        merciless.wait(lambda: len(sweep.attempts(run_id, "end")) == number, "it saves")  # noqa: B023
    merciless.wait_for_empty_queue()
    assert len(sweep.attempts(run_id, "requeue")) == 1
    assert merciless.job(sweep.task(run_id))["Restarts"] == "1"
    (row,) = sweep.status(capsys)
    assert row["state"] == "cancelled"
    assert row["reason"].startswith("preempted and cancelled; python -m launch resume")
    assert main(["resume", str(sweep.folder), "--no-wait"]) == 0
    sweep.wait(sweep.all_done, "it is done")
    assert sweep.causes(run_id, "end") == ["SIGTERM", "SIGTERM", "finished"]
    sweep.assert_as_undisturbed(run_id)


def write_script(path: Path, text: str) -> None:
    """At once: bash may be reading the one before."""
    new = path.with_suffix(".new")
    new.write_text(f"#!/bin/bash\n{text}\n")
    new.chmod(0o755)
    os.replace(new, path)


def test_finished_within_the_grace_period_and_requeued(
    patient: Cluster, sweep_on: SweepOn, tmp_path: Path, source: Path
) -> None:
    """The attempt that SLURM ends while it exits writes no note; the next one does nothing."""
    slow = tmp_path / "python"  # its exit takes a while
    write_script(slow, f"trap '' USR2 TERM\n{sys.executable} \"$@\"\nexec sleep 60")
    sweep = sweep_on(patient, nodes=1, python=str(slow))
    run_id = prune_one(sweep, source, "--epochs", 1)
    task, config = sweep.task(run_id), sweep.runs()[run_id]
    sweep.wait(sweep.all_done, "it is done")
    files = written(config)
    blocker = high(patient, 1)
    patient.wait(lambda: patient.job(task)["PreemptTime"] != "None", "its grace period")
    assert patient.job(task)["JobState"] == "RUNNING"
    write_script(slow, f'exec {sys.executable} "$@"')
    patient.run("scontrol", "requeue", task)
    sweep.wait(lambda: "already finished" in sweep.log(run_id), "the attempt after the end")
    patient.wait_for_state(task, "COMPLETED")
    assert patient.job(task)["Restarts"] == "1"
    patient.wait_for_state(blocker, "COMPLETED")
    assert written(config) == files
    assert not list((sweep.folder / "jobs").glob("*.failed*"))


def test_queued_tasks_run_the_code_of_their_submission(
    cluster: Cluster, sweep_on: SweepOn, tmp_path: Path
) -> None:
    """Submitted from a copy of the project that is broken right after."""
    copy = tmp_path / "project"
    copy.mkdir()
    parts = [ROOT / name for name in ("bip", "launch", "slurm")]
    subprocess.run(["cp", "-r", *parts, "-t", copy], check=True)
    sweep = sweep_on(cluster, nodes=1)
    line = ["--configs", CONFIGS / "Digits/pretrain.yml", "--epochs", "1", "--no-wait",
            "--result-dir", sweep.results, "--exp-name", "sweep",
            "--profile", sweep.profile]  # fmt: skip
    command = [sys.executable, "-m", "launch", "series", *map(str, line)]
    cluster.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        refused = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stderr) == (2, "error: partition: low is DOWN\n")
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
    subprocess.run(command, cwd=copy, check=True, env=os.environ | {"PYTHONPATH": str(copy)})
    (copy / "bip" / "run.py").write_text("raise SystemExit('changed after submission')\n")
    (copy / "slurm" / "task.sh").unlink()
    sweep.wait(sweep.all_done, "it is done")


MEET = """
import os, pathlib, sys, time, torch
from bip.distributed.rendezvous import join
here, task = pathlib.Path(sys.argv[1]), int(os.environ["SLURM_ARRAY_TASK_ID"])
for number in range(20):
    (here / f"ready-{number}-{task}-{os.environ['SLURM_PROCID']}").touch()
    while len(list(here.glob(f"ready-{number}-*"))) < 4:
        time.sleep(0.005)
    group = join(here / "rendezvous", os.environ | {"SLURM_STEP_ID": str(number)})
    assert group.sum_(torch.tensor([task, 1])).tolist() == [2 * task, 2]
    group.barrier()
    group.close()
(here / f"met-{task}-{group.rank}").touch()
"""


def test_tasks_that_start_together_on_one_node_do_not_collide(
    cluster: Cluster, tmp_path: Path
) -> None:
    """20 times two tasks of two ranks meet at their rendezvous at the same moment."""
    (tmp_path / "meet.py").write_text(MEET)
    python = f"PYTHONPATH={ROOT} OMP_NUM_THREADS=1 srun --kill-on-bad-exit=1 {sys.executable}"
    job = cluster.submit(f"{python} {tmp_path}/meet.py {tmp_path}", "--array=0-1", "--nodelist=n1",
                         "--ntasks=2", "--mem-per-cpu=10",
                         f"--output={tmp_path}/%a.log")  # fmt: skip
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job), "all have met", 300)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert len(list(tmp_path.glob("met-*"))) == 4, logs


def test_the_templates_without_the_launcher(
    patient: Cluster, sweep_on: SweepOn, tmp_path: Path, source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As a user gives them to sbatch; all tasks are preempted, requeue themselves and go on."""
    sweep_on(patient)
    monkeypatch.setenv("SERIES", "0.5 0.2")
    monkeypatch.setenv("PYTHON", sys.executable)
    common = ["--exp-name", "sweep", "--result-dir", tmp_path / "out", *LONG, "--epochs", 40]
    facts = ["--nodes=1", "--cpus-per-task=1", "--mem=10", "--time=10", "--gpus-per-node=0"]

    def sbatch(
        template: str, config: str, log: str, *sized: str, flags: tuple[object, ...] = ()
    ) -> list[str]:
        line = [str(word) for word in ("--configs", CONFIGS / config, *common, *flags)]
        path = ROOT / "slurm" / "templates" / template
        command = ["sbatch", *facts, *sized, f"--output={tmp_path / log}", path, *line]
        subprocess.run(command, cwd=ROOT, check=True)
        return line

    series = sbatch("series.sbatch", "Digits/bip.yml", "%a.log", "--ntasks-per-node=1",
                    "--array=0-1", flags=("--source-net", source))  # fmt: skip
    run = sbatch("run.sbatch", "Digits/pretrain.yml", "run.log", "--ntasks-per-node=2")
    configs = [load_config([*series, "--k", k]) for k in ("0.5", "0.2")] + [load_config(run)]

    def attempts(config: RunConfig) -> list[dict[str, Any]]:
        return list(read_jsonl(config.run_folder / "attempts.jsonl"))

    def log() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.log"))

    patient.wait(lambda: all(map(attempts, configs)), "all have begun", 240)
    assert not any(is_done(config.run_folder) for config in configs)
    high(patient, 1)
    patient.wait(lambda: all(is_done(config.run_folder) for config in configs), log(), 400)
    for config, ranks in zip(configs, (1, 1, 2), strict=True):
        assert interrupted(attempts(config)) >= 1
        assert_story(attempts(config))
        assert_same_outcome(config, tmp_path / "calm", ranks)


@pytest.mark.parametrize(
    "loader",
    ["lmdb", pytest.param("dali", marks=pytest.mark.skipif(not is_installed(), reason="no DALI"))],
)
def test_the_whole_path(
    loader: str,
    patient: Cluster,
    sweep_on: SweepOn,
    imagenet: Path,  # noqa: F811
) -> None:
    """sbatch array, two nodes, ResNet18, real ImageNet images from LMDB, preempted mid-epoch."""
    sweep = sweep_on(patient)
    flags = ("--data-dir", imagenet, "--num-classes", 171, "--image-dim", 64, "--batch-size", 10,
             "--test-batch-size", 64, "--num-workers", 1, "--loader", loader, "--print-freq", 1,
             "--epochs", 1, "--stages", "pretrain,prune", "--series", "0.1")  # fmt: skip
    assert sweep.series("ImageNet/bip.yml", *flags) == 0
    prune = next(name for name, c in sweep.runs().items() if c.exp_mode == "prune")
    sweep.wait(lambda: sweep.is_training(prune), "the pruning trains", 300)
    high(patient, 1)
    sweep.wait(lambda: sweep.attempts(prune, "requeue"), "the requeue")
    sweep.wait(sweep.all_done, "all is done", 300)
    (end,) = [r for r in sweep.attempts(prune, "end") if r["cause"] != "finished"]
    assert 0 < end["step"] < 171 // 10, "in mid-epoch"
    sweep.assert_as_undisturbed(prune)
