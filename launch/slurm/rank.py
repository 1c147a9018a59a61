"""The program of one rank of an array task: execute a run, and handle its stop or failure.

On either it gathers facts, calls `launch.slurm.events` and carries out the decision.

Imports little at its top: the signal handlers must be installed before a run's slow imports.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bip.distributed.signals import SIGNALS, StopRequest, signal_name
from bip.slurm import SlurmError, own_restarts, own_task, show_task
from launch.sharing import take_share
from launch.slurm import events
from launch.slurm.events import Decision, Facts, decide

if TYPE_CHECKING:
    from bip.config import RunConfig
    from launch.sweep import Sweep

POINT = "BIP_POINT"  # the RUN_ID that this step runs
ATTEMPT = "BIP_ATTEMPT"  # TASK.RESTARTS of this attempt
PROFILE = "BIP_PROFILE"  # the file of its array's profile
SUBMITTED = "BIP_SUBMITTED"  # when its array was submitted, ISO 8601


def run_point(
    folder: str, train: "Callable[[RunConfig, StopRequest], object] | None" = None
) -> NoReturn:
    """Execute the run that the environment names, of the sweep in `folder`, and end the process.

    The exit code is 0 when the run is done, 75 when the batch script or SLURM must requeue the
    task, and 1 after a failure. The failure is recorded in the sweep's jobs folder: as final, or,
    if this rank only lost the others, for the batch script to decide. `train` is bip.run.train, or
    a test's.
    """
    stop = StopRequest().install()
    problem = take_share()
    faulthandler.enable()  # the batch script searches the log for its message on a bus error
    with contextlib.suppress(OSError):  # first, as it shows the batch script that a rank started
        mark = Path(folder) / "jobs" / f"{os.environ[POINT]}.begun"
        mark.write_text(os.environ.get(ATTEMPT, "") + "\n")
    from bip.errors import Stopped, UserError
    from launch.sweep import Sweep

    sweep = Sweep(Path(folder))
    run_id = os.environ[POINT]
    attempt = Attempt(sweep, run_id)
    try:
        config = sweep.config(run_id)
        attempt.run_folder = config.run_folder
        if problem:
            raise UserError(problem)
        attempt.check_losses()
        if train is None:
            from bip.run import train as train_run

            train = train_run
        train(config, stop)
        # Exit here, so that later code (such as submitit's) cannot turn success into a failure.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)
    except Stopped as stopped:
        if not attempt.is_first:
            # When rank 0 exits, SLURM ends the others by SIGTERM. A rank that ignored it would be
            # killed minutes later, and its exit code would not count as a good save.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        print(stopped, flush=True)
        attempt.end(events.SAVED, signal=stopped.cause)
    except Exception as error:
        attempt.end(*classify(error), signal=signal_name(stop.signal) if stop.signal else "")


def classify(error: Exception) -> tuple[str, str]:
    """(how an error ended the run, for `events`; its message). Prints the traceback of a bug."""
    from bip.errors import ExitCode, LostWorker, RankError, UserError, outcome
    from bip.files import may_pass

    if isinstance(error, (RankError, LostWorker)):
        return events.PEERS, f"error: {error}"
    if isinstance(error, UserError):
        return events.INPUT, f"error: {error}"
    if isinstance(error, OSError) and (known := outcome(error)) and known[0] == ExitCode.USER:
        return events.INPUT, known[1]
    import traceback

    traceback.print_exception(error)
    # After the first line torch prints the frames of its C++ code.
    message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    # A failed collective: the cause is another rank or its node. Compared by name, because
    # importing torch may be what failed.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "DistError" in kinds or "gloo" in str(error).lower():
        return events.PEERS, message
    passing = isinstance(error, OSError) and may_pass(error)
    return events.PASSING if passing else events.BUG, message


class Attempt:
    """This rank's part in one attempt of one run."""

    def __init__(self, sweep: "Sweep", run_id: str) -> None:
        self.sweep, self.run_id = sweep, run_id
        self.run_folder: Path | None = None
        self.rank = int(os.environ.get("SLURM_PROCID", "0"))
        self.profile = json.loads(Path(os.environ[PROFILE]).read_text())
        # Of several runs at once none may have the others ended before they have saved.
        is_shared = self.profile.get("runs_at_once", 1) > 1
        self.requeue_by = "batch" if is_shared else self.profile["requeue_by"]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check_losses(self) -> None:
        """Raises UserError when too many attempts in a row were lost without progress."""
        from bip.errors import UserError

        losses = events.losses_in_a_row(self._records(), self._saved_step())
        if reason := events.why_not_start(losses, self.profile["retries"]):
            raise UserError(reason)

    def end(self, end: str, error: str = "", signal: str = "") -> NoReturn:
        """Decide what becomes of the attempt that ended so, carry it out, and end the process.

        Args:
            end: SAVED and so on, of `events`.
            error: its message; "" after an agreed save.
            signal: the name of the signal that this rank received, or "".
        """
        # If anything fails from here on, the batch script decides, by this rank's record if any.
        failed = Decision(events.LOST, error, code=1 if end == events.PEERS else os.EX_TEMPFAIL)
        try:
            decision = self._decide(end, error, signal)
            if decision.action == events.REQUEUE:
                self._requeue(decision.cause)
            elif decision.action == events.PARKED:
                self._park(decision.seconds)
        except Exception as problem:
            print(f"not requeued from here ({type(problem).__name__}: {problem})", flush=True)
            decision = failed if error else replace(failed, reason=f"error: {problem}")
        if decision.reason:
            is_open = decision.action == events.LOST
            path = self.sweep.loss_path if is_open else self.sweep.failure_path
            try:
                if not path(self.run_id).exists():  # the first rank's record counts
                    self.sweep.note(path(self.run_id), decision.reason)
            except OSError as problem:
                print(f"not recorded ({problem})", file=sys.stderr, flush=True)
            print(decision.reason, file=sys.stderr, flush=True)  # the log's last line
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(decision.code)  # a normal exit may wait for a dead rank forever

    def _decide(self, end: str, error: str, signal: str) -> Decision:
        facts = Facts(
            restarts=own_restarts(),
            rank=self.rank,
            end=end,
            signal=signal,
            error=error,
            failed=self.sweep.failure_path(self.run_id).exists(),
            retries=self.profile["retries"],
            signal_lead=self.profile["signal_lead"],
            requeue_by=self.requeue_by,
            resume=f"{self.sweep.command('resume')} continues it",
            logs=f"see {self.run_id}.log",
        )
        began = time.monotonic()
        while (decision := decide(facts)).action == events.WAIT:
            time.sleep(decision.seconds)
            try:
                task = show_task(own_task() or "")
            except SlurmError:
                task = None
            waited = time.monotonic() - began if facts.waited is not None else 0.0
            facts = replace(facts, task=task, waited=waited, now=time.time(), **self._counts())
        return decision

    def _counts(self) -> dict[str, Any]:
        """The fields of Facts that are in the ledger, with this attempt counted as lost."""
        records, step = [*self._records()], self._saved_step()
        lost = {"event": "requeue", "cause": events.CAUSE_LOST, "step": step}
        used = Counter(r["cause"] for r in records if r["event"] == "requeue")
        return {"used": used, "losses": events.losses_in_a_row([*records, lost], step)}

    def _saved_step(self) -> int:
        from bip.training.checkpoint import CheckpointFolder

        assert self.run_folder is not None
        saved = CheckpointFolder(self.run_folder / "checkpoint").entries()
        return max((entry["step"] for entry in saved), default=0)

    def _requeue(self, cause: str) -> None:
        """Record the cause, then requeue the task or leave that to the batch script."""
        from launch.slurm import client

        by_batch = self.requeue_by == "batch"
        self._record("requeue", cause, "batch" if by_batch else "scontrol")
        if by_batch:
            return
        # SLURM ends this step during the call, so everything else must be done before.
        refusal = client.requeue(own_task() or "", own_restarts())
        if refusal is None:
            # The task is queued again and SLURM is ending this step.
            sys.stdout.flush()
            time.sleep(3)
            return
        print(f"not requeued from here ({refusal}); the batch script tries", flush=True)
        self._record("requeue_refused", cause, "scontrol")

    def _park(self, seconds: float) -> None:
        """Wait until rank 0 has requeued the task, which ends this step."""
        sys.stdout.flush()
        deadline = time.monotonic() + seconds
        # If another rank failed, rank 0 does not requeue.
        while time.monotonic() < deadline and not self.sweep.loss_path(self.run_id).exists():
            time.sleep(1)

    def _records(self) -> list[dict[str, Any]]:
        """The records of attempts.jsonl since the array was submitted."""
        from bip.files import read_jsonl

        assert self.run_folder is not None
        since = os.environ.get(SUBMITTED, "")
        records = read_jsonl(self.run_folder / "attempts.jsonl")
        return [record for record in records if record["time"] >= since]

    def _record(self, event: str, cause: str, by: str) -> None:
        from datetime import UTC, datetime

        from bip.files import append_jsonl

        assert self.run_folder is not None
        self.run_folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"event": event, "time": now, "cause": cause, "by": by, "step": self._saved_step()}
        append_jsonl(self.run_folder / "attempts.jsonl", record)
