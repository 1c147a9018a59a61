"""Dense training: a plain step on every parameter. Other methods prune the network it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bip.methods.base import Method, Mode, Parts, Start

if TYPE_CHECKING:
    from bip.training.forward import Report


class Dense(Method):
    name = "dense"
    trainer = "base"
    summary = "trains a dense network"
    mode: ClassVar[Mode] = "pretrain"
    starts_from: ClassVar[Start] = "fresh"
    has_mask = False
    keys = frozenset({"k", "scale_rand_init", "rewind_epoch"})

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.lower = self.lower_level()

    def step(self, iteration: int) -> list[Report]:
        return self.lower.step(iteration)
