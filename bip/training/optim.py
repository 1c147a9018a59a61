"""Optimizers and schedules of both levels. An optimizer owns only its level's tensors."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bip.config import RunConfig
from bip.settings import Schedule


def schedule_factor(schedule: Schedule, done: float, drops: Sequence[float]) -> float:
    """The factor on the learning rate when the fraction `done` in [0, 1) of training is done.

    cosine: half a period from 1, reaching 0 at the end. step: a tenth from each of `drops` on.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return float(0.1 ** sum(done >= drop for drop in drops))


@dataclass(frozen=True)
class Clock:
    """The length of training: iterations in all, and per epoch."""

    iterations: int
    per_epoch: int

    def is_due(self, done: int, every: int) -> bool:
        """Whether `done` iterations are a multiple of `every`, or all of them."""
        return done % every == 0 or done == self.iterations


def lower_rate(config: RunConfig, iteration: int, clock: Clock) -> float:
    """`lr` at an iteration: the warm-up epochs, then the schedule over what remains."""
    warm = config.warmup_epochs * clock.per_epoch
    if iteration < warm:
        return config.lr * (iteration + 1) / warm if config.warmup == "linear" else config.warmup_lr
    done = (iteration - warm) / (clock.iterations - warm)
    return config.lr * schedule_factor(config.lr_schedule, done, config.drops)


def split_parameters(
    network: nn.Module, prunable: Iterable[nn.Parameter] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that are not `prunable`, as (batch-norm affine, all others)."""
    taken = {id(parameter) for parameter in prunable}
    norm: list[nn.Parameter] = []
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norm += [p for p in module.parameters(recurse=False) if id(p) not in taken]
    taken |= {id(parameter) for parameter in norm}
    return norm, [p for p in network.parameters() if id(p) not in taken]


def build_optimizer(
    config: RunConfig,
    parameters: Sequence[nn.Parameter],
    norm: Sequence[nn.Parameter] = (),
    weight_decay: float | None = None,
) -> torch.optim.Optimizer:
    """The configured torch.optim optimizer over `parameters` and batch-norm affine `norm`."""
    decay = config.wd if weight_decay is None else weight_decay
    groups = [
        {"params": list(parameters), "weight_decay": decay},
        {"params": list(norm), "weight_decay": decay if config.bn_wd else 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
