"""The harness itself: it finds failures, and does not hang."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from bip import errors
from bip.distributed import rendezvous
from bip.distributed.control import Control
from bip.distributed.group import Group, Ranks, wrap
from bip.distributed.heartbeat import _is_echo
from bip.distributed.rendezvous import go_or_leave, join
from bip.distributed.signals import StopRequest
from bip.errors import Stopped, UserError
from tests.distributed.harness import RankError, run_ranks, world_size


@world_size(1, 2, 3, 4)
def test_collectives(group: Group, tmp_path: Path) -> None:
    assert isinstance(tmp_path, Path)
    total = group.sum_(torch.tensor([group.rank + 1.0]))
    assert total.item() == group.world * (group.world + 1) / 2
    assert group.broadcast_(torch.tensor([group.rank])).item() == 0
    assert group.from_first({"rank": group.rank}) == {"rank": 0}
    assert group.ask_first(lambda: group.rank + 7) == 7
    with group.together():
        pass


def ranks(group: Group) -> tuple[int, int]:
    return group.rank, os.getpid()


def test_results_come_in_rank_order_from_processes_of_their_own() -> None:
    results = run_ranks(3, ranks)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


def fail_on_one(group: Group) -> None:
    assert group.rank != 1, "not on this one"
    group.barrier()


def end_on_one(group: Group) -> None:
    if group.rank == 1:
        os._exit(3)
    group.barrier()


def sleep_on_one(group: Group) -> None:
    time.sleep(1000 * group.rank)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (fail_on_one, "not on this one"),
        (end_on_one, "rank 1 of 2: ended with code 3"),
        (sleep_on_one, r"ranks \[1\]"),
    ],
)
def test_a_failing_rank_fails_the_test(body, what) -> None:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    with pytest.raises(RankError, match=what):
        run_ranks(2, body, timeout=3)
    assert time.monotonic() - began < 20


def meet_as_under_srun(folder: Path) -> tuple[int, list[Path]]:
    env = {
        "SLURM_PROCID": os.environ["RANK"], "SLURM_LOCALID": os.environ["RANK"],
        "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    group = join(folder, env)
    total = int(group.sum_(torch.tensor([group.rank + 1])))
    left = list(folder.iterdir())
    group.close()
    return total, left


def test_ranks_of_an_srun_step_meet_and_leave_nothing(tmp_path: Path) -> None:
    """Twice under the same numbers, as after a cluster's restart."""
    for _ in range(2):
        assert run_ranks(3, meet_as_under_srun, tmp_path, join=False) == [(6, [])] * 3


def leave_while_meeting(folder: Path, signalled: list[int]) -> str:
    """Ranks get a signal before rank 2 comes, one after the other."""
    rank = int(os.environ["RANK"])
    if rank == 2:
        return "never came"
    env = {
        "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": "3", "SLURMD_NODENAME_ADDR": "127.0.0.1",
    }  # fmt: skip
    stop = StopRequest()
    if rank in signalled:
        threading.Timer(1.0 + rank, lambda: setattr(stop, "signal", signal.SIGTERM)).start()
    try:
        join(folder, env, stop=stop)
    except Stopped as stopped:
        return str(stopped)
    return "joined"


@pytest.mark.parametrize("ranks", [[0, 1], [0], [1]])
def test_a_signal_while_the_ranks_meet_stops_them_all(ranks: list[int], tmp_path: Path) -> None:
    """Also the signal of rank 0 alone, which holds the store."""
    ends = run_ranks(3, leave_while_meeting, tmp_path, ranks, join=False)
    assert ends == [ends[0], ends[0], "never came"]
    assert ends[0].startswith("stopped by SIGTERM at step 0")


TWO = [Ranks(rank, 2, rank, 2) for rank in range(2)]


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store: Any, ranks: Ranks, signalled: int = 0, seconds: float = 5) -> None:
    stop = StopRequest()
    stop.signal = signalled
    go_or_leave(store, ranks, time.monotonic() + seconds, stop)


class Late:
    """A store in which the last rank comes between this one's check and its verdict."""

    def __init__(self, store: TCPStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def check(self, keys: list[str]) -> bool:
        seen = self.store.check(keys)
        if not self.store.check(["came"]):
            self.store.set("came", "")
            meet(self.store, TWO[1])
        return bool(seen)


def test_all_ranks_go_on(store: TCPStore) -> None:
    """The signal comes just when the last has seen that all are here."""
    meet(Late(store), TWO[0], signal.SIGUSR2)


def test_or_none(store: TCPStore) -> None:
    for signalled in (signal.SIGUSR2, 0):  # the other got no signal, and leaves as well
        with pytest.raises(Stopped, match="SIGUSR2 at step 0"):
            meet(store, TWO[0], signalled)


def test_who_comes_too_late_finds_nobody_waiting(store: TCPStore) -> None:
    for _ in range(2):
        with pytest.raises(errors.RankError, match=r"^ranks: of 3 .*: 0, 1$"):
            meet(store, Ranks(2, 3, 0, 1), seconds=0.2)


@pytest.mark.parametrize("first", [2, 3])
def test_ranks_of_unlike_worlds_all_leave(first: int, store: TCPStore) -> None:
    """One srun of two tasks and one of three: also where the two have met each other already."""
    if first == 2:
        store.add("here", 1)  # the other of the two
        meet(store, TWO[1])
    else:
        store.compare_set("world", "", "3")  # one of the three
    for ranks in [TWO[1]] * (first == 3) + [Ranks(2, 3, 0, 1)]:
        with pytest.raises(UserError, match=r"a world of [23], some of [23]"):
            meet(store, ranks)


def wait_long() -> str:
    """A collective and an exchange for which one rank comes later than ranks may meet."""
    rendezvous.MEETING = timedelta(seconds=3)
    group = join(Path("rendezvous"))
    control = Control(group)
    for call in (group.barrier, lambda: control.ask(0)):
        time.sleep(5 * group.rank)
        call()
    group.close()
    return "met"


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ESTALE, OSError), (errno.EROFS, UserError)],
    ids=["unreachable", "read-only"],
)
def test_a_rendezvous_that_cannot_be_published(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is for another attempt, or for the user."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rendezvous, "atomic_write_bytes", fails)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(kind, match=os.strerror(number)):
        join(tmp_path, step)


def test_no_collective_has_a_clock_of_its_own() -> None:
    assert run_ranks(2, wait_long, join=False) == ["met", "met"]


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug, in a folder called gloo")


def which_are_echoes(group: Group) -> list[tuple[str, bool]]:
    """Errors of rank 0: its own, then those of collectives that rank 1 does not come to."""
    network = torch.nn.Linear(3, 1)
    ddp = wrap(network, group.device)
    for _ in range(2):
        ddp(torch.ones(2, 3)).sum().backward()
    found = []

    def note(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError) as raised:
            call()
        found.append((name, _is_echo(raised.value)))

    note("forward", lambda: ddp(torch.ones(2, 4)))
    note("own backward", lambda: Odd.apply(torch.ones(1, requires_grad=True)).backward())
    group.barrier()
    if group.rank == 1:
        group.close()
        return []
    note("DDP's sum", lambda: ddp(torch.ones(2, 3)).sum().backward())
    note("barrier", group.barrier)
    note("gather", lambda: group.gather(torch.ones(1)))
    return found


def test_errors_of_collectives_are_distinguished_from_a_ranks_own() -> None:
    found, _ = run_ranks(2, which_are_echoes)
    assert found == [
        ("forward", False), ("own backward", False),
        ("DDP's sum", True), ("barrier", True), ("gather", True),
    ]  # fmt: skip
    assert not _is_echo(RuntimeError("gloo"))
    assert _is_echo(torch.distributed.DistNetworkError("Broken pipe"))


def fail(group: Group, asked: bool, error: Exception) -> str:
    """Rank 0 fails at what it is asked, or the last rank at what all do."""

    def call() -> None:
        raise error

    try:
        if asked:
            group.ask_first(call)
        else:
            with group.together():
                if group.rank == group.world - 1:
                    call()
    except (KeyError, UserError, errors.RankError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


@pytest.mark.parametrize(("asked", "failed"), [(False, 2), (True, 0)])
@pytest.mark.parametrize("error", [UserError("data_dir: not here"), KeyError("a bug")], ids=str)
def test_one_ranks_failure_is_raised_on_all(asked: bool, failed: int, error: Exception) -> None:
    """A user's error as one; a bug on its own rank, and its text on the others."""
    ends = run_ranks(3, fail, asked, error)
    if isinstance(error, UserError):
        assert len(set(ends)) == 1
        assert ends[0].startswith("UserError: data_dir: not here")
    else:
        assert ends.pop(failed) == "KeyError: 'a bug'"
        assert ends == [f"RankError: KeyError: 'a bug' (rank {failed})"] * 2
