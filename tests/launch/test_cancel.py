"""Local sweeps that are stopped, seen in their logs, and go on: real workers, a fake training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, ROOT, FakeSweep, until

LINE = ("--series", "0.5,0.1", "--stages", "pretrain,prune")


@pytest.fixture
def going(fake: FakeSweep) -> FakeSweep:
    """Its pretraining runs, and two prunings wait."""
    fake.hold.touch()
    assert fake.series(*LINE, "--no-wait") == 0
    until(lambda: fake.events("start"))
    return fake


def cancel(fake: FakeSweep, *words: str) -> int:
    return main(["cancel", str(fake.folder), *words])


def test_cancel_lets_the_running_run_save_and_starts_no_other(
    going: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cancel(going) == 0
    assert "3 runs, of which 1 were running" in capsys.readouterr().out
    assert len(going.events("saved")) == 1
    assert going.states() == ["cancelled"] * 3
    assert all("launch resume" in row.reason for row in going.rows())
    until(lambda: not Sweep(going.folder).live_workers())
    going.hold.unlink()
    assert len(going.events("start")) == 1
    assert going.resume() == 0
    assert going.states() == ["done"] * 3


def test_a_save_takes_its_time_and_what_does_not_end_is_killed(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.hold.touch()
    monkeypatch.setenv("FAKE_SAVE", "2")
    assert fake.series(*LINE, "--no-wait") == 0
    until(lambda: fake.events("start"))
    assert cancel(fake, "--save-seconds", "30") == 0
    assert len(fake.events("saved")) == 1
    monkeypatch.setenv("FAKE_SAVE", "60")
    assert fake.resume("--no-wait") == 0
    until(lambda: len(fake.events("start")) == 2)
    begin = time.monotonic()
    assert cancel(fake, "--save-seconds", "1") == 0
    assert time.monotonic() - begin < 20
    assert len(fake.events("saved")) == 1
    assert fake.states() == ["cancelled"] * 3


def test_a_run_whose_worker_was_killed_is_cancelled_too(going: FakeSweep) -> None:
    os.kill(going.claim()["worker"], signal.SIGKILL)
    assert cancel(going) == 0
    assert len(going.events("saved")) == 1
    assert going.states() == ["cancelled"] * 3


def test_a_run_on_another_machine_is_not_signalled_here(
    going: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process number may be anybody's here."""
    (row,) = [row for row in going.rows() if row.state == "running"]
    path, bystander = Sweep(going.folder).claim_path(row.run_id), subprocess.Popen(["sleep", "60"])
    path.write_text(json.dumps(going.claim() | {"host": "far", "run": bystander.pid}))
    try:
        assert cancel(going, "--save-seconds", "60") == 2
        assert "far" in capsys.readouterr().err
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert not going.events("saved")


def test_sigterm_to_a_run_leaves_it_cancelled_and_the_next_one_starts(going: FakeSweep) -> None:
    assert going.series(*LINE, "--seeds", "5", "--no-wait") == 0
    os.kill(until(lambda: going.claim().get("run")), signal.SIGTERM)
    until(lambda: "cancelled" in going.states())
    (row,) = [row for row in going.rows() if row.state == "cancelled"]
    assert "stopped by SIGTERM at step 3" in row.reason
    assert "launch resume" in row.reason
    going.hold.unlink()
    assert going.resume() == 0
    assert set(going.states()) == {"done"}


def test_sigterm_to_a_worker_stops_its_run_and_starts_no_other(going: FakeSweep) -> None:
    os.kill(going.claim()["worker"], signal.SIGTERM)
    until(lambda: going.events("saved"))
    until(lambda: going.states() == ["cancelled", "blocked", "blocked"])
    until(lambda: not Sweep(going.folder).live_workers())
    assert len(going.events("start")) == 1


def test_all_ranks_under_torchrun_get_to_save(fake: FakeSweep, tmp_path: Path) -> None:
    """Each is asked itself: torchrun kills what has not ended 30 s after its own signal."""
    fake.hold.touch()
    profile = tmp_path / "profile.yml"
    profile.write_text("executor: local\nntasks_per_node: 2\n")
    configs = ("--configs", str(DIGITS / "pretrain.yml"), "--profile", str(profile))
    assert fake.series("--stages", "pretrain", *configs, "--no-wait") == 0
    until(lambda: len(fake.events("start")) == 2, 60)
    assert cancel(fake) == 0
    assert len(fake.events("saved")) == 2
    assert fake.states() == ["cancelled"]
    by_hand = (lambda: fake.events("start")[-1]["pid"], lambda: fake.claim()["run"])  # or torchrun
    for count, pid in zip((4, 6), by_hand, strict=True):
        assert fake.resume("--no-wait") == 0
        until(lambda: len(fake.events("start")) == count, 60)  # noqa: B023
        os.kill(pid(), signal.SIGTERM)
        until(lambda: fake.states() == ["cancelled"], 60)
        assert "stopped by SIGTERM" in fake.rows()[0].reason


def logs(fake: FakeSweep, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "logs", str(fake.folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_logs_follow_a_run_to_its_end(fake: FakeSweep) -> None:
    fake.script.write_text("print('first', flush=True)\n" + fake.script.read_text())
    fake.hold.touch()
    fake.series(*LINE, "--no-wait")
    run_id = fake.rows()[0].run_id
    until(lambda: fake.events("start"))
    one, other = logs(fake, run_id[-8:], "--follow"), logs(fake, run_id, "--follow")
    assert one.stdout is not None
    assert other.stdout is not None
    assert one.stdout.readline() == other.stdout.readline() == "first\n"
    other.send_signal(signal.SIGINT)
    assert (other.communicate(timeout=30), other.returncode) == (("", ""), 130)
    fake.hold.unlink()
    assert one.communicate(timeout=30)[1] == ""
    assert one.returncode == 0


def test_logs_name_the_failed_runs(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "0.5")
    assert fake.series(*LINE) == 1
    capsys.readouterr()
    assert main(["logs", str(fake.folder)]) == 0
    out = capsys.readouterr().out
    (row,) = [row for row in fake.rows() if row.state == "failed"]
    path = Sweep(fake.folder).log(row.run_id)
    assert all(text in out for text in (row.run_id, "the disk is on fire", str(path), "1 failed"))
    assert main(["logs", str(fake.folder), row.run_id]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(["logs", str(fake.folder), "--follow"]) == 2
    assert "RUN" in capsys.readouterr().err
