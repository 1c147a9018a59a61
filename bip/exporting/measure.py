"""The time that networks take, one beside the other."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
