"""What is logged of every layer at the end of an epoch."""

from typing import Any

import torch
from torch import Tensor

from bip.pruning.state import PrunedParameters


@torch.no_grad()
def layer_facts(
    pruned: PrunedParameters, before: Tensor | None, norms: Tensor | None
) -> dict[str, list[Any]]:
    """One list for each fact, in the order of `names`. Waits for the device.

    kept: the fraction of weights; dead_filters: output filters (rows of a linear layer) of which
    nothing is kept; flips: weights whose mask differs from `before` (n,), the mask an epoch ago;
    threshold: the smallest kept |score|, of a structured group the norm; implicit_norm and
    direct_norm: of the two terms of the hypergradient, from `norms` (2, layers).
    Unknown facts are left out.
    """
    columns: dict[str, list[Tensor]] = {"kept": [], "dead_filters": [], "threshold": []}
    masks, scores = pruned.views(pruned.mask), pruned.views(pruned.scores)
    for tensor, mask, score in zip(pruned.layout.tensors, masks, scores, strict=True):
        columns["kept"].append(mask.count_nonzero() / mask.numel())
        columns["dead_filters"].append((mask.flatten(1).amax(1) == 0).sum())
        sizes = score.abs()
        if pruned.layout.is_grouped:
            others = [d for d in range(score.dim()) if d != tensor.axis]
            sizes = torch.linalg.vector_norm(score, dim=others, keepdim=True).expand_as(score)
        columns["threshold"].append(torch.where(mask > 0, sizes, torch.inf).amin())
    if before is not None:
        changed = pruned.views((pruned.mask != before).to(torch.uint8))
        columns["flips"] = [part.count_nonzero() for part in changed]
    found: dict[str, list[Any]] = {"names": [tensor.name for tensor in pruned.layout.tensors]}
    for name, values in columns.items():
        numbers = torch.stack([value.double() for value in values]).tolist()
        found[name] = [_plain(number, name in ("dead_filters", "flips")) for number in numbers]
    if norms is not None:
        for name, row in zip(("implicit_norm", "direct_norm"), norms.tolist(), strict=True):
            found[name] = [_plain(number) for number in row]
    return found


def _plain(number: float, is_count: bool = False) -> float | int | None:
    """For JSON: four significant digits are enough here; nothing kept has no threshold."""
    if is_count:
        return int(number)
    return float(f"{number:.4g}") if abs(number) < float("inf") else None
