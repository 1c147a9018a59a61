"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878).

The keep ratio falls from 1 to k by the cubic of their eq. 1, between `mask_start` and `mask_end`
of training. Every `mask_every` steps the mask becomes that of the largest |θ|; pruned weights get
no gradient, and θ keeps their values, so that one may return. Theirs ranks each layer alone; here
--scope says which, one ranking over the network by default, as in later work.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from bip.methods.base import MASK, Method, Parts

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bip.config import RunConfig
    from bip.pruning.choices import ScoreInit
    from bip.training.forward import Report


class GradualMagnitude(Method):
    name = "gmp"
    summary = "prunes the smallest weights little by little while it trains"
    mode = "prune"
    keys = MASK | {"mask_start", "mask_end", "mask_every"}

    @classmethod
    def score_init(cls, config: RunConfig) -> ScoreInit | Literal["scaled"]:
        return "scaled"

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

    def prepare(self) -> None:
        self._prune(Fraction(1))

    def keeps_k(self, done: int) -> bool:
        return done >= self.last

    def step(self, iteration: int) -> list[Report]:
        from bip.training.optim import cubic_ratio

        config, clock, done = self.parts.config, self.parts.clock, iteration + 1
        self.lower.mask_is_final = iteration >= self.last
        reports = self.lower.step(iteration)
        if (self.first < done < self.last and done % config.mask_every == 0) or done == self.last:
            self._prune(cubic_ratio(config, done, clock))
        return reports

    def _prune(self, k: Fraction) -> None:
        self.pruned.rank(self.pruned.weights, self.pruned.counts(k))
