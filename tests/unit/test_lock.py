"""The lock on a run folder: one writer, whoever dies and wherever."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bip import lock as module
from bip.errors import RankError, UserError
from bip.lock import Holder, RunLock
from bip.slurm import kill_wait


@contextlib.contextmanager
def held(folder: Path, seconds: float) -> Iterator[Any]:
    """A process that takes the lock, holds it and lets go."""
    context = multiprocessing.get_context("fork")
    taken = context.Event()

    def hold() -> None:
        lock = RunLock(folder)
        lock.acquire()
        taken.set()
        time.sleep(seconds)
        lock.release()

    process = context.Process(target=hold)
    process.start()
    assert taken.wait(10)
    yield process
    process.join(0.5)
    assert not process.is_alive()


def write_holder(folder: Path, **changes: Any) -> None:
    """A lock as another host would have left it."""
    holder = dataclasses.replace(Holder.self({}), boot="another", host="far", **changes)
    (folder / ".lock.1").write_text(json.dumps(dataclasses.asdict(holder)))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    lock = RunLock(tmp_path)
    yield lock
    lock.release()


def test_second_attempt_is_refused_with_the_holders_name(lock: RunLock, tmp_path: Path) -> None:
    assert lock.acquire()
    second = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        second.acquire()
    assert not second.acquire(give_up=lambda: True), "an attempt that is to stop does not wait"
    lock.release()
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
    with held(tmp_path, 5):
        with pytest.raises(UserError, match=r"in use by .*, SLURM job 9_3"):
            RunLock(tmp_path, task | {"SLURM_ARRAY_TASK_ID": "4"}).acquire()
        lock = RunLock(tmp_path, task | {"SLURM_RESTART_COUNT": "1"})
        assert lock.acquire()
    assert "waiting for process" in capsys.readouterr().out
    lock.check()
    lock.release()


def test_a_killed_holder_is_recognised_at_once(lock: RunLock, tmp_path: Path) -> None:
    with held(tmp_path, 60) as process:
        process.kill()
        process.join()
        start = time.monotonic()
        assert lock.acquire()
        assert time.monotonic() - start < 1


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
def test_on_another_host_slurm_decides(
    lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None,
    over: bool | None,
) -> None:  # fmt: skip
    """Where it does not know, a minute without a beat does."""
    fake_scontrol(tmp_path, monkeypatch, answer)
    write_holder(tmp_path, job="7", restart=0)
    now, nap = 0.0, time.sleep

    def sleep(seconds: float) -> None:
        nonlocal now
        if seconds < 1:  # waiting for scontrol's process
            nap(seconds)
        else:
            now += seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    if over is False:
        with pytest.raises(UserError, match=r"in use by process .* on far, SLURM job 7"):
            lock.acquire()
    else:
        assert lock.acquire()
        assert (now > 60) == (over is None)


def test_a_holder_that_was_taken_over_stops_writing(lock: RunLock, tmp_path: Path) -> None:
    lock.acquire()
    lock.check()
    write_holder(tmp_path, released=True)  # as if it looked dead to another host
    later = RunLock(tmp_path)
    assert later.acquire()
    with pytest.raises(RankError, match="another attempt has taken this run over"):
        lock.check()
    lock.release()
    later.check()
    later.release()


def test_a_link_that_was_made_counts_whatever_the_server_answers(
    lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client repeats a request whose answer was lost, and learns that the name exists."""
    link = os.link

    def twice(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    assert lock.acquire()
    assert lock.path == tmp_path / ".lock.1"
    with pytest.raises(UserError, match="in use by process"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("place", ["os.link", "pathlib.Path.read_text"])
def test_an_unreachable_file_system_is_no_sign_of_a_free_lock(
    place: str, lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(module, "UNREACHABLE_SECONDS", 1.0)
    second = RunLock(tmp_path)
    assert lock.acquire()
    if place == "os.link":
        lock.release()
    with monkeypatch.context() as patch:
        patch.setattr(place, unreachable)
        with pytest.raises(OSError, match="Stale file handle"):  # no UserError: another attempt may
            second.acquire()
    if place != "os.link":
        lock.check()
        lock.release()
    assert second.acquire()
    second.release()


def test_one_hiccup_does_not_end_the_waiting(
    lock: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hiccups = iter([OSError(errno.ESTALE, "Stale file handle")])
    listdir = os.listdir

    def flaky(folder: Path) -> list[str]:
        for error in hiccups:
            raise error
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", flaky)
    assert lock.acquire()


def test_kill_wait_where_there_is_no_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_scontrol(tmp_path, monkeypatch, "KillWait                = 45 sec")
    assert kill_wait() == 45
    fake_scontrol(tmp_path, monkeypatch, None)
    (tmp_path / "scontrol").unlink()
    assert kill_wait() == 30
    monkeypatch.setenv("BIP_KILL_WAIT", "")  # the batch script could not find out either
    assert kill_wait() == 30
    monkeypatch.setenv("BIP_KILL_WAIT", "120")
    assert kill_wait() == 120
