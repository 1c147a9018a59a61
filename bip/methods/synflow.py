"""SynFlow: prune the weights that carry the least of a fresh network's flow, in 100 rounds.

Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by iteratively
conserving synaptic flow" (arXiv 2006.05467), algorithm 1: R is the summed output of the network of
|θ| for an input of ones; a weight's score is θ ⊙ ∂R/∂θ, and round i of n keeps k^(i/n). In eval
mode, and in float64: R is a product over layers, which deep networks take out of float32.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import TYPE_CHECKING

from bip.methods.at_start import PrunedAtStart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bip.config import RunConfig
    from bip.pruning.state import PrunedParameters

ROUNDS = 100


class Synflow(PrunedAtStart):
    name = "synflow"
    summary = "keeps what carries a fresh network's flow, in rounds without data, then trains it"

    @classmethod
    def start_cost(cls, config: RunConfig) -> int:
        return ROUNDS

    def score(self, pruned: PrunedParameters) -> None:
        import torch

        from bip.pruning.layout import keep_count
        from bip.pruning.scores import among_kept

        segments = pruned.segments
        images, _ = next(iter(self.parts.batches("upper", 0)))
        linear = linearised(self.parts.network)
        named = dict(linear.named_parameters())
        weights = [named[tensor.name] for tensor in pruned.layout.tensors]
        for done in range(1, ROUNDS + 1):
            flow = self.parts.average(synaptic_flow(linear, weights, tuple(images.shape[1:])))
            with torch.no_grad():
                # Every layer has the same sum, so that all are within float32's range of the peak.
                scaled = (flow / flow.max()).to(pruned.scores.dtype)
                pruned.scores.copy_(among_kept(scaled, pruned.mask))
                ratio = Fraction(float(self.parts.config.k) ** (done / ROUNDS))
                counts = [max(s.keep, keep_count(ratio, s.size)) for s in segments]
                pruned.keep(counts if done < ROUNDS else [s.keep for s in segments])
                pruned.update_mask()
                for weight, mask in zip(weights, pruned.views(pruned.mask), strict=True):
                    weight.mul_(mask)


def linearised(network: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode with the absolute values of all parameters and statistics."""
    import torch

    linear = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        for value in linear.state_dict().values():
            value.abs_()
    return linear


def synaptic_flow(
    linear: nn.Module, weights: Sequence[nn.Parameter], shape: tuple[int, ...]
) -> Tensor:
    """θ ⊙ ∂R/∂θ (n,), flat, of a linearised network for an input of ones of `shape` (C, H, W)."""
    import torch

    ones = torch.ones(1, *shape, dtype=weights[0].dtype, device=weights[0].device)
    found = torch.autograd.grad(linear(ones).sum(), weights)
    return torch.cat([(w.detach() * g).reshape(-1) for w, g in zip(weights, found, strict=True)])
