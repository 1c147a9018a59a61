"""What one rank of an array task runs: a run, and what follows when it stops or fails.

It gathers facts, asks `launch.slurm.events` and carries the decision out.

Imports little: a signal must be noticed before the slow imports of a run.
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
from launch.slurm import events
from launch.slurm.events import Decision, Facts, decide

if TYPE_CHECKING:
    from bip.config import RunConfig
    from launch.sweep import Sweep

POINT = "BIP_POINT"  # the RUN_ID that this step runs
ATTEMPT = "BIP_ATTEMPT"  # TASK.RESTARTS, of the batch script's
PROFILE = "BIP_PROFILE"  # the file of its array's profile
SUBMITTED = "BIP_SUBMITTED"  # when its array was submitted, ISO 8601


def run_point(
    folder: str, train: "Callable[[RunConfig, StopRequest], object] | None" = None
) -> NoReturn:
    """Run the run that the environment names, of the sweep in `folder`, and end the process.

    With 0 when it is done, with 75 when the batch script or SLURM is to requeue the task, with 1
    after a failure that is written to the sweep's jobs folder: as final, or, where this rank only
    lost the others, for the batch script to decide. `train` is bip.run.train, or a test's.
    """
    stop = StopRequest().install()
    faulthandler.enable()  # the batch script looks for its message of a bus error
    with contextlib.suppress(OSError):  # before anything can fail: the batch script looks for it
        begun = Path(folder) / "jobs" / f"{os.environ[POINT]}.begun"
        begun.write_text(os.environ.get(ATTEMPT, "") + "\n")
    from bip.config import build_config, read_yaml
    from bip.errors import Stopped
    from launch.sweep import Sweep

    sweep = Sweep(Path(folder))
    run_id = os.environ[POINT]
    attempt = Attempt(sweep, run_id)
    try:
        path = sweep.folder / "points" / f"{run_id}.yml"
        config = build_config(read_yaml(path), str(path))
        attempt.run_folder = config.run_folder
        attempt.check_losses()
        if train is None:
            from bip.run import train as train_run

            train = train_run
        train(config, stop)
        # Nothing that follows, such as submitit's report of the end, may make a failure of it.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)
    except Stopped as stopped:
        if not attempt.is_first:
            # Where rank 0 exits, SLURM ends the others by SIGTERM: one that did not notice would
            # be killed minutes later, and a kill is not taken for a good save.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        print(stopped, flush=True)
        attempt.end(events.SAVED, signal=stopped.cause)
    except Exception as error:
        attempt.end(*classify(error), signal=signal_name(stop.signal) if stop.signal else "")


def classify(error: Exception) -> tuple[str, str]:
    """How an error ended the run (for `events`), and its message. Prints the traceback of a bug."""
    from bip.errors import LostWorker, RankError, UserError
    from bip.files import may_pass

    if isinstance(error, (RankError, LostWorker)):
        return events.PEERS, f"error: {error}"
    if isinstance(error, UserError):
        return events.INPUT, f"error: {error}"
    import traceback

    traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}"
    # A failed collective: the cause is with another rank, or with its node. By name: where
    # importing torch is what failed, it cannot be imported here.
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
        # Whatever fails from here on, the batch script decides; if there is a note, by that.
        failed = Decision(events.LOST, error, code=1 if end == events.PEERS else os.EX_TEMPFAIL)
        try:
            decision = self._decide(end, error, signal)
            if decision.action == events.REQUEUE:
                self._requeue(decision.cause)
            elif decision.action == events.PARKED:
                self._park(decision.seconds)
        except Exception as problem:
            print(f"not requeued from here ({type(problem).__name__}: {problem})", flush=True)
            decision = failed
        if decision.reason:
            print(decision.reason, file=sys.stderr, flush=True)
            is_open = decision.action == events.LOST
            path = self.sweep.loss_path if is_open else self.sweep.failure_path
            with contextlib.suppress(OSError):
                if not path(self.run_id).exists():  # the first rank to write it counts
                    self.sweep.note(path(self.run_id), decision.reason)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(decision.code)  # the process group may wait for a dead rank for ever

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
            requeue_by=self.profile["requeue_by"],
            resume=f"python -m launch resume {self.sweep.folder} goes on",
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
        """Those of Facts that the ledger has, this attempt taken as lost."""
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
        """Record the cause, and have SLURM requeue the task, or leave it to the batch script."""
        from launch.slurm import client

        by_batch = self.profile["requeue_by"] == "batch"
        self._record("requeue", cause, "batch" if by_batch else "scontrol")
        if by_batch:
            return
        # SLURM ends this step within the call, so nothing may be left to do after it.
        refusal = client.requeue(own_task() or "", own_restarts())
        if refusal is None:
            # The task is in the queue again and this step is being ended: no need to stay longer.
            sys.stdout.flush()
            time.sleep(3)
            return
        print(f"not requeued from here ({refusal}); the batch script tries", flush=True)
        self._record("requeue_refused", cause, "scontrol")

    def _park(self, seconds: float) -> None:
        """Stay until rank 0 has had the task requeued, which ends this step."""
        sys.stdout.flush()
        deadline = time.monotonic() + seconds
        # Where another rank failed, nobody has anything requeued.
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
