"""The sweep folder: its ledger of runs, queue, locks, and the state of every run.

    series.json           the ledger: every run that ever belonged to the sweep
    points/RUN_ID.yml     a run's configuration
    jobs/queue.json       the runs that local workers are to do now, and how many at once
    jobs/fail_fast        exists while a failed run cancels the others
    jobs/profile.json     the profile of the last submission
    jobs/arrays.jsonl     the SLURM arrays that were submitted
    jobs/RUN_ID.lock      held (flock) by a local run's worker and by the run itself
    jobs/RUN_ID.failed    why the last attempt failed, or that it was cancelled
    jobs/RUN_ID.begun     the newest attempt of an array task in which a rank has started
    jobs/RUN_ID.lost      why a rank of an array task lost the others; not final by itself
    jobs/RUN_ID.failed.before  such reasons of attempts that were retried
    jobs/RUN_ID.log       what the run printed
    jobs/slurm/TASK_RUN_ID.err  what srun reported on one of several runs of a task at once
    jobs/worker-N.lock    held by worker N; there are at most `parallelism` of them
    jobs/slot-N.lock      held while worker N has a run, by the worker and by the run itself
    MODE/RUN_ID/          the run folders; result.json in one means done

A run's state is read from these files and from SLURM's queue, so any number of launchers, workers
and `status` commands agree on it. The kernel releases the locks of a process that dies.
"""

import contextlib
import fcntl
import json
import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from bip.config import RunConfig, build_config
from bip.errors import UserError
from bip.files import (
    NOT_SUPPORTED,
    atomic_write_bytes,
    atomic_write_json,
    raise_passing,
    read_jsonl,
    result_dir_error,
)
from bip.methods.base import Mode
from bip.yaml_file import read_yaml
from launch.plan import STAGES, PlannedRun, check_same_source
from launch.printed import last_error, tail

VERSION = 1
StateName = Literal["waiting", "running", "done", "failed", "cancelled", "blocked"]
FINAL: tuple[StateName, ...] = ("done", "failed", "cancelled", "blocked")
LEFT_QUEUE = "its task left SLURM's queue"
IN_QUEUE = "in the queue"
STUCK = f"{IN_QUEUE}, "  # how the reason of a waiting run starts that needs somebody to act
DAMAGED = "its result is damaged"
CANCELLED = "cancelled"  # how the reason of a cancelled run starts
# How the reasons of cancelled runs start: by the user, and by a preemption that cancels.
_CANCELS = (CANCELLED, f"preempted and {CANCELLED}")


@dataclass(frozen=True)
class Run:
    """One run in the ledger. Paths are relative to the sweep folder, which may be moved."""

    run_id: str
    stage: Mode
    k: str
    seed: int
    arch: str
    layer_type: str
    trainer: str
    folder: str
    config: str
    needs: list[str]
    swept: dict[str, str] = field(default_factory=dict)  # further settings that the sweep varies

    @classmethod
    def of(cls, planned: PlannedRun) -> "Run":
        config = planned.config
        return cls(
            run_id=planned.run_id,
            stage=planned.stage,
            k=config.k_text,
            seed=config.seed,
            arch=config.arch,
            layer_type=config.layer_type,
            trainer=planned.trainer,
            folder=f"{planned.stage}/{planned.run_id}",
            config=f"points/{planned.run_id}.yml",
            needs=list(planned.needs),
            swept=planned.swept,
        )

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Run":
        """A run as the ledger has it. Raises TypeError for a missing or damaged value."""
        run = cls(**values)
        texts = [run.run_id, run.k, run.arch, run.layer_type, run.trainer, run.folder, run.config]
        texts += [*run.needs, *run.swept.values()]
        if run.stage not in STAGES or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"a damaged record: {values}")
        return run

    def plain(self) -> dict[str, Any]:
        """As the ledger has it; earlier versions know no `swept`."""
        values = asdict(self)
        return values if self.swept else {k: v for k, v in values.items() if k != "swept"}


@dataclass(frozen=True)
class State:
    """`word` is for people, where it is more exact than `name`: held, suspended."""

    name: StateName
    reason: str = ""
    word: str = ""


@dataclass(frozen=True)
class Place:
    """A run's state in an executor's queue."""

    state: State | None  # None: not known
    task: str = ""  # the newest SLURM array task
    seconds: float | None = None  # that it has been running
    queued: bool = False  # the task is pending


@dataclass(frozen=True)
class Queue:
    """What workers are to do now. `command` is run with `--configs FILE` appended.

    `runs_at_once`: 2 or more: each worker binds its runs to its part of the CPUs.
    """

    run_ids: list[str]
    parallelism: int
    ntasks_per_node: int
    cpus_per_task: int
    env: dict[str, str]
    command: list[str]
    runs_at_once: int = 1


class Lock:
    """An exclusive flock on a file, held until closed or until every process with it is dead.

    The descriptor may be passed to a child, which then keeps the lock if this process is killed.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def try_acquire(cls, path: Path) -> "Lock | None":
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NOT_SUPPORTED:
                raise
            raise UserError(
                f"result_dir: {path.parent}: its file system has no locks ({error.strerror}), by "
                "which processes share the runs; give a --result-dir on another, or have it "
                "mounted with locks (Lustre: -o flock)"
            ) from None
        return cls(descriptor)

    @classmethod
    @contextlib.contextmanager
    def wait(cls, path: Path) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _unless_supported():  # what follows is atomic, if not exclusive
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def is_held(path: Path) -> bool:
        """Probe the lock. A probe briefly holds it shared; contenders retry."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):  # a colleague's, who shows his results only
            return False
        try:
            with _unless_supported():
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def write(self, text: str) -> None:
        """Replace the file's content, a record about the holder."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)

    def close(self) -> None:
        os.close(self.descriptor)


@contextlib.contextmanager
def _unless_supported() -> Iterator[None]:
    """Go on where the file system has no locks: nobody holds one there."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


class Sweep:
    """A sweep folder, RESULT_DIR/EXP_NAME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "series.json"
        self.jobs = folder / "jobs"
        self.queue_path = self.jobs / "queue.json"

    def command(self, verb: str) -> str:
        """The command for this sweep, to be pasted into a shell."""
        return f"python -m launch {verb} {shlex.quote(str(self.folder))}"

    def config(self, run_id: str) -> RunConfig:
        """A run's configuration. Raises UserError if its file has changed since it was planned: the
        run would train into the folder of another."""
        path = self.folder / "points" / f"{run_id}.yml"
        config = build_config(read_yaml(path), str(path))
        if config.run_id != run_id:
            raise UserError(
                f"{path}: changed since it was planned (its settings are those of "
                f"{config.run_id}); plan the new settings with python -m launch series"
            )
        if config.run_folder.absolute() != (self.folder / config.exp_mode / run_id).absolute():
            raise UserError(
                f"{path}: writes to {config.run_folder.parents[1]}, not to {self.folder}; the "
                "sweep folder was moved: move it back, or plan it again with launch series"
            )
        return config

    def log(self, run_id: str) -> Path:
        return self.jobs / f"{run_id}.log"

    def claim_path(self, run_id: str) -> Path:
        return self.jobs / f"{run_id}.lock"

    def worker_path(self, number: int) -> Path:
        return self.jobs / f"worker-{number}.lock"

    def slot_path(self, number: int) -> Path:
        return self.jobs / f"slot-{number}.lock"

    def failure_path(self, run_id: str) -> Path:
        return self.jobs / f"{run_id}.failed"

    @property
    def fail_fast(self) -> Path:
        """Exists while a failure is to cancel the other runs, whether the launcher stays or not."""
        return self.jobs / "fail_fast"

    def loss_path(self, run_id: str) -> Path:
        return self.jobs / f"{run_id}.lost"

    def runs(self) -> list[Run]:
        """The ledger's runs, in the order of stages.

        Raises UserError if there is no ledger, OSError if its file system is unreachable.
        """
        try:
            content = json.loads(self.ledger.read_text())
            if content["version"] != VERSION:
                raise UserError(
                    f"{self.ledger}: format version {content['version']}, not {VERSION}; "
                    "it was made by another version of this program"
                )
            return [Run.read(values) for values in content["points"]]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.folder}: not a sweep folder (no series.json); give RESULT_DIR/EXP_NAME "
                "of a series"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise_passing(error, self.ledger)
            raise UserError(
                f"{self.ledger}: not a readable ledger ({type(error).__name__}: {error})"
            ) from None

    def add(self, planned: Sequence[PlannedRun]) -> None:
        """Add the runs to the ledger and write their configurations.

        Raises UserError, with nothing written, if the ledger has one of them with another
        source_net, or if the folder cannot be written; OSError if its file system is unreachable.
        """
        changed: dict[Path, bytes] = {}
        runs = [Run.of(one) for one in planned]
        for one, run in zip(planned, runs, strict=True):
            path, text = self.folder / run.config, one.config.to_yaml().encode()
            if path.is_file():
                if path.read_bytes() == text:
                    continue
                old = read_yaml(path).get("source_net")
                check_same_source(run.run_id, old and Path(old), one.config.source_net)
            changed[path] = text
        try:
            self._write(runs, changed)
        except OSError as error:
            raise_passing(error, self.folder)
            raise result_dir_error(self.folder, error) from None

    def _write(self, runs: list[Run], changed: dict[Path, bytes]) -> None:
        (self.folder / "points").mkdir(parents=True, exist_ok=True)
        self.jobs.mkdir(exist_ok=True)
        with Lock.wait(self.jobs / "ledger.lock"):
            with ThreadPoolExecutor(16) as pool:  # many fsyncs in parallel wait less
                list(pool.map(atomic_write_bytes, changed, changed.values()))
            old = self.runs() if self.ledger.exists() else []
            merged = {run.run_id: run for run in old}
            for run in runs:
                swept = merged[run.run_id].swept if run.run_id in merged else {}
                merged[run.run_id] = replace(run, swept=swept | run.swept)
            ordered = sorted(merged.values(), key=lambda run: STAGES.index(run.stage))
            if ordered != old:
                content = {"version": VERSION, "points": [run.plain() for run in ordered]}
                atomic_write_json(self.ledger, content)

    def queue(self) -> Queue:
        values = json.loads(self.queue_path.read_text())
        return Queue(run_ids=values.pop("points"), **values)

    def set_queue(self, queue: Queue) -> None:
        """Queue runs and remove their failure records. Runs of live workers stay queued."""
        with Lock.wait(self.jobs / "ledger.lock"):
            run_ids = queue.run_ids
            # Workers that were just submitted have not started yet.
            path = self.queue_path
            recent = path.exists() and time.time() - path.stat().st_mtime < 60
            if recent or self.live_workers():
                run_ids = list(dict.fromkeys([*self.queue().run_ids, *run_ids]))
            for run_id in queue.run_ids:
                self.failure_path(run_id).unlink(missing_ok=True)
            values = asdict(queue)
            del values["run_ids"]
            atomic_write_json(path, {"points": run_ids} | values)

    def unfinished(self) -> int:
        """Number of queued runs whose state may still change."""
        states = self.states(self.runs())
        return sum(states[run_id].name not in FINAL for run_id in self.queue().run_ids)

    def live_workers(self) -> int:
        return sum(map(Lock.is_held, self.jobs.glob("worker-*.lock")))

    def parallelism(self) -> int:
        """Runs at once, by the profile of the last submission; 1 if that is not readable."""
        try:
            return max(1, int(json.loads((self.jobs / "profile.json").read_text())["parallelism"]))
        except (OSError, ValueError, KeyError, TypeError):
            return 1

    def is_done(self, run: Run) -> bool:
        return self._result(run) == "whole"

    def _result(self, run: Run) -> Literal["none", "whole", "damaged"]:
        try:
            text = (self.folder / run.folder / "result.json").read_text()
        except (FileNotFoundError, NotADirectoryError):
            return "none"
        except PermissionError:  # there is one, of another user
            return "whole"
        except (IsADirectoryError, UnicodeDecodeError):
            return "damaged"
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            return "whole" if isinstance(found, dict) and "top1" in found else "damaged"
        return "damaged"

    def damage(self, run: Run) -> str:
        """What to do about a result that cannot be read; "" for one that can, or for none.

        It is written whole, so a disk or a person has damaged it. A finished run keeps no state to
        resume from.
        """
        if self._result(run) != "damaged":
            return ""
        folder = self.folder / run.folder
        away = shlex.join(["mv", str(folder), f"{folder}.damaged"])
        return (
            f"{DAMAGED}: {folder}/result.json; {away}, then {self.command('resume')} runs it again"
        )

    def is_running(self, run: Run) -> bool:
        """Whether it runs locally."""
        return Lock.is_held(self.claim_path(run.run_id))

    def fail(self, run_id: str, reason: str) -> None:
        self.note(self.failure_path(run_id), reason)

    def mark_cancelled(self, run_id: str, why: str = "") -> None:
        """Mark the run so that no attempt starts until it is submitted again."""
        self.fail(run_id, f"{CANCELLED}{why}; {self.command('resume')} continues it")

    @staticmethod
    def note(path: Path, reason: str) -> None:
        atomic_write_json(path, {"reason": reason, "time": time.time()})

    def failure(self, run: Run) -> str | None:
        """Why the last attempt failed or was cancelled, or None."""
        path = self.failure_path(run.run_id)
        try:
            return str(json.loads(path.read_text())["reason"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            found = self.newest_reason(run)
            known = f"; the newest reason found: {found}" if found else f"; see {run.run_id}.log"
            return f"failed (its record {path.name} is unreadable, as by a full disk){known}"

    def newest_reason(self, run: Run) -> str:
        """The newest reason why an attempt ended, in any file that has one; "" for none."""
        found: list[tuple[float, str]] = []
        for record in read_jsonl(self.folder / run.folder / "attempts.jsonl"):
            cause = str(record.get("cause", ""))
            if record.get("event") == "end" and cause.startswith(("error", "rank lost")):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found.append((datetime.fromisoformat(record["time"]).timestamp(), cause))
        lost = self.loss_path(run.run_id)
        before = lost.with_suffix(".failed.before")
        for record in read_jsonl(before):
            found.append((before.stat().st_mtime, str(record.get("reason", ""))))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(lost.read_text())
            found.append((float(note["time"]), str(note["reason"])))
        with contextlib.suppress(OSError):
            log = self.log(run.run_id)
            if error := last_error(tail(log)):
                found.append((log.stat().st_mtime, error))
        return max(found, default=(0.0, ""))[1]

    def states(
        self, runs: Collection[Run], places: Mapping[str, Place] | None = None
    ) -> dict[str, State]:
        """The state of every run. A run is blocked when a run that it needs cannot finish.

        `places`: runs in an executor's queue, or lost from it (RUN_ID -> place).
        """
        states: dict[str, State] = {}
        # In the order of stages, a run comes after those that it needs.
        for run in runs:
            needed = [(name, states.get(name)) for name in run.needs]
            stuck = [(name, s.name) for name, s in needed if s and s.name in FINAL[1:]]
            place = (places or {}).get(run.run_id)
            if self.is_done(run):
                state = State("done")
            elif self.is_running(run):
                state = State("running")
            elif damage := self.damage(run):
                state = State("failed", damage)
            elif (reason := self.failure(run)) is not None:
                state = State("cancelled" if reason.startswith(_CANCELS) else "failed", reason)
            elif place and place.state and (place.state.name != "failed" or not stuck):
                state = place.state
            elif stuck:
                name, end = stuck[0]
                which = "which failed" if end == "failed" else f"which is {end}"
                state = State("blocked", f"needs {name}, {which}")
            else:
                state = State("waiting")
            states[run.run_id] = state
        return states

    def claim(self, run: Run) -> dict[str, Any]:
        """The record by the worker of a running local run: its start time and process."""
        try:
            found: dict[str, Any] = json.loads(self.claim_path(run.run_id).read_text())
        except (OSError, ValueError):
            return {}
        return found
