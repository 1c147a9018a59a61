"""RigL: sparse from scratch, with weights dropped and grown (Evci et al., ICML 2020, 1911.11134).

The mask starts random, with as many weights in each layer as --scope gives it (`erk` by default,
`layer` is the paper's uniform, but for its dense first layer), and keeps these counts. Every
`mask_every` steps until `mask_end` of training, in place of a gradient step (the paper's
Algorithm 1), each layer drops the fraction f of its smallest |θ| and grows as many of the largest
|g|; f = (α / 2)·(1 + cos(π t / T_end)), α = `rigl_drop` (eq. 1). What was just dropped may grow
again and keeps its value; other grown weights start at zero, without momentum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from bip.methods.base import MASK, Method, Parts

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bip.config import RunConfig
    from bip.pruning.choices import ScoreInit
    from bip.training.forward import Report


class RigL(Method):
    name = "rigl"
    summary = "trains a sparse network from scratch, dropping and growing weights"
    mode = "prune"
    starts_from = "fresh"
    default_scope = "erk"
    keys = MASK | {"mask_start", "mask_end", "mask_every", "rigl_drop"}

    @classmethod
    def score_init(cls, config: RunConfig) -> ScoreInit | Literal["scaled"]:
        return "kaiming_uniform"  # independent of θ and of one another: a random mask

    def __init__(self, parts: Parts) -> None:
        from bip.training.optim import mask_span

        super().__init__(parts)
        assert parts.pruned is not None
        self.pruned = parts.pruned
        self.lower = self.lower_level()
        self.first, self.last = mask_span(parts.config, parts.clock)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"lower": self.lower.optimizer}

    def step(self, iteration: int) -> list[Report]:
        self.lower.mask_is_final = iteration >= self.last
        report = self.lower.take_gradient(iteration)
        in_span = self.first <= iteration < self.last
        if in_span and iteration % self.parts.config.mask_every == 0:
            self._replace(iteration)
        else:
            self.lower.update()
        return [report]

    def _replace(self, iteration: int) -> None:
        """Drop the smallest kept weights and grow as many of the largest gradients."""
        alpha = self.parts.config.rigl_drop
        fraction = alpha / 2 * (1 + math.cos(math.pi * iteration / self.last))
        grown = self.pruned.replace(fraction)
        for state in self.lower.optimizer.state.get(self.pruned.weights, {}).values():
            if getattr(state, "shape", None) == grown.shape:
                state.mul_(~grown)
