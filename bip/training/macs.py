"""Multiply-accumulates of one image, and parameters: of the whole network, and of what is kept."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bip.pruning.state import PrunedParameters

_COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def macs_of(network: nn.Module, sample: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one image by module name, "" for the whole network.

    Of convolutions and matrix products, those of activations (attention) too, by the shapes in a
    forward of `sample` (one image).
    """
    with _plain_attention(), FlopCounterMode(display=False) as counter:
        network(sample[:1])
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    named = {name.partition(".")[2]: found for name, found in counts.items() if "." in name}
    return named | {"": counts.get("Global", 0)}


@torch.no_grad()
def positions(network: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How often each weight of a conv or linear layer is used for one image of `shape` (C, H, W).

    By parameter name. One forward pass in eval mode.
    """
    found: dict[str, int] = {}
    names = {id(module): name for name, module in network.named_modules()}

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        name = f"{names[id(module)]}.weight".removeprefix(".")
        channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
        found[name] = found.get(name, 0) + output.numel() // channels

    def note_attention(module: nn.MultiheadAttention, _inputs: Any, output: Any) -> None:
        name = f"{names[id(module)]}.out_proj.weight".removeprefix(".")  # it is never called itself
        found[name] = found.get(name, 0) + output[0].numel() // module.embed_dim

    modules = [module for module in network.modules() if isinstance(module, _COUNTED)]
    handles = [module.register_forward_hook(note) for module in modules]
    attention = [m for m in network.modules() if isinstance(m, nn.MultiheadAttention)]
    handles += [module.register_forward_hook(note_attention) for module in attention]
    try:
        with _evaluating(network), _plain_attention():
            network(_image(network, shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _image(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, *shape, device=next(network.parameters()).device)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """By single products: torch's fused operations call no modules, and are not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode; then the modes of all modules are restored."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def costs(
    network: nn.Module, pruned: PrunedParameters | None, shape: tuple[int, ...]
) -> dict[str, int]:
    """macs, macs_kept, parameters and parameters_kept.

    A pruned weight costs nothing, wherever it lies.
    """
    uses = positions(network, shape)
    with _evaluating(network):
        macs = macs_of(network, _image(network, shape))[""]
    total = sum(weight.numel() for weight in network.parameters())
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
