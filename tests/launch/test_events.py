"""What becomes of an attempt: one line for each situation that a rank or the batch script meets."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bip.slurm import Task
from launch.slurm import events
from launch.slurm.events import (
    AWAIT_NODE,
    BUG,
    CANCELLED,
    FINAL,
    INPUT,
    LOST,
    PARKED,
    PASSING,
    PEERS,
    PROBE,
    REQUEUE,
    REQUEUED,
    SAVED,
    WAIT,
    Facts,
    decide,
    losses_in_a_row,
    standing_of,
    why_not_start,
)  # fmt: skip
from tests.launch import fake_slurm
from tests.launch.conftest import ROOT

NOW = 1e9
RUNNING, PREEMPTED, GONE, NODE_FAILED, AT_LIMIT, ENDED = (
    Task.parse(line)
    for line in (
        fake_slurm.RUNNING, fake_slurm.PREEMPTED, fake_slurm.REQUEUED, fake_slurm.NODE_FAILED,
        fake_slurm.AT_LIMIT, fake_slurm.CANCELLED,
    )
)  # fmt: skip
NEAR = replace(RUNNING, end=NOW + 180)  # within signal_lead and the two minutes before it
PENDING = replace(RUNNING, state="PENDING")
TAKEN_FOR_GOOD = replace(ENDED, preempted=True)  # PreemptMode=CANCEL
RETRIES = {"preempted": 7, "timed_out": 3, "lost": 2}
GONE_PEER = "error: rank 0 is gone"
LATE_PEER = "error: ranks: of 2 these did not come in time: 1"
SLAIN = "rank 1 on n2 was killed by SIGKILL"
MUTE = "error: rank 1 (n2 pid 7) has not answered for 10 s; its last step was 3"
FULL, FULL_MEMORY = "No space left on device: jobs", "the memory limit of 4000 MB was hit"
NO_ANSWER = "scontrol show: Unable to contact slurm controller"
DISABLED = "scontrol requeue: Requested operation is presently disabled for job 7_0"


def batch(code: int, task: Task | None = RUNNING, **more: Any) -> Facts:
    """A sweep's step of which a rank started, after SLURM's record had time to come."""
    known: dict[str, Any] = {"waited": 5.0, "now": NOW, "begun": True, "retries": RETRIES}
    known |= {"logs": "see run.log", "resume": "launch resume"}
    return Facts(code=code, task=task, **known | more)


def alone(code: int, task: Task | None = RUNNING, **more: Any) -> Facts:
    """A template's step."""
    return batch(code, task, **{"retries": None, "begun": False, "lasted": 60.0} | more)


def rank(end: str, task: Task | None = RUNNING, number: int = 0, **more: Any) -> Facts:
    error = {} if end == SAVED else {"error": "what went wrong"}
    signal = {"signal": "SIGTERM"} if end == SAVED else {}
    known = {"rank": number, "end": end, "task": task, "waited": 5.0, "now": NOW}
    known |= {"retries": RETRIES, "resume": "launch resume", "logs": "see run.log"}
    return Facts(**known | error | signal | more)


BATCH: list[tuple[str, Facts, str, str]] = [
    # Notes first, before SLURM is asked
    ("a rank or `launch cancel` left a note", batch(75, failed=True, waited=None), FINAL, ""),
    ("nothing is known of SLURM yet", batch(75, waited=None), WAIT, ""),
    # What SLURM did to the task
    ("cancelled after a save", batch(75, ENDED), CANCELLED, "cancelled; launch resume"),
    ("cancelled, one rank killed", batch(137, ENDED), CANCELLED, "cancelled"),
    ("cancelled, and ranks lost others", batch(1, ENDED, lost=GONE_PEER), CANCELLED, "cancelled"),
    ("preempted for good", batch(75, TAKEN_FOR_GOOD), CANCELLED, "preempted and cancelled"),
    ("requeued, by TERM", batch(143, GONE), REQUEUED, ""),
    ("requeued, by KILL", batch(137, GONE), REQUEUED, ""),
    ("requeued, with an error", batch(1, GONE, lost=GONE_PEER), REQUEUED, ""),
    ("requeued after a node failure", batch(1, NODE_FAILED), REQUEUED, ""),
    ("requeued and pending", batch(1, PENDING), REQUEUED, ""),
    ("the next attempt runs", batch(1, replace(RUNNING, restarts=1)), REQUEUED, ""),
    ("ended at its limit after a save", batch(75, AT_LIMIT), REQUEUE, ""),
    ("no answer", batch(75, None, refusal=NO_ANSWER, refused=599), WAIT, ""),
    ("no answer for ten minutes", batch(75, None, refusal=NO_ANSWER, refused=600), FINAL,
     "saved at its last step, but SLURM refuses to requeue (scontrol show: Unable to contact"),
    ("no scontrol", batch(143, None, refusal="scontrol: not found on this machine"), FINAL,
     "exit code 143 of srun, but SLURM refuses"),
    ("no answer on a failure", batch(1, None, refusal=NO_ANSWER, refused=600), FINAL, "exit code"),
    # Saved, or stopped by a signal
    ("saved", batch(75), REQUEUE, ""),
    ("preempted before a rank started", batch(143, PREEMPTED, begun=False, losses=9), REQUEUE, ""),
    ("timed out before a rank started", batch(140, NEAR, begun=False, losses=9), REQUEUE, ""),
    ("died of the signal", batch(138), REQUEUE, ""),
    ("requeueing is refused once", batch(75, refusal="Socket timed out", refused=9), REQUEUE, ""),
    ("requeueing is refused for ten minutes", batch(75, refusal="timed out", refused=600), FINAL,
     "saved at its last step, but SLURM refuses to requeue (timed out); launch resume"),
    ("requeueing is disabled", batch(75, refusal=DISABLED), FINAL, "saved at its last step, but"),
    # Another attempt may succeed
    ("its record of a preemption may come late", batch(143, begun=False, waited=4), WAIT, ""),
    ("the same for a note", batch(1, lost=GONE_PEER, waited=4), WAIT, ""),
    ("no rank started", batch(1, begun=False, losses=2), REQUEUE, "no rank started"),
    ("no rank started, killed", batch(137, begun=False), REQUEUE, "no rank started"),
    ("no rank started, the others ended by TERM", batch(143, begun=False), REQUEUE, "no rank st"),
    ("no rank started, too often", batch(143, begun=False, losses=3), FINAL,
     "lost 3 times in a row without progress, the last time: no rank started (exit code 143 of "
     "srun); the profile's retries.lost is 2; see run.log"),
    ("the command is missing", batch(2, begun=False), FINAL, "exit code 2 of srun; see run.log"),
    ("the command may not be executed", batch(126, begun=False), FINAL, "exit code 126"),
    ("the ranks did not meet", batch(1, lost=LATE_PEER), REQUEUE, "the ranks did not meet"),
    ("they never meet", batch(1, lost=LATE_PEER, losses=3), FINAL, "the ranks did not meet"),
    ("SIGBUS", batch(135), REQUEUE, "SIGBUS"),
    ("SIGBUS behind a killed rank", batch(137, bus_error=True, death=SLAIN), REQUEUE, "SIGBUS"),
    ("SIGBUS beside a lost rank", batch(135, lost=GONE_PEER), REQUEUE, "SIGBUS"),
    ("SIGBUS too often", batch(135, losses=3), FINAL, "retries.lost is 2"),
    ("a file system is away, by a rank's note", batch(75, lost="Stale"), REQUEUE,
     "the ranks failed (Stale)"),
    ("it stays away", batch(75, lost="Stale", losses=3), FINAL, "the ranks failed (Stale)"),
    ("it stays away, with progress", batch(75, lost="Stale", losses=9, saved=True), REQUEUE, ""),
    ("it stays away, and preempted", batch(75, PREEMPTED, lost="x", losses=9), REQUEUE, ""),
    ("failed while preempted", batch(1, PREEMPTED, losses=9), REQUEUE, "while SLURM was ending"),
    ("failed while preempted, with a note", batch(1, PREEMPTED, lost=GONE_PEER, losses=9, nodes=2),
     REQUEUE, "while SLURM was ending"),
    ("failed near its limit", batch(1, NEAR), REQUEUE, "while SLURM was ending"),
    ("short limits are always near, so it counts", batch(1, NEAR, losses=3), FINAL, "was ending"),
    # A rank that was killed, or hangs
    ("killed", batch(137), REQUEUE, "a rank was killed by SIGKILL"),
    ("killed, by srun's report", batch(143, death=SLAIN, lost=GONE_PEER), REQUEUE,
     f"{SLAIN}; {GONE_PEER}"),
    ("killed, and a preemption may show late", batch(137, waited=4), WAIT, ""),
    ("killed too often", batch(137, death=SLAIN, losses=3), FINAL,
     f"lost 3 times in a row without progress, the last time: {SLAIN} (exit code 137 of srun)"),
    ("killed, with progress", batch(137, death=SLAIN, losses=9, saved=True), REQUEUE, SLAIN),
    ("killed for lack of memory", batch(137, death=SLAIN, memory=FULL_MEMORY), FINAL,
     f"{SLAIN}: {FULL_MEMORY}"),
    ("killed as it was preempted", batch(137, PREEMPTED, memory=FULL_MEMORY, losses=9), REQUEUE,
     ""),
    ("killed as it was preempted, on two nodes", batch(137, PREEMPTED, nodes=2), REQUEUE, ""),
    ("killed, and the node may have failed", batch(137, death=SLAIN, nodes=2), PROBE, ""),
    ("hangs, by a note", batch(1, lost=MUTE), REQUEUE, MUTE),
    ("hangs, and its peers left no note", batch(1, error=MUTE), REQUEUE, MUTE),
    ("hangs too often", batch(1, error=MUTE, losses=3), FINAL, MUTE),
    ("no progress", batch(1, lost="error: no progress for 600 s; the others wait for rank 1"),
     REQUEUE, "rank 1"),
    ("a loader process was killed", batch(75, lost="error: train.lmdb: a loader process died"),
     REQUEUE, "a loader process died"),
    # No records can be written
    ("a full disk", batch(1, begun=False, unwritable=FULL), REQUEUE, f"no records ({FULL})"),
    ("a full disk, with a reason in the log", batch(1, unwritable=FULL, error="error: result_dir"),
     REQUEUE, "no records (No space left on device: jobs); error: result_dir"),
    ("a full disk: restarts count", batch(1, replace(RUNNING, restarts=2), restarts=2,
     unwritable=FULL), FINAL, "after 2 restarts no more are made without records"),
    ("a full disk while saving", batch(75, replace(RUNNING, restarts=2), restarts=2, lost="x",
     unwritable=FULL), FINAL, f"({FULL}); x"),
    ("a full disk, but preempted after a save", batch(75, replace(PREEMPTED, restarts=9),
     restarts=9, unwritable=FULL), REQUEUE, ""),
    # Nodes
    ("several nodes", batch(1, lost=GONE_PEER, nodes=2), PROBE, ""),
    ("a node failed", batch(1, lost=GONE_PEER, nodes=2, nodes_answer=False), AWAIT_NODE, ""),
    ("a node failed, and SLURM has not noticed",
     batch(1, lost=GONE_PEER, nodes=2, nodes_answer=False, node_awaited=True), REQUEUE, ""),
    ("all nodes answer: what the rank wrote is final",
     batch(1, lost="error: mask: rank 1 differs", nodes=2, nodes_answer=True), FINAL,
     "error: mask: rank 1 differs"),
    ("all nodes answer, no rank started", batch(1, begun=False, nodes=2, nodes_answer=True),
     REQUEUE, "no rank started"),
    # Anything else
    ("a rank crashed without a note", batch(139, death="rank 1 on n2 was killed by SIGSEGV"), FINAL,
     "exit code 139 of srun; rank 1 on n2 was killed by SIGSEGV; see run.log"),
    ("a rank exited without a note", batch(137, death="rank 1 on n2 ended with exit code 3"), FINAL,
     "rank 1 on n2 ended with exit code 3"),
    ("a lost peer on one node", batch(1, lost=GONE_PEER), FINAL, GONE_PEER),
    ("restarts of a sweep", batch(75, replace(PREEMPTED, restarts=1009), restarts=1009), REQUEUE,
     ""),
    ("are bounded, whatever its ranks count",
     batch(75, replace(PREEMPTED, restarts=1010), restarts=1010), FINAL,
     "already restarted 1010 times (BIP_MAX_RESTARTS is 1010); launch resume"),
    # Templates
    ("a template: stopped", alone(143), REQUEUE, ""),
    ("a template: restarts", alone(75, replace(RUNNING, restarts=99), restarts=99), REQUEUE, ""),
    ("a template: are bounded", alone(75, replace(RUNNING, restarts=100), restarts=100), FINAL,
     "exit code 75 of srun, and already restarted 100 times (BIP_MAX_RESTARTS is 100)"),
    ("a template: as the user says",
     alone(75, replace(RUNNING, restarts=3), restarts=3, max_restarts=3), FINAL, "is 3)"),
    ("a template: a file system fails at once",
     alone(74, replace(RUNNING, restarts=4), restarts=4), REQUEUE, ""),
    ("a template: five times", alone(135, replace(RUNNING, restarts=5), restarts=5), FINAL,
     "a file system fails, or is unreachable (exit code 135 of srun), within ten minutes"),
    ("a template: five times in weeks",
     alone(135, replace(RUNNING, restarts=50), restarts=50, lasted=660.0), REQUEUE, ""),
    ("a template: a bug", alone(1), FINAL, "exit code 1 of srun"),
    ("a template: a node failed", alone(1, nodes=2, nodes_answer=False, node_awaited=True),
     REQUEUE, ""),
]  # fmt: skip

RANK: list[tuple[str, Facts, str, str]] = [
    # Final by itself
    ("bad input", rank(INPUT, waited=None), FINAL, "what went wrong"),
    ("bad input, stopped too", rank(INPUT, signal="SIGTERM", waited=None), FINAL, "what went"),
    ("a bug", rank(BUG, waited=None), FINAL, "what went wrong"),
    ("a bug, on another rank", rank(BUG, number=1, waited=None), FINAL, "what went wrong"),
    # The batch script decides
    ("peers are gone", rank(PEERS, waited=None), LOST, "what went wrong"),
    ("another rank, by the signal", rank(PEERS, number=1, signal="SIGTERM", waited=None), LOST, ""),
    ("SLURM did nothing", rank(PEERS, signal="SIGTERM"), LOST, "what went wrong"),
    ("a limit is near, which proves nothing", rank(PEERS, NEAR, signal="SIGTERM"), LOST, ""),
    ("no answer of SLURM", rank(PEERS, None, signal="SIGTERM"), LOST, "what went wrong"),
    ("a file system is away, on another rank", rank(PASSING, number=1, waited=None), LOST, "what"),
    ("broken by the signal, on another rank", rank(BUG, number=1, signal="SIGTERM"), LOST, "what"),
    ("broken, and no answer", rank(BUG, None, signal="SIGUSR2"), LOST, "what went wrong"),
    # The other ranks stay
    ("another rank saved", rank(SAVED, number=1, waited=None), PARKED, ""),
    ("another rank saved, by batch", rank(SAVED, number=1, requeue_by="batch"), PARKED, ""),
    # Rank 0 has it requeued
    ("a note of cancel comes before SLURM's", rank(SAVED, failed=True, waited=None), CANCELLED,
     "cancelled; launch resume"),
    ("cancelled", rank(SAVED, ENDED), CANCELLED, "cancelled; launch resume"),
    ("preempted for good", rank(SAVED, TAKEN_FOR_GOOD), CANCELLED, "preempted and cancelled"),
    ("nothing is known of SLURM yet", rank(SAVED, waited=None), WAIT, ""),
    ("its record may come late", rank(SAVED, waited=4), WAIT, ""),
    ("preempted", rank(SAVED, PREEMPTED, waited=0.0), REQUEUE, "preempted"),
    ("at its limit", rank(SAVED, NEAR, waited=0.0), REQUEUE, "timed_out"),
    ("requeued by somebody", rank(SAVED, GONE, waited=0.0), REQUEUE, "requeued"),
    ("no answer, TERM", rank(SAVED, None), REQUEUE, "preempted"),
    ("no answer, USR2", rank(SAVED, None, signal="SIGUSR2"), REQUEUE, "timed_out"),
    ("a signal that SLURM knows nothing of", rank(SAVED, losses=2), REQUEUE, "lost"),
    ("too often", rank(SAVED, losses=3), FINAL,
     "lost 3 times in a row without progress, the last time: SIGTERM came"),
    ("broken by a preemption", rank(BUG, PREEMPTED, signal="SIGTERM", losses=9), REQUEUE,
     "preempted"),
    ("the ranks were, by a preemption", rank(PEERS, PREEMPTED, signal="SIGTERM"), REQUEUE,
     "preempted"),
    ("broken by a requeue", rank(PEERS, GONE, signal="SIGTERM"), REQUEUE, "requeued"),
    ("broken near its limit", rank(BUG, NEAR, signal="SIGTERM"), REQUEUE, "lost"),
    ("a file system is away", rank(PASSING, waited=0.0), REQUEUE, "lost"),
    ("it stays away", rank(PASSING, losses=3), FINAL,
     "the last time: what went wrong; the profile's retries.lost is 2; see run.log"),
    ("preemptions left", rank(SAVED, PREEMPTED, used={"preempted": 6}), REQUEUE, "preempted"),
    ("no preemptions left", rank(SAVED, PREEMPTED, used={"preempted": 7}), FINAL,
     "preempted 8 times; the profile's retries.preempted is 7"),
    ("no time-outs left", rank(SAVED, NEAR, used={"timed_out": 3}), FINAL, "retries.timed_out is"),
    ("an operator's count as preemptions", rank(SAVED, GONE, used={"requeued": 7}), FINAL,
     "requeued 8 times; the profile's retries.preempted is 7"),
    ("broken too often", rank(BUG, PREEMPTED, signal="SIGTERM", used={"preempted": 7}), FINAL,
     "preempted 8 times, the last time: what went wrong; the profile's"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "action", "named"),
    [pytest.param(*row[1:], id=f"{kind}: {row[0]}")
     for kind, rows in (("batch", BATCH), ("rank", RANK)) for row in rows],
)  # fmt: skip
def test_situation(facts: Facts, action: str, named: str) -> None:
    """`named` is a part of the reason for the user, or the cause for the ledger."""
    decision = decide(facts)
    assert decision.action == action
    assert named in (decision.reason, decision.cause) or (named and named in decision.reason)


def test_losses_count_unless_slurm_caused_them_or_something_was_saved() -> None:
    assert decide(batch(1, begun=False)).counts
    assert decide(batch(143, begun=False, losses=3)).counts
    assert decide(batch(75, lost="Stale")).counts
    assert decide(batch(1, NEAR)).counts
    for facts in (
        batch(75), batch(143), batch(143, PREEMPTED, begun=False), batch(140, NEAR, begun=False),
        batch(75, lost="Stale", saved=True), batch(1, PREEMPTED), batch(1, PREEMPTED, begun=False),
        alone(143), alone(74),
    ):  # fmt: skip
        decision = decide(facts)
        assert (decision.action, decision.counts) == (REQUEUE, False), facts


def test_exit_codes_of_ranks() -> None:
    """75 leaves it to the batch script to requeue; 1 is an error that may be final."""
    for facts, code in (
        (rank(SAVED, PREEMPTED), os.EX_TEMPFAIL), (rank(SAVED, number=1), os.EX_TEMPFAIL),
        (rank(PASSING, number=1), os.EX_TEMPFAIL), (rank(BUG, None, signal="x"), os.EX_TEMPFAIL),
        (rank(PEERS), 1), (rank(BUG), 1), (rank(INPUT), 1), (rank(SAVED, ENDED), 1),
        (rank(SAVED, losses=3), 1), (rank(SAVED, failed=True), 1),
    ):  # fmt: skip
        assert decide(facts).code == code, facts


def test_other_ranks_leave_at_once_where_the_batch_script_requeues() -> None:
    """Parked, they would be killed when rank 0 exits, and a kill is no good save."""
    assert decide(rank(SAVED, number=1, requeue_by="batch")).seconds == 0
    assert decide(rank(SAVED, number=1)).seconds > 0


def test_what_slurm_has_made_of_a_task() -> None:
    tasks = (RUNNING, PREEMPTED, AT_LIMIT, GONE, NODE_FAILED, PENDING, ENDED, TAKEN_FOR_GOOD)
    expected = 3 * [events.RUNS] + 3 * [REQUEUED] + 2 * [CANCELLED]
    assert [standing_of(task, 0) for task in tasks] == expected


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "step": step}


def end(cause: str) -> dict[str, Any]:
    return {"event": "end", "cause": cause}


def requeue(cause: str, **more: int) -> dict[str, Any]:
    return {"event": "requeue", "cause": cause} | more


SAVING = [start(5), end("SIGTERM"), requeue("preempted", step=9)]
GONE_9 = requeue("lost", step=9)  # before its start could be recorded


@pytest.mark.parametrize(
    ("records", "saved", "losses"),
    [
        ([start(10 * at) for at in range(9)], 90, 0),  # hard preemptions between periodic saves
        (2 * [start(5)], 5, 2),
        (3 * [start(5)], 5, 3),
        (3 * [start(5)], 6, 0),
        ([*3 * [start(5)], end("SIGTERM")], 5, 2),
        (3 * [start(5), end("rank lost: 1")], 5, 3),
        (2 * [start(5), end("SIGTERM"), requeue("lost")], 5, 2),
        (3 * [start(5), end("SIGTERM"), requeue("lost")], 5, 3),
        ([requeue("lost"), start(5), requeue("lost"), requeue("lost")], 5, 3),
        (3 * [requeue("lost")], 5, 3),  # starts were recorded in an older submission
        ([requeue("lost"), requeue("lost"), start(5), requeue("lost")], 6, 0),
        (9 * [start(5), end("error: RuntimeError: compiler"), requeue("preempted")], 5, 0),
        ([*SAVING, GONE_9, GONE_9], 9, 2),
        ([*SAVING, GONE_9, GONE_9, GONE_9], 9, 3),
        ([start(5), GONE_9, GONE_9, GONE_9], 9, 2),  # the first saved more
    ],
)
def test_losses_in_a_row(records: list[dict[str, Any]], saved: int, losses: int) -> None:
    assert losses_in_a_row(records, saved) == losses


def test_too_many_losses_stop_the_next_attempt_and_name_the_remedy() -> None:
    assert why_not_start(2, RETRIES) == ""
    reason = why_not_start(3, RETRIES)
    assert "--checkpoint-minutes" in reason
    assert "retries.lost is 2" in reason


def test_it_runs_with_a_bare_python() -> None:
    """On the batch node: standard library only, and no syntax after Python 3.8."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import launch.slurm.batch, launch.slurm.together
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("bip", "launch"):
        print(module.__file__)
    elif name.split(".")[0] not in sys.stdlib_module_names | {{"__main__"}}:
        sys.exit(name)
"""
    words = [sys.executable, "-I", "-S", "-c", script]
    files = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(files) == 10
    for path in files:
        text = Path(path).read_text()
        ast.parse(text, feature_version=(3, 8))
        assert not text.strip() or "from __future__ import annotations" in text, path
        assert not re.search("StrEnum|datetime import UTC|import Self|slots=", text), path
