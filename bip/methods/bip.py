"""BiP: bi-level-optimization pruning (Zhang et al., NeurIPS 2022, arXiv 2210.04092, Algorithm A1).

One iteration: the lower level trains θ for the present mask, on the lower batch; then the upper
level moves the scores by the hypergradient of eq. A4, on the upper batch, and updates the mask.
`accelerate` is the published cheaper variant: upper level first, without the implicit term.
With `levels` simultaneous both levels move by the gradient of one batch, which costs one
forward-backward an iteration instead of two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bip.methods.base import MASK, SCORES, Method, Parts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from bip.config import RunConfig
    from bip.training.forward import Report


class Bip(Method):
    name = "bip"
    trainer = "bilevel"
    summary = "trains weights and mask in turn, as two levels"
    mode = "prune"
    keys = (
        MASK | SCORES | {"lr2", "accelerate", "lower_steps", "levels", "mask_until"}
        | {"mask_lr", "mask_lr_schedule", "mask_wd"}
    )  # fmt: skip

    @classmethod
    def lower_batches(cls, config: RunConfig) -> int:
        return config.lower_steps

    @classmethod
    def forward_backwards(cls, config: RunConfig) -> int:
        return config.lower_steps + (config.levels == "alternate")

    @classmethod
    def cost(cls, config: RunConfig, done: int, iterations: int) -> int:
        moving = min(done, cls._final_from(config, iterations))
        return moving * cls.forward_backwards(config) + (done - moving) * config.lower_steps

    @staticmethod
    def _final_from(config: RunConfig, iterations: int) -> int:
        """The first iteration in which the mask does not move any more."""
        return math.ceil(config.mask_until * iterations)

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = parts.config
        self.lower = self.lower_level(repeats=config.lower_steps)
        self.upper = self.upper_level(
            inv_gamma=0.0 if config.accelerate else config.lr2,
            rate="mask_lr",
            weight_decay=config.mask_wd,
            measures_terms=True,
        )

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"lower": self.lower.optimizer, "upper": self.upper.optimizer}

    def step(self, iteration: int) -> list[Report]:
        if iteration >= self._final_from(self.parts.config, self.parts.clock.iterations):
            self.lower.mask_is_final = True
            return self.lower.step(iteration)
        if self.parts.config.levels == "simultaneous":
            return self._step_both(iteration)
        if self.parts.config.accelerate:
            return self.upper.step(iteration) + self.lower.step(iteration)
        return self.lower.step(iteration) + self.upper.step(iteration)

    def _step_both(self, iteration: int) -> list[Report]:
        pruned = self.upper.pruned
        report = self.lower.take_gradient(iteration)
        self.upper.move_scores(iteration)  # by θ as it was in the forward pass
        self.lower.move_weights()  # by m as it was there
        pruned.update_mask()
        pruned.write_z()
        return [report]

    def term_norms(self) -> Tensor | None:
        return self.upper.term_norms

    def facts(self) -> dict[str, float]:
        return self.upper.facts()
