"""How scores start."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from bip.pruning.choices import ScoreInit
from bip.pruning.layout import Layout

FLOOR = 1e-18  # its square is a float32 yet, so that a group's norm is more than 0


def among_kept(scores: Tensor, mask: Tensor) -> Tensor:
    """|scores| by which nothing that `mask` has pruned is selected before anything that it keeps.

    Both (n,). Exactly 0 where pruned, at least 1e-18 where kept.
    """
    return torch.where(mask != 0, scores.abs().clamp_min(FLOOR), 0.0)


def group_sums(values: Tensor, layout: Layout) -> Tensor:
    """The sum of flat `values` (n,) over each group of `layout`: (groups,)."""
    parts = []
    for tensor in layout.tensors:
        view = values[tensor.start : tensor.stop].view(tensor.shape)
        others = [d for d in range(view.dim()) if d != tensor.axis]
        parts.append(view.reshape(-1) if tensor.axis is None else view.sum(others))
    return torch.cat(parts)


@torch.no_grad()
def write_group_scores(scores: Tensor, values: Tensor, layout: Layout) -> None:
    """Fill the flat `scores` (n,) so that group i ranks by `values[i]`, not negative.

    A group ranks by the L2 norm of its scores, so each of its elements gets its value / sqrt(size).
    """
    for tensor in layout.tensors:
        score = scores[tensor.start : tensor.stop].view(tensor.shape)
        own = values[tensor.first_group : tensor.first_group + tensor.groups]
        shape = [-1 if d == tensor.axis else 1 for d in range(score.dim())]
        size = math.sqrt(tensor.size // tensor.groups)
        score.copy_(own.view(tensor.shape if tensor.axis is None else shape) / size)


@torch.no_grad()
def initialise_scores(
    scores: Tensor,
    weights: Tensor,
    layout: Layout,
    how: ScoreInit | Literal["scaled"],
    gain: Literal["published", "torch"] = "published",
) -> None:
    """Fill the flat `scores` in place from the flat `weights` (both in `layout`'s order).

    scaled: s = θ, in its own storage. hydra: s = sqrt(6 / fan_in) · θ / max|θ| per layer
    (HYDRA, arXiv 2002.10509, eq. 3). The others are torch.nn.init's, drawn from torch's
    generator, with the published code's `gain` (kaiming a = 0, xavier sqrt(2)), or with that of
    torch's layers (kaiming_uniform a = sqrt(5), xavier 1).
    """
    for tensor in layout.tensors:
        score = scores[tensor.start : tensor.stop].view(tensor.shape)
        weight = weights[tensor.start : tensor.stop].view(tensor.shape)
        if how == "scaled":
            score.copy_(weight)
        elif how == "hydra":
            peak = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
            score.copy_(math.sqrt(6 / tensor.fan_in) * weight / peak)
        elif how == "kaiming_uniform":
            nn.init.kaiming_uniform_(score, a=0 if gain == "published" else math.sqrt(5))
        elif how.startswith("xavier"):
            getattr(nn.init, f"{how}_")(score, gain=math.sqrt(2) if gain == "published" else 1)
        else:
            getattr(nn.init, f"{how}_")(score)
