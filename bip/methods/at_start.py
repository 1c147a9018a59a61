"""Pruning at initialisation: what its methods share. They differ in `score` alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from bip.methods.base import Mode, Start
from bip.methods.finetune import Finetune
from bip.settings import PRUNING, MethodSettings, Positive, setting

if TYPE_CHECKING:
    from bip.pruning.state import PrunedParameters


class ScoredOnImages(MethodSettings):
    score_batches: Positive = setting(
        PRUNING, 1, "training batches that the weights of a fresh network are scored on", before=1
    )


class PrunedAtStart(Finetune):
    """Scores the weights of a fresh network, keeps the best for good, and trains them."""

    mode: ClassVar[Mode] = "prune"
    starts_from: ClassVar[Start] = "fresh"
    score_init = "scaled"  # until `prepare`

    def prepare(self) -> None:
        pruned, network = self.parts.pruned, self.parts.network
        assert pruned is not None
        pruned.mask.fill_(1)
        pruned.write_z()
        # Forwards in training mode move batch-norm's running statistics.
        before = [buffer.clone() for buffer in network.buffers()]
        self.score(pruned)
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)
        network.zero_grad(set_to_none=True)
        pruned.update_mask()
        pruned.write_z()

    @abstractmethod
    def score(self, pruned: PrunedParameters) -> None:
        """Set `pruned.scores` for the network as it is: the same on every rank."""
