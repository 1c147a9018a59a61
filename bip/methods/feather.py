"""Feather (Georgoulakis, Retsinas and Maragos, BMVC 2023, arXiv 2310.02448).

The weights that are trained are dense; the network sees what a threshold operator between soft
and hard leaves of them, sign(w)·(|w|³ − T³)^(1/3) of the largest |w|, where T lies at the cut of
one ranking over the network. The gradient goes straight through the operator, that of pruned
weights times a factor, by default 1, and 0.5 for k < 0.05. T follows the weights at every step,
the keep ratio the cubic of gradual pruning, over the first half of training (`mask_end` 0.5).

All by the published code (github.com/athglentis/feather, sparse_utils.py), but: here T is the
largest |w| that is pruned, there it is interpolated between that and the smallest one kept; there
the gradient's norm is clipped at 3, here `dead_filters` tames what that is for; there the last
step returns the weights above T as they are, here what the operator made of them and was trained.
The dense weights are the scores, so θ is always what the network sees.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

from bip.methods.base import MASK, Parts
from bip.methods.over_time import PrunedInSpan, Span
from bip.settings import PRUNING, setting

if TYPE_CHECKING:
    from bip.training.forward import Report

POWER = 3


class FeatherSettings(Span):
    feather_scale: float | None = setting(
        PRUNING, None, "factor on the gradient of pruned weights (default 1; 0.5 for k < 0.05)",
        ge=0, le=1,
    )  # fmt: skip


class Feather(PrunedInSpan):
    name = "feather"
    summary = "trains dense weights through a threshold operator"
    settings = FeatherSettings
    keys = MASK | {"dead_filters"}
    trains_scores = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        given = FeatherSettings.of(parts.config).feather_scale
        by_k = 0.5 if parts.config.k < Decimal("0.05") else 1.0
        self.scale = by_k if given is None else given

    def prepare(self) -> None:
        self._threshold(Fraction(1))

    def step(self, iteration: int) -> list[Report]:
        report = self.lower.take_gradient(iteration)
        self.pruned.set_straight_gradient(self.scale)
        if self.parts.config.dead_filters == "scaled":
            self.pruned.scale_dead_filters()
        self.lower.optimizer.step()
        self._threshold(self.ratio(iteration + 1))
        return [report]

    def _threshold(self, k: Fraction) -> None:
        self.pruned.keep(self.pruned.counts(k))
        self.pruned.update_mask()
        self.pruned.shrink(POWER)
        self.pruned.write_z()
