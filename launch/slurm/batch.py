"""The program that `slurm/task.sh` runs on the batch node: `events.decide` for an srun step.

    python3 -I -S batch.py begin FOLDER RUN_ID
        prints the attempt's name, and the present sizes of the run's log and of srun's
    python3 -I -S batch.py end CODE SECONDS [FOLDER RUN_ID LOG_SIZE SRUN_LOG_SIZE]
        after srun, with its exit code and duration: requeues the task, or records why not. Prints
        `requeued` when the batch script must exit, else `final`
    python3 -I -S batch.py kill-wait
        prints the seconds from SIGTERM to SIGKILL

Run by its path and outside of containers, so installed packages do not matter; `bip/slurm.py`
explains what it may import. BIP_REQUEUE_PACE multiplies its waits (for tests).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bip.slurm import SlurmError, ask, kill_wait, own_restarts, own_task, show_task
from launch.slurm import deaths, events
from launch.slurm.client import requeue
from launch.slurm.events import Decision, Facts, decide


class Step:
    """A step of this task that failed or was stopped, with the facts known on the batch node."""

    def __init__(self, code: int, lasted: float, run: Run | None) -> None:
        self.run = run
        self.task = own_task() or ""
        self.pace = float(os.environ.get("BIP_REQUEUE_PACE", 1))
        self.began, self.skipped = time.monotonic(), 0.0
        self.refused_since: float | None = None
        most = os.environ.get("BIP_MAX_RESTARTS", "")
        self.facts = Facts(
            code=code,
            lasted=lasted,
            restarts=own_restarts(),
            nodes=int(os.environ.get("SLURM_NNODES") or 1),
            max_restarts=int(most) if most.isdigit() else None,
            **(run.facts(self.task, code) if run is not None else {}),
        )

    def decide(self) -> Decision:
        """What becomes of the run, after gathering the facts that this needs."""
        while True:
            decision = decide(self.facts)
            if decision.counts and self.run is not None and not self.facts.unwritable:
                name = f"{self.task}.{self.facts.restarts}"
                if problem := self.run.count(name, decision.reason):
                    self.facts = replace(self.facts, unwritable=problem)
                    continue
            if decision.action == events.WAIT:
                self.sleep(decision.seconds)
                self.ask()
            elif decision.action == events.AWAIT_NODE:
                self.sleep(decision.seconds)
                self.facts = replace(self.facts, node_awaited=True)
                self.refused_since = None  # retry for the full time again
                self.ask()
            elif decision.action == events.PROBE:
                self.facts = replace(self.facts, nodes_answer=self.nodes_answer())
                self.ask()
            else:
                return decision

    def end(self) -> str:
        """Decide and carry it out; returns `requeued` or `final`."""
        while True:
            decision = self.decide()
            if decision.action == events.REQUEUE:
                if decision.reason:
                    self.report(f"to be requeued: {decision.reason}")
                if self.run is not None and (problem := self.run.set_aside()):
                    print(f"not recorded ({problem})", file=sys.stderr, flush=True)
                # Everything is recorded by now, as SLURM ends this process too.
                if (refusal := requeue(self.task, self.facts.restarts)) is None:
                    break
                self.refuse(refusal)
            elif decision.action == events.REQUEUED:
                break
            else:
                self.give_up(decision)
                return "final"
        self.await_end()
        return "requeued"

    def clock(self) -> float:
        return time.monotonic() - self.began + self.skipped

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * self.pace)
        self.skipped += seconds * (1 - self.pace)

    def ask(self) -> None:
        """Read SLURM's record of the task."""
        refusal = self.facts.refusal if self.facts.task is not None else ""
        try:
            task = show_task(self.task)
            if task is None:
                refusal = "scontrol: Invalid job id: SLURM has no record of the task any more"
        except SlurmError as error:
            task, refusal = None, str(error)
            print(f"no answer ({refusal})", file=sys.stderr, flush=True)
        if self.facts.waited is None:
            self.began, self.skipped = time.monotonic(), 0.0
        if refusal and self.refused_since is None:
            self.refused_since = self.clock()
        since = self.refused_since
        refused = self.clock() - since if refusal and since is not None else 0.0
        self.facts = replace(
            self.facts, task=task, waited=self.clock(), now=time.time(),
            refusal=refusal, refused=refused,
        )  # fmt: skip

    def refuse(self, refusal: str) -> None:
        """Handle scontrol's refusal to requeue the task."""
        print(f"not requeued ({refusal})", file=sys.stderr, flush=True)
        self.facts = replace(self.facts, refusal=refusal)
        if not events.will_not_change(refusal):
            self.sleep(10)
        self.ask()

    def nodes_answer(self) -> bool:
        """Whether a step still starts on every node of the task."""
        probe = ["timeout", "60", "srun", "--overlap", "--ntasks-per-node=1"]
        nodes = str(self.facts.nodes)
        probe += [f"--nodes={nodes}", f"--ntasks={nodes}", "true"]
        for pause in (20, 0):
            if subprocess.run(probe, stdout=subprocess.DEVNULL, check=False).returncode == 0:
                return True
            self.sleep(pause)
        return False

    def await_end(self) -> None:
        """Wait until the batch script of a requeued task may exit.

        Exiting while SLURM cleans up the task is safe and frees the nodes early. Exiting after the
        next attempt has started would end that attempt.
        """
        for _ in range(15):
            with contextlib.suppress(SlurmError):
                task = show_task(self.task)
                if task and task.state.startswith(("COMPLETING", "PENDING", "REQUEUE")):
                    break
            self.sleep(60)

    def give_up(self, decision: Decision) -> None:
        if not decision.reason:
            return
        self.report(decision.reason)
        if self.run is not None and (problem := self.run.fail(decision.reason)):
            print(f"not recorded ({problem})", file=sys.stderr, flush=True)

    def report(self, reason: str) -> None:
        """Print it here, and as the last line of the run's log."""
        print(reason, file=sys.stderr, flush=True)
        if self.run is not None:
            with contextlib.suppress(OSError), open(self.run.log, "a") as log:
                log.write(f"{reason}\n")


class Run:
    """One run of a sweep, with its files in FOLDER/jobs (listed in `launch/sweep.py`).

    `own_log`: srun reports on this run in a file of its own, as others execute beside it.
    """

    def __init__(
        self, folder: str, run_id: str, log_size: int = 0, srun_size: int = 0, own_log: bool = False
    ) -> None:
        self.folder, self.run_id = Path(folder), run_id
        self.log_size, self.srun_size = log_size, srun_size
        name = f"{own_task()}_{run_id}.err" if own_log else f"{own_task()}_0_log.err"
        self.srun_log = self.folder / "jobs" / "slurm" / name
        self.note, self.lost, self.started, self.log, self.before = (
            self.folder / "jobs" / f"{run_id}.{kind}"
            for kind in ("failed", "lost", "begun", "log", "failed.before")
        )

    def facts(self, task: str, code: int) -> dict[str, Any]:
        """The fields of Facts that are on disk, or show why a rank was killed."""
        profile = _read_json(Path(os.environ.get("BIP_PROFILE", "")))
        restarts = own_restarts()
        counted = {note.get("attempt") for note in self._notes_before()}
        losses = 1
        while f"{task}.{restarts - losses}" in counted:
            losses += 1
        started = _read(self.started).strip() == f"{task}.{restarts}"
        error, bus_error = self._printed()
        of_srun = _after(self.srun_log, self.srun_size)
        death, lost = deaths.first_death(of_srun), str(_read_json(self.lost).get("reason", ""))
        memory = ""
        # In other cases nothing more is asked, as the time to requeue may be short.
        if code == events.KILLED or "SIGKILL" in death + lost + error:
            printed = of_srun + _after(self.log, self.log_size, 1 << 20)
            memory = deaths.look(_SLURMS.sub("", printed), os.environ)
        logs = f"see {self.run_id}.log, and slurm/{self.srun_log.name} in {self.folder}/jobs"
        return {
            "failed": self.note.exists(),
            "lost": lost,
            "begun": started,
            "bus_error": bus_error,
            "error": error,
            "death": death,
            "memory": memory,
            "unwritable": self.unwritable(),
            "saved": started and self._has_saved(),
            "losses": losses,
            "retries": {**events.DEFAULT_RETRIES, **profile.get("retries", {})},
            "signal_lead": profile.get("signal_lead", 120),
            "resume": f"python -m launch resume {shlex.quote(str(self.folder))} continues it",
            "logs": logs,
        }

    def unwritable(self) -> str:
        """Why no record can be written; "" if one can."""
        probe = self.note.with_name(f"{self.note.name}.{os.getpid()}.probe")
        try:
            _write(probe, 4096 * "x")
        except OSError as error:
            return f"{error.strerror}: {self.note.parent}"
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        return ""

    def set_aside(self) -> str:
        """Keep a rank's record of an attempt that was not final. Returns why it cannot; or ""."""
        try:
            if self.lost.exists():
                with contextlib.suppress(ValueError):  # cut short
                    self._append(json.loads(self.lost.read_text()))
                self.lost.unlink()
        except OSError as error:
            return str(error)
        return ""

    def count(self, attempt: str, reason: str) -> str:
        """Record an attempt as lost, once. Returns why it cannot; or ""."""
        try:
            if all(note.get("attempt") != attempt for note in self._notes_before()):
                self._append({"reason": reason, "attempt": attempt})
        except OSError as error:
            return str(error)
        return ""

    def fail(self, reason: str) -> str:
        """Record why the run has failed. Returns why it cannot; or ""."""
        if reason == _read_json(self.lost).get("reason"):  # the rank's own reason is final
            with contextlib.suppress(OSError):
                os.replace(self.lost, self.note)
                return ""
        problem = self.set_aside()
        temporary = self.note.with_name(self.note.name + ".new")
        try:
            _write(temporary, json.dumps({"reason": reason, "time": time.time()}) + "\n")
            os.replace(temporary, self.note)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return str(error)
        return problem

    def cancel_others(self) -> None:
        """With --fail-fast, if this run has failed: mark and cancel the sweep's other runs.

        Whatever is damaged or missing there does not change what becomes of this run.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SlurmError):
            self._cancel_others()

    def _cancel_others(self) -> None:
        reason = str(_read_json(self.note).get("reason", ""))
        jobs = self.note.parent
        if not reason or reason.startswith("cancelled") or not (jobs / "fail_fast").exists():
            return
        arrays = [json.loads(line) for line in _read(jobs / "arrays.jsonl").splitlines()]
        resume = f"python -m launch resume {shlex.quote(str(self.folder))} continues it"
        why = {"reason": f"cancelled, as {self.run_id} failed (--fail-fast); {resume}"}
        for name in {name for array in arrays for task in array["tasks"] for name in task}:
            note = jobs / f"{name}.failed"
            is_done = any(self.folder.glob(f"*/{name}/result.json"))
            if not is_done and not note.exists():
                _write(note, json.dumps({**why, "time": time.time()}) + "\n")
        ask("scancel", *sorted({str(array["job"]) for array in arrays}))

    def _append(self, note: Any) -> None:
        _write(self.before, json.dumps(note) + "\n", "a")

    def _notes_before(self) -> list[dict[str, Any]]:
        notes = []
        for line in _read(self.before).splitlines():
            with contextlib.suppress(ValueError):
                notes.append(json.loads(line))
        return [note for note in notes if isinstance(note, dict)]

    def _has_saved(self) -> bool:
        """Whether a checkpoint is newer than this attempt's start."""
        with contextlib.suppress(OSError):
            began = self.started.stat().st_mtime_ns
            manifests = self.folder.glob(f"*/{self.run_id}/checkpoint/manifest.json")
            return any(path.stat().st_mtime_ns > began for path in manifests)
        return False

    def _printed(self) -> tuple[str, bool]:
        """The last error line of this attempt's log, and whether faulthandler reported that a rank
        died by SIGBUS."""
        error, bus_error = b"", False
        with contextlib.suppress(OSError), open(self.log, "rb") as stream:
            stream.seek(self.log_size)
            for line in stream:
                bus_error |= line.startswith(b"Fatal Python error: Bus error")
                if line.startswith(b"error: "):
                    error = line.rstrip(b"\r\n")[:500]
        return re.sub(r"[^ -~]", "?", error.decode("latin-1")), bus_error


# What a rank or a user's library prints is no report of SLURM's.
_SLURMS = re.compile(r"^(?!slurmstepd[-\w.]*: |srun: ).*\n?", re.MULTILINE)


def _write(path: Path, text: str, mode: str = "w") -> None:
    """To the disk: otherwise a full one shows only later, by an empty file."""
    with open(path, mode) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _after(path: Path, begin: int, most: int = 1 << 16) -> str:
    """The text of a file from byte `begin` on, of its last `most` bytes; "" if there is none."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        stream.seek(max(begin, stream.seek(0, os.SEEK_END) - most))
        return stream.read().decode("utf-8", "replace")
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> str:
    """The file's text; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file does not hold one."""
    try:
        value = json.loads(_read(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def begin(run: Run) -> str:
    """Before srun: note what the logs hold already; the attempt's name."""
    run.set_aside()  # of an attempt whose batch script was killed, so it was not final
    run.log_size, run.srun_size = _size(run.log), _size(run.srun_log)
    return f"{own_task()}.{own_restarts()}"


def main(command: str, *arguments: str) -> None:
    if command == "begin":
        folder, run_id = arguments
        run = Run(folder, run_id)
        print(begin(run), run.log_size, run.srun_size)
    elif command == "kill-wait":
        print(kill_wait())
    else:
        code, lasted, *names = arguments
        sweep_run = Run(names[0], names[1], int(names[2]), int(names[3])) if names else None
        verdict = Step(int(code), float(lasted), sweep_run).end()
        if verdict == "final" and sweep_run is not None:
            sweep_run.cancel_others()
        print(verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
