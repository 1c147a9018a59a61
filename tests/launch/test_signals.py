"""Stopped before it trains: a whole rank with all its processes, and the next attempt."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bip.files import read_jsonl
from tests.launch.fake_slurm import PREEMPTED, RUNNING, FakeSlurm


class Life:
    """Attempts of one rank of a task that SLURM preempts, from their first line."""

    def __init__(self, folder: Path, **settings: object) -> None:
        facts = {"epochs": 1, "max_steps": 3, "num_workers": 0}
        self.slurm = FakeSlurm(folder, **(facts | settings))
        self.log = self.slurm.sweep.log(self.slurm.name)
        self.config = self.slurm.config
        self.result = self.config.run_folder / "result.json"

    @contextlib.contextmanager
    def start(self, restarts: int = 0, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
        """The leader of a new process group, as every rank of a step is."""
        script = (
            f"from launch.slurm.rank import run_point; run_point({str(self.slurm.sweep.folder)!r})"
        )
        env = {"SLURM_RESTART_COUNT": str(restarts)} | env
        env = (
            self.slurm.env | {"BIP_POINT": self.slurm.name, "BIP_ATTEMPT": f"7_0.{restarts}"} | env
        )
        self.slurm.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        with self.log.open("ab") as log:
            rank = subprocess.Popen(
                [sys.executable, "-c", script],
                env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield rank
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()

    def preempt(self, rank: "subprocess.Popen[bytes]", when: Callable[[int], bool]) -> int:
        """Signal all its processes once `when` is true of the rank; its exit status."""
        deadline = time.monotonic() + 120
        while not when(rank.pid):
            assert rank.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        self.slurm.says(PREEMPTED)
        os.killpg(rank.pid, signal.SIGTERM)
        return rank.wait(120)

    def has_begun(self, _pid: int) -> bool:
        return (self.slurm.sweep.jobs / f"{self.slurm.name}.begun").exists()


def runs_compiler(pid: int) -> bool:
    """Whether a process of it compiles a kernel (and not what torch only tries out)."""
    with contextlib.suppress(OSError):  # one that has just ended
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b".main.cpp" in command and b"g++" in command:
                    return True
    return False


def test_while_it_imports(tmp_path: Path) -> None:
    life = Life(tmp_path, epochs=10, max_steps=None)  # far from its end when it has imported
    with life.start() as rank:
        assert life.preempt(rank, life.has_begun) == os.EX_TEMPFAIL, life.log.read_text()
    assert "stopped by SIGTERM at step " in life.log.read_text()
    assert (life.slurm.causes(), life.slurm.calls("requeue")) == (["preempted"], 1)
    assert life.slurm.note() == ""
    with life.start(restarts=1) as rank:
        assert rank.wait(120) == 0, life.log.read_text()
    assert life.result.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_while_it_compiles(tmp_path: Path) -> None:
    """What compiles dies of the signal, and so does the step; that is no bug of the run's."""
    life = Life(tmp_path, compile=True)
    cache = str(tmp_path / "compiled")
    with life.start(TORCHINDUCTOR_CACHE_DIR=cache, TORCHINDUCTOR_COMPILE_THREADS="1") as rank:
        assert life.preempt(rank, runs_compiler) == os.EX_TEMPFAIL, life.log.read_text()
    assert "Traceback" in life.log.read_text()
    assert (life.slurm.causes(), life.slurm.calls("requeue")) == (["preempted"], 1)
    assert life.slurm.note() == ""
    begun, ended, again = read_jsonl(life.config.run_folder / "attempts.jsonl")
    assert [begun["event"], ended["event"], again["event"]] == ["start", "end", "requeue"]
    assert ended["cause"].startswith("error: ")
    assert not life.result.exists()
