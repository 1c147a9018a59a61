"""The step loop: the same for every method."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from bip.data.batches import Data
from bip.distributed.compare import check_finite, compare_ranks, run_state
from bip.distributed.control import Control
from bip.distributed.group import Group
from bip.distributed.heartbeat import Heartbeat
from bip.distributed.signals import StopRequest, signal_name
from bip.errors import Stopped, UserError
from bip.methods.base import Method, Parts
from bip.pruning.facts import layer_facts
from bip.run_folder import Progress, RunFolder
from bip.training.checkpoint import State, model_state
from bip.training.evaluate import Accuracy, average_statistics, evaluate, share_statistics
from bip.training.forward import reseed
from bip.training.metrics import RunLog, RunningMean, Throughput, peak_memory
from bip.training.stopwatch import Stopwatch


@dataclass
class Loop:
    """One run's training, from `progress` to the end of the clock."""

    parts: Parts
    method: Method
    data: Data
    group: Group
    control: Control
    stop: StopRequest
    heartbeat: Heartbeat
    folder: RunFolder
    progress: Progress
    log: RunLog
    stopwatch: Stopwatch
    saved_at: int = 0
    spent_before: int = 0  # forward-backwards of the pruning that the run goes on from

    def __post_init__(self) -> None:
        self.config, self.clock = self.parts.config, self.parts.clock
        self.network, self.pruned = self.parts.network, self.parts.pruned
        self.mask_before: Tensor | None = None  # at the last epoch's end; None: not known
        self.empty: list[str] = []  # layers of which nothing is kept
        epoch = None if "rewind_epoch" in self.config.idle() else self.config.rewind_epoch
        self.rewind_at = None if epoch is None else epoch * self.clock.per_epoch
        if (self.rewind_at or 0) > self.clock.iterations:
            raise UserError(
                f"rewind_epoch: epoch {epoch} ends after step {self.rewind_at}, but the last step "
                f"is {self.clock.iterations}; give an earlier epoch"
            )

    def run(self) -> None:
        """Train to the end.

        Raises Stopped when a rank received a signal: on every rank, at the same iteration, with a
        checkpoint saved.
        """
        train_mode(self.network, self.config.freeze_bn)
        self.saved_at = self.progress.iteration
        if signal := self.control.ask(self.stop.signal):
            self._stop(signal)
        self._end_epoch_if_due()
        started, before = time.monotonic(), self.progress.seconds
        saved = started
        self.stopwatch.sample(self.clock.per_epoch)
        if self.progress.iteration == 0:
            self.method.prepare()
            self._keep_to_rewind_if_due()
        if self.progress.iteration % self.clock.per_epoch == 0:
            self._note_mask()
        means, speed = RunningMean(), Throughput(self.group.world)  # without `prepare`
        for iteration in range(self.progress.iteration, self.clock.iterations):
            with self.stopwatch.step(iteration):
                reports = self.method.step(iteration)
            means.add(reports)
            speed.add(reports)
            done = self.progress.iteration = iteration + 1
            self.progress.seconds = before + time.monotonic() - started
            self.heartbeat.note_step(done)
            due = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
            proof = self.pruned.proof if self.pruned is not None else None
            posted = self.control.post(self.stop.signal, due, proof)
            if self.clock.is_due(done, self.config.print_freq):
                self._report(done, means.take(self.group))
            if posted.stop:
                self._stop(posted.stop)
            if self.config.check_ranks and done % self.config.check_ranks == 0:
                self._compare_ranks(buffers=self.config.freeze_bn)
            self._keep_to_rewind_if_due()
            if posted.save or self.clock.is_due(done, self.clock.per_epoch):
                with means.paused(), speed.paused():
                    if self.clock.is_due(done, self.clock.per_epoch):
                        self._report_cost(done, speed.take())
                    if posted.save or done == self.clock.iterations:
                        self._checkpoint()
                        saved = time.monotonic()
                    self._end_epoch_if_due()

    def _keep_to_rewind_if_due(self) -> None:
        """Before the iteration's checkpoint, so that an attempt that resumes there has done it."""
        if self.progress.iteration == self.rewind_at:
            self.control.finish()
            self.folder.save_model(self.state, self.config.rewind_model)

    def _stop(self, signal: int) -> NoReturn:
        """Save this iteration, if it is not saved yet, and raise Stopped."""
        self.control.finish()
        if self.saved_at != self.progress.iteration:
            self._checkpoint()
        raise Stopped(signal_name(signal), self.progress.iteration)

    def _report(self, done: int, means: dict[str, float]) -> None:
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"loss: {means['loss']} at step {done}; training diverged, lower lr or mask_lr "
                "(the last checkpoint is kept)"
            )
        if self.pruned is not None:
            self.pruned.check()
        values: dict[str, float] = {"epoch": self._epoch_of(done), **means}
        values |= self._rates() | self.method.facts()
        text = (
            f"epoch {values['epoch']}/{self.epochs} step {done}/{self.clock.iterations} "
            f"loss {means['loss']:.4f} top1 {means['top1']:.2f}% "
            f"{means['images_per_second']:.0f} images/s"
        )
        length = {"epochs": self.epochs, "steps": self.clock.iterations}
        self.log.record("step", done, text, **length, seconds=self.progress.seconds, **values)

    def _epoch_of(self, done: int) -> int:
        return (done - 1) // self.clock.per_epoch + 1

    def _rates(self) -> dict[str, float]:
        rates = {name: o.param_groups[0]["lr"] for name, o in self.method.optimizers.items()}
        return {f"{name}_lr": rate for name, rate in rates.items()}

    def _report_cost(self, done: int, images_per_second: float) -> None:
        """Where the epoch's time went, on rank 0."""
        parts = self.stopwatch.take() | self.parts.forward_backward.exchange_seconds()
        seconds = {f"{part}_seconds": took for part, took in parts.items()}
        self.log.record(
            "cost", done, "", epoch=self._epoch_of(done), images_per_second=images_per_second,
            **seconds, peak_memory_bytes=peak_memory(self.group.device), **self._rates(),
        )  # fmt: skip

    def _report_layers(self, done: int, epoch: int) -> None:
        if self.pruned is not None and self.group.is_first:
            facts = layer_facts(self.pruned, self.mask_before, self.method.term_norms())
            self.log.record("layers", done, "", epoch=epoch, **facts)
        self._note_mask()

    def _note_mask(self) -> None:
        """Keep the mask, to count at the next epoch's end what has changed."""
        if self.pruned is not None and self.group.is_first:
            self.mask_before = self.pruned.mask.clone()

    @property
    def epochs(self) -> int:
        """Epochs of training, including a last one that is cut short."""
        return -(-self.clock.iterations // self.clock.per_epoch)

    def _end_epoch_if_due(self) -> None:
        """Evaluate at the end of an epoch (every `eval_every`) and of training, once."""
        done = self.progress.iteration
        last = done == self.clock.iterations
        epoch = -(-done // self.clock.per_epoch)
        if done == self.progress.evaluated or not (last or done % self.clock.per_epoch == 0):
            return
        self._report_layers(done, epoch)
        if epoch % self.config.eval_every == 0 or last:
            self.control.finish()
            self.agree()
            self._end_epoch(epoch)
        self.progress.evaluated = done

    def _end_epoch(self, epoch: int) -> None:
        self._warn_of_empty_layers()
        test = self.evaluate("test")
        values: dict[str, Any] = {"top1": test.top1, "top5": test.top5, "loss": test.loss}
        text = f"epoch {epoch}/{self.epochs} test top1 {test.top1:.2f}% top5 {test.top5:.2f}%"
        if self.config.holdout:
            held = self.evaluate("holdout")
            values["holdout_top1"] = held.top1
            text += f" holdout top1 {held.top1:.2f}%"
            best = self.progress.best_holdout
            if self.method.keeps_k(self.progress.iteration) and (best is None or held.top1 > best):
                self.progress.best_holdout, self.progress.best_epoch = held.top1, epoch
                self.folder.save_best(self.state)
        self.log.record(
            "epoch", self.progress.iteration, text, epoch=epoch, epochs=self.epochs, **values
        )

    def _warn_of_empty_layers(self) -> None:
        empty = self.pruned.empty_layers() if self.pruned is not None else []
        if empty != self.empty and empty and self.group.is_first:
            print(
                f"warning: layer collapse: nothing is kept of {', '.join(empty)}; give a larger k, "
                "or --scope layer",
                flush=True,
            )
        self.empty = empty

    def evaluate(self, split: Literal["test", "holdout"]) -> Accuracy:
        """Accuracy of the present network on "test" or "holdout".

        Raises Stopped when a rank received a signal meanwhile, after saving.
        """
        size = self.data.eval_size(split)
        # Ranks may differ by one batch. Polling is collective, so only at batches that all have.
        polls = iter(range(size // self.group.world // self.data.eval_batch))

        def poll() -> None:
            if next(polls, None) is not None and (signal := self.control.ask(self.stop.signal)):
                self._stop(signal)

        return evaluate(
            self.network, self.data.evaluate(split), size, self.group,
            bf16=self.config.precision == "bf16", poll=poll,
        )  # fmt: skip

    def recalibrate(self, batches: int) -> None:
        """Estimate batch-norm statistics again, on the next `batches` training batches.

        Every rank takes its share; the statistics are the mean over ranks.
        """
        first = self.clock.iterations * self.method.lower_batches(self.config)
        stream = self.data.train("lower", first)
        reseed(self.config.order_seed, first, "lower", self.group.rank)
        taken = self.group.counted(itertools.islice(stream, batches))
        torch.optim.swa_utils.update_bn((images for images, _ in taken), self.network)
        average_statistics(self.network, self.group)

    def _checkpoint(self) -> None:
        self.control.finish()
        self.agree()
        check_finite(self._tensors(buffers=True), self.progress.iteration)
        self.folder.save(self._state_to_resume, self.progress.iteration)
        self.saved_at = self.progress.iteration

    def agree(self) -> None:
        """Give all ranks rank 0's running statistics; raise RankError if other state differs.

        Frozen statistics are equal on all ranks, so they are compared too.
        """
        if not self.config.freeze_bn:
            share_statistics(self.network, self.group)
        self._compare_ranks(buffers=True)

    def _compare_ranks(self, buffers: bool) -> None:
        compare_ranks(self._tensors(buffers), self.group)

    def _tensors(self, buffers: bool) -> Iterator[tuple[str, Tensor]]:
        return run_state(self.network, self.pruned, self.method.optimizers, buffers)

    @property
    def forward_backwards(self) -> int:
        """Done so far, those of the pruning that the run goes on from included."""
        own = self.method.start_cost(self.config)
        own += self.method.cost(self.config, self.progress.iteration, self.clock.iterations)
        return self.spent_before + own

    def state(self) -> State:
        """The content of a model's file: the network, its mask, settings and progress."""
        return model_state(self.config, self.network, self.pruned) | {
            "progress": asdict(self.progress),
            "epoch": self.progress.iteration // self.clock.per_epoch,
            "data": self.data.identity,
            "forward_backwards": self.forward_backwards,
        }

    def _state_to_resume(self) -> State:
        optimizers = {name: o.state_dict() for name, o in self.method.optimizers.items()}
        return self.state() | {"optimizer": optimizers}

    def load_optimizers(self, state: State) -> None:
        """Load the optimizers of a checkpoint; that of a finished run has none."""
        if self.progress.iteration < self.clock.iterations:
            for name, optimizer in self.method.optimizers.items():
                optimizer.load_state_dict(state["optimizer"][name])


def train_mode(network: nn.Module, freeze_bn: bool) -> None:
    """Set training mode, in which frozen batch-norm uses its running statistics unchanged."""
    network.train()
    if freeze_bn:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
