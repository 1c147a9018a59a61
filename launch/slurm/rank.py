"""What one rank of an array task runs: a run, and what follows when it is told to stop.

Imports little: a signal must be noticed before the slow imports of a run.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bip.distributed.signals import SIGNALS, StopRequest, signal_name

if TYPE_CHECKING:
    from launch.slurm import client as slurm
    from launch.sweep import Sweep

POINT = "BIP_POINT"  # the RUN_ID that this step runs
ATTEMPT = "BIP_ATTEMPT"  # TASK.RESTARTS, of the batch script's
PROFILE = "BIP_PROFILE"  # the file of its array's profile
SUBMITTED = "BIP_SUBMITTED"  # when its array was submitted, ISO 8601
PARK_SECONDS = 900.0
LATE_SECONDS = 4.0  # by which SLURM's record of a preemption may come after the signal


def run_point(folder: str) -> None:
    """Run the point that the environment names, of the sweep in `folder`, to its end.

    Ends the process otherwise: with 75 when the batch script is to requeue the task, with 1 after
    a failure that is written to the sweep's jobs folder: as final, or, where this rank only lost
    the others, for the batch script to decide. A stopped run that requeues itself waits for SLURM
    to end it.
    """
    stop = StopRequest().install()
    faulthandler.enable()  # task.sh looks for its word of a bus error
    with contextlib.suppress(OSError):  # before anything can go wrong: task.sh asks for it
        begun = Path(folder) / "jobs" / f"{os.environ[POINT]}.begun"
        begun.write_text(os.environ.get(ATTEMPT, "") + "\n")
    from bip.config import build_config, read_yaml
    from bip.errors import LostWorker, RankError, Stopped, UserError
    from bip.files import may_pass
    from launch.sweep import Sweep

    sweep = Sweep(Path(folder))
    run_id = os.environ[POINT]
    attempt = Attempt(sweep, run_id)
    try:
        path = sweep.folder / "points" / f"{run_id}.yml"
        config = build_config(read_yaml(path), str(path))
        attempt.run_folder = config.run_folder
        attempt.check_lost()
        from bip.run import train

        train(config, stop)
        # Nothing that follows, as submitit's word of the end, may make a failure of it.
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
        attempt.requeue(stopped.cause)
    except (RankError, LostWorker) as error:
        attempt.lose(f"error: {error}", stop.signal)
    except UserError as error:
        attempt.fail(f"error: {error}")
    except Exception as error:
        import traceback

        traceback.print_exc()
        told = f"{type(error).__name__}: {error}"
        if _is_collective(error):
            attempt.lose(told, stop.signal)
        if stop.signal:  # what the run had started may have died of the signal, and it of that
            attempt.requeue(signal_name(stop.signal), told)
        if isinstance(error, OSError) and may_pass(error):
            attempt.requeue("", told)
        attempt.fail(told)


def _is_collective(error: Exception) -> bool:
    """Whether a collective failed: the cause is with another rank, or with its node."""
    # By name: where importing torch is what failed, it cannot be imported here.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "DistError" in kinds or "gloo" in str(error).lower()


class Attempt:
    """This rank's part in one attempt of one point."""

    def __init__(self, sweep: "Sweep", run_id: str) -> None:
        self.sweep, self.run_id = sweep, run_id
        self.run_folder: Path | None = None
        self.is_first = os.environ.get("SLURM_PROCID", "0") == "0"
        self.profile = json.loads(Path(os.environ[PROFILE]).read_text())

    def check_lost(self) -> None:
        """Raises UserError when attempts that ended without a word have used up their budget.

        Those count that follow one another without progress: where the time to save is too short,
        every preemption ends without a word, and periodic saves carry the run on.
        """
        from bip.errors import UserError

        if (silent := self._losses()) > (allowed := self.profile["retries"]["lost"]):
            raise UserError(
                f"{silent} attempts ended without a word and without progress (nodes failed, the "
                "memory did not suffice, or the time to save was too short: a lower "
                "--checkpoint-minutes saves more often); the profile's retries.lost is "
                f"{allowed}"
            )

    def _losses(self, *more: dict[str, Any]) -> int:
        """Attempts in a row that were lost without progress, `more` being further records."""
        silent, begun, is_open = 0, sys.maxsize, False
        now = {"event": "start", "step": self._saved_step()}
        for record in [*self._records(), *more, now]:
            event, step = record["event"], record.get("step", 0)
            if event in ("start", "requeue") and step > begun:
                silent, is_open = 0, False  # the attempt that ends here has saved more
            if event == "start":
                silent, is_open = silent + is_open, True
                begun = step if begun == sys.maxsize else max(begun, step)
            elif event == "requeue":
                lost = record["cause"] == "lost" and step <= begun
                silent, begun, is_open = silent + lost, max(begun, step), False
            elif event == "end":  # an error and no requeue's record was not final: a loss
                is_open = record["cause"] != "finished" and not record["cause"].startswith("SIG")
        return silent

    def _saved_step(self) -> int:
        from bip.training.checkpoint import CheckpointFolder

        assert self.run_folder is not None
        saved = CheckpointFolder(self.run_folder / "checkpoint").entries()
        return max((entry["step"] for entry in saved), default=0)

    def requeue(self, signal_name: str, told: str = "") -> NoReturn:
        """Have the task requeued if its cause has budget left, and wait for the end.

        Nothing was saved where `told` says what went wrong: the attempt is lost, unless SLURM's
        record shows that SLURM has broken it.
        """
        by_batch = self.profile["requeue_by"] == "batch"
        counted = False
        try:
            if self.is_first:
                self._requeue(signal_name, told, by_batch)
                counted = True
            elif not by_batch and not told:  # rank 0 may wait for this one
                self._park()
        except Exception as error:  # the state is saved, whatever goes wrong here
            print(f"not requeued from here ({type(error).__name__}: {error})", flush=True)
        if told and not counted:  # by its note the batch script counts it
            self._note(told, self.sweep.loss_path(self.run_id))
        sys.stdout.flush()
        os._exit(os.EX_TEMPFAIL)

    def _requeue(self, signal_name: str, told: str, by_batch: bool) -> None:
        """On return the batch script requeues, if SLURM has not been asked to already."""
        from launch.slurm import client as slurm

        resume = f"python -m launch resume {self.sweep.folder} goes on"
        if self.sweep.failure_path(self.run_id).exists():
            self.fail(f"cancelled; {resume}")  # the note is that of launch cancel
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        task, cause = self._ask(signal_name)
        if told and task is None:
            raise slurm.SlurmError("no word of what it did to the task")
        if told and cause == "timed_out":
            cause = "lost"
        if task is not None and task.ended and task.restarts <= restarts:
            self.fail(f"{'preempted and ' * task.preempted}cancelled; {resume}")
        if cause == "lost":
            losses = self._losses({"event": "requeue", "cause": cause, "step": self._saved_step()})
            if losses > (allowed := self.profile["retries"]["lost"]):
                why = told or (
                    f"{signal_name} came, and SLURM had neither preempted the task nor was it at "
                    "its limit: another rank died before it, or somebody ended the step"
                )
                self.fail(
                    f"lost {losses} times in a row without progress, the last time: {why}; the "
                    f"profile's retries.lost is {allowed}; see {self.run_id}.log"
                )
        used = sum(r["event"] == "requeue" and r["cause"] == cause for r in self._records())
        # An operator's requeue counts as a preemption.
        kind = cause if cause in self.profile["retries"] else "preempted"
        if cause != "lost" and used >= (allowed := self.profile["retries"][kind]):
            after = f", the last time: {told}" if told else ""
            self.fail(f"{cause} {used + 1} times{after}; the profile's retries.{kind} is {allowed}")
        self._record("requeue", cause, "batch" if by_batch else "scontrol")
        if by_batch:
            return
        # SLURM ends this step within the call, so nothing may be left to do after it.
        refusal = slurm.requeue(slurm.own_task() or "", restarts)
        if refusal is None:
            # The task is in the queue again and this step is being ended: no need to stay longer.
            sys.stdout.flush()
            time.sleep(3)
            return
        print(f"not requeued from here ({refusal}); the batch script tries", flush=True)
        self._record("requeue_refused", cause, "scontrol")

    def fail(self, reason: str) -> NoReturn:
        """Record why this point is given up."""
        self._leave(reason, self.sweep.failure_path(self.run_id))

    def lose(self, reason: str, signal_number: int = 0) -> NoReturn:
        """Record how this rank lost others. Whether that is final task.sh finds out: a bug of
        theirs, or a node that failed, perhaps with the batch script on it. Where SLURM is ending
        all of them it is neither."""
        told = signal_name(signal_number) if signal_number else ""
        with contextlib.suppress(Exception):  # this rank may be all that others wait for
            if told and self.is_first and self._is_doing_of_slurm(told):
                self.requeue(told, reason)
        self._leave(reason, self.sweep.loss_path(self.run_id))

    def _leave(self, reason: str, note: Path) -> NoReturn:
        """End with a note; the first rank to write it is heard."""
        print(reason, file=sys.stderr, flush=True)
        self._note(reason, note)
        sys.stdout.flush()
        os._exit(1)  # the process group may wait for a dead rank for ever

    def _note(self, reason: str, note: Path) -> None:
        with contextlib.suppress(OSError):
            if not note.exists():
                self.sweep.note(note, reason)

    def _park(self) -> NoReturn:
        """Wait for rank 0 to have the task requeued, which ends this step.

        Had this rank exited at once, SLURM might take the task as failed and end rank 0 in midst.
        """
        sys.stdout.flush()
        deadline = time.monotonic() + PARK_SECONDS
        # Where another rank failed, nobody has anything requeued.
        while time.monotonic() < deadline and not self.sweep.loss_path(self.run_id).exists():
            time.sleep(1)
        os._exit(os.EX_TEMPFAIL)

    def _is_doing_of_slurm(self, signal_name: str) -> bool:
        task, cause = self._ask(signal_name)
        return task is not None and cause in ("preempted", "requeued")

    def _ask(self, signal_name: str) -> "tuple[slurm.Task | None, str]":
        """SLURM's record of this task, if it answers, and why the signal came.

        That is preempted, timed_out, requeued (by somebody), or lost: SLURM did nothing to it.
        """
        from launch.slurm import client as slurm

        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        deadline = time.monotonic() + LATE_SECONDS
        while True:
            try:
                task = slurm.show_task(slurm.own_task() or "")
            except slurm.SlurmError:
                task = None
            cause = self._cause(task, restarts, signal_name)
            if cause != "lost" or not signal_name or time.monotonic() > deadline:
                return task, cause
            time.sleep(1)

    def _cause(self, task: "slurm.Task | None", restarts: int, signal_name: str) -> str:
        if task is None:
            return "preempted" if signal_name == "SIGTERM" else "timed_out"
        if task.preempted:
            return "preempted"
        lead = self.profile["signal_lead"] + 120  # SLURM signals up to a minute early
        if task.end is not None and task.end - time.time() < lead:
            return "timed_out"
        if task.restarts > restarts:
            return "requeued"
        return "lost" if task.state == "RUNNING" else "preempted"

    def _records(self) -> list[dict[str, Any]]:
        """What attempts.jsonl tells since the array was submitted."""
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
