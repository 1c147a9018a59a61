"""A rank of an array task whose run ends as told: python -m tests.launch.rank_that HOW FOLDER"""

import atexit
import errno
import os
import signal
import sys

from bip.config import RunConfig
from bip.distributed.signals import StopRequest
from bip.errors import RankError, Stopped, UserError
from launch.slurm.rank import run_point


def finishes(config: RunConfig, stop: StopRequest) -> None:
    pass


def saves(config: RunConfig, stop: StopRequest) -> None:
    raise Stopped("SIGTERM", 5)


def saves_and_cannot_record_it(config: RunConfig, stop: StopRequest) -> None:
    (config.run_folder / "attempts.jsonl").mkdir(parents=True)  # stands for a full disk
    raise Stopped("SIGTERM", 5)


def breaks(config: RunConfig, stop: StopRequest) -> None:
    """What it had started died of the signal."""
    stop.signal = signal.SIGTERM
    raise RuntimeError("a process of the compiler died")


def loses_peers(config: RunConfig, stop: StopRequest) -> None:
    raise RankError("rank 1 is gone")


def has_no_files(config: RunConfig, stop: StopRequest) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def has_bad_input(config: RunConfig, stop: StopRequest) -> None:
    raise UserError("lr: too high")


def has_a_bug(config: RunConfig, stop: StopRequest) -> None:
    raise ValueError("bug")


def dies_of_sigbus(config: RunConfig, stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGBUS)


if __name__ == "__main__":
    how, folder = sys.argv[1:]
    atexit.register(lambda: os._exit(1))  # as submitit would
    run_point(folder, globals()[how])
