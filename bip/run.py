"""One run, composed: the only file that knows every part."""

import contextlib
import copy
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bip import models
from bip.attempts import Attempts
from bip.config import RunConfig, check_inputs
from bip.data.batches import Data, open_data
from bip.data.options import DataOptions
from bip.data.splits import stage_data
from bip.distributed.control import Control
from bip.distributed.group import MEETING, Group, join, wrap
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
from bip.identity import (
    check_same_source,
    check_source,
    compare_starts,
    difference,
    start_facts,
    with_source_of_resume,
)
from bip.lock import RunLock
from bip.pruning.layout import find_followers, find_prunable
from bip.pruning.scores import initialise_scores
from bip.pruning.state import PrunedParameters
from bip.training.checkpoint import (
    CheckpointFolder,
    State,
    hash_tensors,
    model_state,
    read_checkpoint,
    restore_model,
    seal,
    split_state,
    write_checkpoint,
)
from bip.training.evaluate import Accuracy
from bip.training.loop import Loop, Progress
from bip.training.metrics import RunLog
from bip.training.optim import Clock
from bip.training.steps import ForwardBackward, TrainingStep, build_step

STAGING = timedelta(hours=12)  # how long nodes wait for one that copies its data
DENSE = Path("checkpoint", "model_dense.pth.tar")  # in a run folder, with --save-dense
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def train(config: RunConfig, stop: StopRequest | None = None) -> dict[str, Any]:
    """Run `config` to its end in its run folder and return its result.

    A finished run is not run again; an interrupted one goes on from its newest checkpoint.
    With `evaluate` nothing is trained or written. Raises UserError before anything is created
    for input that cannot work, Stopped when `stop` was set and the state is saved, RankError when
    ranks disagree or one is gone.
    """
    check_inputs(config)
    config = with_source_of_resume(config)
    stop = stop or StopRequest()
    done = (config.run_folder / "result.json").exists() and not config.evaluate
    if not done:
        stage_data(DataOptions.of(config), stop.raise_if_set)
    patience = STAGING if config.stage_to is not None else MEETING
    group = join(config.result_dir / ".rendezvous", patience=patience, stop=stop)
    heartbeat = Heartbeat(group, config.rank_timeout)
    with heartbeat.watching():
        # Rank 0 looks for all: an attempt that is just ending may write it between two looks.
        finished = group.ask_first(lambda: read_result(config))
        if finished is not None and not config.evaluate:
            result = dict(finished)
            group.barrier()
        else:
            run = Run(config, group, stop, heartbeat)
            result = run.evaluate() if config.evaluate else run.train()
    group.close()
    return result


def read_result(config: RunConfig) -> dict[str, Any] | None:
    """The result of a finished run, and say so; else None.

    Raises UserError if it began from another file than the one that `source_net` is now.
    """
    finished = read_json(config.run_folder / "result.json")
    if finished is None or config.evaluate:
        return finished  # type: ignore[no-any-return]
    source = config.source_net
    if source is not None and source.is_file():
        check_same_source(config, finished.get("source_sha256"), sha256_file(source))
    print(f"already finished: {config.run_folder} (top1 {finished['top1']:.2f}%)", flush=True)
    if config.save_dense and not (config.run_folder / DENSE).exists():
        print("warning: save_dense: no effect on a finished run; python -m bip export writes it")
    return finished  # type: ignore[no-any-return]


class Run:
    """The parts of one run on this rank. Making one reads and checks all input, writes nothing."""

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        stop: StopRequest | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.config, self.group, self.stop = config, group, stop or StopRequest()
        self.heartbeat = heartbeat or Heartbeat(group, config.rank_timeout)
        self.folder = config.run_folder
        self.attempts = Attempts(self.folder)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoint")
        config.batch_per_rank(group.world)
        if config.sync_bn and group.device.type != "cuda":
            raise UserError("sync_bn: needs GPUs; leave --sync-bn out on the CPU")
        _set_backends(config)
        compare_starts(start_facts(config, group), group)
        self.source, self.source_sha256 = group.ask_first(self._read_source)
        with group.together():
            self.data = self._open_data()
            self.network = self._build_network()
        compare_starts(self.data.identity | {"loader": self.data.loader}, group)
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            group.broadcast_(tensor.data)
        self.pruned = self._build_pruned()
        self.control = Control(group)
        self.lock = RunLock(self.folder)
        self.resumed: State | None = None

    def _open_data(self) -> Data:
        group = self.group
        return open_data(DataOptions.of(self.config), group.rank, group.world, group.device)

    def _read_source(self) -> tuple[State | None, str | None]:
        """The checkpoint that the run starts from (--source-net, or --resume to go on)."""
        path, resume = self.config.source_net, self.config.resume
        # What --resume holds replaces the source; to evaluate, the source need not even be pruned.
        if path is None or (resume is not None and (self.config.evaluate or not path.is_file())):
            return None, None
        state = read_checkpoint(path)
        check_source(self.config, state)
        return state, sha256_file(path)

    def _build_network(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        network = models.build(config.arch, DataOptions.of(config).classes, self.data.channels)
        models.check_image_size(network, config.arch, self.data.channels, self.data.image_dim)
        if config.exp_mode == "pretrain" and config.scale_rand_init:
            models.scale_initial_weights(network, float(config.k))
        if self.source is not None:
            restore_model(network, None, self.source, str(config.source_net))
        if config.sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        if self.group.device.type == "cuda":
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.to(self.group.device)

    def _build_pruned(self) -> PrunedParameters | None:
        """θ, scores and mask as the mode starts them; None for a dense network."""
        config = self.config
        if config.exp_mode == "pretrain" or config.layer_type == "dense":
            return None
        layout = find_prunable(self.network, config.layer_type)
        pruned = PrunedParameters(self.network, layout, config.k, config.ranking_scope, self.group)
        sample = torch.zeros(
            2, self.data.channels, self.data.image_dim, self.data.image_dim,
            device=self.group.device,
        )  # fmt: skip
        pruned.followers = find_followers(self.network, layout, sample)
        if config.exp_mode == "prune" and not config.evaluate:
            # Drawn on the CPU, so that the scores do not depend on the device.
            scores = torch.empty(layout.size)
            torch.manual_seed(config.seed + 1)
            initialise_scores(scores, pruned.weights.detach().cpu(), layout, config.score_init)
            with torch.no_grad():
                pruned.scores.copy_(scores)
            self.group.broadcast_(pruned.scores.data)
            pruned.update_mask()
            pruned.write_z()
        elif self.source is not None:
            restore_model(self.network, pruned, self.source, str(config.source_net))
            pruned.write_followers()
        return pruned

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of --source-net, or of the checkpoint of --resume, on the test images."""
        with self.heartbeat.watching():
            if (resume := self.config.resume) is not None:
                state = self.group.ask_first(lambda: read_checkpoint(resume))
                check_source(self.config, state, "resume")
                restore_model(self.network, self.pruned, state, str(resume))
                if self.pruned is not None:
                    self.pruned.write_followers()
            loop = self._loop(Progress(), RunLog(self.folder, active=False))
            loop.agree()
            accuracy = loop.evaluate("test")
            self.group.barrier()
            self.heartbeat.stop()
        if self.group.is_first:
            print(
                f"top1 {accuracy.top1:.2f}% top5 {accuracy.top5:.2f}% loss {accuracy.loss:.4f} "
                f"on {accuracy.count} test images"
            )
        return {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}

    def train(self) -> dict[str, Any]:
        """Train from the start or the newest checkpoint to the end; write and return the result."""
        try:
            with self.heartbeat.watching(), self._writing():
                # Checked before the folder is made.
                self.group.ask_first(self._read_resume)
                finished = self._take_folder()
                return finished if finished is not None else self._train()
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that takes no more is for the user to mend."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise UserError(
                f"result_dir: {self.folder}: {error.strerror}; the newest checkpoint is kept, and "
                "the same command goes on from it"
            ) from None

    def _write(self, call: Callable[[], None]) -> None:
        """Rank 0 writes; nobody goes on before it is done, and its failure is everyone's.

        A rank that left earlier would have SLURM end rank 0 in the midst of it.
        """

        def write() -> None:
            with self._writing():
                self.lock.check()
                call()

        self.group.ask_first(write)

    def _take_folder(self) -> dict[str, Any] | None:
        """Lock the run folder on rank 0. Returns the result if the holder before has finished it.

        Raises Stopped if this attempt is told to stop while it waits.
        """

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

    def _train(self) -> dict[str, Any]:
        state = self.group.ask_first(self._furthest)
        progress = Progress(**state["progress"]) if state else Progress()
        if state is not None:
            restore_model(self.network, self.pruned, state, str(self.checkpoints.folder))
        self.group.ask_first(lambda: self._open_folder(progress))
        self.heartbeat.on_end = lambda cause: self._record_end(cause, progress)
        with self.group.together():
            log = RunLog(self.folder, self.group.is_first, progress.iteration, progress.evaluated)
        loop = self._loop(progress, log)
        if state is not None and progress.iteration < loop.clock.iterations:
            for name, optimizer in loop.step.optimizers.items():
                optimizer.load_state_dict(state["optimizer"][name])
        del state
        try:
            try:
                loop.run()
                result = self._finish(loop)
            except Stopped as stopped:
                self._leave(stopped.cause, progress)
                raise
            self._leave("finished", progress)
            return result
        finally:
            log.close()
            self.data.close()

    def _leave(self, cause: str, progress: Progress) -> None:
        """The agreed end: after it any rank may exit at any time, and nobody misses it."""

        def write() -> None:
            self._record_end(cause, progress)
            self.lock.release()

        self.group.ask_first(write)
        self.heartbeat.note_end()
        with suppress(RuntimeError):  # a rank killed by now has nothing to lose
            self.group.barrier()
        self.heartbeat.stop()

    def _record_end(self, cause: str, progress: Progress) -> None:
        if self.group.is_first:
            # On a full disk the first error is the one to tell; another attempt tells its own.
            with suppress(OSError, RankError):
                self.lock.check()
                self.attempts.record("end", cause=cause, step=progress.iteration)

    def _read_resume(self) -> None:
        """What --resume holds, on rank 0; in the run's own folder it is read under the lock."""
        resume = self.config.resume
        if resume is not None and resume.resolve().parent != self.checkpoints.folder.resolve():
            self.resumed = self._own_state(read_checkpoint(resume), resume)

    def _furthest(self) -> State | None:
        """The run folder's newest checkpoint, or what --resume holds if that is further.

        A requeued task is given the same --resume again, and must not lose what it did since.
        """
        given, self.resumed = self.resumed, None
        resume = self.config.resume
        try:
            own = self.checkpoints.load()
        except UserError as error:
            if given is None:
                raise
            print(f"{error}; going on from --resume {resume}")
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
                f"--resume {resume}: {self.folder} has come to step {reached} itself and goes on "
                "from there (to go back, give another --exp-name)"
            )
        return own

    def _own_state(self, state: State, where: Path) -> State:
        """Raises UserError if it is no checkpoint of this run that can be gone on from."""
        if "progress" not in state or "optimizer" not in state:
            raise UserError(
                f"resume: {where} holds a model without the state of its training; give it as "
                "--source-net"
            )
        if state["fingerprint"] != self.config.fingerprint():
            raise UserError(
                f"resume: {where} was written by a run with other settings: "
                f"{difference(self.config, state['config'])}"
            )
        before, now = state.get("data", {}), self.data.identity
        for name in before.keys() & now.keys():  # a folder and an LMDB of it may take turns
            if before[name] != now[name]:
                raise UserError(
                    f"data_dir: the run was trained on {before[name]}; {self.config.data_dir} "
                    f"holds {now[name]}; put the data back, or give another --exp-name"
                )
        check_same_source(self.config, state["source_sha256"], self.source_sha256)
        self.source_sha256 = state["source_sha256"]
        return state

    def _open_folder(self, progress: Progress) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            loader, world = self.data.loader, self.group.world
            for line in self.attempts.changes(world, loader, self._has_local_batch_norm()):
                print(f"warning: {line}")
            settings = self.folder / "config.yml"
            if not settings.exists():
                atomic_write_bytes(settings, self.config.to_yaml().encode())
            self.attempts.start(self.config, self.group, loader, progress.iteration)
        except OSError as error:
            raise result_dir_error(self.folder, error) from None
        for line in self.config.warnings():
            print(f"warning: {line}")
        if self.pruned is not None and self.pruned.layout.dense:
            print(f"kept dense: {', '.join(self.pruned.layout.dense)}")
        begun = f"going on from step {progress.iteration}" if progress.iteration else "starting"
        kind = self.group.device.type
        print(f"{begun}: {self.folder} on {world} x {kind}, loader {loader}", flush=True)

    def _has_local_batch_norm(self) -> bool:
        """Whether training normalises by the statistics of a rank's own part of a batch."""
        if self.config.sync_bn or self.config.freeze_bn:
            return False
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())

    def _loop(self, progress: Progress, log: RunLog) -> Loop:
        config = self.config
        per_epoch = max(1, self.data.batches_per_epoch // config.lower_batches)
        iterations = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
        clock = Clock(iterations, per_epoch)
        ddp = wrap(self.network, self.group.device) if self.group.world > 1 else None
        forward_backward = ForwardBackward(
            config, self.network, ddp, self.group.rank, self.group.device
        )
        step = build_step(
            config, self.network, self.pruned, forward_backward,
            lambda level, start: self.group.counted(self.data.train(level, start)), clock,
            progress.iteration,
        )  # fmt: skip
        return Loop(
            config, self.group, self.data, self.network, self.pruned, step, clock, log,
            self.control, self.stop,
            lambda: self._save(step, progress), lambda: self._save_best(progress), progress,
            self.heartbeat.note_step,
        )  # fmt: skip

    def _state(self, progress: Progress) -> State:
        return model_state(self.config, self.network, self.pruned) | {
            "progress": asdict(progress),
            "data": self.data.identity,
            "source_sha256": self.source_sha256,
        }

    def _save(self, step: TrainingStep, progress: Progress) -> None:
        def write() -> None:
            optimizers = {name: o.state_dict() for name, o in step.optimizers.items()}
            state = self._state(progress) | {"optimizer": optimizers}
            self.checkpoints.save(state, progress.iteration)

        self._write(write)

    def _save_best(self, progress: Progress) -> None:
        def write() -> None:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(self.checkpoints.best, seal(self._state(progress)))

        self._write(write)

    def _finish(self, loop: Loop) -> dict[str, Any]:
        """Final mask, final accuracy, the models and, last, result.json."""
        progress = loop.progress
        follow = self.pruned is not None and self.pruned.followers
        # The final checkpoint tells it: an attempt that begins there cannot measure it again.
        if follow and self.config.exp_mode == "prune" and progress.top1_before_bn_mask is None:
            progress.top1_before_bn_mask = loop.evaluate("test").top1
        final = self._finalise(loop)
        best = best_state = None
        if progress.best_epoch is not None:
            best_state = self.group.ask_first(self._read_best)
        if best_state is None:
            progress.best_epoch = None
            self._save_best(progress)
        else:
            final_state = copy.deepcopy(self._state(progress))
            # On a GPU a repeated epoch may differ from what it was when it was the best.
            progress.best_epoch = best_state["progress"]["best_epoch"]
            restore_model(self.network, self.pruned, best_state, str(self.checkpoints.best))
            best = self._finalise(loop)
            self._save_best(progress)
            restore_model(self.network, self.pruned, final_state, "final model")
        result = self._result(final, best, progress, loop.epochs)
        if progress.top1_before_bn_mask is not None:
            result["top1_before_bn_mask"] = progress.top1_before_bn_mask

        def write() -> None:
            if self.config.save_dense:
                plain = {"state_dict": self.network.state_dict(), "arch": self.config.arch}
                write_checkpoint(self.folder / DENSE, plain)
            # Nothing is left to resume: the optimizers' state would only take space.
            self.checkpoints.save(
                self._state(progress) | {"optimizer": {}}, progress.iteration, keep_before=0
            )
            atomic_write_json(self.folder / "result.json", result)
            print(f"finished: {self.folder} top1 {final.top1:.2f}%", flush=True)

        self._write(write)
        return result

    def _read_best(self) -> State | None:
        """The best epoch's model; None, with a warning, if its file is damaged."""
        try:
            return read_checkpoint(self.checkpoints.best)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            print(f"warning: {error}; the final model takes its place, and best_top1 stays empty")
            return None

    def _finalise(self, loop: Loop) -> Accuracy:
        """The mask is final now: what follows pruned filters becomes zero; test accuracy."""
        if self.pruned is not None:
            self.pruned.write_followers()
            if self.config.recalibrate_bn:
                loop.recalibrate(self.config.recalibrate_bn)
        loop.agree()
        return loop.evaluate("test")

    def _result(
        self, final: Accuracy, best: Accuracy | None, progress: Progress, epochs: int
    ) -> dict[str, Any]:
        config, pruned = self.config, self.pruned
        state = model_state(config, self.network, pruned)
        # The same weights are counted for a dense network as for those pruned from it.
        total = (pruned.layout if pruned else find_prunable(self.network, "unstructured")).size
        kept = pruned.kept() if pruned else total
        weights, mask = split_state(state)
        return {
            "k": float(config.k),
            "kept": kept,
            "total": total,
            "sparsity": 1 - kept / total,
            "top1": final.top1,
            "top5": final.top5,
            "best_top1": best.top1 if best else None,
            "best_epoch": progress.best_epoch,
            "epochs": epochs,
            "seed": config.seed,
            "arch": config.arch,
            "dataset": config.dataset,
            "trainer": config.trainer,
            "layer_type": config.layer_type,
            "mask_sha256": hash_tensors({"mask": mask}) if mask is not None else None,
            "weights_sha256": hash_tensors(weights),
            "source_sha256": self.source_sha256,
            "seconds": progress.seconds,
            "attempts": len(self.attempts.starts()),
        }


def _set_backends(config: RunConfig) -> None:
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
