"""A rank that is killed, frozen, stuck or in trouble of its own ends the run, named, in time.

And nobody is taken for lost who only ends: real processes, joined as torchrun or srun would.
"""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistNetworkError, TCPStore

from bip import run as run_module
from bip.__main__ import main
from bip.data.batches import Data
from bip.distributed.group import Group, Ranks
from bip.distributed.heartbeat import Heartbeat
from bip.errors import RankError
from bip.files import read_jsonl
from bip.training.checkpoint import CheckpointFolder
from bip.training.loop import Loop
from tests.distributed.harness import PRELOAD
from tests.runs import arguments

LIMIT = 4  # rank_timeout


def heart(rank: int, world: int, **settings: Any) -> tuple[Heartbeat, TCPStore]:
    """A heartbeat whose rounds the test makes itself, and a store."""
    group = Group(Ranks(rank, world, rank, world), torch.device("cpu"))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return Heartbeat(group, **settings), store


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes of exits that are noted and not made."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


@pytest.fixture
def meet_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes a store the process group's."""

    def use(store: Any) -> None:
        origin = SimpleNamespace(_get_default_store=lambda: store)
        monkeypatch.setattr("torch.distributed.distributed_c10d", origin)

    return use


@pytest.mark.parametrize(
    ("pauses", "is_lost"),
    [([5] * 12, True), ([5, 3600, 5, 5], False), ([5, 3600] + [5] * 12, True)],
)
def test_a_suspended_job_is_not_a_lost_rank(
    pauses: list[int], is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scontrol suspend stops all ranks; the first to wake finds the others' beats old."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    heartbeat, store = heart(0, 2, timeout=30)
    store.set("beat/1", '{"host": "host pid 1", "step": 7}')  # and never again
    for pause in pauses:
        now += pause
        heartbeat._round(store)
    assert (heartbeat.lost is not None) == is_lost
    for fact in ("rank 1 (host pid 1)", "for 30 s", "last step was 7") if is_lost else ():
        assert fact in str(heartbeat.lost)


def test_a_rank_that_is_stuck_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It beats, but has not come as far as the others, who wait for it; or, where all have come
    equally far (it hangs in its forward pass, they wait in the backward one), it is elsewhere.
    """
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("bip.distributed.heartbeat._where", lambda _thread: "it")
    text = []
    for passed in (8, 9):
        heartbeat, store = heart(0, 3, timeout=30, stall=100)
        heartbeat.group.passed = 9
        heartbeat.note_step(4)  # before the first step it may take longer
        heartbeat.main = threading.get_ident()
        for beat in range(50):
            now += 5
            for rank, far in ((1, passed), (2, 9)):
                where = "the forward pass" if rank == 2 else "it"
                facts = {"beat": beat, "passed": far, "step": 4, "where": where, "host": f"h{rank}"}
                store.set(f"beat/{rank}", json.dumps(facts))
            heartbeat._round(store)
            if beat == 15:
                assert heartbeat.lost is None
                heartbeat.note_alive()  # rank 0 waits for something outside: from the start again
            if heartbeat.lost is not None:
                break
        assert beat > 30
        text.append(heartbeat.lost)
    for part in ("no progress for 100 s", "wait for rank 1 (h1) at step 4 in it", "--rank-timeout"):
        assert part in text[0]
    assert "equally far: rank 2 (h2) at step 4 in the forward pass; rank 0 (" in text[1]


def test_the_end_comes_whatever_fails(codes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed stderr and a full disk; a disk that hangs does not delay it."""

    def full(_cause: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    heartbeat, _ = heart(0, 2, timeout=30, on_end=full)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    with pytest.raises(OSError, match="No space"):
        heartbeat._end("rank 1 is lost")
    assert codes == [1]
    monkeypatch.setattr("bip.distributed.heartbeat.GRACE", 0.1)
    heartbeat, _ = heart(0, 2, timeout=30, on_end=lambda _cause: time.sleep(2))
    heartbeat._end("rank 1 is lost")
    assert codes == [1, 1, 1]


def test_behind_a_collectives_failure_the_lost_rank_is_raised(
    codes: list[int], meet_in: Callable[[Any], None]
) -> None:
    """Once, though bodies are nested, and without a stay for others that know already."""
    causes: list[str] = []
    heartbeat, store = heart(0, 2, timeout=2, on_end=causes.append)
    meet_in(store)
    store.set("beat/1", '{"host": "h1", "step": 7, "passed": 0}')  # and never again
    start = time.monotonic()
    with (
        pytest.raises(RankError, match=r"^rank 1 \(h1\) .* 2 s; its last step was 7$") as raised,
        heartbeat.watching(),
        heartbeat.watching(),
    ):
        raise DistNetworkError("Connection closed by peer")
    assert time.monotonic() - start < 30
    assert causes == [f"rank lost: {raised.value}"]
    time.sleep(0.5)
    assert not codes


class Flaky:
    """A store whose connections break after some calls. A clone is a new connection."""

    def __init__(self, store: TCPStore, breaks: list[int]) -> None:
        self.store, self.breaks = store, breaks
        self.left = breaks.pop(0) if breaks else 1_000_000

    def clone(self) -> "Flaky":
        return Flaky(self.store, self.breaks)

    def __getattr__(self, name: str) -> Any:
        self.left -= 1
        if self.left < 0:
            raise DistNetworkError("Connection reset by peer")
        return getattr(self.store, name)


def test_a_broken_connection_to_the_store_is_made_again(
    codes: list[int], meet_in: Callable[[Any], None]
) -> None:
    heartbeat, store = heart(0, 2, timeout=20)
    heartbeat.interval = 0.05
    broken = [0, 9, 3, 0, 5]
    meet_in(Flaky(store, broken))
    with heartbeat.watching():
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (broken or heartbeat.rounds < 10):
            store.set("beat/1", f'{{"passed": 0, "time": {time.monotonic()}}}')
            time.sleep(0.02)
    assert (broken, heartbeat.lost, codes) == ([], None, [])
    assert heartbeat.rounds >= 10


def test_a_frozen_store_delays_nobody(codes: list[int], meet_in: Callable[[Any], None]) -> None:
    """Its callers hang, whatever their time-outs; the end comes and a stop does not wait."""
    serve = (
        "import time; from torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            store = TCPStore("127.0.0.1", int(holder.stdout.readline()), is_master=False)
            meet_in(store)
            causes: list[str] = []
            heartbeat, _ = heart(1, 2, timeout=1.5, on_end=causes.append)
            with heartbeat.watching():
                time.sleep(0.5)
                holder.send_signal(signal.SIGSTOP)
                wait_until(lambda: bool(codes), 60)
                end = time.monotonic()
            assert time.monotonic() - end < 10
        finally:
            holder.kill()  # else leaving the block would wait for a stopped process
    assert [cause.split(", ")[0] for cause in causes] == ["rank lost: rank 0"]
    assert codes == [1]


# Whole runs


Trouble = Callable[[int], None]  # what a rank does first, given its number


class Process:
    """One rank, forked from a server that has imported torch."""

    def __init__(self, *args: Any, stderr: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.stderr = stderr
        self.process = context.Process(target=_train, args=(*args, stderr))
        self.process.start()

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid or 0, signal_number)

    def ended(self, timeout: float = 60) -> tuple[int, str]:
        """(exit code, stderr)."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it goes on"
        return self.process.exitcode, self.stderr.read_text()


def _train(
    flags: list[str], env: dict[str, str], rank: int, trouble: Trouble, stderr: Path
) -> None:
    for number, path in ((1, os.devnull), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(env)
    trouble(rank)
    sys.exit(main(["train", *flags]))


def none(_rank: int) -> None:
    pass


@contextlib.contextmanager
def running(
    folder: Path, world: int, under: str, trouble: Trouble = none, **settings: Any
) -> Iterator[list[Process]]:
    """The ranks of an endless run, `under` "torchrun" (the store is not theirs) or "srun" (rank
    0's).
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    long = {"epochs": 100_000, "eval_every": 100_000, "batch_size": 66, "rank_timeout": LIMIT}
    flags = arguments("pretrain", folder, **long | settings)
    ranks = []
    for rank in range(world):
        env = {
            "torchrun": {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            "srun": {
                "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world),
                "SLURM_LOCALID": str(rank), "SLURM_STEP_TASKS_PER_NODE": str(world),
                "SLURMD_NODENAME_ADDR": "127.0.0.1",
            },
        }[under]  # fmt: skip
        ranks.append(Process(flags, env, rank, trouble, stderr=folder / f"rank{rank}.err"))
    try:
        yield ranks
    finally:
        for one in ranks:
            one.process.kill()
            one.process.join()


def wait_until(is_so: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def steps(folder: Path) -> int:
    return sum(1 for path in folder.rglob("metrics.jsonl") for _ in read_jsonl(path))


def last_cause(folder: Path) -> str:
    (path,) = folder.rglob("attempts.jsonl")
    return str(list(read_jsonl(path))[-1].get("cause"))


@pytest.mark.parametrize(
    ("how", "victim", "under"),
    [
        (signal.SIGKILL, 1, "torchrun"),
        (signal.SIGSTOP, 0, "torchrun"),
        (signal.SIGSTOP, 2, "srun"),
        (signal.SIGKILL, 0, "srun"),
        (signal.SIGSTOP, 0, "srun"),
    ],
)
def test_a_lost_rank_ends_the_others_and_is_named(
    how: int, victim: int, under: str, tmp_path: Path
) -> None:
    with running(tmp_path, 3, under) as ranks:
        wait_until(lambda: steps(tmp_path) > 3)
        time.sleep(2)  # a few beats
        ranks[victim].send(how)
        struck = time.monotonic()
        for rank, process in enumerate(ranks):
            if rank == victim:
                continue
            code, stderr = process.ended()
            assert code == 1, stderr
            assert f"has not answered for {LIMIT} s" in stderr
            if (victim, under) == (0, "srun"):
                assert "error: rank 0, which holds the rendezvous store" in stderr
            else:
                assert f"error: rank {victim} (" in stderr
                assert "its last step was " in stderr
        assert time.monotonic() - struck < 6 * LIMIT
    if victim != 0:
        assert last_cause(tmp_path).startswith(f"rank lost: rank {victim} (")


def hang_at_the_start(victim: int, opening: Path, rank: int) -> None:
    opened = run_module.open_data

    def hang(*args: Any) -> Data:
        if rank == victim:
            opening.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return opened(*args)

    run_module.open_data = hang


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_lost_at_the_start_is_named(victim: int, tmp_path: Path) -> None:
    """While it opens its data, before the first step."""
    opening = tmp_path / "opening"
    with running(tmp_path, 2, "srun", partial(hang_at_the_start, victim, opening)) as ranks:
        wait_until(opening.exists)
        code, stderr = ranks[1 - victim].ended(6 * LIMIT)
    assert code == 1
    assert f"error: rank {victim}" in stderr
    assert f"has not answered for {LIMIT} s" in stderr


def hang_at_a_batch(rank: int) -> None:
    init, train = Heartbeat.__init__, Data.train

    def hang(self: Data, level: Any = "lower", start: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(train(self, level, start)):
            if rank == 1 and number == 6:
                time.sleep(3600)
            yield batch

    def impatient(self: Heartbeat, *args: Any) -> None:
        init(self, *args, stall=10)

    Heartbeat.__init__ = impatient  # type: ignore[method-assign,assignment]
    Data.train = hang  # type: ignore[method-assign,assignment]


def have_a_bug(culprit: int, rank: int) -> None:
    report = Loop._report

    def fail(self: Loop, done: int, means: Any) -> None:
        report(self, done, means)
        if rank == culprit and done == 5:
            raise KeyError("a bug")

    Loop._report = fail  # type: ignore[method-assign]


def save_slowly(_rank: int) -> None:
    save = CheckpointFolder.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        time.sleep(2.5 * LIMIT)
        return save(*args, **kwargs)

    CheckpointFolder.save = slow  # type: ignore[method-assign]


def test_a_stopped_run_ends_after_its_save(tmp_path: Path) -> None:
    """A save longer than the time-out: the others wait for it, and for the record of the end."""
    with running(tmp_path, 2, "srun", save_slowly) as ranks:
        wait_until(lambda: steps(tmp_path) > 3)
        for process in ranks:
            process.send(signal.SIGTERM)
        code, stderr = ranks[1].ended()
        # As srun --kill-on-bad-exit does it when the first rank has left; both may have.
        with contextlib.suppress(ProcessLookupError):
            ranks[0].send(signal.SIGKILL)
        assert code == os.EX_TEMPFAIL, stderr
    assert last_cause(tmp_path) == "SIGTERM"
    assert len(list(tmp_path.rglob("checkpoint.pth.tar"))) == 1


def have_no_space(_rank: int) -> None:
    def save(*_args: Any, **_kwargs: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    CheckpointFolder.save = save  # type: ignore[method-assign]


def close_slowly(rank: int) -> None:
    Data.close = lambda _self: time.sleep(3 * LIMIT * rank)  # type: ignore[method-assign]


TROUBLES: dict[str, tuple[Trouble, int, str, dict[str, Any], int, list[list[str]], str]] = {
    # It hangs where it waits for a batch, and beats all the same.
    "a rank is stuck": (
        hang_at_a_batch, 3, "torchrun", {"rank_timeout": 30}, 1,
        [["error: no progress for 10 s; the others wait for rank 1 (",
          ") at step 6 in bip.distributed.group, line "]] * 3,
        "rank lost: no progress for 10 s; "),
    # It holds the store, and stays until the others have read why.
    "rank 0 has a bug": (
        partial(have_a_bug, 0), 3, "srun", {"print_freq": 5}, 1,
        [["Traceback"], *[["error: rank 0: KeyError: 'a bug'"]] * 2], "error: 'a bug'"),
    "rank 1 has a bug": (
        partial(have_a_bug, 1), 3, "srun", {"print_freq": 5}, 1,
        [["error: rank 1: KeyError: 'a bug'"], ["Traceback"], ["error: rank 1: KeyError: 'a bug'"]],
        "rank lost: rank 1: KeyError: 'a bug'"),
    "the disk is full": (
        have_no_space, 3, "srun", {"max_steps": 3, "rank_timeout": 30}, 2,
        [[": No space left on device; the newest checkpoint is kept"]] * 3, "error: result_dir: "),
    # Rank 1 still closes its data when rank 0 has left with the store.
    "a finished rank leaves": (
        close_slowly, 2, "srun", {"max_steps": 5}, 0, [[]] * 2, "finished"),
}  # fmt: skip


@pytest.mark.parametrize("case", TROUBLES.values(), ids=TROUBLES)
def test_all_ranks_end_and_report_what_happened(case: Any, tmp_path: Path) -> None:
    trouble, world, under, settings, expected, texts, cause = case
    with running(tmp_path, world, under, trouble, **settings) as ranks:
        ends = [process.ended(100) for process in ranks]
    for (code, stderr), parts in zip(ends, texts, strict=True):
        assert code == expected, stderr
        assert [part for part in parts if part not in stderr] == []
    assert last_cause(tmp_path).startswith(cause)
