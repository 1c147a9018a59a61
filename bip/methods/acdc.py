"""AC/DC: dense and sparse phases in turn (Peste et al., NeurIPS 2021, arXiv 2106.12379).

After a dense warm-up, sparse and dense phases of one length alternate; the last dense phase takes
what is left before the last, longer sparse phase, whose mask is final. A sparse phase begins with
the mask of the largest |θ| (the paper's Algorithm 1); a dense phase begins with pruned weights at
zero and without momentum, as the published scripts run it (--reset_momentum_after_recycling).
The defaults are the published phases of ImageNet: 10, 5 and 15 of 100 epochs.
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


class AlternatingCompression(Method):
    name = "acdc"
    summary = "trains dense and sparse phases in turn"
    mode = "prune"
    keys = MASK | {"acdc_warmup", "acdc_phase", "acdc_last"}

    @classmethod
    def score_init(cls, config: RunConfig) -> ScoreInit | Literal["scaled"]:
        return "scaled"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        assert parts.pruned is not None
        self.pruned = parts.pruned
        config, length = parts.config, parts.clock.iterations
        self.lower = self.lower_level()
        self.last = min(length - round(config.acdc_last * length), length - 1)
        self.warm = min(round(config.acdc_warmup * length), self.last)
        self.phase = max(1, round(config.acdc_phase * length))

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"lower": self.lower.optimizer}

    def prepare(self) -> None:
        self._rank(Fraction(1))

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
            self._rank(Fraction(self.parts.config.k))
        elif was_sparse and not sparse:
            self._restore()
        self.lower.mask_is_final = iteration >= self.last
        return self.lower.step(iteration)

    def _restore(self) -> None:
        self.pruned.drop_pruned()
        self.lower.optimizer.state.clear()
        self._rank(Fraction(1))

    def _rank(self, k: Fraction) -> None:
        self.pruned.rank(self.pruned.weights, self.pruned.counts(k))
