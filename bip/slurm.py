"""SLURM's commands: the only place that runs scontrol and that names a task.

Standard library only, and for Python 3.8: `launch/slurm/batch.py` imports this and runs with the
batch node's own Python.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from bip.errors import UserError

KILL_WAIT = 30  # SLURM's default
KILL_WAIT_NAME = "BIP_KILL_WAIT"


class SlurmError(UserError):
    """A SLURM command is missing or refused. The message is its first line."""


# Variables that SLURM's commands read as options: the user's (SQUEUE_STATES would hide tasks) and
# those of the job around this process. Not the controller's address (CONF) and token (JWT).
_OPTIONS = re.compile(r"SLURM_(?!(CONF|JWT)$)|(SBATCH|SRUN|SQUEUE|SACCT|SCANCEL|SCONTROL)_")


def without_options(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that SLURM's commands read as options."""
    return {name: value for name, value in env.items() if not _OPTIONS.match(name)}


def ask(*command: str, timeout: float = 60) -> str:
    """A SLURM command's output; variables in the environment that are options are ignored.

    Raises SlurmError if the command is missing, fails or hangs.
    """
    env = without_options(os.environ)
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout,
            env=env, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {timeout:.0f} s") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command[:2])}: {problem(done.stderr or done.stdout)}")
    return done.stdout


# What SLURM's commands print, and what it means to a user.
_ADVICE = {
    r"DNS SRV|configuration source|slurm\.conf": "this machine belongs to no cluster; use a login "
    "node of the cluster, or set SLURM_CONF to its slurm.conf",
    r"[Mm]unge|MUNGE": "munge does not work on this machine; use another login node, or ask the "
    "site's support to start munged",
    r"Unable to contact slurm controller|Connection refused|Socket timed out": "slurmctld does not "
    "answer now; try again later",
    r"authentication|Incompatible versions": "SLURM's commands and its controller do not fit "
    "together; use a login node of the cluster",
}


def problem(printed: str) -> str:
    """One line on why a SLURM command failed, with advice where its own line has none.

    The line is the first that names an error; a site's plugins may print others before it.
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    line = (named or lines)[0]
    advice = next((text for sign, text in _ADVICE.items() if re.search(sign, printed)), "")
    return f"{line} ({advice})" if advice else line


def own_task(env: Mapping[str, str] = os.environ) -> str | None:
    """The name of this process's array task or job for scontrol; None outside a job.

    Never an array's bare ID: scontrol applies that to all its tasks. (SLURM_JOB_ID may be it.)
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def own_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often this process's task was requeued before this attempt."""
    return int(env.get("SLURM_RESTART_COUNT") or 0)


@dataclass(frozen=True)
class Task:
    """The controller's record of one array task or job."""

    state: str
    restarts: int
    preempted: bool
    end: float | None  # Unix seconds: when its time limit ends, or when the task ended
    reason: str

    @classmethod
    def parse(cls, line: str) -> Task:
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        end = None
        if re.match(r"\d{4}-", fields.get("EndTime", "")):
            end = datetime.fromisoformat(fields["EndTime"]).timestamp()
        preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "")
        restarts = int(fields.get("Restarts", 0))
        return cls(fields["JobState"], restarts, preempted, end, fields.get("Reason", ""))


def show_task(name: str, timeout: float = 60) -> Task | None:
    """The task's record; None if SLURM no longer has one. Raises SlurmError without an answer."""
    try:
        answer = ask("scontrol", "show", "job", "-o", name, timeout=timeout)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    line = answer.partition("\n")[0]
    if "JobState=" not in line:
        raise SlurmError(f"scontrol show: no record of {name} in its answer")
    return Task.parse(line)


def settings(timeout: float = 60) -> dict[str, str]:
    """The controller's configuration, by SLURM's names."""
    lines = ask("scontrol", "show", "config", timeout=timeout).splitlines()
    pairs = (line.partition("=") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs if value}


def number(text: str, missing: int) -> int:
    """The leading number of a setting such as '30 sec'."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else missing


def kill_wait() -> int:
    """Seconds from SIGTERM to SIGKILL: as the batch script found out, for ranks in a container
    without scontrol, or as the controller answers; SLURM's default without an answer.
    """
    if (given := os.environ.get(KILL_WAIT_NAME, "")).isdecimal():
        return int(given)
    try:
        return number(settings(timeout=30).get("KillWait", ""), KILL_WAIT)
    except (SlurmError, OSError):
        return KILL_WAIT
