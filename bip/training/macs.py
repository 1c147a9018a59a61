"""Multiply-accumulates of one image, and parameters: of the whole network, and of what is kept."""

from typing import Any

import torch
from torch import Tensor, nn

from bip.pruning.state import PrunedParameters

_COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def positions(network: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How often each weight of a conv or linear layer is used for one image of `shape` (C, H, W).

    By parameter name. One forward pass in eval mode; the modes of all modules are restored.
    """
    found: dict[str, int] = {}
    names = {id(module): name for name, module in network.named_modules()}

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        name = f"{names[id(module)]}.weight".removeprefix(".")
        channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
        found[name] = found.get(name, 0) + output.numel() // channels

    modules = [module for module in network.modules() if isinstance(module, _COUNTED)]
    handles = [module.register_forward_hook(note) for module in modules]
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()(torch.zeros(1, *shape, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return found


def costs(
    network: nn.Module, pruned: PrunedParameters | None, shape: tuple[int, ...]
) -> dict[str, int]:
    """macs, macs_kept, parameters and parameters_kept.

    Of conv and linear layers; products of activations, as in attention, do not count. A pruned
    weight costs nothing, wherever it lies.
    """
    uses = positions(network, shape)
    weights = dict(network.named_parameters())
    macs = sum(weights[name].numel() * count for name, count in uses.items() if name in weights)
    total = sum(weight.numel() for weight in weights.values())
    saved = dropped = 0
    if pruned is not None:
        for tensor, mask in zip(pruned.layout.tensors, pruned.views(pruned.mask), strict=True):
            gone = mask.numel() - int(mask.count_nonzero())
            dropped += gone
            saved += gone * uses.get(tensor.name, 0)
    return {
        "macs": macs,
        "macs_kept": macs - saved,
        "parameters": total,
        "parameters_kept": total - dropped,
    }
