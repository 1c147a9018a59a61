"""Many ranks in one process: threads that meet at a barrier to exchange."""

import threading
from collections.abc import Callable
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
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRank(rank, slots, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results
