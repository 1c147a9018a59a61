"""The training steps: pretraining, fine-tuning, HYDRA and BiP. Each is one call per iteration."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bip.config import RunConfig
from bip.pruning.state import PrunedParameters
from bip.training.optim import (
    Clock,
    build_optimizer,
    lower_rate,
    mask_rate,
    set_rate,
    split_parameters,
)

Batch = tuple[Tensor, Tensor]
LEVELS = {"lower": 0, "upper": 1}


@dataclass(frozen=True)
class Report:
    """What one forward-backward saw on this rank, still on the device: loss sum, hits, images."""

    loss: Tensor
    correct: Tensor
    count: int


class ForwardBackward:
    """One forward-backward over this rank's part of a global batch, on the plain network.

    Leaves the gradient of the global mean loss in the parameters' .grad, on every rank.
    `ddp` is the network in DistributedDataParallel where there are several ranks.
    """

    def __init__(
        self, config: RunConfig, network: nn.Module, ddp: DistributedDataParallel | None,
        rank: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.network, self.ddp, self.rank, self.device = (
            config, network, ddp, rank, device,
        )  # fmt: skip
        forward = ddp or network
        self.forward = torch.compile(forward) if config.compile else forward

    def __call__(self, batch: Batch, level: str, step: int) -> Report:
        """Run on `batch` = (images (b, C, H, W), labels (b,)), in `accumulate` micro-batches."""
        parts = self.config.accumulate
        reseed(self.config.seed, step, level, self.rank)
        self.network.zero_grad(set_to_none=True)
        images, labels = batch[0].chunk(parts), batch[1].chunk(parts)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for part, (x, y) in enumerate(zip(images, labels, strict=True)):
            with self._sync_only(last=part == parts - 1):
                # A context per forward: a cached bf16 cast of z would outlive z's rewriting.
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
                ):
                    output = self.forward(x)
                    loss = F.cross_entropy(output, y, label_smoothing=self.config.label_smoothing)
                (loss / parts).backward()
            loss_sum += loss.detach() * len(y)
            correct += (output.detach().argmax(1) == y).sum()
        return Report(loss_sum, correct, len(batch[1]))

    def _sync_only(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()


def reseed(seed: int, step: int, level: str, rank: int) -> None:
    """Dropout is a function of these four, so no generator needs saving."""
    key = np.random.SeedSequence([seed, step, LEVELS[level], rank])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class TrainingStep(Protocol):
    """One iteration of a method, by its number. `optimizers` is what a checkpoint keeps of it."""

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...

    def __call__(self, iteration: int) -> list[Report]: ...


@dataclass
class PretrainStep:
    """The plain step: every parameter, no mask, no scores."""

    run: ForwardBackward
    batches: Iterator[Batch]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"lower": self.optimizer}

    def __call__(self, iteration: int) -> list[Report]:
        set_rate(self.optimizer, self.rate(iteration))
        report = self.run(next(self.batches), "lower", iteration)
        self.optimizer.step()
        return [report]


@dataclass
class LowerStep(PretrainStep):
    """`repeats` steps on θ, biases and batch-norm under the mask as it is.

    Alone it is fine-tuning: the mask is final, and what follows a pruned filter stays zero.
    """

    pruned: PrunedParameters
    repeats: int = 1
    mask_is_final: bool = True

    def __call__(self, iteration: int) -> list[Report]:
        set_rate(self.optimizer, self.rate(iteration))
        reports = []
        for draw in range(iteration * self.repeats, (iteration + 1) * self.repeats):
            reports.append(self.run(next(self.batches), "lower", draw))
            self.pruned.set_lower_gradient()
            self.optimizer.step()
            self.pruned.write_z()
            if self.mask_is_final:
                self.pruned.write_followers()
        return reports


@dataclass
class UpperStep(PretrainStep):
    """One step on the scores, then the mask; θ as it is. Alone, with 1/γ = 0, it is HYDRA."""

    pruned: PrunedParameters
    inv_gamma: float
    measures: Callable[[int], bool] = lambda _iteration: False
    term_norms: Tensor | None = None

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"upper": self.optimizer}

    def __call__(self, iteration: int) -> list[Report]:
        set_rate(self.optimizer, self.rate(iteration))
        report = self.run(next(self.batches), "upper", iteration)
        if self.measures(iteration):
            self.term_norms = self.pruned.term_norms(self.inv_gamma)
        self.pruned.set_upper_gradient(self.inv_gamma)
        self.optimizer.step()
        self.pruned.update_mask_and_z()
        return [report]


@dataclass
class BilevelStep:
    """One BiP iteration: lower, then upper; the other way round where `upper_first`."""

    lower: LowerStep
    upper: UpperStep
    upper_first: bool = False

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.lower.optimizers | self.upper.optimizers

    def __call__(self, iteration: int) -> list[Report]:
        first: TrainingStep
        second: TrainingStep
        first, second = (self.upper, self.lower) if self.upper_first else (self.lower, self.upper)
        return first(iteration) + second(iteration)


def build_step(
    config: RunConfig,
    network: nn.Module,
    pruned: PrunedParameters | None,
    run: ForwardBackward,
    batches: Callable[[str, int], Iterator[Batch]],
    clock: Clock,
    start: int = 0,
) -> TrainingStep:
    """The configured method's step, its batches beginning at iteration `start`.

    Here alone it is decided who owns what. BiP: the lower optimizer θ, biases and batch-norm,
    the upper one the scores. HYDRA: the upper one scores and batch-norm; biases stay frozen.
    `batches(level, number)` yields a level's batches from the given number on.
    """
    norm, others = split_parameters(network, pruned.z if pruned else ())
    trained_norm = [] if config.freeze_bn else norm

    def rate(iteration: int) -> float:
        return lower_rate(config, iteration, clock)

    if pruned is None:
        optimizer = build_optimizer(config, others, trained_norm)
        return PretrainStep(run, batches("lower", start), optimizer, rate)

    if config.method == "hydra":
        optimizer = build_optimizer(config, [pruned.scores], trained_norm)
        return UpperStep(run, batches("upper", start), optimizer, rate, pruned, inv_gamma=0.0)

    finetune = config.method == "finetune"
    repeats = 1 if finetune else config.lower_steps
    optimizer = build_optimizer(config, [pruned.weights, *others], trained_norm)
    lower = LowerStep(
        run, batches("lower", start * repeats), optimizer, rate, pruned, repeats, finetune
    )
    if finetune:
        return lower
    upper = UpperStep(
        run,
        batches("upper", start),
        build_optimizer(config, [pruned.scores], weight_decay=config.mask_wd),
        lambda iteration: mask_rate(config, iteration, clock),
        pruned,
        inv_gamma=0.0 if config.accelerate else config.lr2,
        measures=lambda iteration: clock.is_due(iteration + 1, config.print_freq),
    )
    return BilevelStep(lower, upper, upper_first=config.accelerate)
