"""What runs inside a job: a worker that takes points in turn until none is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch.slurm import client as slurm
from launch.sweep import FINAL, Lock, Queue, Record, Sweep

TRAIN = [sys.executable, "-m", "bip", "train"]
POLL_SECONDS = 0.25
# The launcher's CUDA_VISIBLE_DEVICES, which submitit's local executor empties.
VISIBLE_GPUS = "BIP_LAUNCH_CUDA_VISIBLE_DEVICES"

# These would tell a run that it is one rank of something that it is not.
_FOREIGN = re.compile(
    r"SUBMITIT_|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|"
    r"MASTER_PORT)$|TORCHELASTIC_"
)


def work(folder: str) -> None:
    """Run queued points of the sweep, one at a time, until all of them are done, failed or blocked.

    Of each number below `parallelism` there is one worker; one without a number leaves.
    """
    sweep = Sweep(Path(folder))
    taken = _take_number(sweep)
    if taken is None:
        return
    number, presence = taken
    try:
        while number < (queue := sweep.queue()).parallelism:
            records = {record.run_id: record for record in sweep.records()}
            states = sweep.states(records.values())
            queued = [records[name] for name in queue.points if name in records]
            if all(states[record.run_id].name in FINAL for record in queued):
                return
            ready = [
                record
                for record in queued
                if states[record.run_id].name == "waiting"
                and all(states[need].name == "done" for need in record.needs)
            ]
            # After a run look again from the top: much may have changed. With nothing to run stay
            # nevertheless: what others run may unlock points, or they may die.
            if not _run_first(sweep, ready, queue, number):
                time.sleep(POLL_SECONDS)
    finally:
        presence.close()


def _take_number(sweep: Sweep) -> tuple[int, Lock] | None:
    for _ in range(8):  # an onlooker holds a lock for an instant
        for number in range(sweep.queue().parallelism):
            if lock := Lock.try_acquire(sweep.worker_path(number)):
                return number, lock
        time.sleep(POLL_SECONDS / 2)
    return None


def _run_first(sweep: Sweep, ready: list[Record], queue: Queue, number: int) -> bool:
    """Run the first point that nobody else claims; False if there is none to be had now."""
    slot = Lock.try_acquire(sweep.slot_path(number))
    if slot is None:  # the run of an earlier, killed worker goes on in it
        return False
    try:
        return any(run_point(sweep, record, queue, slot) for record in ready)
    finally:
        slot.close()


def run_point(sweep: Sweep, record: Record, queue: Queue, slot: Lock) -> bool:
    """Claim the point, run it as a process of its own and record a failure.

    False if another worker was faster.
    """
    claim = Lock.try_acquire(sweep.claim_path(record.run_id))
    if claim is None:
        return False
    try:
        if sweep.is_done(record) or sweep.failure(record) is not None:
            return False
        claim.write(json.dumps({"started": time.time(), "worker": os.getpid()}))
        with open(sweep.log(record.run_id), "ab") as log:
            begin = log.tell()
            # The run holds the claim and the slot too: should this worker be killed, the run goes
            # on, and nobody starts it twice or one too many.
            process = subprocess.Popen(
                [*_ranks(queue), "--configs", str(sweep.folder / record.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=run_environment(os.environ, queue),
                pass_fds=(claim.descriptor, slot.descriptor),
            )
            code = process.wait()
        if not sweep.is_done(record):
            sweep.fail(record.run_id, _reason(code, sweep.log(record.run_id), begin))
    finally:
        claim.close()
    return True


def _ranks(queue: Queue) -> list[str]:
    if queue.ntasks_per_node == 1:
        return queue.command
    python, *rest = queue.command
    torchrun = [python, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={queue.ntasks_per_node}", *rest]


def without_job(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without options of SLURM's commands, and without the variables of a job, or
    of ranks, that this process is part of."""
    kept = slurm.without_options(env)
    return {name: value for name, value in kept.items() if not _FOREIGN.match(name)}


def run_environment(inherited: Mapping[str, str], queue: Queue) -> dict[str, str]:
    """The environment of a run: the launcher's, without what belongs to the job around it."""
    env = without_job(inherited)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if (gpus := env.pop(VISIBLE_GPUS, None)) is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    return env | {"OMP_NUM_THREADS": str(queue.cpus_per_task)} | queue.env


def _reason(code: int, log: Path, begin: int) -> str:
    """One line: how the attempt ended and its telling last line."""
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - 16384))
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Under torchrun its own report (ChildFailedError) follows the failed rank's last words.
    pattern = r"(?!torch\.distributed)[\w.]*(Error|Exception)\b"
    raised = [line for line in lines if re.match(pattern, line)]
    telling = [line for line in lines if line.startswith("error: ")] or raised
    last = (telling if code > 0 and telling else lines or ["it printed nothing"])[-1]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last line: {last}"
    if code == 0:
        return f"ended without a result; last line: {last}"
    return f"exit code {code}: {last}"
