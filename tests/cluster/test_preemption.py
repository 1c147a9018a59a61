"""Real runs on real clusters, taken away in every way SLURM has."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bip.config import RunConfig, load_config
from bip.data.loaders.dali import is_installed
from bip.files import read_jsonl
from launch.__main__ import main
from tests.cluster.conftest import Cluster
from tests.cluster.sweeps import (
    CONFIGS,
    ClusterSweep,
    assert_same_outcome,
    assert_story,
    env_for,
    high,
    interrupted,
    is_done,
    undisturbed,
)
from tests.data.conftest import imagenet  # noqa: F401

pytestmark = pytest.mark.cluster
ROOT = CONFIGS.parent
LONG = ("--epochs", 25, "--print-freq", 2, "--eval-every", 25)  # some 10 s on one core


@pytest.fixture(scope="module")
def patient(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Tells by the user signal; does not requeue by itself; arrays of at most 2 tasks."""
    options = {"send-user-signal": True, "grace-time": 30, "job-requeue": 0, "kill-wait": 5}
    return start_cluster(cpus=2, **options, **{"max-array-size": 2})


@pytest.fixture(scope="module")
def merciless(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Ends preempted jobs for good."""
    return start_cluster(nodes=1, cpus=2, **{"preempt-mode": "CANCEL", "kill-wait": 10})


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    """Point this process's SLURM commands at a cluster."""

    def use(cluster: Cluster) -> Cluster:
        for name, value in env_for(cluster).items():
            monkeypatch.setenv(name, value)
        return cluster

    return use


def test_user_signal_without_requeueing_by_slurm_in_chunks(
    patient: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path, source: Path
) -> None:
    """`send_user_signal`, JobRequeue=0, three points in arrays of at most two tasks.

    Within the GraceTime SLURM requeues nothing itself: the batch script has to, as in a container
    the ranks find none of SLURM's commands.
    """
    cluster = on(patient)
    facts = {"parallelism": 2, "nodes": 1, "ntasks_per_node": 2, "requeue_by": "batch"}
    hidden = {"srun_args": ["--export=ALL,PATH=/nowhere"]}
    sweep = ClusterSweep(cluster, tmp_path / "out", **facts, **hidden)
    line = ("--series", "0.5,0.2,0.1", "--source-net", source)
    assert sweep.series("Digits/bip.yml", *line, *LONG) == 0
    assert [len(array["tasks"]) for array in sweep.arrays()] == [2, 1]
    sweep.wait(lambda: len(sweep.training()) == 2, "two runs train")
    struck = sweep.training()
    high(cluster, 1)
    sweep.wait(lambda: all(sweep.attempts(name, "requeue") for name in struck), "requeues")
    sweep.wait(sweep.all_done, "all are done")
    for run_id in struck:
        (end,) = [r for r in sweep.attempts(run_id, "end") if r["cause"] != "finished"]
        assert end["cause"] == "SIGUSR2"
        assert [r["by"] for r in sweep.attempts(run_id, "requeue")] == ["batch"]
        assert_story(sweep.attempts(run_id))
        config = sweep.points()[run_id]
        assert_same_outcome(config.run_folder, undisturbed(config, tmp_path / "calm"))


def test_no_grace_and_a_finished_run_that_is_requeued(
    cluster: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path, source: Path
) -> None:
    """GraceTime=0 and 2 s to KillWait; then a requeue after the end."""
    on(cluster)
    sweep = ClusterSweep(cluster, tmp_path / "out")
    line = ("--series", "0.2", "--source-net", source, "--checkpoint-minutes", 0.01)
    assert sweep.series("Digits/bip.yml", *line, *LONG) == 0
    (run_id,) = sweep.points()
    sweep.wait(lambda: sweep.training(), "it trains")
    high(cluster, 1)
    sweep.wait(lambda: interrupted(sweep.attempts(run_id)) == 1, "the second attempt")
    sweep.wait(sweep.all_done, "it is done")
    assert_story(sweep.attempts(run_id))
    config = sweep.points()[run_id]
    assert_same_outcome(config.run_folder, undisturbed(config, tmp_path / "calm"))

    task, before = sweep.task(run_id), sweep.attempts(run_id)
    cluster.wait_for_state(task, "COMPLETED")
    written = {p: p.stat().st_mtime for p in config.run_folder.rglob("*") if p.is_file()}
    cluster.run("scontrol", "requeue", task)
    sweep.wait(lambda: "already finished" in sweep.log(run_id), "the attempt after the end")
    cluster.wait_for_state(task, "COMPLETED")
    assert sweep.attempts(run_id) == before
    assert {p: p.stat().st_mtime for p in config.run_folder.rglob("*") if p.is_file()} == written


def test_time_limit_is_a_save_and_a_requeue_until_the_budget_is_spent(
    cluster: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path, source: Path
) -> None:
    """Told 20 to 50 s before the limit; once is allowed, twice is not."""
    on(cluster)
    facts = {"signal_lead": 20, "retries": {"timed_out": 1}}
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1, **facts)
    line = ("--series", "0.2", "--source-net", source, "--epochs", 5000, "--print-freq", 100)
    assert sweep.series("Digits/bip.yml", *line) == 0
    (run_id,) = sweep.points()
    task, note = sweep.task(run_id), sweep.folder / "jobs" / f"{run_id}.failed"
    for number in (1, 2):
        # However slow the machine, each attempt makes steps before its limit comes near.
        cluster.run("scontrol", "update", f"JobId={task}", "TimeLimit=30")
        sweep.wait(sweep.training, f"attempt {number} trains")
        limit_at_next_minute(cluster, task)
        what = f"time-out {number}"
        cluster.wait(lambda: len(sweep.attempts(run_id, "end")) == number, what)  # noqa: B023
        cluster.wait(lambda: note.exists() or sweep.attempts(run_id, "requeue"), what)
    cluster.wait(note.exists, "the second is not requeued")
    assert "timed_out 2 times; the profile's retries.timed_out is 1" in note.read_text()
    ends, starts = sweep.attempts(run_id, "end"), sweep.attempts(run_id, "start")
    assert [end["cause"] for end in ends] == ["SIGUSR2", "SIGUSR2"]
    assert [r["cause"] for r in sweep.attempts(run_id, "requeue")] == ["timed_out"]
    assert 0 < ends[0]["step"] == starts[1]["step"] < ends[1]["step"]


def limit_at_next_minute(cluster: Cluster, task: str) -> None:
    """Of the task's running attempt, the next minute that is 45 s away: SLURM looks at limits about
    every 30 s."""
    minutes, seconds = map(int, cluster.run("squeue", "-h", "-j", task, "-o", "%M").split(":"))
    limit = minutes + 1 + (seconds > 15)
    cluster.run("scontrol", "update", f"JobId={task}", f"TimeLimit={limit}")


def test_failure_is_not_requeued_blocks_its_stage_and_is_resumed(
    cluster: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bug in pretraining, two values in one task, resume with the chain rebuilt, cancel."""
    on(cluster)
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1, points_per_task=2)
    stages = ("--stages", "pretrain,prune,finetune", "--series", "0.5,0.1", "--epochs", 1)
    good = sweep.profile.read_text()
    sweep.profile.write_text(good + "env: {RANK: spoiled, WORLD_SIZE: '1'}\n")
    assert sweep.series("Digits/bip.yml", *stages) == 0
    assert [a["dependency"].split(":")[0] for a in sweep.arrays()] == ["", "afterok", "aftercorr"]
    assert [len(array["tasks"]) for array in sweep.arrays()] == [1, 1, 1]
    cluster.wait(lambda: {r["state"] for r in sweep.status(capsys)} == {"failed", "blocked"}, "it")
    rows = sweep.status(capsys)
    assert [row["state"] for row in rows] == ["failed"] + 4 * ["blocked"]
    assert rows[0]["reason"].startswith("error: environment: ranks are not set correctly")
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the chain is gone from the queue")
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
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty")
    assert_cancelled(sweep, victim)
    points = sorted((sweep.folder / "points").glob("*k0.3*"))
    points[0].write_text(points[0].read_text().replace("momentum: 0.9", "momentum: 0.8"))
    assert main(resume) == 2
    assert "changed since it was planned" in capsys.readouterr().err


def assert_cancelled(sweep: ClusterSweep, run_id: str) -> None:
    """SLURM told it to stop and it saved; nobody has requeued it."""
    assert sweep.result(run_id) is None
    assert [r["event"] for r in sweep.attempts(run_id)] == ["start", "end"]
    task = sweep.cluster.job(sweep.task(run_id))
    assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "0")
    note = sweep.folder / "jobs" / f"{run_id}.failed"
    assert json.loads(note.read_text())["reason"].startswith("cancelled; python -m launch resume")


def ranks_of(run_id: str) -> dict[int, int]:
    """rank -> process, of a run on this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            facts = dict(
                line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0")
            )
        except (OSError, ValueError):
            continue
        if facts.get(b"BIP_POINT") == run_id.encode() and b"submitit.core._submit" in command:
            found[int(facts[b"SLURM_PROCID"])] = int(folder.name)
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_its_step(
    cluster: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    source: Path,
    blow: signal.Signals,
) -> None:
    """One of two, killed or frozen: the other ends too, and srun clears away what is left."""
    on(cluster)
    sweep = ClusterSweep(cluster, tmp_path / "out")
    line = ("--series", "0.5", "--source-net", source, "--rank-timeout", 10)
    assert sweep.series("Digits/bip.yml", *line, *LONG, "--epochs", 400) == 0
    sweep.wait(sweep.training, "it trains")
    (run_id,) = sweep.training()
    ranks = ranks_of(run_id)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], blow)
    gone = lambda: not set(ranks.values()) & set(ranks_of(run_id).values())  # noqa: E731
    cluster.wait(gone, "both ranks are gone", 90)
    assert main(["cancel", str(sweep.folder)]) == 0
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty")
    assert not sweep.result(run_id)
    if blow == signal.SIGSTOP:  # nothing but the silence tells of it
        assert "has not answered for 10 s; its last step was" in sweep.log(run_id)


@pytest.mark.parametrize("requeue_by", ["scontrol", "batch"])
def test_scancel_is_not_undone_by_the_run(
    requeue_by: str,
    cluster: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    source: Path,
) -> None:
    on(cluster)
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1, requeue_by=requeue_by)
    line = ("--series", "0.2", "--source-net", source, "--epochs", 5000, "--print-freq", 100)
    assert sweep.series("Digits/bip.yml", *line) == 0
    (run_id,) = sweep.points()
    sweep.wait(lambda: sweep.training(), "it trains")
    cluster.run("scancel", sweep.task(run_id))
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty")
    assert_cancelled(sweep, run_id)


def test_preempted_for_good_it_saves_and_is_resumed(
    merciless: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PreemptMode=CANCEL, of which doctor warns. While its grace lasts a run can still requeue
    itself; without one SLURM has ended its task before it is told."""
    cluster = on(merciless)
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1, ntasks_per_node=2)
    assert main(["doctor", str(sweep.profile)]) == 0
    assert "PreemptMode=CANCEL: SLURM ends preempted tasks for good" in capsys.readouterr().out
    assert sweep.series("Digits/bip.yml", "--series", "0.2", "--source-net", source, *LONG) == 0
    (run_id,) = sweep.points()
    for number, grace in enumerate((30, 0), 1):
        sweep.wait(sweep.training, f"attempt {number} trains")
        cluster.run("scontrol", "update", "PartitionName=low", f"GraceTime={grace}")
        cluster.submit("true", "--partition=high", "--exclusive", "--mem-per-cpu=10")
        cluster.wait(lambda: len(sweep.attempts(run_id, "end")) == number, "it saves")  # noqa: B023
    cluster.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty")
    assert len(sweep.attempts(run_id, "requeue")) == 1
    assert cluster.job(sweep.task(run_id))["Restarts"] == "1"
    (row,) = sweep.status(capsys)
    assert row["state"] == "failed"
    assert row["reason"].startswith("preempted and cancelled; python -m launch resume")
    assert main(["resume", str(sweep.folder), "--no-wait"]) == 0
    sweep.wait(sweep.all_done, "it is done")
    ends = [record["cause"] for record in sweep.attempts(run_id, "end")]
    assert ends == ["SIGTERM", "SIGTERM", "finished"]
    assert_story(sweep.attempts(run_id))
    config = sweep.points()[run_id]
    assert_same_outcome(config.run_folder, undisturbed(config, tmp_path / "calm"))


def test_finished_within_the_grace_period_and_requeued(
    patient: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path, source: Path
) -> None:
    """The attempt that SLURM ends while it exits writes no note; the next one does nothing."""
    cluster = on(patient)
    slow = tmp_path / "python"  # its exit takes a while
    slow.write_text(f"#!/bin/bash\ntrap '' USR2 TERM\n{sys.executable} \"$@\"\nexec sleep 60\n")
    slow.chmod(0o755)
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1, python=str(slow))
    line = ("--series", "0.2", "--source-net", source, "--epochs", 1)
    assert sweep.series("Digits/bip.yml", *line) == 0
    (run_id,) = sweep.points()
    task, config = sweep.task(run_id), sweep.points()[run_id]
    sweep.wait(sweep.all_done, "it is done")
    written = {p: p.stat().st_mtime for p in config.run_folder.rglob("*") if p.is_file()}
    blocker = high(cluster, 1)
    cluster.wait(lambda: cluster.job(task)["PreemptTime"] != "None", "its grace period")
    assert cluster.job(task)["JobState"] == "RUNNING"
    quick = tmp_path / "quick"  # a script that bash may be reading is not to be written to
    quick.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    quick.chmod(0o755)
    os.replace(quick, slow)
    cluster.run("scontrol", "requeue", task)
    sweep.wait(lambda: "already finished" in sweep.log(run_id), "the attempt after the end")
    cluster.wait_for_state(task, "COMPLETED")
    assert cluster.job(task)["Restarts"] == "1"
    cluster.wait_for_state(blocker, "COMPLETED")
    assert {p: p.stat().st_mtime for p in config.run_folder.rglob("*") if p.is_file()} == written
    assert not list((sweep.folder / "jobs").glob("*.failed*"))


def test_queued_tasks_run_the_code_of_their_submission(
    cluster: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path
) -> None:
    """Submitted from a copy of the project that is broken right after."""
    on(cluster)
    copy = tmp_path / "project"
    subprocess.run(["cp", "-r", *(ROOT / n for n in ("bip", "launch", "slurm")), "-t",
                    _made(copy)], check=True)  # fmt: skip
    sweep = ClusterSweep(cluster, tmp_path / "out", nodes=1)
    flags = ["--configs", CONFIGS / "Digits/pretrain.yml", "--epochs", "1", "--no-wait"]
    place = ["--result-dir", sweep.results, "--exp-name", "sweep", "--profile", sweep.profile]
    cluster.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        command = [sys.executable, "-m", "launch", "series", *map(str, [*flags, *place])]
        refused = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stderr) == (2, "error: partition: low is DOWN\n")
        cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
        subprocess.run(command, cwd=copy, check=True, env=os.environ | {"PYTHONPATH": str(copy)})
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "State=UP")
    (copy / "bip" / "run.py").write_text("raise SystemExit('changed after submission')\n")
    (copy / "slurm" / "task.sh").unlink()
    sweep.wait(sweep.all_done, "it is done")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_tasks_that_start_together_on_one_node_do_not_collide(
    cluster: Cluster, on: Callable[[Cluster], Cluster], tmp_path: Path
) -> None:
    """20 times two tasks of two ranks meet at their rendezvous at the same moment."""
    on(cluster)
    script = f"""
import os, pathlib, time, torch
from bip.distributed.rendezvous import join
here, task = pathlib.Path({str(tmp_path)!r}), int(os.environ["SLURM_ARRAY_TASK_ID"])
for number in range(20):
    (here / f"ready-{{number}}-{{task}}-{{os.environ['SLURM_PROCID']}}").touch()
    while len(list(here.glob(f"ready-{{number}}-*"))) < 4:
        time.sleep(0.005)
    group = join(here / "rendezvous", os.environ | {{"SLURM_STEP_ID": str(number)}})
    assert group.sum_(torch.tensor([task, 1])).tolist() == [2 * task, 2]
    group.barrier()
    group.close()
(here / f"met-{{task}}-{{group.rank}}").touch()
"""
    (tmp_path / "meet.py").write_text(script)
    meet = f"PYTHONPATH={ROOT} srun --kill-on-bad-exit=1 {sys.executable} {tmp_path}/meet.py"
    job = cluster.submit(meet, "--array=0-1", "--nodelist=n1", "--ntasks=2", "--mem-per-cpu=10",
                         f"--output={tmp_path}/%a.log")  # fmt: skip
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job), "all have met", 300)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert len(list(tmp_path.glob("met-*"))) == 4, logs


def test_the_templates_without_the_launcher(
    patient: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user gives them to sbatch; all tasks are preempted, requeue themselves and go on."""
    cluster = on(patient)
    monkeypatch.setenv("SERIES", "0.5 0.2")
    monkeypatch.setenv("PYTHON", sys.executable)
    common = ["--exp-name", "sweep", "--result-dir", tmp_path / "out", *LONG, "--epochs", 40]
    facts = ["--nodes=1", "--cpus-per-task=1", "--mem=10", "--time=10", "--gpus-per-node=0"]

    def flags(config: str, *more: object) -> list[str]:
        return [str(word) for word in ("--configs", CONFIGS / config, *common, *more)]

    def sbatch(template: str, flags: list[str], log: str, *more: str) -> None:
        words = ["sbatch", *facts, *more, f"--output={tmp_path / log}"]
        words += [ROOT / "slurm" / "templates" / template, *flags]
        subprocess.run([str(word) for word in words], cwd=ROOT, check=True)

    series, run = flags("Digits/bip.yml", "--source-net", source), flags("Digits/pretrain.yml")
    sbatch("series.sbatch", series, "%a.log", "--ntasks-per-node=1", "--array=0-1")
    sbatch("run.sbatch", run, "run.log", "--ntasks-per-node=2")
    runs = [load_config([*series, "--k", k]) for k in ("0.5", "0.2")] + [load_config(run)]

    def attempts(config: RunConfig) -> list[dict[str, Any]]:
        return list(read_jsonl(config.run_folder / "attempts.jsonl"))

    def log() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.log"))

    cluster.wait(lambda: all(map(attempts, runs)), "all have begun", 240)
    assert not any(is_done(config.run_folder) for config in runs)
    high(cluster, 1)
    cluster.wait(lambda: all(is_done(config.run_folder) for config in runs), log(), 400)
    for config, world in zip(runs, (1, 1, 2), strict=True):
        assert interrupted(attempts(config)) >= 1
        assert_story(attempts(config))
        assert_same_outcome(config.run_folder, undisturbed(config, tmp_path / "calm", world))


@pytest.mark.parametrize(
    "loader",
    ["lmdb", pytest.param("dali", marks=pytest.mark.skipif(not is_installed(), reason="no DALI"))],
)
def test_the_whole_path(
    loader: str,
    patient: Cluster,
    on: Callable[[Cluster], Cluster],
    tmp_path: Path,
    imagenet: Path,  # noqa: F811
) -> None:
    """sbatch array, two nodes, ResNet18, real ImageNet images from LMDB, preempted mid-epoch."""
    cluster = on(patient)
    sweep = ClusterSweep(cluster, tmp_path / "out")
    flags = ("--data-dir", imagenet, "--num-classes", 171, "--image-dim", 64, "--batch-size", 10,
             "--test-batch-size", 64, "--num-workers", 1, "--loader", loader, "--print-freq", 1,
             "--epochs", 1, "--stages", "pretrain,prune", "--series", "0.1")  # fmt: skip
    assert sweep.series("ImageNet/bip.yml", *flags) == 0
    prune = next(name for name, c in sweep.points().items() if c.exp_mode == "prune")
    sweep.wait(lambda: sweep.is_training(prune), "the pruning trains", 300)
    high(cluster, 1)
    sweep.wait(lambda: sweep.attempts(prune, "requeue"), "the requeue")
    sweep.wait(sweep.all_done, "all is done", 300)
    (end,) = [r for r in sweep.attempts(prune, "end") if r["cause"] != "finished"]
    assert 0 < end["step"] < 171 // 10, "in mid-epoch"
    assert_story(sweep.attempts(prune))
    config = sweep.points()[prune]
    assert_same_outcome(config.run_folder, undisturbed(config, tmp_path / "calm"))
