"""How the ranks of a run meet under plain python, torchrun or srun.

Each rank finds its number in the environment, connects to the store of torchrun or rank 0, and
waits for all ranks; then the process group is made.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from bip.distributed.group import COLLECTIVE, Group, Ranks, pick_device
from bip.distributed.signals import StopRequest, signal_name
from bip.errors import RankError, Stopped, UserError
from bip.files import atomic_write_bytes, result_dir_error

# Names of the rank, of the number of ranks, and of both on this node; the first that are set count.
# Within a batch job mpirun's processes have SLURM's variables too, of the step of its daemons.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # of MPICH and Intel MPI
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")
LAUNCHERS = (TORCHRUN, OPEN_MPI, HYDRA, SRUN)
CONNECTING = timedelta(seconds=10)  # between two looks for a signal

MEETING = timedelta(minutes=10)  # for all ranks to connect
_VERDICT = "verdict"  # in the store: "go", "late", or "stop" and the signal


def find_ranks(env: Mapping[str, str]) -> Ranks:
    """This process's place among the ranks that one launcher started, or alone.

    A batch script's own variables do not count: only srun sets SLURM_STEP_NUM_TASKS per step.
    Raises UserError naming the variable where the environment cannot be right.
    """
    for names in LAUNCHERS:
        if names[0] in env and names[1] in env:
            break
    else:
        return Ranks(0, 1, 0, 1)
    rank, world = (_number(env, name) for name in names[:2])
    if not 0 <= rank < world:
        raise UserError(f"{names[0]}: {rank} is no rank of {world} ({names[1]}); unset both")
    of_step = env.get("SLURM_STEP_NUM_TASKS", "1")
    if world == 1:
        if names == TORCHRUN and of_step != "1" and "TORCHELASTIC_RUN_ID" not in env:
            raise UserError(
                f"WORLD_SIZE: is 1, but srun started {of_step} ranks; unset it and RANK"
            )
        return Ranks(0, 1, 0, 1)
    if names[2] not in env and "SLURM_LOCALID" not in env:
        raise UserError(
            f"{names[2]}: is not set, but {names[1]} is {world}; start the ranks by torchrun or "
            f"srun, or unset {names[0]} and {names[1]} to run alone"
        )
    local = _number(env, names[2] if names[2] in env else "SLURM_LOCALID")
    local_world = _number(env, names[3]) if names[3] in env else _tasks_of_this_node(env)
    return Ranks(rank, world, local, local_world)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"{name}: {env[name]!r} is no number; unset it to run alone") from None


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

    They meet at MASTER_ADDR. Under srun rank 0 binds a free port and publishes it in the shared
    folder `rendezvous`, under a name made of job, restart and step, so that two tasks on a node, or
    two attempts of a task, cannot mix. Raises Stopped when a rank gets a signal before all have
    joined, UserError where the environment names no place to meet or no interface of this node.
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
            raise RankError(
                f"ranks: {holder} left before all met in time ({_line(error)})"
            ) from error
    return Group(ranks, device, holder)


def _meet(
    ranks: Ranks, device: torch.device, rendezvous: Path, env: Mapping[str, str],
    patience: timedelta, stop: StopRequest,
) -> None:  # fmt: skip
    deadline = time.monotonic() + patience.total_seconds()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _check_interface(env)
    address = None
    by_srun = env.get("SLURM_STEP_NUM_TASKS") == str(ranks.world)
    if "MASTER_ADDR" in env and ("RANK" in env or not by_srun):
        store = _store_at_master(ranks, env, deadline, stop)
    elif by_srun:
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        address = rendezvous / ".".join(env.get(name, "0") for name in names)
        store = _srun_store(ranks, address, env, deadline, stop)
    else:
        raise UserError(
            f"MASTER_ADDR: {ranks.world} ranks are to meet, but it is not set; set it and "
            "MASTER_PORT (mpirun -x NAME=VALUE), start them by torchrun or srun, or unset the "
            "variables of rank and world size to run alone"
        )
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


def _store_at_master(
    ranks: Ranks, env: Mapping[str, str], deadline: float, stop: StopRequest
) -> Any:
    """The store of torchrun's agent, or rank 0's, at MASTER_ADDR and MASTER_PORT."""
    of_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = env["MASTER_ADDR"], _number(env, "MASTER_PORT") if "MASTER_PORT" in env else 29500
    if ranks.rank == 0 and not of_agent:
        try:
            return _own_store("localhost", port, ranks)
        except RuntimeError as error:
            raise UserError(
                f"MASTER_PORT: {port} cannot be used on this node ({_line(error)}); set another"
            ) from None
    store = _connect(host, port, ranks, deadline, stop, "MASTER_ADDR")
    if of_agent:  # as torch's own rendezvous does
        return PrefixStore(f"/worker/attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _own_store(host: str, port: int, ranks: Ranks) -> TCPStore:
    return TCPStore(
        host, port, ranks.world, is_master=True, timeout=MEETING, wait_for_workers=False
    )


def _connect(
    host: str, port: int, ranks: Ranks, deadline: float, stop: StopRequest, name: str
) -> TCPStore:
    """The store at an address, which may not be there yet. A signal ends the wait."""
    seconds = CONNECTING.total_seconds()
    refused = 0
    while True:
        stop.raise_if_set()
        try:
            # Else torch would wait in C++, deaf to signals, and report in many lines.
            socket.create_connection((host, port), seconds).close()
            return TCPStore(host, port, ranks.world, is_master=False, timeout=CONNECTING)
        except OSError as error:
            if time.monotonic() > deadline:
                raise _late(name, host, port, error) from None
            time.sleep(0.2)
        except RuntimeError as error:
            refused += 1
            if refused == 3 and name == "MASTER_ADDR":
                raise UserError(
                    f"MASTER_PORT: at {host} port {port} another program answers; set another port"
                ) from None
            if time.monotonic() > deadline:
                raise _late(name, host, port, error) from None


def _late(name: str, host: str, port: int, error: Exception) -> RankError:
    return RankError(
        f"ranks: nobody answered at {host} port {port} ({name}) in time ({_line(error)})"
    )


def _srun_store(
    ranks: Ranks, path: Path, env: Mapping[str, str], deadline: float, stop: StopRequest
) -> TCPStore:
    if ranks.rank == 0:
        host = own_address(env)
        store = _own_store(host, 0, ranks)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, f"{host} {store.port}".encode())
        except OSError as error:
            raise result_dir_error(path.parent, error) from None
        return store
    _wait(path.exists, deadline, stop, f"rank 0 did not publish {path} (is it shared?)")
    host, port = path.read_text().split()
    return _connect(host, int(port), ranks, deadline, stop, str(path))


def own_address(env: Mapping[str, str]) -> str:
    """A name or address of this node that it can resolve itself, in a step of srun.

    Where the host's name means nothing to the node: of the address towards the node that srun runs
    on, or of a step on one node the loopback's.
    """
    names = [env.get("SLURMD_NODENAME_ADDR"), socket.gethostname(), env.get("SLURMD_NODENAME")]
    for name in filter(None, names):
        with contextlib.suppress(OSError):
            socket.getaddrinfo(name, None)
            return name
    if env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1":
        return "127.0.0.1"
    with (
        contextlib.suppress(OSError, KeyError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((env["SLURM_LAUNCH_NODE_IPADDR"], 9))  # sends nothing
        return str(probe.getsockname()[0])
    raise UserError(
        f"host name: {socket.gethostname()} is not resolved on this node; enter it in /etc/hosts, "
        "or start the ranks by torchrun with MASTER_ADDR"
    )


def _check_interface(env: Mapping[str, str]) -> None:
    there = [name for _, name in socket.if_nameindex()]
    wanted = env.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in wanted.split(",") if name and name not in there]
    if missing:
        raise UserError(
            f"GLOO_SOCKET_IFNAME: this node ({socket.gethostname()}) has no network interface "
            f"{missing[0]}; it has {', '.join(there)}"
        )


def _line(error: Exception) -> str:
    """The first line of torch's message, without its list of C++ frames."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
