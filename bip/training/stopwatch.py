"""Where the time of training steps goes, without slowing them."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
SAMPLES = 200  # steps of an epoch that are timed, evenly spread
PARTS = ("data", "forward", "backward", "threshold")  # what is left of a step is its update


class Stopwatch:
    """Seconds of the parts of this rank's steps since the last `take`.

    On CUDA these are the stream's seconds, between events that are read by `take` alone, so that no
    step waits for the device. There `data` is what the GPU waits for, not what workers spend.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.stride = 1
        self.active = False
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def sample(self, per_epoch: int) -> None:
        """Time every n-th step only, of epochs of so many steps."""
        self.stride = -(-per_epoch // SAMPLES)

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Around one step; its parts call `part`."""
        self.active = iteration % self.stride == 0
        with self.part("step"):
            yield
        self.active = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.active:
            yield
        elif self.on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append((name, *events))
        else:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)

    def timed(self, name: str, values: Iterable[T]) -> Iterator[T]:
        """`values`; waiting for each is a part."""
        iterator = iter(values)
        while True:
            with self.part(name):
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds of all steps since the last call, by part; waits for the device.

        `communication` lies within the other parts: the ranks' exchanges, but for those of
        gradients (`ForwardBackward.exchange_seconds`).
        """
        if self._events:
            torch.cuda.synchronize()
        for name, began, ended in self._events:
            self._add(name, began.elapsed_time(ended) / 1000)
        found = {name: self.stride * seconds for name, seconds in self._seconds.items()}
        self._seconds, self._events = {}, []
        if "step" in found:
            known = sum(found.get(part, 0.0) for part in PARTS)
            found["update"] = max(0.0, found.pop("step") - known)
        return found
