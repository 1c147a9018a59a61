"""One run's folder: its lock, attempts, checkpoints and result, and where a run resumes.

Every rank calls these functions; rank 0 reads and writes, and its failure is raised on all ranks.
"""

import contextlib
import errno
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bip.attempts import Attempts
from bip.checkpoint_path import LATEST, LIBRARIES
from bip.config import RunConfig
from bip.distributed.group import Group
from bip.distributed.heartbeat import Heartbeat
from bip.distributed.signals import StopRequest, signal_name
from bip.errors import RankError, Stopped, UserError
from bip.files import (
    atomic_write_bytes,
    atomic_write_json,
    read_json,
    result_dir_error,
    sha256_file,
)
from bip.identity import check_same_source, check_source, difference
from bip.lock import RunLock
from bip.models import library
from bip.training import sources
from bip.training.checkpoint import (
    CheckpointFolder,
    State,
    hash_tensors,
    read_checkpoint,
    seal,
    write_checkpoint,
)
from bip.training.metrics import RunLog

DENSE = Path("checkpoint", "model_dense.pth.tar")  # in a run folder, with --save-dense
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class Progress:
    """How far a run has come: what a checkpoint records beside the tensors."""

    iteration: int = 0
    evaluated: int = 0  # iteration of the last evaluation at an epoch's end
    seconds: float = 0.0
    best_holdout: float | None = None
    best_epoch: int | None = None
    top1_before_bn_mask: float | None = None


def read_result(config: RunConfig) -> dict[str, Any] | None:
    """The result of a finished run, after printing it; None if it is not finished.

    Raises UserError if `source_net` is not the file that it started from.
    """
    path = config.run_folder / "result.json"
    finished: dict[str, Any] | None = read_json(path)
    if finished is not None and (not isinstance(finished, dict) or "top1" not in finished):
        away = shlex.join(["mv", str(path.parent), f"{path.parent}.damaged"])
        raise UserError(f"{path}: damaged; {away}, then repeat the command to run it again")
    if finished is None or config.evaluate:
        return finished
    source = config.source_net
    if source is not None and source.is_file():
        check_same_source(config, finished.get("source_sha256"), sha256_file(source))
    print(f"already finished: {config.run_folder} (top1 {finished['top1']:.2f}%)", flush=True)
    if config.save_dense and not (config.run_folder / DENSE).exists():
        print("warning: save_dense: no effect on a finished run; python -m bip export writes it")
    return finished


class RunFolder:
    """The folder of one run, from `take` to the end of `attempt`."""

    def __init__(
        self, config: RunConfig, group: Group, stop: StopRequest, heartbeat: Heartbeat
    ) -> None:
        self.config, self.group, self.stop, self.heartbeat = config, group, stop, heartbeat
        self.path = config.run_folder
        self.attempts = Attempts(self.path)
        self.checkpoints = CheckpointFolder(self.path / "checkpoint")
        self.lock = RunLock(self.path)
        self.source_sha256: str | None = None  # of the file that the run started from
        self.data_identity: dict[str, str] = {}
        self._resumed: State | None = None

    # Before training

    def read_source(self) -> State | None:
        """The checkpoint that the run starts from (--source-net), if it has one."""
        state, self.source_sha256 = self.group.ask_first(self._read_source)
        return state

    def _read_source(self) -> tuple[State | None, str | None]:
        path, resume = self.config.source_net, self.config.resume
        # The checkpoint of --resume replaces the source. For --evaluate the source may be dense.
        if path is None or (resume is not None and (self.config.evaluate or not path.is_file())):
            return None, None
        if str(path).startswith(LIBRARIES):
            weights = library.weights(str(path), self.config.arch)
            return sources.recognise(weights, {}, path), hash_tensors(weights)
        state = read_checkpoint(path, self.config.source_key, self.config.skip_objects)
        check_source(self.config, state)
        return state, sha256_file(path)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A full or read-only disk is a UserError in the body. Releases the lock at the end."""
        try:
            with self._writing():
                yield
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise UserError(
                f"result_dir: {self.path}: {error.strerror}; the newest checkpoint is kept; free "
                "space or fix the folder, then repeat the command"
            ) from None

    def take(self) -> dict[str, Any] | None:
        """Lock the folder. Returns the result if an earlier attempt has finished the run.

        The checkpoint of --resume is checked before anything is created. Raises Stopped if a
        signal comes while this attempt waits for the lock.
        """
        self.group.ask_first(self._read_resume)

        def give_up() -> bool:
            self.heartbeat.note_alive()
            return self.stop.signal != 0

        def take() -> tuple[int, dict[str, Any] | None]:
            if not self.lock.acquire(give_up=give_up):
                return self.stop.signal, None
            return 0, read_result(self.config)

        signal, finished = self.group.ask_first(take)
        if signal or finished is not None:
            self.group.barrier()
            self.heartbeat.stop()
        if signal:
            raise Stopped(signal_name(signal), 0)
        return finished

    def _read_resume(self) -> None:
        """Read --resume, on rank 0. A checkpoint in the run's folder is read under the lock."""
        resume = self.config.resume
        if resume is not None and resume.resolve().parent != self.checkpoints.folder.resolve():
            self._resumed = self._own_state(read_checkpoint(resume), resume)

    def furthest(self) -> State | None:
        """The newest checkpoint here, or that of --resume if it is further; None for neither.

        A requeued task gets the same --resume again and must keep its progress since.
        """
        return self.group.ask_first(self._furthest)

    def _furthest(self) -> State | None:
        given, self._resumed = self._resumed, None
        resume = self.config.resume
        try:
            own = self.checkpoints.load()
        except UserError as error:
            if given is None:
                raise
            print(f"{error}; resuming from --resume {resume}")
            return given
        if own is None:
            return given
        own = self._own_state(own, self.checkpoints.folder)
        reached = own["progress"]["iteration"]
        start = given["progress"]["iteration"] if given is not None else 0
        if given is not None and reached < start:
            return given
        if resume is not None and resume.resolve() != self.checkpoints.newest.resolve():
            print(
                f"--resume {resume}: not used, as {self.path} has reached step {reached} and "
                "resumes there (to go back, give another --exp-name)"
            )
        return own

    def _own_state(self, state: State, where: Path) -> State:
        """Raises UserError unless it is a checkpoint of this run that it can resume from."""
        if "progress" not in state or "optimizer" not in state:
            raise UserError(
                f"resume: {where} holds a model without optimizer state; give it as --source-net"
            )
        if state["fingerprint"] != self.config.fingerprint():
            raise UserError(
                f"resume: {where} was written by a run with other settings: "
                f"{difference(self.config, state['config'])}"
            )
        before, now = state.get("data", {}), self.data_identity
        for name in before.keys() & now.keys():  # a run may change from a folder to its LMDB store
            if before[name] != now[name]:
                raise UserError(
                    f"data_dir: the run was trained on {before[name]}; {self.config.data_dir} "
                    f"holds {now[name]}; put the data back, or give another --exp-name"
                )
        check_same_source(self.config, state["source_sha256"], self.source_sha256)
        self.source_sha256 = state["source_sha256"]
        return state

    def open(self, step: int, loader: str, local_batch_norm: bool, dense: tuple[str, ...]) -> None:
        """Create the folder, record an attempt that starts at `step`, warn of what changed.

        `local_batch_norm`: batch-norm uses the statistics of each rank's own part of a batch.
        `dense` names the weights that are not pruned.
        """

        def write() -> None:
            world = self.group.world
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for line in self.attempts.changes(world, loader, local_batch_norm):
                    print(f"warning: {line}")
                settings = self.path / "config.yml"
                if not settings.exists():
                    atomic_write_bytes(settings, self.config.to_yaml().encode())
                self.attempts.start(self.config, self.group, loader, step)
                self._name_latest()
            except OSError as error:
                raise result_dir_error(self.path, error) from None
            for line in self.config.warnings():
                print(f"warning: {line}")
            if dense:
                print(f"kept dense: {', '.join(dense)}")
            how = f"resuming at step {step}" if step else "starting"
            kind = self.group.device.type
            print(f"{how}: {self.path} on {world} x {kind}, loader {loader}", flush=True)

        self.group.ask_first(write)

    def _name_latest(self) -> None:
        """Link latest_exp of the experiment to this run. A file system without links has none."""
        link = self.path.parents[1] / LATEST
        temporary = link.with_name(f".{LATEST}.{os.getpid()}")
        with suppress(OSError):
            temporary.symlink_to(self.path.relative_to(link.parent))
            os.replace(temporary, link)
        with suppress(OSError):  # left if `link` is a folder, as the published code makes it
            temporary.unlink()

    # During training

    def log(self, progress: Progress) -> RunLog:
        """The run's log from `progress` on. Raises on every rank if one cannot open it."""
        with self.group.together():
            first = self.group.is_first
            return RunLog(self.path, first, progress.iteration, progress.evaluated, self.config)

    def write(self, call: Callable[[], None]) -> None:
        """Rank 0 writes, if it still has the lock; all ranks wait for it.

        If another rank exited earlier, SLURM would end rank 0 during the write.
        """

        def write() -> None:
            with self._writing():
                self.lock.check()
                call()

        self.group.ask_first(write)

    def save(self, state: Callable[[], State], step: int) -> None:
        """Commit the newest checkpoint; `state` is called on rank 0."""
        self.write(lambda: self._save(state(), step))

    def _save(self, state: State, step: int, keep_before: int = 1) -> None:
        self.checkpoints.save(self._of_source(state), step, keep_before)

    def save_best(self, state: Callable[[], State]) -> None:
        """Write the model that other runs start from."""
        self.save_model(state, self.checkpoints.best)

    def save_model(self, state: Callable[[], State], path: Path) -> None:
        """Write a model beside the run's checkpoints; `state` is called on rank 0."""

        def write() -> None:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, seal(self._of_source(state())))

        self.write(write)

    def _of_source(self, state: State) -> State:
        return state | {"source_sha256": self.source_sha256}

    def read_best(self) -> State | None:
        """The best epoch's model; None, with a warning, if its file is damaged."""
        return self.group.ask_first(self._read_best)

    def _read_best(self) -> State | None:
        try:
            return read_checkpoint(self.checkpoints.best)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            print(f"warning: {error}; the final model is used, and best_top1 stays empty")
            return None

    # The end

    def finish(
        self, state: Callable[[], State], step: int, result: dict[str, Any], dense: State | None
    ) -> dict[str, Any]:
        """Write the last checkpoint, without optimizers, then the result, which means done.

        `dense`, where given, is written as a plain network. Returns the completed result.
        """
        attempts = self.group.ask_first(lambda: len(self.attempts.starts()))
        result |= {"source_sha256": self.source_sha256, "attempts": attempts}

        def write() -> None:
            if dense is not None:
                write_checkpoint(self.path / DENSE, dense)
            # A finished run never resumes, so the optimizers' state would only take space.
            self._save(state() | {"optimizer": {}}, step, keep_before=0)
            atomic_write_json(self.path / "result.json", result)
            print(f"finished: {self.path} top1 {result['top1']:.2f}%", flush=True)

        self.write(write)
        return result

    @contextlib.contextmanager
    def attempt(self, progress: Progress) -> Iterator[None]:
        """Record how the attempt ends, also if the heartbeat ends it."""
        self.heartbeat.on_end = lambda cause: self._record_end(cause, progress)
        try:
            yield
        except Stopped as stopped:
            self._leave(stopped.cause, progress)
            raise
        self._leave("finished", progress)

    def _leave(self, cause: str, progress: Progress) -> None:
        """The agreed end. After it each rank may exit at any time; none waits for another."""

        def write() -> None:
            self._record_end(cause, progress)
            self.lock.release()

        self.group.ask_first(write)
        self.heartbeat.note_end()
        with suppress(RuntimeError):  # all is saved, so a rank that was killed here does not matter
            self.group.barrier()
        self.heartbeat.stop()

    def _record_end(self, cause: str, progress: Progress) -> None:
        if self.group.is_first:
            # On a full disk the first error is raised already; this one would hide it.
            with suppress(OSError, RankError):
                self.lock.check()
                self.attempts.record("end", cause=cause, step=progress.iteration)
