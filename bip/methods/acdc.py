"""AC/DC: dense and sparse phases in turn (Peste et al., NeurIPS 2021, arXiv 2106.12379).

After a dense warm-up, sparse and dense phases of one length alternate; the last dense phase takes
what is left before the last, longer sparse phase, whose mask is final. A sparse phase begins with
the mask of the largest |θ| (the paper's Algorithm 1); a dense phase begins with pruned weights at
zero and without momentum, as the published scripts run it (--reset_momentum_after_recycling).
The defaults are the published phases of ImageNet: 10, 5 and 15 of 100 epochs.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from bip.methods.base import Parts
from bip.methods.over_time import PrunedOverTime
from bip.settings import PRUNING, MethodSettings, setting

if TYPE_CHECKING:
    from bip.config import RunConfig
    from bip.training.forward import Report


class Phases(MethodSettings):
    acdc_warmup: float = setting(
        PRUNING, 0.1, "AC/DC's first dense phase, a fraction of training",
        before=0.1, ge=0, lt=1,
    )  # fmt: skip
    acdc_phase: float = setting(
        PRUNING, 0.05, "AC/DC's phases, each a fraction of training",
        before=0.05, gt=0, lt=1,
    )  # fmt: skip
    acdc_last: float = setting(
        PRUNING, 0.15, "AC/DC's last sparse phase, a fraction of training",
        before=0.15, gt=0, le=1,
    )  # fmt: skip


class AlternatingCompression(PrunedOverTime):
    name = "acdc"
    summary = "trains dense and sparse phases in turn"
    settings = Phases

    @classmethod
    def check(cls, config: RunConfig) -> None:
        given = Phases.of(config)
        if given.acdc_warmup + given.acdc_last > 1:
            raise ValueError(
                f"acdc_last: {given.acdc_last} and acdc_warmup {given.acdc_warmup} are more than "
                "the training; make one of them smaller"
            )

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        given, length = Phases.of(parts.config), parts.clock.iterations
        self.last = min(length - round(given.acdc_last * length), length - 1)
        self.warm = min(round(given.acdc_warmup * length), self.last)
        self.phase = max(1, round(given.acdc_phase * length))

    def prepare(self) -> None:
        self.keep_largest(Fraction(1))

    def is_sparse(self, iteration: int) -> bool:
        """Whether an iteration lies in a sparse phase."""
        if iteration >= self.last:
            return True
        pairs = (self.last - self.warm) // (2 * self.phase)
        number = (iteration - self.warm) // self.phase
        return 0 <= number < 2 * pairs and number % 2 == 0

    def keeps_k(self, done: int) -> bool:
        return self.is_sparse(done - 1)

    def step(self, iteration: int) -> list[Report]:
        sparse = self.is_sparse(iteration)
        was_sparse = iteration > 0 and self.is_sparse(iteration - 1)
        if sparse and not was_sparse:
            self.keep_largest(Fraction(self.parts.config.k))
        elif was_sparse and not sparse:
            self._restore()
        self.lower.mask_is_final = iteration >= self.last
        return self.lower.step(iteration)

    def _restore(self) -> None:
        self.pruned.drop_pruned()
        self.lower.optimizer.state.clear()
        self.keep_largest(Fraction(1))
