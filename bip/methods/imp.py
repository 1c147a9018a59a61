"""Iterative magnitude pruning: in rounds, keep the largest weights of those that are left.

Frankle & Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635). A run is one round: it starts
from the round before it, or from the dense network, and the k of a series are its rounds (20% of
the rest each, in the published series). Then the weights go on as they are with the learning-rate
schedule from its start (`--rewind lr`: Renda, Frankle & Carbin, arXiv 2003.02389), or go back to an
early epoch of the dense network (`--rewind weights`: Frankle et al., arXiv 1912.05671).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bip.methods.base import MASK
from bip.methods.finetune import Finetune

if TYPE_CHECKING:
    from bip.config import RunConfig
    from bip.pruning.choices import ScoreInit


class IterativeMagnitude(Finetune):
    name = "imp"
    summary = "keeps the largest weights in rounds, the k of a series, and trains them in each"
    mode = "prune"
    starts_from = "dense"
    in_rounds = True
    keys = MASK | {"rewind", "rewind_net"}

    @classmethod
    def score_init(cls, config: RunConfig) -> ScoreInit | Literal["scaled"]:
        return "scaled"  # s = θ; of what the round before has pruned 0, so that masks nest
