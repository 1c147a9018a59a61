"""How ranks find one another, in environments that users and launchers leave behind."""

import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from bip.distributed.group import Ranks
from bip.distributed.rendezvous import find_ranks, join, own_address
from bip.distributed.signals import StopRequest
from bip.errors import RankError, Stopped, UserError

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
OMPI = {f"OMPI_COMM_WORLD_{n}": "1" for n in ("RANK", "LOCAL_RANK")}
OMPI |= {f"OMPI_COMM_WORLD_{n}": "2" for n in ("SIZE", "LOCAL_SIZE")}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        ({"WORLD_SIZE": "4"}, Ranks(0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nobody"}, Ranks(0, 1, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1)),
        (TWO | MEET | {"LOCAL_WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
        (OMPI, Ranks(1, 2, 1, 2)),
        (STEP, Ranks(3, 6, 1, 2)),
        (OMPI | STEP, Ranks(1, 2, 1, 2)),  # mpirun's daemons are a step of srun
    ],
)
def test_a_process_finds_its_rank(env: dict[str, str], ranks: Ranks) -> None:
    assert find_ranks(env) == ranks


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (TWO, r"MASTER_ADDR: 2 ranks .*unset"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, "MASTER_ADDR: 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2"} | MEET, r"LOCAL_RANK: .*WORLD_SIZE is 2"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK: 3 is no rank of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "1"} | STEP, "WORLD_SIZE: is 1, but srun started 6"),
        (TWO | MEET | {"GLOO_SOCKET_IFNAME": "ib7"}, r"GLOO_SOCKET_IFNAME: .*interface ib7"),
        (TWO | MEET | {"MASTER_PORT": "http"}, "MASTER_PORT: 'http'"),
    ],
)
def test_misleading_variables_are_named(env: dict[str, str], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        join(tmp_path, env)


def test_a_host_name_that_nobody_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert own_address({"SLURM_STEP_NUM_NODES": "1"}) == "127.0.0.1"
    several = {"SLURM_STEP_NUM_NODES": "2"}
    assert own_address(several | {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}) == "127.0.0.1"
    with pytest.raises(UserError, match=r"host name: no-such-host.invalid"):
        own_address(several)


def test_waiting_for_the_master_ends_by_a_signal_and_in_time(tmp_path: Path) -> None:
    env = TWO | {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}
    stop = StopRequest()
    threading.Timer(1, lambda: setattr(stop, "signal", 15)).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        join(tmp_path, env, stop=stop)
    with pytest.raises(RankError, match=r"ranks: nobody answered .*MASTER_ADDR"):
        join(tmp_path, env, patience=timedelta(seconds=0.5))
    assert time.monotonic() - began < 60


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = TWO | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        with pytest.raises(UserError, match=r"MASTER_PORT: .*set another"):
            join(tmp_path, env | {"RANK": "0"})


def test_a_rank_alone_that_makes_no_progress_ends() -> None:
    code = (
        "import time, torch\n"
        "from bip.distributed.group import Group, Ranks\n"
        "from bip.distributed.heartbeat import Heartbeat\n"
        "heartbeat = Heartbeat(Group(Ranks(0, 1, 0, 1), torch.device('cpu')), 2, stall=1)\n"
        "with heartbeat.watching():\n"
        "    heartbeat.note_step(7)\n"
        "    time.sleep(300)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "no progress for 1 s at step 7" in done.stderr
