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
from launch.status import Row, status
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, ROOT, FakeSweep, until

LINE = ("--series", "0.5,0.1", "--stages", "pretrain,prune")


def rows(fake: FakeSweep) -> list[Row]:
    return status(fake.folder)


def states(fake: FakeSweep) -> list[str]:
    return [row.state for row in rows(fake)]


def resume(fake: FakeSweep) -> int:
    return main(["resume", str(fake.folder)], fake.command)


@pytest.fixture
def going(fake: FakeSweep) -> FakeSweep:
    """Its pretraining runs, and two prunings wait."""
    fake.hold.touch()
    assert fake.series(*LINE, "--no-wait") == 0
    until(lambda: fake.events("start"))
    return fake


def claim(fake: FakeSweep) -> dict[str, int]:
    """What the worker of the one running run noted."""
    sweep = Sweep(fake.folder)
    (run,) = filter(sweep.is_running, sweep.runs())
    return sweep.claim(run)


def test_cancel_lets_the_running_run_save_and_starts_no_other(
    going: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", str(going.folder)]) == 0
    assert "3 runs, of which 1 were running" in capsys.readouterr().out
    assert len(going.events("saved")) == 1
    assert states(going) == ["cancelled"] * 3
    assert all("launch resume" in row.reason for row in rows(going))
    until(lambda: not Sweep(going.folder).live_workers())
    going.hold.unlink()
    assert len(going.events("start")) == 1
    assert resume(going) == 0
    assert states(going) == ["done"] * 3


def test_a_save_takes_its_time_and_what_does_not_end_is_killed(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.hold.touch()
    monkeypatch.setenv("FAKE_SAVE", "2")
    assert fake.series(*LINE, "--no-wait") == 0
    until(lambda: fake.events("start"))
    assert main(["cancel", str(fake.folder), "--save-seconds", "30"]) == 0
    assert len(fake.events("saved")) == 1
    monkeypatch.setenv("FAKE_SAVE", "60")
    assert main(["resume", str(fake.folder), "--no-wait"], fake.command) == 0
    until(lambda: len(fake.events("start")) == 2)
    begin = time.monotonic()
    assert main(["cancel", str(fake.folder), "--save-seconds", "1"]) == 0
    assert time.monotonic() - begin < 20
    assert len(fake.events("saved")) == 1
    assert states(fake) == ["cancelled"] * 3


def test_a_run_whose_worker_was_killed_is_cancelled_too(going: FakeSweep) -> None:
    os.kill(claim(going)["worker"], signal.SIGKILL)
    assert main(["cancel", str(going.folder)]) == 0
    assert len(going.events("saved")) == 1
    assert states(going) == ["cancelled"] * 3


def test_a_run_on_another_machine_is_not_signalled_here(
    going: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process number may be anybody's here."""
    (row,) = [row for row in rows(going) if row.state == "running"]
    path, bystander = Sweep(going.folder).claim_path(row.run_id), subprocess.Popen(["sleep", "60"])
    note = claim(going) | {"host": "far", "run": bystander.pid}
    path.write_text(json.dumps(note))
    try:
        assert main(["cancel", str(going.folder), "--save-seconds", "60"]) == 2
        assert "far" in capsys.readouterr().err
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert not going.events("saved")


def test_sigterm_to_a_run_leaves_it_cancelled_and_the_next_one_starts(going: FakeSweep) -> None:
    other = [*LINE, "--seeds", "5"]
    assert going.series(*other, "--no-wait") == 0
    os.kill(until(lambda: claim(going).get("run")), signal.SIGTERM)
    until(lambda: "cancelled" in states(going))
    (row,) = [row for row in rows(going) if row.state == "cancelled"]
    assert "stopped by SIGTERM at step 3" in row.reason
    assert "launch resume" in row.reason
    going.hold.unlink()
    assert resume(going) == 0
    assert set(states(going)) == {"done"}


def test_sigterm_to_a_worker_stops_its_run_and_starts_no_other(going: FakeSweep) -> None:
    os.kill(claim(going)["worker"], signal.SIGTERM)
    until(lambda: going.events("saved"))
    until(lambda: states(going)[0] == "cancelled")
    assert states(going)[1:] == ["blocked", "blocked"]
    until(lambda: not Sweep(going.folder).live_workers())
    assert len(going.events("start")) == 1


def test_all_ranks_under_torchrun_get_to_save(fake: FakeSweep, tmp_path: Path) -> None:
    """Each is asked itself: torchrun kills what has not ended 30 s after its own signal."""
    fake.hold.touch()
    profile = tmp_path / "profile.yml"
    profile.write_text("executor: local\nntasks_per_node: 2\n")
    line = ("--stages", "pretrain", "--configs", str(DIGITS / "pretrain.yml"), "--profile",
            str(profile), "--no-wait")  # fmt: skip
    assert fake.series(*line) == 0
    until(lambda: len(fake.events("start")) == 2, 60)
    assert main(["cancel", str(fake.folder)]) == 0
    assert len(fake.events("saved")) == 2
    assert states(fake) == ["cancelled"]
    by_hand = (lambda: fake.events("start")[-1]["pid"], lambda: claim(fake)["run"])  # or torchrun
    for count, pid in zip((4, 6), by_hand, strict=True):
        assert main(["resume", str(fake.folder), "--no-wait"], fake.command) == 0
        until(lambda: len(fake.events("start")) == count, 60)  # noqa: B023
        os.kill(pid(), signal.SIGTERM)
        until(lambda: states(fake) == ["cancelled"], 60)
        assert "stopped by SIGTERM" in rows(fake)[0].reason


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
    run_id = rows(fake)[0].run_id
    until(lambda: fake.events("start"))
    one, other = logs(fake, run_id[-8:], "--follow"), logs(fake, run_id, "--follow")
    assert one.stdout is not None
    assert other.stdout is not None
    assert one.stdout.readline() == other.stdout.readline() == "first\n"
    other.send_signal(signal.SIGINT)
    out, err = other.communicate(timeout=30)
    assert (out, err, other.returncode) == ("", "", 130)
    fake.hold.unlink()
    out, err = one.communicate(timeout=30)
    assert (err, one.returncode) == ("", 0)


def test_logs_name_the_failed_runs(
    fake: FakeSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "0.5")
    assert fake.series(*LINE) == 1
    capsys.readouterr()
    assert main(["logs", str(fake.folder)]) == 0
    out = capsys.readouterr().out
    (row,) = [row for row in rows(fake) if row.state == "failed"]
    path = Sweep(fake.folder).log(row.run_id)
    assert all(text in out for text in (row.run_id, "the disk is on fire", str(path), "1 failed"))
    assert main(["logs", str(fake.folder), row.run_id]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(["logs", str(fake.folder), "--follow"]) == 2
    assert "RUN" in capsys.readouterr().err
