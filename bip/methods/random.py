"""Random pruning at initialisation: what a criterion must beat.

One ranking over the network by default; --scope layer keeps k of every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bip.methods.at_start import PrunedAtStart

if TYPE_CHECKING:
    from bip.pruning.state import PrunedParameters

SEED = 2  # beside the run's seed: the network has 0, other scores have 1


class Random(PrunedAtStart):
    name = "random"
    summary = "keeps random weights of a fresh network, then trains them"

    def score(self, pruned: PrunedParameters) -> None:
        import torch

        from bip.pruning.scores import write_group_scores

        # Drawn on the CPU, so that the mask depends on neither device nor rank.
        generator = torch.Generator().manual_seed(self.parts.config.seed + SEED)
        values = torch.rand(pruned.layout.groups, generator=generator)
        write_group_scores(pruned.scores, values.to(pruned.scores.device), pruned.layout)
