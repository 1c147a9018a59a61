"""Pruning while it trains: what methods share whose mask, or k, changes over time.

They own one level, which trains the weights, and rank |θ|. The keep ratio may fall from 1 to k by
the cubic of Zhu and Gupta (arXiv 1710.01878, eq. 1), over the span from `mask_start` to `mask_end`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from bip.methods.base import FirstScores, Method, Mode, Parts
from bip.settings import PRUNING, MethodSettings, Positive, setting

if TYPE_CHECKING:
    from bip.config import RunConfig


class Span(MethodSettings):
    mask_start: float = setting(
        PRUNING, 0.0, "fraction of training done when the mask starts to change",
        before=0.0, ge=0, lt=1,
    )  # fmt: skip
    mask_end: float = setting(
        PRUNING, 0.75, "fraction of training done when the mask, or k, is final",
        before=0.75, gt=0, le=1,
    )  # fmt: skip


class SpanInSteps(Span):
    mask_every: Positive = setting(
        PRUNING, 100, "steps between changes of the mask (gmp, rigl)", before=100
    )


class PrunedOverTime(Method):
    """Trains one level for a mask that it changes itself."""

    mode: ClassVar[Mode] = "prune"
    score_init: ClassVar[FirstScores | None] = "scaled"
    trains_scores: ClassVar[bool] = False  # in place of θ

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        assert parts.pruned is not None
        self.pruned = parts.pruned
        self.lower = self.lower_level(owned=parts.pruned.scores if self.trains_scores else None)

    def keep_largest(self, k: Fraction) -> None:
        """The mask of the largest |θ|, and z."""
        self.pruned.rank(self.pruned.weights, self.pruned.counts(k))


class PrunedInSpan(PrunedOverTime):
    """The mask changes after `first` and up to `last` iterations done."""

    settings: ClassVar[type[MethodSettings]] = Span

    @classmethod
    def check(cls, config: RunConfig) -> None:
        span = Span.of(config)
        if span.mask_start >= span.mask_end:
            raise ValueError(f"mask_end: {span.mask_end} is not after mask_start {span.mask_start}")

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        span, length = Span.of(parts.config), parts.clock.iterations
        self.first = round(span.mask_start * length)
        self.last = max(1, self.first, round(span.mask_end * length))

    def keeps_k(self, done: int) -> bool:
        return done >= self.last

    def ratio(self, done: int) -> Fraction:
        """The keep ratio of the cubic after `done` iterations, exact.

        1 − k_t = (1 − k)·(1 − (1 − (t − t_0) / (n Δt))³)
        """
        first, last = self.first, self.last
        left = Fraction(last - done, last - first) if first < last else Fraction(done < last)
        k = Fraction(self.parts.config.k)
        return k + (1 - k) * min(max(left, Fraction(0)), Fraction(1)) ** 3
