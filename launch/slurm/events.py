"""The only place that decides what happens after an attempt that did not finish.

The batch script (`batch.py`, when srun has ended) and the ranks (`rank.py`, when the run has
stopped) gather `Facts`, call `decide` and carry out the decision. Some decisions only request more
facts; then they call again. A rank that lost its peers cannot know whether they had a bug or their
node failed, so it leaves the decision to the batch script. If that is killed with its node, the
run is tried again.

Pure, standard library only, and for Python 3.8 (see `bip/slurm.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bip.slurm import Task

# Actions. After the last three the caller decides again.
REQUEUE = "requeue"  # requeue the task (a rank records the cause first)
REQUEUED = "requeued"  # SLURM has requeued it already; again would hit the next attempt
FINAL = "final"  # record `reason` as the run's failure; if "", it is recorded already
CANCELLED = "cancelled"  # like FINAL: SLURM or the user has cancelled the task
LOST = "lost"  # a rank: record `reason` for the batch script, which decides
PARKED = "parked"  # a rank: wait until SLURM ends this step, for at most `seconds`
WAIT = "wait"  # ask SLURM (again) after `seconds`
PROBE = "probe"  # find out whether all nodes answer
AWAIT_NODE = "await_node"  # give SLURM NODE_SECONDS to notice a failed node, and requeue the task

# How a run ended on a rank
SAVED = "saved"  # stopped by a signal, after all ranks saved
PEERS = "peers"  # other ranks, or a process of this one, have ended
PASSING = "passing"  # a file system is unreachable
BUG = "bug"
INPUT = "input"  # bad input, which fails every time

# Causes, in attempts.jsonl and in the profile's retries. An operator's requeue ("requeued") counts
# as preempted.
CAUSE_PREEMPTED, CAUSE_TIMED_OUT, CAUSE_LOST = "preempted", "timed_out", "lost"
DEFAULT_RETRIES = {CAUSE_PREEMPTED: 100, CAUSE_TIMED_OUT: 100, CAUSE_LOST: 5}

# A rank's report that another has stopped answering, or was ended by something outside.
_SILENT = re.compile("has not answered for|no progress for|a loader process died|killed by SIGKILL")

RUNS = "runs"
EX_IOERR, EX_TEMPFAIL, BUS = 74, 75, 135  # of bip; 128 + SIGBUS: an I/O error of a mapped file
KILLED = 137  # 128 + SIGKILL: by a user, an operator, the kernel for lack of memory, or a node
STOPPED = (EX_TEMPFAIL, 138, 140, 143)  # 128 + USR1, USR2, TERM: a rank that noticed too late
CANNOT_START = (2, 13, 126, 127)  # the command is missing, or may not be executed
LATE_SECONDS = 5.0  # by which SLURM's record of a preemption may be later than the signal
ANSWER_SECONDS = 600.0  # for which scontrol is retried
NODE_SECONDS = 600.0
PARK_SECONDS = 900.0
EARLY_SECONDS = 120.0  # SLURM signals up to a minute before `signal_lead`


@dataclass(frozen=True)
class Facts:
    """The known facts of an attempt that did not finish. "" and None: none, or unknown."""

    restarts: int = 0  # of the task before this attempt
    rank: int | None = None  # None: the batch script asks
    # How it ended
    end: str = ""  # on this rank
    signal: str = ""  # that this rank received
    error: str = ""  # of this rank; for the batch script the log's last error line
    code: int = 0  # of srun, which is the highest of all ranks
    lasted: float = 0.0  # seconds from srun's start
    # SLURM's record
    waited: float | None = None  # seconds since it was first read; None: not read yet
    task: Task | None = None
    now: float = 0.0  # Unix seconds, to compare with the task's end
    refusal: str = ""  # scontrol's last error
    refused: float = 0.0  # seconds since its first
    nodes: int = 1
    nodes_answer: bool | None = None
    node_awaited: bool = False  # SLURM has had NODE_SECONDS
    # On disk: records, the log, checkpoints, the ledger
    failed: bool = False
    lost: str = ""
    begun: bool = False  # a rank has started
    bus_error: bool = False  # the log reports one; srun's code may be another rank's
    death: str = ""  # which rank ended first, on which node, and how
    memory: str = ""  # what shows that the task's memory limit was hit
    unwritable: str = ""  # why the sweep's jobs folder takes no records: full, read-only
    saved: bool = False  # this attempt wrote a checkpoint
    losses: int = 1  # in a row without progress, including this one
    used: Mapping[str, int] = field(default_factory=dict)  # requeues by cause
    # The profile and the user
    retries: Mapping[str, int] | None = None  # None: a template's task, whose ranks count nothing
    signal_lead: float = 120.0
    requeue_by: str = "scontrol"
    max_restarts: int | None = None  # the user's BIP_MAX_RESTARTS
    resume: str = "the same sbatch line continues it"
    logs: str = ""


@dataclass(frozen=True)
class Decision:
    action: str
    reason: str = ""  # for the user
    cause: str = ""  # for the ledger
    seconds: float = 0.0
    code: int = 0  # exit status of a rank
    counts: bool = False  # the batch script records the attempt as lost


def decide(facts: Facts) -> Decision:
    return _of_batch(facts) if facts.rank is None else _of_rank(facts)


def standing_of(task: Task, restarts: int) -> str:
    """The state of the attempt with that many restarts: RUNS, REQUEUED or CANCELLED."""
    if task.restarts != restarts or task.state.startswith(("PENDING", "REQUEUE")):
        return REQUEUED
    # Until its processes have ended, a cancelled task is COMPLETING, and so are a requeued one
    # (with more restarts, also after a node failure) and one that reached its time limit.
    if task.state in ("CANCELLED", "PREEMPTED", "COMPLETING") and task.reason != "TimeLimit":
        return CANCELLED if task.end is not None else REQUEUED
    return RUNS


def will_not_change(refusal: str) -> bool:
    """Whether retrying cannot help after this error of scontrol."""
    return bool(re.search("disabled|denied|invalid|not found", refusal.lower()))


def losses_in_a_row(records: Iterable[Mapping[str, Any]], step: int) -> int:
    """Attempts in a row that were lost without progress, by the ledger and the step saved now.

    A hard preemption or a failed node ends an attempt without a record. A periodic save is
    progress, so attempts that saved do not count.
    """
    losses, reached, is_open = 0, sys.maxsize, False
    for record in [*records, {"event": "start", "step": step}]:
        event, step = record["event"], record.get("step", 0)
        if event in ("start", "requeue") and step > reached:
            losses, is_open = 0, False  # the attempt that ends here has made progress
        if event == "start":
            losses, is_open = losses + is_open, True
            reached = step if reached == sys.maxsize else max(reached, step)
        elif event == "requeue":
            lost = record["cause"] == CAUSE_LOST and step <= reached
            losses, reached, is_open = losses + lost, max(reached, step), False
        elif event == "end":  # after an error the batch script has retried the run: a loss
            is_open = record["cause"] != "finished" and not record["cause"].startswith("SIG")
    return losses


def why_not_start(losses: int, retries: Mapping[str, int]) -> str:
    """Why the run must not start after this many losses in a row; "" if it may."""
    if losses <= retries[CAUSE_LOST]:
        return ""
    return (
        f"{losses} attempts ended without a recorded cause and without progress (nodes failed, "
        "memory ran out, or the time to save was too short; a lower --checkpoint-minutes "
        f"saves more often); the profile's retries.lost is {retries[CAUSE_LOST]}"
    )


def _cause(f: Facts) -> str:
    """What SLURM did to the attempt; CAUSE_LOST if nothing."""
    if f.task is None:  # by default SLURM sends the user signal before a time limit only
        return CAUSE_PREEMPTED if f.signal == "SIGTERM" else CAUSE_TIMED_OUT
    if f.task.preempted:
        return CAUSE_PREEMPTED
    if f.task.end is not None and f.task.end - f.now < f.signal_lead + EARLY_SECONDS:
        return CAUSE_TIMED_OUT
    if standing_of(f.task, f.restarts) == REQUEUED:
        return REQUEUED
    return CAUSE_LOST if f.task.state == "RUNNING" else CAUSE_PREEMPTED


def _cancelled(f: Facts) -> Decision:
    preempted = f.task is not None and f.task.preempted  # PreemptMode=CANCEL
    reason = f"{'preempted and ' * preempted}cancelled; {f.resume}"
    return Decision(CANCELLED, reason, code=1)


def _too_many_losses(f: Facts, why: str) -> str:
    """Why the run fails after this loss; "" if it may be retried."""
    allowed = (f.retries or DEFAULT_RETRIES)[CAUSE_LOST]
    if f.unwritable and f.restarts >= allowed:  # losses cannot be counted, so all restarts count
        return (
            f"{why}; after {f.restarts} restarts no more are made without records; the profile's "
            f"retries.lost is {allowed}; {f.resume}"
        )
    if f.losses <= allowed:
        return ""
    return (
        f"lost {f.losses} times in a row without progress, the last time: {why}; the profile's "
        f"retries.lost is {allowed}; {f.logs}"
    )


def _of_rank(f: Facts) -> Decision:
    assert f.retries is not None
    is_first = f.rank == 0  # it alone has the task requeued
    if f.end == INPUT or (f.end == BUG and not f.signal):
        return Decision(FINAL, f.error, code=1)
    if f.end == PEERS and not (f.signal and is_first):
        return Decision(LOST, f.error, code=1)
    # Here the run saved, or its file system is unreachable, or it failed while SLURM may have been
    # ending it: the signal may have killed a child process, which failed the run.
    if not is_first:
        if f.error:
            return Decision(LOST, f.error, code=EX_TEMPFAIL)
        # If it exited now, SLURM might count the task as failed and end rank 0 before rank 0 has
        # requeued it. A batch script that requeues waits for this rank to exit.
        seconds = 0.0 if f.requeue_by == "batch" else PARK_SECONDS
        return Decision(PARKED, seconds=seconds, code=EX_TEMPFAIL)
    if f.failed:  # `launch cancel` marks the run before it cancels the task
        return _cancelled(f)
    if f.waited is None:
        return Decision(WAIT)
    cause = _cause(f)
    if cause == CAUSE_LOST and f.signal and f.waited < LATE_SECONDS:
        return Decision(WAIT, seconds=1)
    if f.end == PEERS and (f.task is None or cause not in (CAUSE_PREEMPTED, REQUEUED)):
        return Decision(LOST, f.error, code=1)
    if f.error and f.task is None:
        return Decision(LOST, f.error, code=EX_TEMPFAIL)
    if f.error and cause == CAUSE_TIMED_OUT:  # near a short limit an error proves no time-out
        cause = CAUSE_LOST
    if f.task is not None and standing_of(f.task, f.restarts) == CANCELLED:
        return _cancelled(f)
    if cause == CAUSE_LOST:
        unknown = (
            f"{f.signal} came, but SLURM did not preempt the task, nor was it at its limit: "
            "another rank died before it, or a user ended the step"
        )
        if reason := _too_many_losses(f, f.error or unknown):
            return Decision(FINAL, reason, code=1)
    else:
        kind = cause if cause in f.retries else CAUSE_PREEMPTED
        if (used := f.used.get(cause, 0)) >= f.retries[kind]:
            last = f", the last time: {f.error}" * bool(f.error)
            reason = f"{cause} {used + 1} times{last}; the profile's retries.{kind} is "
            return Decision(FINAL, reason + str(f.retries[kind]), code=1)
    return Decision(REQUEUE, cause=cause, code=EX_TEMPFAIL)


def _of_batch(f: Facts) -> Decision:
    if f.failed:  # by a rank or `launch cancel`; final even if other ranks were only stopped
        return Decision(FINAL)
    if f.waited is None:
        return Decision(WAIT)
    standing = "" if f.task is None else standing_of(f.task, f.restarts)
    if standing == REQUEUED:
        return Decision(REQUEUED)
    if standing == CANCELLED:
        return _cancelled(f)
    is_silent = will_not_change(f.refusal) or f.refused >= ANSWER_SECONDS
    if not standing and not is_silent:
        return Decision(WAIT, seconds=10)

    cause = _cause(f) if standing else CAUSE_LOST
    trouble, stopped = _trouble(f), f.code in STOPPED
    if f.memory and cause in (CAUSE_LOST, CAUSE_TIMED_OUT):  # another attempt would need as much
        return Decision(FINAL, f"{f.death or f.lost or f'exit code {f.code} of srun'}: {f.memory}")
    is_open = bool(f.lost or _is_kill(f) or (stopped and trouble))
    if is_open and standing and cause == CAUSE_LOST and f.waited < LATE_SECONDS:
        return Decision(WAIT, seconds=1)
    if stopped:
        # If a rank fails or cannot start, srun ends the others by TERM. That counts as a loss,
        # unless SLURM ended the task.
        return _requeue(f, trouble, counts=cause == CAUSE_LOST)
    if f.retries is None and f.code in (EX_IOERR, BUS):
        return _requeue(f)
    if f.retries is not None and f.begun and cause != CAUSE_LOST:
        # A rank that detects another's failure exits, with or without a record.
        trouble = trouble or "the ranks failed while SLURM was ending them"
        return _requeue(f, trouble, counts=cause != CAUSE_PREEMPTED)
    if f.nodes > 1:
        if f.nodes_answer is None:
            return Decision(PROBE)
        if not f.nodes_answer:  # ranks detect a failed node minutes before SLURM does
            if not f.node_awaited:
                return Decision(AWAIT_NODE, seconds=NODE_SECONDS)
            return _requeue(f, trouble, counts=cause != CAUSE_PREEMPTED)
    if trouble:
        return _requeue(f, trouble, counts=cause != CAUSE_PREEMPTED)
    ended = f"exit code {f.code} of srun"
    return Decision(FINAL, f.lost or "; ".join(filter(None, [ended, f.death, f.error, f.logs])))


def _trouble(f: Facts) -> str:
    """Why another attempt may succeed after this failure; "" if it will not."""
    if f.retries is None:
        return ""
    if f.unwritable:  # then a rank's own reason cannot be recorded either
        what = f.lost or f.error
        return f"the sweep's jobs folder takes no records ({f.unwritable}){'; ' * bool(what)}{what}"
    if f.code == BUS or f.bus_error:
        return "a rank died of SIGBUS: the file system of its data fails or was unreachable"
    report = f.lost or f.error  # a rank that misses another may exit without a record
    if f.begun and (_is_kill(f) or _SILENT.search(report)):
        return "; ".join(filter(None, [f.death, report])) or "a rank was killed by SIGKILL"
    if f.code in STOPPED:
        if f.lost:
            return f"the ranks failed ({f.lost})"
        if f.code == EX_TEMPFAIL:
            return ""
        if f.death:
            return f.death
    if f.code in CANNOT_START:
        return ""
    if f.lost:
        if re.search("error: ranks: .* in time", f.lost):
            return "the ranks did not meet"
    elif not f.begun:  # srun could not start it: the controller or a node was unreachable
        return "no rank started"
    return ""


def _is_kill(f: Facts) -> bool:
    """Whether a rank was killed. (srun's code may be that of ranks which it ended afterwards.)"""
    return "SIGKILL" in f.death if f.death else f.code == KILLED


def _requeue(f: Facts, trouble: str = "", counts: bool = False) -> Decision:
    """The batch script retries, within limits. `counts`: as a loss, if nothing was saved."""
    ended = f"exit code {f.code} of srun"
    if f.task is not None:
        tried = f"already restarted {f.restarts} times"
        most = 100
        if f.retries is not None:  # ranks count by cause; this also limits what they cannot count
            most = 1000 + f.retries[CAUSE_PREEMPTED] + f.retries[CAUSE_TIMED_OUT]
        most = most if f.max_restarts is None else f.max_restarts
        if f.restarts >= most:
            reason = f"{ended}, and {tried} (BIP_MAX_RESTARTS is {most}); {f.resume}"
            return Decision(FINAL, reason)
        is_io = f.retries is None and f.code in (EX_IOERR, BUS)
        if is_io and f.restarts >= 5 and f.lasted < 600:
            failed = f"a file system fails, or is unreachable ({ended}), within ten minutes"
            return Decision(FINAL, f"{failed}, and {tried}; {f.resume}")
        counts = counts and bool(trouble) and not f.saved
        if counts and (reason := _too_many_losses(f, f"{trouble} ({ended})")):
            return Decision(FINAL, reason, counts=True)
    if will_not_change(f.refusal) or f.refused >= ANSWER_SECONDS:
        why = trouble or ("saved at its last step" if f.code == EX_TEMPFAIL else ended)
        return Decision(FINAL, f"{why}, but SLURM refuses to requeue ({f.refusal}); {f.resume}")
    return Decision(REQUEUE, trouble, counts=counts)
