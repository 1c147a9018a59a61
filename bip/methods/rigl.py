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
from typing import TYPE_CHECKING

from bip.methods.base import Parts
from bip.methods.over_time import PrunedInSpan, SpanInSteps
from bip.pruning.choices import PATTERNS
from bip.settings import PRUNING, setting

if TYPE_CHECKING:
    from bip.config import RunConfig
    from bip.training.forward import Report


class RigLSettings(SpanInSteps):
    rigl_drop: float = setting(
        PRUNING, 0.3, "fraction of kept weights that RigL replaces at first",
        before=0.3, ge=0, lt=1,
    )  # fmt: skip


class RigL(PrunedInSpan):
    name = "rigl"
    summary = "trains a sparse network from scratch, dropping and growing weights"
    starts_from = "fresh"
    default_scope = "erk"
    score_init = "kaiming_uniform"  # independent of θ and of one another: a random mask
    settings = RigLSettings

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        if config.layer_type in PATTERNS:
            raise ValueError(
                f"layer_type: rigl replaces a part of each ranking, and {config.layer_type} ranks "
                "too few weights; give unstructured, or another --trainer such as gmp"
            )

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.own = RigLSettings.of(parts.config)

    def keeps_k(self, done: int) -> bool:
        return True

    def step(self, iteration: int) -> list[Report]:
        self.lower.mask_is_final = iteration >= self.last
        report = self.lower.take_gradient(iteration)
        in_span = self.first <= iteration < self.last
        if in_span and iteration % self.own.mask_every == 0:
            self._replace(iteration)
        else:
            self.lower.update()
        return [report]

    def _replace(self, iteration: int) -> None:
        """Drop the smallest kept weights and grow as many of the largest gradients."""
        fraction = self.own.rigl_drop / 2 * (1 + math.cos(math.pi * iteration / self.last))
        grown = self.pruned.replace(fraction)
        for state in self.lower.optimizer.state.get(self.pruned.weights, {}).values():
            if getattr(state, "shape", None) == grown.shape:
                state.mul_(~grown)
