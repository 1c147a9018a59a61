"""A worker on this machine: it takes runs in turn until none is left."""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bip.distributed.signals import StopRequest
from bip.errors import UserError
from launch.local.processes import RunProcess, was_stopped
from launch.printed import last_error, tail
from launch.sharing import own_share
from launch.slurm import client as slurm
from launch.sweep import FINAL, Lock, Queue, Run, Sweep

TRAIN = [sys.executable, "-m", "bip", "train"]
POLL_SECONDS = 0.25
# Holds the launcher's CUDA_VISIBLE_DEVICES, as submitit's local executor empties that variable.
VISIBLE_GPUS = "BIP_LAUNCH_CUDA_VISIBLE_DEVICES"

# With these variables a run would take itself for a rank of another group.
_FOREIGN = re.compile(
    r"SUBMITIT_|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|"
    r"MASTER_PORT)$|TORCHELASTIC_"
)


def work(folder: str) -> None:
    """Execute queued runs of the sweep, one at a time, until no more of them can start.

    Each worker takes a number below `parallelism`; a worker without one exits. On SIGTERM a worker
    stops its run, waits for it, and exits.
    """
    stop = StopRequest().install()
    sweep = Sweep(Path(folder))
    taken = _take_number(sweep)
    if taken is None:
        return
    number, presence = taken
    try:
        while not stop.signal and number < (queue := sweep.queue()).parallelism:
            runs = {run.run_id: run for run in sweep.runs()}
            states = sweep.states(runs.values())
            queued = [runs[name] for name in queue.run_ids if name in runs]
            if all(states[run.run_id].name in FINAL for run in queued):
                return
            ready = [
                run
                for run in queued
                if states[run.run_id].name == "waiting"
                and all(states[need].name == "done" for need in run.needs)
            ]
            # After a run read all states again. Without a run wait: runs of other workers may
            # unblock more, or those workers may die.
            if not _run_first(sweep, ready, queue, number, stop):
                time.sleep(POLL_SECONDS)
    finally:
        presence.close()


def _take_number(sweep: Sweep) -> tuple[int, Lock] | None:
    for _ in range(8):  # a probe holds a lock briefly
        for number in range(sweep.queue().parallelism):
            if lock := Lock.try_acquire(sweep.worker_path(number)):
                return number, lock
        time.sleep(POLL_SECONDS / 2)
    return None


def _run_first(
    sweep: Sweep, ready: list[Run], queue: Queue, number: int, stop: StopRequest
) -> bool:
    """Execute the first run that no other worker has locked; False if there is none now."""
    slot = Lock.try_acquire(sweep.slot_path(number))
    if slot is None:  # the run of a killed worker still uses it
        return False
    try:
        return any(_execute(sweep, run, queue, number, slot, stop) for run in ready)
    finally:
        slot.close()


def _execute(
    sweep: Sweep, run: Run, queue: Queue, number: int, slot: Lock, stop: StopRequest
) -> bool:
    """Lock the run, execute it in its own process and record a failure.

    False if another worker was faster.
    """
    claim = Lock.try_acquire(sweep.claim_path(run.run_id))
    if claim is None:
        return False
    try:
        if sweep.is_done(run) or sweep.failure(run) is not None:
            return False
        try:
            sweep.config(run.run_id)
        except UserError as error:
            sweep.fail(run.run_id, f"error: {error}")
            return True
        note = {"started": time.time(), "host": platform.node(), "worker": os.getpid()}
        claim.write(json.dumps(note))
        env, share = run_environment(os.environ, queue), None
        if queue.runs_at_once > 1:
            share = own_share(number, queue.runs_at_once, env.get("CUDA_VISIBLE_DEVICES"))
            if share.gpu is not None:
                env["CUDA_VISIBLE_DEVICES"] = share.gpu
        with open(sweep.log(run.run_id), "ab") as log:
            if share is not None:
                log.write(f"{share.line(env)}\n".encode())
                log.flush()
            begin = log.tell()
            # The run's process holds both locks too: if this worker is killed, the run continues,
            # no other worker starts it again, and its slot stays taken.
            process = subprocess.Popen(
                [*_ranks(queue), "--configs", str(sweep.folder / run.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=(claim.descriptor, slot.descriptor),
            )
            if share is not None:  # its threads inherit it, as Python starts none so soon
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, share.cpus)
            ranks = queue.ntasks_per_node
            claim.write(json.dumps(note | {"run": process.pid, "ranks": ranks}))
            code = _wait(process, RunProcess(process.pid, ranks), stop)
        if not sweep.is_done(run) and sweep.failure(run) is None:  # else `launch cancel` marked it
            lines = tail(sweep.log(run.run_id), begin)
            if was_stopped(code, lines):
                sweep.mark_cancelled(run.run_id, f" ({_how_it_stopped(lines)})")
            else:
                sweep.fail(run.run_id, _reason(code, lines))
                if sweep.fail_fast.exists():
                    _cancel_others(sweep)
    finally:
        claim.close()
    return True


def _cancel_others(sweep: Sweep) -> None:
    """In a process of its own, as this worker is one of those that it stops."""
    with open(sweep.jobs / "submit.log", "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "launch", "cancel", str(sweep.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(process: "subprocess.Popen[bytes]", run: RunProcess, stop: StopRequest) -> int:
    """Wait for the run's exit code; stop the run if this worker gets a signal."""
    while True:
        if stop.signal:
            run.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_SECONDS)


def _ranks(queue: Queue) -> list[str]:
    if queue.ntasks_per_node == 1:
        return queue.command
    python, *rest = queue.command
    torchrun = [python, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={queue.ntasks_per_node}", *rest]


def without_job(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without options of SLURM's commands, and without the variables of this
    process's own job or ranks."""
    kept = slurm.without_options(env)
    return {name: value for name, value in kept.items() if not _FOREIGN.match(name)}


def run_environment(inherited: Mapping[str, str], queue: Queue) -> dict[str, str]:
    """The environment of a run: the launcher's, without that of the job around it."""
    env = without_job(inherited)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if (gpus := env.pop(VISIBLE_GPUS, None)) is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    return env | {"OMP_NUM_THREADS": str(queue.cpus_per_task)} | queue.env


def _how_it_stopped(lines: list[str]) -> str:
    found = re.findall(r"stopped by \w+ at step \d+", "\n".join(lines))
    return found[-1] if found else "killed by SIGTERM"


def _reason(code: int, lines: list[str]) -> str:
    """One line: how the attempt ended, and its most useful line of output."""
    last = lines[-1] if lines else "it printed nothing"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last line: {last}"
    if code == 0:
        return f"ended without a result; last line: {last}"
    return f"exit code {code}: {last_error(lines) or last}"
