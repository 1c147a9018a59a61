"""HYDRA: scores are trained for frozen weights (Sehwag et al., NeurIPS 2020, arXiv 2002.10509).

The upper level of BiP without its implicit term: s.grad = sign(s) ⊙ θ ⊙ g. Batch-norm affine moves
with the scores, biases are frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bip.methods.base import MASK, SCORES, Method, Parts

if TYPE_CHECKING:
    from torch import Tensor

    from bip.training.forward import Report


class Hydra(Method):
    name = "hydra"
    trainer = "base"
    summary = "trains scores for frozen weights"
    mode = "prune"
    needs_finetuning = True
    keys = MASK | SCORES

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.upper = self.upper_level(owns_norm=True)

    def step(self, iteration: int) -> list[Report]:
        return self.upper.step(iteration)

    def term_norms(self) -> Tensor | None:
        return self.upper.term_norms
