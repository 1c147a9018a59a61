"""One run, composed of its parts. `Run.train` lists the stages."""

import os
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from bip.building import build_network, build_pruned
from bip.config import RunConfig, check_inputs
from bip.data.batches import open_data
from bip.data.options import DataOptions
from bip.data.splits import stage_data
from bip.distributed.control import Control
from bip.distributed.group import Group, wrap
from bip.distributed.heartbeat import Heartbeat
from bip.distributed.rendezvous import MEETING, join
from bip.distributed.signals import StopRequest
from bip.errors import UserError
from bip.identity import (
    check_source,
    compare_starts,
    is_pruned,
    start_facts,
    with_source_of_resume,
)
from bip.methods.base import Parts
from bip.run_folder import Progress, RunFolder, read_result
from bip.training import sources
from bip.training.checkpoint import State, read_checkpoint, restore_model
from bip.training.finish import finish
from bip.training.forward import ForwardBackward
from bip.training.loop import Loop
from bip.training.metrics import RunLog
from bip.training.optim import Clock
from bip.training.stopwatch import Stopwatch

STAGING = timedelta(hours=12)  # that nodes wait for a node that copies its data


def train(config: RunConfig, stop: StopRequest | None = None) -> dict[str, Any]:
    """Run `config` to its end in its run folder and return its result.

    A finished run is not run again; an interrupted one resumes from its newest checkpoint.
    With `evaluate` nothing is trained or written. Raises UserError for bad input, before anything
    is created; Stopped when `stop` was set and the state is saved; RankError when ranks disagree
    or one has ended.
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
        # Only rank 0 reads it: an ending attempt may write it between the reads of two ranks.
        finished = group.ask_first(lambda: read_result(config))
        if finished is not None and not config.evaluate:
            result = dict(finished)
            group.barrier()
        else:
            run = Run(config, group, stop, heartbeat)
            result = run.evaluate() if config.evaluate else run.train()
    group.close()
    return result


class Run:
    """The parts of one run on this rank. `__init__` reads and checks all input, writes nothing."""

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        stop: StopRequest | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.config, self.group, self.stop = config, group, stop or StopRequest()
        self.heartbeat = heartbeat or Heartbeat(group, config.rank_timeout)
        self.folder = RunFolder(config, group, self.stop, self.heartbeat)
        config.batch_per_rank(group.world)
        if config.sync_bn and group.device.type != "cuda":
            raise UserError("sync_bn: needs GPUs; leave --sync-bn out on the CPU")
        _set_backends(config)
        compare_starts(start_facts(config, group), group)
        self.source = self.folder.read_source()
        with group.together():
            options = DataOptions.of(config)
            self.data = open_data(options, group.rank, group.world, group.device)
            self.network, self.source = build_network(config, self.data, group, self.source)
        self.folder.data_identity = self.data.identity
        compare_starts(self.data.identity | {"loader": self.data.loader}, group)
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            group.broadcast_(tensor.data)
        self.pruned = build_pruned(config, self.network, self.data, group, self.source)
        self.control = Control(group)
        if group.is_first and self.source is not None:
            for line in sources.notes(self.source, config, self.pruned):
                print(line)

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of --source-net, or of the checkpoint of --resume, on the test images."""
        with self.heartbeat.watching():
            if (resume := self.config.resume) is not None:
                state = self.group.ask_first(lambda: read_checkpoint(resume))
                check_source(self.config, state, "resume")
                restore_model(self.network, self.pruned, state, str(resume))
                if self.pruned is not None:
                    self.pruned.write_followers()
            loop = self.loop(Progress(), RunLog(self.folder.path, active=False))
            loop.agree()
            accuracy = loop.evaluate("test")
            self.group.barrier()
            self.heartbeat.stop()
        if self.group.is_first:
            print(accuracy.line)
        return {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}

    def train(self) -> dict[str, Any]:
        """Train from the start or the newest checkpoint to the end; write and return the result."""
        folder = self.folder
        with self.heartbeat.watching(), folder.in_use():
            if (finished := folder.take()) is not None:
                return finished
            state = folder.furthest()
            progress = self._resume(state)
            dense = self.pruned.layout.dense if self.pruned is not None else ()
            local = self._has_local_batch_norm()
            folder.open(progress.iteration, self.data.loader, local, dense)
            with folder.attempt(progress), folder.log(progress) as log, closing(self.data):
                loop = self.loop(progress, log)
                if state is not None:
                    loop.load_optimizers(state)
                del state
                loop.run()
                log.result = finish(loop)
                return log.result

    def _resume(self, state: State | None) -> Progress:
        if state is None:
            return Progress()
        restore_model(self.network, self.pruned, state, str(self.folder.checkpoints.folder))
        return Progress(**state["progress"])

    def _spent_before(self) -> int:
        """Forward-backwards from the dense network to the pruned one that the run starts from."""
        before = self.source or {}
        return int(before.get("forward_backwards", 0)) if is_pruned(before.get("config", {})) else 0

    def _has_local_batch_norm(self) -> bool:
        """Whether batch-norm uses the statistics of each rank's own part of a batch."""
        if self.config.sync_bn or self.config.freeze_bn:
            return False
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())

    def loop(self, progress: Progress, log: RunLog) -> Loop:
        """The step loop from `progress` on, with the configured method."""
        config, group = self.config, self.group
        method = config.method
        per_epoch = max(1, self.data.batches_per_epoch // method.lower_batches(config))
        iterations = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
        if config.budget is not None:
            iterations = method.iterations_of(config, config.budget)
        ddp = wrap(self.network, group.device) if group.world > 1 else None
        watch = Stopwatch(group.device)
        group.timed = watch.part
        if self.pruned is not None:
            self.pruned.timed = watch.part
        parts = Parts(
            config, self.network, self.pruned,
            ForwardBackward(config, self.network, ddp, group.rank, group.device, watch),
            lambda level, start: watch.timed("data", group.counted(self.data.train(level, start))),
            Clock(iterations, per_epoch), progress.iteration,
            lambda values: group.sum_(values).div_(group.world),
        )  # fmt: skip
        return Loop(
            parts, method(parts), self.data, group, self.control, self.stop, self.heartbeat,
            self.folder, progress, log, watch, spent_before=self._spent_before(),
        )  # fmt: skip


def _set_backends(config: RunConfig) -> None:
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
