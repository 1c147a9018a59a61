"""Fine-tuning: the lower level alone, on the weights that a final mask keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bip.methods.base import Method, Mode, Parts, Start

if TYPE_CHECKING:
    from bip.training.forward import Report


class Finetune(Method):
    name = "finetune"
    trainer = "base"
    summary = "trains the kept weights of a pruned network"
    mode: ClassVar[Mode] = "finetune"
    starts_from: ClassVar[Start] = "pruned"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.lower = self.lower_level(mask_is_final=True)

    def step(self, iteration: int) -> list[Report]:
        return self.lower.step(iteration)
