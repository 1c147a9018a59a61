"""One-shot magnitude pruning: keep the largest |θ| of the dense network, then train them.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (arXiv
1506.02626), in one step. The baseline that every other method must beat.
"""

from __future__ import annotations

from bip.methods.finetune import Finetune


class OneShotMagnitude(Finetune):
    name = "omp"
    summary = "keeps the largest weights, once, then trains them"
    mode = "prune"
    starts_from = "dense"
    score_init = "scaled"  # s = θ, so the first mask keeps the largest weights
