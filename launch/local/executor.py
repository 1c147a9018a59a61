"""Submission through submitit: queue a sweep's points and start the jobs that run them."""

import os
import subprocess
import sys
from pathlib import Path

from bip.errors import UserError
from bip.files import atomic_write_json
from launch.local.worker import TRAIN, VISIBLE_GPUS, without_job, work
from launch.profile import Profile
from launch.sweep import Queue, Sweep

_A_YEAR_IN_MINUTES = 366 * 24 * 60


def submit(sweep: Sweep, profile: Profile, run_ids: list[str], command: list[str] = TRAIN) -> int:
    """Queue the points and start as many workers as are missing. Returns how many were started.

    Calling it again while workers are alive adds to their queue; there are never more than
    `profile.parallelism` runs at once.
    """
    atomic_write_json(sweep.jobs / "profile.json", profile.model_dump(mode="json"))  # for `resume`
    profile_values = profile.model_dump(exclude={"executor"})
    sweep.set_queue(Queue(points=run_ids, command=command, **profile_values))
    count = min(profile.parallelism, sweep.unfinished()) - sweep.live_workers()
    if count > 0:
        _start_apart(sweep, count)
    return max(count, 0)


def _start_apart(sweep: Sweep, count: int) -> None:
    """Submit from a process in a session of its own.

    submitit starts local jobs in the session of its caller, where Ctrl-C and a closed terminal
    would end them.
    """
    env = without_job(os.environ)
    if "CUDA_VISIBLE_DEVICES" in env:
        env[VISIBLE_GPUS] = env["CUDA_VISIBLE_DEVICES"]
    log = sweep.jobs / "submit.log"
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.local.executor", str(sweep.folder), str(count)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # half of the jobs would be worse than all
            raise
    if code:
        raise UserError(f"the jobs could not be submitted; see {log}")


def start_local_jobs(folder: Path, count: int) -> None:
    """`count` submitit jobs on this machine, each a worker of the sweep in `folder`."""
    import submitit  # only this process needs it

    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=_A_YEAR_IN_MINUTES, name=folder.name)
    executor.map_array(work, [str(folder)] * count)


if __name__ == "__main__":
    start_local_jobs(Path(sys.argv[1]), int(sys.argv[2]))
