"""SNIP: keep the connections to which the loss is most sensitive at initialisation.

Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity"
(arXiv 1810.02340), eq. 5: |∂l/∂c| = |θ ⊙ g| at c = 1. Several batches count as one large batch.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from bip.methods.at_start import PrunedAtStart, ScoredOnImages

if TYPE_CHECKING:
    from bip.config import RunConfig
    from bip.pruning.state import PrunedParameters


class Snip(PrunedAtStart):
    name = "snip"
    summary = "keeps what the loss of a fresh network is sensitive to, then trains it"
    settings = ScoredOnImages

    @classmethod
    def start_cost(cls, config: RunConfig) -> int:
        return ScoredOnImages.of(config).score_batches

    def score(self, pruned: PrunedParameters) -> None:
        import torch

        parts = self.parts
        total = torch.zeros_like(pruned.gradient)
        # The upper level's images: the lower level trains on its own.
        count = self.start_cost(parts.config)
        batches = itertools.islice(parts.batches("upper", 0), count)
        for number, batch in enumerate(batches):
            parts.forward_backward(batch, "upper", number)
            pruned.take_gradient()
            total += pruned.gradient
        with torch.no_grad():
            torch.mul(pruned.weights, total, out=pruned.scores).abs_()
