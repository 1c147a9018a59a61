"""Workers, locks and launchers: real processes through submitit, a stand-in for the training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bip import models
from bip.errors import UserError
from launch.local.executor import LocalExecutor
from launch.local.worker import run_environment
from launch.plan import check_same_source
from launch.status import status
from launch.sweep import Lock, Queue, Sweep
from tests.launch.conftest import DIGITS, FakeSweep, plan_sweep, until

CHAIN = ("--stages", "pretrain,prune")
ONE = ("--series", "0.5", *CHAIN, "--parallelism", "1")
SIX = ("--series", "0.9,0.8,0.7,0.6,0.5,0.4", *CHAIN)


def most_at_once(fake: FakeSweep) -> int:
    """The largest number of runs between their start and end records."""
    steps = [(r["time"], 1) for r in fake.events("start")]
    steps += [(r["time"], -1) for r in fake.events("end")]
    running, most = 0, 0
    for _, change in sorted(steps):
        running += change
        most = max(most, running)
    return most


def stages(fake: FakeSweep) -> list[str]:
    """Of all starts."""
    return [record["stage"] for record in fake.events("start")]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def going(fake: FakeSweep) -> int:
    """The process of the pretraining, which runs until `hold` is gone; its pruning waits."""
    fake.hold.touch()
    fake.series(*ONE, "--no-wait")
    return int(until(lambda: fake.events("start"))[0]["pid"])


def test_several_launchers_share_the_slots(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again while runs are going adds no worker beyond --parallelism."""
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    line = (*SIX, "--parallelism", "2")
    assert fake.series(*line, "--no-wait") == 0
    assert fake.series(*line, "--no-wait") == 0
    assert fake.series(*line) == 0
    assert most_at_once(fake) == 2
    assert stages(fake)[0] == "pretrain"
    run_ids = [record["run_id"] for record in fake.events("start")]
    assert len(run_ids) == len(set(run_ids)) == len(fake.events("end")) == 7


def test_a_second_call_runs_only_what_it_adds(
    fake: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake.series(*ONE) == 0
    assert capsys.readouterr().out.count("] done") == 2
    ledger = (fake.folder / "series.json").read_bytes()
    assert fake.series(*ONE) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs were finished before" in shown
    assert "50.00" in shown  # the table
    assert (fake.folder / "series.json").read_bytes() == ledger
    assert fake.series("--series", "0.5,0.1", *CHAIN) == 0
    assert [record["k"] for record in fake.events("start")] == ["1", "0.5", "0.1"]
    assert fake.series(*ONE, "--lr2", "0.5") == 0
    assert len(fake.rows()) == 4


def test_runs_get_their_threads_and_no_foreign_ranks(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_PROCID", "SLURM_JOB_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    profile = tmp_path / "profile.yml"
    profile.write_text(
        "executor: local\ncpus_per_task: 3\nenv: {FAKE_SECONDS: 0.01, COLOUR: red}\n"
    )
    assert fake.series(*ONE, "--profile", str(profile)) == 0
    for record in fake.events("start"):
        environment = record["environment"]
        assert environment["OMP_NUM_THREADS"] == "3"
        assert environment["COLOUR"] == "red"
        assert environment["CUDA_VISIBLE_DEVICES"] == "5"
        foreign = [name for name in environment if name.startswith(("SLURM_", "SUBMITIT_"))]
        assert foreign == ["SLURM_CONF"]
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(environment)


def test_failure_is_shown_blocks_its_dependants_and_spares_the_others(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--series", "0.5,0.1", "--stages", "pretrain,prune,finetune")
    monkeypatch.setenv("FAKE_FAIL", "1")
    assert fake.series(*line) == 1
    assert fake.states() == ["failed"] + 4 * ["blocked"]
    assert stages(fake) == ["pretrain"]
    monkeypatch.setenv("FAKE_FAIL", "0.5")
    assert fake.series(*line) == 1
    rows = {(row.stage, row.k): row for row in fake.rows()}
    assert {key: row.state for key, row in rows.items()} == {
        ("pretrain", "1"): "done",
        ("prune", "0.5"): "failed",
        ("prune", "0.1"): "done",
        ("finetune", "0.5"): "blocked",
        ("finetune", "0.1"): "done",
    }
    reason = "exit code 2: error: data_dir: the disk is on fire"
    assert rows["prune", "0.5"].reason == reason
    assert rows["prune", "0.5"].run_id in rows["finetune", "0.5"].reason
    assert reason in capsys.readouterr().out
    monkeypatch.delenv("FAKE_FAIL")  # the user repairs it and gives the same command
    before = len(fake.events("start"))
    assert fake.series(*line) == 0
    again = [(record["stage"], record["k"]) for record in fake.events("start")[before:]]
    assert again == [("prune", "0.5"), ("finetune", "0.5")]


def test_ctrl_c_leaves_the_runs_going(fake: FakeSweep) -> None:
    fake.hold.touch()
    call = f"main({fake.argv(*ONE)}, {fake.command})"
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from launch.__main__ import main; sys.exit({call})"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its own process group, as on a terminal
        # A job of a shell's `&` ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: fake.events("start"))
    os.killpg(launcher.pid, signal.SIGINT)
    # The pipe closes with the launcher: the runs must not hold it open.
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    assert f"python -m launch status {fake.folder}" in output
    assert fake.states() == ["running", "waiting"]
    fake.hold.unlink()
    until(lambda: fake.states() == ["done", "done"])
    assert stages(fake) == ["pretrain", "prune"]


def test_killed_run_is_a_failure_with_its_signal(fake: FakeSweep, going: int) -> None:
    kill(going)
    until(lambda: fake.states() == ["failed", "blocked"])
    assert fake.rows()[0].reason.startswith("killed by SIGKILL")


def test_run_of_a_killed_worker_is_taken_up_again(fake: FakeSweep, going: int) -> None:
    kill(fake.claim()["worker"])
    kill(going)
    until(lambda: fake.states()[0] == "waiting")
    assert Sweep(fake.folder).live_workers() == 0
    fake.hold.unlink()
    assert fake.series(*ONE) == 0
    assert stages(fake) == ["pretrain", "pretrain", "prune"]


@pytest.mark.usefixtures("going")
def test_run_outlives_its_killed_worker_and_is_not_started_twice(fake: FakeSweep) -> None:
    kill(fake.claim()["worker"])
    fake.series(*ONE, "--no-wait")
    time.sleep(1.5)  # time enough for a second worker to make the mistake
    assert stages(fake) == ["pretrain"]
    assert fake.states()[0] == "running"
    fake.hold.unlink()
    assert fake.series(*ONE) == 0
    assert stages(fake) == ["pretrain", "prune"]


def test_launcher_stops_waiting_when_no_worker_is_left(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.watch.DEAD_SECONDS", 0.1)
    monkeypatch.setattr("launch.local.executor.LocalExecutor.submit", lambda *_: None)
    assert fake.series(*ONE) == 1
    out, err = capsys.readouterr()
    assert "no worker is alive (2 waiting)" in err
    assert "waiting" in out


def test_run_that_ends_without_a_result_has_failed(fake: FakeSweep) -> None:
    fake.script.write_text("print('good bye')")
    assert fake.series(*ONE) == 1
    assert fake.rows()[0].reason == "ended without a result; last line: good bye"


def test_several_ranks_start_through_torchrun(fake: FakeSweep, tmp_path: Path) -> None:
    fake.script.write_text(
        "import os, pathlib, sys, time\n"
        "text = ' '.join(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / ('rank' + os.environ['RANK'])).write_text(text)\n"
        # torchrun ends the others when one has failed, perhaps before they have come so far.
        "while len(list(here.glob('rank?'))) < 2: time.sleep(0.05)\n"
        "sys.exit('error: batch_size: too small')\n"
    )
    profile = tmp_path / "profile.yml"
    profile.write_text("executor: local\nntasks_per_node: 2\n")
    configs = ("--configs", str(DIGITS / "pretrain.yml"), "--profile", str(profile))
    fake.series("--stages", "pretrain", *configs)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["0 0 2", "1 1 2"]
    assert fake.rows()[0].reason == "exit code 1: error: batch_size: too small"


def test_a_planned_run_never_changes_its_source(fake: FakeSweep, tmp_path: Path) -> None:
    """Another --source-net is refused, unless the RUN_ID tells the two apart."""
    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    for number, path in enumerate((one, other)):
        weights = models.build("digits_net", 10, 1).state_dict()
        torch.save({"state_dict": weights, "number": number}, path)
    assert fake.series("--series", "0.5", "--source-net", str(one)) == 0
    before = {path: path.read_bytes() for path in fake.folder.glob("points/*")}
    code = fake.series("--series", "0.5", "--source-net", str(other))
    after = {path: path.read_bytes() for path in fake.folder.glob("points/*")}
    assert {path: after[path] for path in before} == before
    assert code == (2 if after == before else 0)


def test_settings_edited_while_queued_are_not_run(fake: FakeSweep) -> None:
    """They are those of another run, and would train into its folder."""
    sweep = plan_sweep(fake.results)
    path = sweep.folder / sweep.runs()[0].config
    path.write_text(path.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    LocalExecutor(sweep, command=fake.command).submit([path.stem])
    row = until(lambda: next((r for r in status(sweep.folder) if r.state == "failed"), None))
    assert f"{path}: changed since it was planned" in row.reason
    assert not fake.events("start")


def test_source_is_known_by_its_run_wherever_it_lies() -> None:
    best = Path("prune/RUN/checkpoint/model_best.pth.tar")
    check_same_source("run", "/old" / best, "/new" / best)
    for other in (Path("/old/prune/OTHER/checkpoint/model_best.pth.tar"), Path("/x.pth"), None):
        with pytest.raises(UserError, match="run would start from"):
            check_same_source("run", "/old" / best, other)


def test_unwritable_place_is_a_clear_error(
    fake: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.results.write_text("a file where the folder should be")
    assert fake.series(*ONE) == 2
    assert f"error: result_dir: {fake.folder}: " in capsys.readouterr().err


def test_lock_lives_as_long_as_any_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock.try_acquire(path)
    assert lock is not None
    assert Lock.is_held(path)
    assert Lock.try_acquire(path) is None
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    lock.close()
    assert Lock.is_held(path)
    child.kill()
    child.wait()
    assert not Lock.is_held(path)
    assert not Lock.is_held(tmp_path / "none")


def test_run_environment_keeps_what_is_the_users() -> None:
    queue = Queue([], 1, 1, 2, {"OMP_NUM_THREADS": "7"}, [])
    kept = run_environment({"HOME": "/h", "RANKING": "x", "LOCAL_RANK": "1"}, queue)
    assert kept == {"HOME": "/h", "RANKING": "x", "OMP_NUM_THREADS": "7"}
