"""The program that `slurm/task.sh` runs on the batch node for a task whose runs share it.

    python3 -I -S together.py FOLDER AT_ONCE RUN_ID... -- SRUN-ARGUMENTS COMMAND...

Executes the runs, AT_ONCE at a time, each as a step of its own. A run that failed for good leaves
the others alone. Once a run needs the task requeued, no further run starts; when the last has
ended, the task is requeued once. `batch.py` decides on each run. The exit status is that of the
task: 75 requeued, 1 a run failed, 0 all are done.

Run by its path and outside of containers, as `batch.py`, and for the same versions of Python.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.slurm import events
from launch.slurm.batch import Run, Step, begin


class Together:
    """The runs of one task."""

    def __init__(self, folder: str, at_once: int, run_ids: list[str], srun: list[str]) -> None:
        self.folder, self.at_once, self.srun = folder, at_once, srun
        self.waiting = deque(run_ids)
        self.open: list[Step] = []  # ended, and need the task requeued
        self.failed = False

    def execute(self) -> int:
        with ThreadPoolExecutor(self.at_once) as pool:
            for ended in [pool.submit(self._work, number) for number in range(self.at_once)]:
                ended.result()
        for step in self.open:
            if step.run is not None and step.run.note.exists():  # cancelled by --fail-fast
                self.failed = True
                continue
            step.ask()  # time has passed since it ended
            if step.end() == "requeued":
                return events.EX_TEMPFAIL
            self.failed = True
            if step.run is not None:
                step.run.cancel_others()
        return int(self.failed)

    def _work(self, number: int) -> None:
        """Execute runs on share `number`, one after the other."""
        while not self.open:
            try:
                run_id = self.waiting.popleft()
            except IndexError:
                return
            try:
                self._execute(run_id, number)
            except OSError as problem:  # no srun, no process left: the others go on
                print(f"{run_id}: not executed ({problem})", file=sys.stderr, flush=True)
                self.failed = True

    def _execute(self, run_id: str, number: int) -> None:
        run = Run(self.folder, run_id, own_log=True)
        if run.note.exists():  # it failed in an earlier attempt of this task
            self.failed = True
            return
        attempt = begin(run)
        env = {"BIP_POINT": run_id, "BIP_ATTEMPT": attempt, "BIP_SHARE": f"{number}/{self.at_once}"}
        options = ["--overlap", "--kill-on-bad-exit=1", "--open-mode=append"]
        options += [f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK') or 1}"]
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            log = None  # on a full disk: the task's own
            with contextlib.suppress(OSError):
                log = stack.enter_context(open(run.srun_log, "ab"))
            code = subprocess.call(
                ["srun", *options, f"--output={run.log}", *self.srun],
                stdin=subprocess.DEVNULL, stderr=log, env={**os.environ, **env},
            )  # fmt: skip
        if code == 0:
            return
        # The shell's number for a process that a signal ended.
        step = Step(code if code > 0 else 128 - code, time.monotonic() - began, run)
        decision = step.decide()
        if decision.action in (events.REQUEUE, events.REQUEUED):
            self.open.append(step)
        else:
            self.failed = True
            step.give_up(decision)
            run.cancel_others()


def main(*arguments: str) -> int:
    at = arguments.index("--")
    folder, at_once, *run_ids = arguments[:at]
    return Together(folder, int(at_once), run_ids, [*arguments[at + 1 :]]).execute()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
