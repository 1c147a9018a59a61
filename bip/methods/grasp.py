"""GraSP: prune what hinders the flow of gradients at initialisation.

Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow" (arXiv
2002.07376), eq. 8: without a weight the squared norm of the gradient changes by −θ ⊙ H g, to first
order; those where it grows most, or falls least, are pruned. The loss is taken at a temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from bip.methods.at_start import PrunedAtStart, ScoredOnImages

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bip.config import RunConfig
    from bip.pruning.state import PrunedParameters
    from bip.training.forward import Batch

TEMPERATURE = 200.0  # of the authors' code, and appendix C


class Grasp(PrunedAtStart):
    name = "grasp"
    summary = "keeps what lets gradients of a fresh network flow, then trains it"
    settings = ScoredOnImages

    @classmethod
    def start_cost(cls, config: RunConfig) -> int:
        # g, then the forward-backward of H g and its own backward
        return 3 * ScoredOnImages.of(config).score_batches

    def score(self, pruned: PrunedParameters) -> None:
        import torch

        from bip.pruning.scores import group_sums, write_group_scores

        parts, layout = self.parts, pruned.layout
        count = ScoredOnImages.of(parts.config).score_batches

        def batches() -> Iterable[Batch]:
            for images, labels in itertools.islice(parts.batches("upper", 0), count):
                chunks = parts.config.accumulate
                yield from zip(images.chunk(chunks), labels.chunk(chunks), strict=True)

        product = hessian_gradient(parts.network, pruned.z, batches, parts.average)
        with torch.no_grad():
            flow = group_sums(pruned.weights * product, layout)
            # The scores rank by size, and θ ⊙ H g has a sign: the places in its order do instead.
            order = flow.argsort(descending=True, stable=True)
            places = torch.empty_like(flow)
            places[order] = torch.arange(len(flow), 0, -1, device=flow.device, dtype=flow.dtype)
            write_group_scores(pruned.scores, places, layout)


def hessian_gradient(
    network: nn.Module,
    weights: list[nn.Parameter],
    batches: Callable[[], Iterable[Batch]],
    average: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """H g (n,) of the mean loss over `batches`, all of one size: flat, in the order of `weights`.

    `average` is the mean over ranks, in place. Two passes over the batches, the second with a
    double backward; nothing is left in the parameters' .grad.
    """
    import torch
    import torch.nn.functional as F

    def flat_gradient(batch: Batch, keep_graph: bool) -> Tensor:
        loss = F.cross_entropy(network(batch[0]) / TEMPERATURE, batch[1])
        found = torch.autograd.grad(loss, weights, create_graph=keep_graph)
        return torch.cat([gradient.reshape(-1) for gradient in found])

    def mean(parts: Iterable[Tensor]) -> Tensor:
        total, count = torch.zeros(size, dtype=weights[0].dtype, device=weights[0].device), 0
        for part in parts:
            total += part
            count += 1
        return average(total / count)

    size = sum(weight.numel() for weight in weights)
    g = mean(flat_gradient(batch, keep_graph=False) for batch in batches())

    def product(batch: Batch) -> Tensor:
        found = torch.autograd.grad(flat_gradient(batch, keep_graph=True) @ g, weights)
        return torch.cat([part.reshape(-1) for part in found])

    return mean(product(batch) for batch in batches())
