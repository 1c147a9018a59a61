"""Many ranks in one process: threads that meet at a barrier to exchange."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadRank:
    """One rank's `Exchange`. `sent` counts the bytes that it has put into gathers."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, len(slots)
        self._slots, self._barrier = slots, barrier
        self.sent = self.rounds = 0

    def gather(self, values: Tensor) -> Tensor:
        self.sent += values.numel() * values.element_size()
        self.rounds += 1
        self._slots[self.rank] = values.clone()
        self._barrier.wait()
        gathered = torch.stack(self._slots)
        self._barrier.wait()
        return gathered


def on_threads(world: int, function: Callable[[ThreadRank], T]) -> list[T]:
    """`function(exchange)` on `world` ranks at once; the results in rank order."""
    slots: list[Any] = [None] * world
    barrier = threading.Barrier(world)

    def run(rank: int) -> T:
        try:
            return function(ThreadRank(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, rank) for rank in range(world)]
    # The first of its own: a broken barrier follows from another rank's error.
    errors = [error for future in futures if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    for error in errors:
        raise error
    return [future.result() for future in futures]
