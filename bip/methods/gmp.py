"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878).

The keep ratio falls from 1 to k by the cubic of their eq. 1, between `mask_start` and `mask_end`
of training. Every `mask_every` steps the mask becomes that of the largest |θ|; pruned weights get
no gradient, and θ keeps their values, so that one may return. Theirs ranks each layer alone; here
--scope says which, one ranking over the network by default, as in later work.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from bip.methods.base import Parts
from bip.methods.over_time import PrunedInSpan, SpanInSteps

if TYPE_CHECKING:
    from bip.training.forward import Report


class GradualMagnitude(PrunedInSpan):
    name = "gmp"
    summary = "prunes the smallest weights little by little while it trains"
    settings = SpanInSteps

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.every = SpanInSteps.of(parts.config).mask_every

    def prepare(self) -> None:
        self.keep_largest(Fraction(1))

    def step(self, iteration: int) -> list[Report]:
        done = iteration + 1
        self.lower.mask_is_final = iteration >= self.last
        reports = self.lower.step(iteration)
        if (self.first < done < self.last and done % self.every == 0) or done == self.last:
            self.keep_largest(self.ratio(done))
        return reports
