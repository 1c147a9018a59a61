"""The processes of a local run: find, stop and kill them."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from bip.errors import ExitCode


class RunProcess:
    """A run's process; with several ranks it is torchrun's, and the ranks are its children."""

    def __init__(self, pid: int, ranks: int) -> None:
        self.pid, self.ranks = pid, ranks
        self.asked: set[int] = set()

    def ask_to_stop(self) -> None:
        """Send SIGTERM to each rank, once. Call it again while the run lives: ranks start late.

        torchrun gets none: it would forward the signal, and kill the ranks 30 s later.
        """
        for pid in {*self._rank_pids()} - self.asked:
            self.asked.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        for pid in {self.pid, *self._rank_pids()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def has_open(self, path: Path) -> bool:
        """Whether the process is on this machine and has the file open."""
        with suppress(OSError):
            files = Path(f"/proc/{self.pid}/fd").iterdir()
            return any(os.path.samefile(file, path) for file in files)
        return False

    def _rank_pids(self) -> list[int]:
        if self.ranks == 1:
            return [self.pid]
        pids: list[int] = []
        for thread in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                pids += map(int, thread.read_text().split())
        return pids


def was_stopped(code: int, lines: list[str]) -> bool:
    """Whether a run's process that printed these lines was stopped by request."""
    if code in (ExitCode.STOPPED, -signal.SIGTERM):
        return True
    # torchrun exits with 1, both after a signal and when its first rank ends.
    if lines and "SignalException" in lines[-1] and lines[-1].endswith("got signal: 15"):
        return True
    report = [line.split()[2] for line in lines if line.startswith("exitcode  :")]
    return report[-1:] in (["75"], ["-15"])
