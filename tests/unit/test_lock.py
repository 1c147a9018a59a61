"""The lock on a run folder: one writer, whoever dies and wherever."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from bip import lock as module
from bip.errors import RankError, UserError
from bip.lock import Holder, RunLock


def hold(folder: Path, taken: object, seconds: float) -> None:
    """In a process of its own: take the lock, say so, hold it, and let go."""
    lock = RunLock(folder)
    lock.acquire()
    taken.set()  # type: ignore[attr-defined]
    time.sleep(seconds)
    lock.release()


def write_holder(folder: Path, number: int = 1, **changes: object) -> None:
    """A lock as another host would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = dataclasses.replace(Holder.self({}), boot="another", host="far", **changes)  # type: ignore[arg-type]
    (folder / f".lock.{number}").write_text(json.dumps(dataclasses.asdict(holder)))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)


def test_second_attempt_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_requeued_attempt_waits_for_the_one_before_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That lives on for KillWait at most; another task's attempt is not waited for."""
    task = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    monkeypatch.setenv("BIP_KILL_WAIT", "30")
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=hold, args=(tmp_path, taken, 5))
    process.start()
    taken.wait(10)
    with pytest.raises(UserError, match=r"in use by .*, SLURM job 9_3"):
        RunLock(tmp_path, task | {"SLURM_ARRAY_TASK_ID": "4"}).acquire()
    lock = RunLock(tmp_path, task | {"SLURM_RESTART_COUNT": "1"})
    assert lock.acquire()
    process.join(0.5)
    assert process.exitcode == 0, "it has let go"
    assert "waiting for process" in capsys.readouterr().out
    lock.check()
    lock.release()


def test_a_killed_holder_is_recognised_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=hold, args=(tmp_path, taken, 60))
    process.start()
    taken.wait(10)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    began = time.monotonic()
    lock = RunLock(tmp_path)
    assert lock.acquire()
    assert time.monotonic() - began < 1
    lock.release()


def test_of_many_only_one_takes_over(tmp_path: Path) -> None:
    """Eight processes find the same stale lock; each holds for a moment, none beside another."""
    write_holder(tmp_path, released=True)
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"

    def work() -> None:
        lock = RunLock(tmp_path)
        while True:
            try:
                lock.acquire()
                break
            except UserError:
                continue
        with open(log, "a") as stream:
            stream.write("in\n")
            stream.flush()
            time.sleep(0.05)
            stream.write("out\n")
        lock.release()

    processes = [context.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text().split() == ["in", "out"] * 8


@pytest.mark.parametrize(("over", "free"), [(True, True), (False, False)])
def test_on_another_host_slurm_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool, free: bool
) -> None:
    monkeypatch.setattr(module, "_attempt_is_over", lambda _holder: over)
    monkeypatch.setattr(module, "_kill_wait", lambda: 0.0)
    write_holder(tmp_path, job="7")
    lock = RunLock(tmp_path)
    if free:
        assert lock.acquire()
        lock.release()
    else:
        monkeypatch.setattr(lock, "_patience", lambda _holder: 1.0)
        with pytest.raises(UserError, match=r"in use by process .* on far, SLURM job 7"):
            lock.acquire()


def fake_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    """Answers so, by an error where it is no record; None: there is no scontrol."""
    if answer is not None:
        script = f"#!/bin/sh\necho '{answer}'\nexit {int('=' not in answer)}\n"
        (folder / "scontrol").write_text(script)
        (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin" if answer is not None else str(folder))


@pytest.mark.parametrize(
    ("answer", "over"),
    [
        ("JobState=RUNNING Restarts=0 ", False),
        ("JobState=RUNNING Restarts=1 ", True),  # the next attempt: our own
        ("JobState=PENDING Restarts=1 ", True),
        ("JobState=FAILED Restarts=0 ", True),
        ("slurm_load_jobs error: Invalid job id specified", True),
        ("slurm_load_jobs error: Unable to contact slurm controller", None),
        (None, None),
    ],
)
def test_what_slurm_says_of_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, over: bool | None
) -> None:
    fake_scontrol(tmp_path, monkeypatch, answer)
    holder = dataclasses.replace(Holder.self({}), job="7", restart=0)
    assert module._attempt_is_over(holder) is over


def test_a_holder_that_was_taken_over_stops_writing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    later = RunLock(tmp_path)
    later._take(later._newest()[0])
    with pytest.raises(RankError, match="another attempt has taken this run over"):
        lock.check()
    lock.release()
    later.check()
    later.release()


def test_a_link_that_was_made_counts_whatever_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client repeats a request whose answer was lost, and hears that the name exists."""
    link = os.link

    def twice(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    lock = RunLock(tmp_path)
    assert lock.acquire()
    assert lock.path == tmp_path / ".lock.1"
    with pytest.raises(UserError, match="in use by process"):
        RunLock(tmp_path).acquire()
    lock.release()


@pytest.mark.parametrize("place", ["os.link", "pathlib.Path.read_text"])
def test_a_file_system_that_is_away_is_no_sign_of_a_free_lock(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(module, "UNREACHABLE_SECONDS", 1.0)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire()
    if place == "os.link":
        first.release()
    with monkeypatch.context() as patch:
        patch.setattr(place, away)
        with pytest.raises(OSError, match="Stale file handle"):  # no UserError: another attempt may
            second.acquire()
    if place != "os.link":
        first.check()
        first.release()
    assert second.acquire()
    second.release()


def test_one_hiccup_does_not_end_the_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hiccups = iter([OSError(errno.ESTALE, "Stale file handle")])
    listdir = os.listdir

    def flaky(folder: Path) -> list[str]:
        for error in hiccups:
            raise error
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", flaky)
    lock = RunLock(tmp_path)
    assert lock.acquire()
    lock.release()


def test_kill_wait_where_there_is_no_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_scontrol(tmp_path, monkeypatch, "KillWait                = 45 sec")
    assert module._kill_wait() == 45
    fake_scontrol(tmp_path, monkeypatch, None)
    (tmp_path / "scontrol").unlink()
    assert module._kill_wait() == 30
    monkeypatch.setenv("BIP_KILL_WAIT", "")  # the batch script could not find out either
    assert module._kill_wait() == 30
    monkeypatch.setenv("BIP_KILL_WAIT", "120")
    assert module._kill_wait() == 120


def test_a_told_attempt_gives_up_waiting(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    assert not RunLock(tmp_path).acquire(give_up=lambda: True)
    first.release()
