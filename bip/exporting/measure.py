"""What an exported network costs: multiplications and time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def macs(network: nn.Module, sample: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one image by module name, "" for the whole network.

    Of convolutions and matrix products, by the shapes in a forward of `sample` (one image).
    """
    with FlopCounterMode(display=False) as counter:
        network(sample[:1])
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    named = {name.partition(".")[2]: count for name, count in counts.items() if "." in name}
    return named | {"": counts.get("Global", 0)}


@torch.no_grad()
def latency(networks: list[Callable[[Tensor], Any]], images: Tensor, rounds: int) -> list[float]:
    """Median seconds of a forward of `images` by each network. They take turns; one is warm-up."""
    seconds: list[list[float]] = [[] for _ in networks]
    for turn in range(rounds + 1):
        for network, found in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            network(images)
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]
