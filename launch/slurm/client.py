"""SLURM's commands: what they are asked, and what their answers mean."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from bip.errors import UserError


class SlurmError(UserError):
    """A SLURM command is missing or refused. The message is its first line."""


# What SLURM's commands take for options: a user's habits (SQUEUE_STATES would hide tasks), and the
# facts of the job around this process. Not where the controller is, and the token it asks for.
_OPTIONS = re.compile(r"SLURM_(?!(CONF|JWT)$)|(SBATCH|SRUN|SQUEUE|SACCT|SCANCEL|SCONTROL)_")


def without_options(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would change the meaning of SLURM's commands."""
    return {name: value for name, value in env.items() if not _OPTIONS.match(name)}


def ask(*command: str, timeout: float = 60) -> str:
    """A SLURM command's output, whatever options the environment holds.

    Raises SlurmError if it is missing, refuses or hangs.
    """
    env = without_options(os.environ)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {timeout:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise SlurmError(f"{' '.join(command[:2])}: {lines[0]}")
    return done.stdout


def own_task(env: Mapping[str, str] = os.environ) -> str | None:
    """The name of this process's array task or job for scontrol; None outside a job.

    Never the bare ID of an array: scontrol takes that for every one of its tasks. The ID of a
    one-task array's task is that of the array.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class Task:
    """What the controller knows of one array task or job."""

    state: str
    restarts: int
    preempted: bool
    ended: bool  # unless requeued: cancelled, or preempted where PreemptMode is CANCEL
    end: float | None  # of the time limit, Unix seconds

    @classmethod
    def parse(cls, line: str) -> "Task":
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        end = None
        if re.match(r"\d{4}-", fields.get("EndTime", "")):
            end = datetime.fromisoformat(fields["EndTime"]).timestamp()
        preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "")
        state = fields["JobState"]
        # Until its processes are gone, a cancelled task is shown as COMPLETING, like one that
        # SLURM has requeued (only `restarts` tells it, after a node failure) and one that reached
        # its limit.
        ended = state in ("CANCELLED", "PREEMPTED", "COMPLETING") and end is not None
        ended = ended and fields.get("Reason") != "TimeLimit"
        return cls(state, int(fields.get("Restarts", 0)), preempted, ended, end)


def show_task(name: str) -> Task | None:
    """None if the controller no longer knows it. Raises SlurmError if it cannot be asked."""
    try:
        lines = ask("scontrol", "show", "job", "-o", name).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return Task.parse(lines[0]) if lines and "JobState=" in lines[0] else None


@dataclass(frozen=True)
class Queued:
    """One task in the queue. `task` is ARRAYJOBID_INDEX."""

    task: str
    state: str
    reason: str
    seconds: float


def seconds_of(text: str) -> float:
    days, _, clock = text.rpartition("-")
    parts = [float(part) for part in clock.split(":") if part.replace(".", "").isdigit()]
    total = 0.0
    for part in parts:
        total = 60 * total + part
    return total + 86400 * int(days or 0)


def queue(jobs: Iterable[str]) -> dict[str, Queued]:
    """The tasks of these array jobs that are waiting or running, by name; one squeue call."""
    if not (wanted := set(jobs)):
        return {}
    # Not those of this user: a colleague may look. Asked for one ID alone, squeue takes an unknown
    # one, as of a job that ended, for an error.
    names = ",".join([*sorted(wanted), min(wanted)])
    answer = ask("squeue", "--noheader", "--array", f"--jobs={names}", "--format=%F_%K|%T|%r|%M")
    found = {}
    for line in answer.splitlines():
        task, state, reason, seconds = line.split("|")
        if task.split("_")[0] in wanted:
            found[task] = Queued(task, state, reason, seconds_of(seconds))
    return found


def settings() -> dict[str, str]:
    """The controller's configuration, by SLURM's names."""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs if value}


def partitions(names: str | None) -> list[dict[str, str]]:
    """The fields of each of these partitions (`a,b`; None: the default one).

    Raises SlurmError for one that does not exist.
    """
    lines = ask("scontrol", "show", "partition", "-o").splitlines()
    known = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    if names is None:
        if found := [fields for fields in known if fields.get("Default") == "YES"]:
            return found
        raise SlurmError("partition: there is no default one; name one in the profile")
    by_name = {fields.get("PartitionName", ""): fields for fields in known}
    if missing := [name for name in names.split(",") if name not in by_name]:
        raise SlurmError(f"partition: there is no {missing[0]}")
    return [by_name[name] for name in names.split(",")]


def hosts() -> set[str]:
    """The machines of the cluster's nodes, by the short names of their hosts."""
    lines = ask("scontrol", "show", "node", "-o")
    return {name.split(".")[0] for name in re.findall(r"\bNodeHostName=(\S+)", lines)}


class AccountingError(SlurmError):
    """There is accounting, but it does not answer."""


def accounting(kind: str, fields: str, *where: str) -> list[dict[str, str]]:
    """sacctmgr's records of a kind; none where there is no accounting. Raises AccountingError."""
    try:
        answer = ask("sacctmgr", "-nP", "show", kind, "where", *where, f"format={fields}")
    except SlurmError as error:
        if "not running a supported accounting_storage plugin" in str(error):
            return []
        raise AccountingError(str(error)) from None
    names = fields.split(",")
    return [dict(zip(names, line.split("|"), strict=True)) for line in answer.splitlines() if line]


def jobs_of_user() -> int:
    """This user's jobs in the queue, an array's tasks counted one by one."""
    return len(ask("squeue", "--noheader", "--array", "--me", "--format=%i").splitlines())


def number(text: str, missing: int) -> int:
    """The leading number of a setting such as '30 sec'."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else missing


def requeue(name: str, restarts: int) -> str | None:
    """Requeue a task that this attempt is of. Returns None, or why it is not requeued.

    Does nothing when SLURM has requeued it already: a second requeue would hit the next attempt.
    A cancelled task stays cancelled.
    """
    try:
        task = show_task(name)
        if task is not None and (task.restarts > restarts or task.state == "PENDING"):
            return None
        if task is not None and task.ended:
            return "it was cancelled"
        ask("scontrol", "requeue", name)
    except SlurmError as error:
        if "pending" in str(error).lower():
            return None
        return str(error)
    return None
