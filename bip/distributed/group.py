"""The ranks of one run: found in the environment of plain python, torchrun or srun."""

import contextlib
import inspect
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as rendezvous_of
from torch.nn.parallel import DistributedDataParallel

from bip.distributed.signals import StopRequest, signal_name
from bip.errors import RankError, Stopped, UserError
from bip.files import atomic_write_bytes, result_dir_error

T = TypeVar("T")
MEETING = timedelta(minutes=10)  # until all ranks are here
# After that no clock but the heartbeat's ends a run: a suspended job, a long save or slow data
# may keep a collective waiting.
COLLECTIVE = timedelta(days=7)
# torch renamed it in 2.14 and warns about the old name at every rank's first call.
all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_VERDICT = "verdict"  # in the store: "go", "late", or "stop" and the signal


@dataclass(frozen=True)
class Ranks:
    """This process's place among the run's processes."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def find_ranks(env: Mapping[str, str]) -> Ranks:
    """torchrun's variables, else those of an srun step, else one process.

    A batch script's own variables do not count: only srun sets SLURM_STEP_NUM_TASKS per step.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
    else:
        return Ranks(0, 1, 0, 1)
    try:
        rank, world, local = (int(env[name]) for name in names[:3])
        local_world = int(env.get(names[3]) or _tasks_of_this_node(env))
    except (KeyError, ValueError) as error:
        raise UserError(f"environment: ranks are not set correctly ({error})") from None
    return Ranks(rank, world, local, local_world)


def _tasks_of_this_node(env: Mapping[str, str]) -> int:
    """Of an srun step, from SLURM's list of its nodes' numbers, such as "4(x2),2"."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[0]


class Group:
    """The run's process group; with one rank there is none and every call is local."""

    def __init__(self, ranks: Ranks, device: torch.device, store_holder: str = "rank 0") -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self.device = device
        self.store_holder = store_holder
        # Places that every rank comes by in the same order: of ranks that all wait, the one that
        # has passed fewer is the one that is waited for.
        self.passed = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def holds_store(self) -> bool:
        return self.store_holder == f"rank {self.rank}"

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, of which every rank takes the same number; the arrival of each is a place."""
        for batch in batches:
            self.passed += 1
            yield batch

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.passed += 1
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def broadcast_(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        self.passed += 1
        if self.world > 1:
            dist.broadcast(values, 0)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` (m,), the same m on all, as (W, m)."""
        self.passed += 1
        if self.world == 1:
            return values[None]
        gathered = values.new_empty(self.world * len(values))
        all_gather_flat(gathered, values)
        return gathered.view(self.world, -1)

    def from_first(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        self.passed += 1
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def ask_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank.

        What it raises is raised on rank 0; on the others a UserError likewise, anything else as a
        RankError that tells of it.
        """
        value: Any = None
        problem: Exception | None = None
        if self.is_first:
            try:
                value = call()
            except Exception as error:
                problem = error
        value, known, told = self.from_first((value, *_in_words(problem)))
        if problem is not None:
            raise problem
        if told is not None:
            raise UserError(told) if known else RankError(f"{told} (rank 0)")
        return value  # type: ignore[no-any-return]

    def all_objects(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        self.passed += 1
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around work without collectives that may fail on one rank: then every rank raises.

        A UserError of any rank becomes every rank's; any other exception is the rank's own, and
        a RankError that tells of it on the others.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        for rank, (is_known, told) in enumerate(self.all_objects(_in_words(problem))):
            if told is not None:
                if problem is not None and not isinstance(problem, UserError):
                    raise problem
                message = told if self.world == 1 else f"{told} (rank {rank})"
                raise UserError(message) if is_known else RankError(message)

    def barrier(self) -> None:
        self.passed += 1
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _in_words(problem: Exception | None) -> tuple[bool, str | None]:
    """(whether it is a UserError, what to tell the other ranks of it)."""
    if problem is None or isinstance(problem, UserError):
        return True, None if problem is None else str(problem)
    return False, f"{type(problem).__name__}: {problem}"


def wrap(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network under DDP, its buffers left alone: they are shared where they are read."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch renamed the option in 2.15 and warns about the old name.
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {no_sync: False}
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )


def pick_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU. A scheduler that isolates GPUs shows each rank only its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible < ranks.local_world and visible != 1:
        raise UserError(
            f"{ranks.local_world} ranks on this node see {visible} GPUs; start one rank per GPU"
        )
    device = torch.device("cuda", ranks.local_rank if visible >= ranks.local_world else 0)
    torch.cuda.set_device(device)
    return device


def join(
    rendezvous: Path,
    env: Mapping[str, str] = os.environ,
    patience: timedelta = MEETING,
    stop: StopRequest | None = None,
) -> Group:
    """Find this process's rank and join the others, who may come later by up to `patience`.

    Under torchrun the store is torch's own. Under srun rank 0 binds a free port itself and
    publishes it in the shared folder `rendezvous`, keyed by job, restart and step, so that
    neither two tasks on a node nor two attempts of one job can meet. Raises Stopped when a rank is
    told to stop before all are here.
    """
    ranks = find_ranks(env)
    device = pick_device(ranks)
    holder = "rank 0"
    if ranks.world > 1:
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = "torchrun's agent"
        stop = stop or StopRequest()
        try:
            _meet(ranks, device, rendezvous, env, patience, stop)
        except RuntimeError as error:  # of the store, or of gloo as it connects
            # Who holds the store has gone: mostly for a signal that comes here as well.
            for _ in range(50):
                stop.raise_if_set()
                time.sleep(0.1)
            raise RankError(f"{holder} went away while the ranks met ({error})") from error
    return Group(ranks, device, holder)


def _meet(
    ranks: Ranks, device: torch.device, rendezvous: Path, env: Mapping[str, str],
    patience: timedelta, stop: StopRequest,
) -> None:  # fmt: skip
    deadline = time.monotonic() + patience.total_seconds()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    address = None
    if "MASTER_ADDR" in env and "RANK" in env:
        store, _, _ = next(rendezvous_of("env://", timeout=patience))
    else:
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        address = rendezvous / ".".join(env.get(name, "0") for name in names)
        store = _srun_store(ranks, address, env, deadline, stop)
    holds_store = ranks.rank == 0 and address is not None
    try:
        _go_or_leave(store, ranks, deadline, stop, holds_store)
        store.set_timeout(MEETING)
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=MEETING
        )
        # Gloo connects each pair in its own time: a rank that has met all and soon leaves (the run
        # is finished) would be taken for a crash by one that still waits for a third.
        dist.all_reduce(torch.zeros(1))
    finally:
        if holds_store and address is not None:
            # All have read it, or will not; a cluster may count its jobs from 1 again.
            address.unlink(missing_ok=True)
    store.set_timeout(COLLECTIVE)
    _set_timeout(COLLECTIVE)


def _set_timeout(timeout: timedelta) -> None:
    """Of the default group. The function got its public name in torch 2.14."""
    inner: Any = dist.distributed_c10d
    change = getattr(dist, "set_timeout", None) or inner._set_pg_timeout
    change(timeout)


def _go_or_leave(
    store: Any, ranks: Ranks, deadline: float, stop: StopRequest, holds_store: bool = False
) -> None:
    """Wait until all are here. The first word in the store decides for all: to go on or to leave.

    A rank that left on its own word could leave the others waiting in the first collective, and
    one that holds the store could take the word with it.
    """
    store.set(f"here/{ranks.rank}", "")
    world = store.compare_set("world", "", str(ranks.world)).decode()
    try:
        if world != str(ranks.world):  # none of the others', whatever they have agreed on
            verdict = f"unlike {world} {ranks.world}".encode()
            store.compare_set(_VERDICT, "", verdict.decode())
            store.add("here", 1)
        elif store.add("here", 1) == ranks.world:
            verdict = store.compare_set(_VERDICT, "", "go")
        else:
            _wait(lambda: store.check([_VERDICT]), deadline, stop, "the other ranks did not come")
            verdict = store.get(_VERDICT)
    except Stopped:
        verdict = store.compare_set(_VERDICT, "", f"stop {stop.signal}")
    except RankError:
        verdict = store.compare_set(_VERDICT, "", "late")
    word, *numbers = verdict.decode().split()
    if word != "go":
        absent = [rank for rank in range(ranks.world) if not store.check([f"here/{rank}"])]
        store.add("heard", 1)  # from now on the store's holder may leave
        until = time.monotonic() + 5
        while holds_store and time.monotonic() < until:
            if store.add("heard", 0) >= store.add("here", 0):
                break
            time.sleep(0.05)
    if word == "stop":
        raise Stopped(signal_name(int(numbers[0])), 0)
    if word == "unlike":
        raise UserError(
            f"ranks: some were started as one of {numbers[0]}, some as one of {numbers[1]}; start "
            "all by one command"
        )
    if word == "late":
        names = ", ".join(map(str, absent[:16])) + ", ..." * (len(absent) > 16)
        raise RankError(f"ranks: of {ranks.world} these did not come in time: {names or 'none'}")


def _wait(met: Callable[[], bool], deadline: float, stop: StopRequest, problem: str) -> None:
    """Poll, ever more seldom. Raises Stopped when told to stop, RankError at the deadline."""
    pause = 0.01
    while not met():
        stop.raise_if_set()
        if time.monotonic() > deadline:
            raise RankError(f"ranks: {problem} in time")
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)


def _srun_store(
    ranks: Ranks, path: Path, env: Mapping[str, str], deadline: float, stop: StopRequest
) -> TCPStore:
    if ranks.rank == 0:
        host = env.get("SLURMD_NODENAME_ADDR") or socket.gethostname()
        store = TCPStore(
            host, 0, ranks.world, is_master=True, timeout=MEETING, wait_for_workers=False
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, f"{host} {store.port}".encode())
        except OSError as error:
            raise result_dir_error(path.parent, error) from None
        return store
    _wait(path.exists, deadline, stop, f"rank 0 did not publish {path} (is it shared?)")
    host, port = path.read_text().split()
    return TCPStore(host, int(port), ranks.world, is_master=False, timeout=MEETING)
