"""SLURM's commands for queue, partitions, limits and accounting. (`bip.slurm` has those for one
task.)"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bip.slurm import (
    SlurmError,
    Task,
    ask,
    number,
    own_restarts,
    own_task,
    problem,
    settings,
    show_task,
    without_options,
)
from launch.slurm.events import CANCELLED, REQUEUED, standing_of

__all__ = [
    "SlurmError",
    "Task",
    "ask",
    "number",
    "own_restarts",
    "own_task",
    "problem",
    "settings",
    "show_task",
    "without_options",
]


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
    # Not limited to this user, as others may run `status`. With a single ID squeue fails if the job
    # has ended, so ask for several.
    names = ",".join([*sorted(wanted), min(wanted)])
    answer = ask("squeue", "--noheader", "--array", f"--jobs={names}", "--format=%F_%K|%T|%r|%M")
    found = {}
    for line in answer.splitlines():
        # A reason is SLURM's text, and may hold anything.
        task, state, text = line.split("|", 2)
        reason, _, seconds = text.rpartition("|")
        if task.split("_")[0] in wanted:
            found[task] = Queued(task, state, reason, seconds_of(seconds))
    return found


def all_partitions() -> list[dict[str, str]]:
    """The fields of every partition that this user sees."""
    lines = ask("scontrol", "show", "partition", "-o").splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]


def partitions(names: str | None) -> list[dict[str, str]]:
    """The fields of each of these partitions (`a,b`; None: the default one).

    Raises SlurmError for one that does not exist.
    """
    known = all_partitions()
    if names is None:
        if found := [fields for fields in known if fields.get("Default") == "YES"]:
            return found
        raise SlurmError("partition: there is no default one; name one in the profile")
    by_name = {fields.get("PartitionName", ""): fields for fields in known}
    if missing := [name for name in names.split(",") if name not in by_name]:
        raise SlurmError(f"partition: there is no {missing[0]}")
    return [by_name[name] for name in names.split(",")]


def nodes() -> list[dict[str, str]]:
    """The fields of each node of the cluster."""
    lines = ask("scontrol", "show", "node", "-o").splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]


def hosts() -> set[str]:
    """The short host names of the cluster's nodes."""
    return {node["NodeHostName"].split(".")[0] for node in nodes() if "NodeHostName" in node}


_ENDED = ("jobid", "state", "exitcode", "reason", "nodelist", "start")


def ended(jobs: Iterable[str]) -> dict[str, dict[str, str]]:
    """How tasks of these array jobs ended: name -> fields of `sacct`, or what scontrol still knows.

    Tasks of which SLURM knows nothing any more are left out.
    """
    found: dict[str, dict[str, str]] = {}
    names = sorted(set(jobs))
    try:
        which = (f"--jobs={','.join(names)}", f"--format={','.join(_ENDED)}")
        answer = ask("sacct", "-nPX", *which, timeout=10)
        lines = [line.split("|") for line in answer.splitlines()]
        found = {line[0]: dict(zip(_ENDED, line, strict=False)) for line in lines}
    except SlurmError:  # no accounting, or it does not answer
        for job in names:
            with contextlib.suppress(SlurmError):
                for line in ask("scontrol", "show", "job", "-o", job, timeout=10).splitlines():
                    fields = dict(re.findall(r"(\w+)=(\S*)", line))
                    task = f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"
                    known = ("JobId", "JobState", "ExitCode", "Reason", "NodeList", "StartTime")
                    values = (fields.get(name, "") for name in known)
                    found[task] = dict(zip(_ENDED, values, strict=True))
    return found


class AccountingError(SlurmError):
    """The cluster has accounting, but it does not answer."""


def accounting(kind: str, fields: str, *where: str) -> list[dict[str, str]]:
    """sacctmgr's records of a kind; none without accounting. Raises AccountingError."""
    try:
        answer = ask("sacctmgr", "-nP", "show", kind, "where", *where, f"format={fields}")
    except SlurmError as error:
        if "not running a supported accounting_storage plugin" in str(error):
            return []
        raise AccountingError(str(error)) from None
    names = fields.split(",")
    return [dict(zip(names, line.split("|"), strict=True)) for line in answer.splitlines() if line]


def jobs_of_user() -> int:
    """Number of this user's jobs in the queue; each task of an array counts."""
    return len(ask("squeue", "--noheader", "--array", "--me", "--format=%i").splitlines())


def jobs_of_comment(comment: str) -> list[str]:
    """This user's jobs in the queue that were submitted with --comment."""
    answer = ask("squeue", "--noheader", "--me", "--format=%F|%k")
    lines = (line.partition("|") for line in answer.splitlines())
    return sorted({job for job, _, text in lines if text == comment})


def requeue(name: str, restarts: int) -> str | None:
    """Requeue a task whose present attempt has number `restarts`. Returns None, or why it is not
    requeued.

    Reads its state first: a second requeue would hit the next attempt, and a cancelled task must
    stay cancelled.
    """
    try:
        task = show_task(name)
        standing = standing_of(task, restarts) if task is not None else ""
        if standing == REQUEUED:
            return None
        if standing == CANCELLED:
            return "it was cancelled"
        ask("scontrol", "requeue", name)
    except SlurmError as error:
        return None if "pending" in str(error).lower() else str(error)
    return None
