"""How the ranks of a run meet under plain python, torchrun or srun.

Each rank finds its number in the environment, connects to the store of torchrun or rank 0, and
waits for all ranks; then the process group is made.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous as rendezvous_of

from bip.distributed.group import COLLECTIVE, Group, Ranks, pick_device
from bip.distributed.signals import StopRequest, signal_name
from bip.errors import RankError, Stopped, UserError
from bip.files import atomic_write_bytes, result_dir_error

MEETING = timedelta(minutes=10)  # for all ranks to connect
_VERDICT = "verdict"  # in the store: "go", "late", or "stop" and the signal


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
    """Ranks of an srun step by node, from SLURM's list such as "4(x2),2"."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[0]


def join(
    rendezvous: Path,
    env: Mapping[str, str] = os.environ,
    patience: timedelta = MEETING,
    stop: StopRequest | None = None,
) -> Group:
    """Find this process's rank and join the others, which may start up to `patience` later.

    Under torchrun the store is torch's own. Under srun rank 0 binds a free port and publishes it
    in the shared folder `rendezvous`, under a name made of job, restart and step, so that two tasks
    on a node, or two attempts of a task, cannot mix. Raises Stopped when a rank gets a signal
    before all have joined.
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
            # The store's host has exited, mostly by a signal that this rank gets too.
            for _ in range(50):
                stop.raise_if_set()
                time.sleep(0.1)
            raise RankError(f"{holder} left while the ranks met ({error})") from error
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
        go_or_leave(store, ranks, deadline, stop, holds_store)
        store.set_timeout(MEETING)
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=MEETING
        )
        # Gloo connects ranks pair by pair. Without this barrier a rank that is connected could
        # exit at once (a finished run), and one that still connects would report a crash.
        dist.all_reduce(torch.zeros(1))
    finally:
        if holds_store and address is not None:
            # All have read it, and a cluster may number its jobs from 1 again.
            address.unlink(missing_ok=True)
    store.set_timeout(COLLECTIVE)
    _set_timeout(COLLECTIVE)


def _set_timeout(timeout: timedelta) -> None:
    """Set the default group's time-out. The function is public since torch 2.14."""
    inner: Any = dist.distributed_c10d
    change = getattr(dist, "set_timeout", None) or inner._set_pg_timeout
    change(timeout)


def go_or_leave(
    store: Any, ranks: Ranks, deadline: float, stop: StopRequest, holds_store: bool = False
) -> None:
    """Wait for all ranks. The first verdict in the store holds for all: start, or exit.

    So no rank exits while the others wait for it in the first collective. The rank that holds the
    store waits until the others have read the verdict.

    Raises Stopped, RankError naming the ranks missing at `deadline` (time.monotonic()), or
    UserError where ranks have different world sizes.
    """
    store.set(f"here/{ranks.rank}", "")
    world = store.compare_set("world", "", str(ranks.world)).decode()
    try:
        if world != str(ranks.world):  # it does not belong to the others
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
    kind, *numbers = verdict.decode().split()
    if kind != "go":
        absent = [rank for rank in range(ranks.world) if not store.check([f"here/{rank}"])]
        store.add("read", 1)
        until = time.monotonic() + 5
        while holds_store and time.monotonic() < until:
            if store.add("read", 0) >= store.add("here", 0):
                break
            time.sleep(0.05)
    if kind == "stop":
        raise Stopped(signal_name(int(numbers[0])), 0)
    if kind == "unlike":
        raise UserError(
            f"ranks: some were started for a world of {numbers[0]}, some of {numbers[1]}; start "
            "all by one command"
        )
    if kind == "late":
        names = ", ".join(map(str, absent[:16])) + ", ..." * (len(absent) > 16)
        raise RankError(f"ranks: of {ranks.world} these did not come in time: {names or 'none'}")


def _wait(met: Callable[[], bool], deadline: float, stop: StopRequest, problem: str) -> None:
    """Poll with growing pauses. Raises Stopped on a signal, RankError at the deadline."""
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
