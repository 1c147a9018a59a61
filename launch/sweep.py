"""The sweep folder: its ledger of points, the queue, the claims, and the state of every point.

    series.json           the ledger: every point that ever belonged to the sweep
    points/RUN_ID.yml     a point's configuration
    jobs/queue.json       the points that workers are to run now, and how many at once
    jobs/RUN_ID.lock      held (flock) while the point runs, by its worker and by the run itself
    jobs/RUN_ID.failed    why the last attempt failed, or that it was cancelled
    jobs/RUN_ID.begun     the newest attempt of an array task of which a rank began
    jobs/RUN_ID.lost      how a rank of an array task lost the others; not final by itself
    jobs/RUN_ID.failed.before  what was said of attempts that were not final
    jobs/RUN_ID.log       what the run printed
    jobs/worker-N.lock    held by worker N; there are at most `parallelism` of them
    jobs/slot-N.lock      held while worker N has a run, by the worker and by the run itself
    MODE/RUN_ID/          the run folders; result.json in one means done

A point's state is read from these files and nowhere else, so any number of launchers, workers and
onlookers agree on it, and the kernel releases the locks of whatever dies.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bip.config import read_yaml
from bip.errors import UserError
from bip.files import atomic_write_bytes, atomic_write_json, raise_passing
from bip.methods.base import Mode
from launch.plan import STAGES, Point, check_same_source

VERSION = 1
StateName = Literal["waiting", "running", "done", "failed", "blocked"]
FINAL: tuple[StateName, ...] = ("done", "failed", "blocked")
LEFT_QUEUE = "its task left SLURM's queue"


@dataclass(frozen=True)
class Record:
    """One line of the ledger. Paths are relative to the sweep folder, which may be moved."""

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

    @classmethod
    def of(cls, point: Point) -> "Record":
        config = point.config
        return cls(
            run_id=point.run_id,
            stage=point.stage,
            k=config.k_text,
            seed=config.seed,
            arch=config.arch,
            layer_type=config.layer_type,
            trainer=point.trainer,
            folder=f"{point.stage}/{point.run_id}",
            config=f"points/{point.run_id}.yml",
            needs=list(point.needs),
        )


@dataclass(frozen=True)
class State:
    name: StateName
    reason: str = ""


@dataclass(frozen=True)
class Queue:
    """What workers are to do now. `command` is run with `--configs FILE` appended."""

    points: list[str]
    parallelism: int
    ntasks_per_node: int
    cpus_per_task: int
    env: dict[str, str]
    command: list[str]


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
        return cls(descriptor)

    @classmethod
    @contextlib.contextmanager
    def wait(cls, path: Path) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def is_held(path: Path) -> bool:
        """A look takes the lock (shared) for an instant: whoever loses to a look tries again."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def write(self, text: str) -> None:
        """Replace the file's content, a note about the holder."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)

    def close(self) -> None:
        os.close(self.descriptor)


class Sweep:
    """A sweep folder, RESULT_DIR/EXP_NAME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "series.json"
        self.jobs = folder / "jobs"

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

    def loss_path(self, run_id: str) -> Path:
        return self.jobs / f"{run_id}.lost"

    def records(self) -> list[Record]:
        """The ledger's points, in the order of stages.

        Raises UserError if there is no ledger, OSError if its file system is away.
        """
        try:
            content = json.loads(self.ledger.read_text())
            if content["version"] != VERSION:
                raise UserError(
                    f"{self.ledger}: format version {content['version']}, not {VERSION}; "
                    "it was made by another version of this program"
                )
            return [Record(**values) for values in content["points"]]
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}: not a sweep folder (no series.json); give RESULT_DIR/EXP_NAME "
                "of a series"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise_passing(error, self.ledger)
            raise UserError(
                f"{self.ledger}: not a readable ledger ({type(error).__name__}: {error})"
            ) from None

    def add(self, points: Sequence[Point]) -> None:
        """Merge the points into the ledger and write their configurations.

        Raises UserError, with nothing written, if one of them is there with another source_net,
        and if the folder cannot be written; OSError if its file system is away.
        """
        changed: dict[Path, bytes] = {}
        records = [Record.of(point) for point in points]
        for point, record in zip(points, records, strict=True):
            path, text = self.folder / record.config, point.config.to_yaml().encode()
            if path.is_file():
                if path.read_bytes() == text:
                    continue
                old = read_yaml(path).get("source_net")
                check_same_source(point.run_id, old and Path(old), point.config.source_net)
            changed[path] = text
        try:
            self._write(records, changed)
        except OSError as error:
            raise_passing(error, self.folder)
            raise UserError(f"{self.folder}: cannot be written ({error})") from None

    def _write(self, records: list[Record], changed: dict[Path, bytes]) -> None:
        (self.folder / "points").mkdir(parents=True, exist_ok=True)
        self.jobs.mkdir(exist_ok=True)
        with Lock.wait(self.jobs / "ledger.lock"):
            with ThreadPoolExecutor(16) as pool:  # fsync is waiting, and a disk takes many at once
                list(pool.map(atomic_write_bytes, changed, changed.values()))
            old = self.records() if self.ledger.exists() else []
            merged = {record.run_id: record for record in [*old, *records]}
            ordered = sorted(merged.values(), key=lambda record: STAGES.index(record.stage))
            if ordered != old:
                content = {"version": VERSION, "points": [asdict(record) for record in ordered]}
                atomic_write_json(self.ledger, content)

    def queue(self) -> Queue:
        return Queue(**json.loads((self.jobs / "queue.json").read_text()))

    def set_queue(self, queue: Queue) -> None:
        """Queue points, their old failures forgotten. Points that live workers have stay queued."""
        path = self.jobs / "queue.json"
        with Lock.wait(self.jobs / "ledger.lock"):
            points = queue.points
            # Workers submitted just now have not begun yet.
            recent = path.exists() and time.time() - path.stat().st_mtime < 60
            if recent or self.live_workers():
                points = list(dict.fromkeys([*self.queue().points, *points]))
            for run_id in queue.points:
                self.failure_path(run_id).unlink(missing_ok=True)
            atomic_write_json(path, asdict(queue) | {"points": points})

    def unfinished(self) -> int:
        """How many of the queued points may still change their state."""
        states = self.states(self.records())
        return sum(states[run_id].name not in FINAL for run_id in self.queue().points)

    def live_workers(self) -> int:
        return sum(map(Lock.is_held, self.jobs.glob("worker-*.lock")))

    def is_done(self, record: Record) -> bool:
        return (self.folder / record.folder / "result.json").exists()

    def fail(self, run_id: str, reason: str) -> None:
        self.note(self.failure_path(run_id), reason)

    @staticmethod
    def note(path: Path, reason: str) -> None:
        atomic_write_json(path, {"reason": reason, "time": time.time()})

    def failure(self, record: Record) -> str | None:
        """Why the last attempt failed, or None."""
        try:
            return str(json.loads(self.failure_path(record.run_id).read_text())["reason"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return "failed (its record is unreadable)"

    def states(
        self,
        records: Collection[Record],
        queued: Mapping[str, State] | None = None,
        submitted: Mapping[str, str] | None = None,
    ) -> dict[str, State]:
        """The state of every point. A point is blocked when a point that it needs cannot finish.

        `queued` tells of points in SLURM's queue; those of `submitted` (RUN_ID -> array task) that
        are not there have left it. With None that is not known.
        """
        submitted = submitted or {}
        lost = {} if queued is None or self.live_workers() else submitted
        states: dict[str, State] = {}
        # Stage order: what a point needs comes before it.
        for record in records:
            needed = [(name, states.get(name)) for name in record.needs]
            stuck = [name for name, state in needed if state and state.name in FINAL[1:]]
            if self.is_done(record):
                state = State("done")
            elif Lock.is_held(self.claim_path(record.run_id)):
                state = State("running")
            elif (reason := self.failure(record)) is not None:
                state = State("failed", reason)
            elif queued and record.run_id in queued:
                state = queued[record.run_id]
            elif stuck:
                state = State("blocked", f"needs {stuck[0]}, which {states[stuck[0]].name}")
            elif record.run_id in lost:
                err = f"jobs/slurm/{submitted[record.run_id]}_0_log.err"
                told = f"without a result; see {err}"
                if not (self.folder / err).exists():
                    told = f"and never started; python -m launch resume {self.folder} submits it"
                state = State("failed", f"{LEFT_QUEUE} {told}")
            else:
                state = State("waiting")
            states[record.run_id] = state
        return states

    def started(self, record: Record) -> float | None:
        """When (Unix seconds) the running attempt began."""
        try:
            return float(json.loads(self.claim_path(record.run_id).read_text())["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
