"""How scores start."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from bip.pruning.choices import ScoreInit
from bip.pruning.layout import Layout


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
