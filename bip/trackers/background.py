"""A tracker in a thread: training never waits for it, and goes on when it fails."""

import contextlib
import importlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bip.trackers.base import Tracker

_MOST = 100_000  # calls that may wait; what comes then is dropped, metrics.jsonl has it


def start(name: str, folder: Path, config: dict[str, Any], step: int) -> "Background | None":
    """A tracker of a run folder, from `step` on; None, with a warning, if it cannot be imported."""
    try:
        # Here and not in the thread, as a data worker may be forked during an import.
        module = importlib.import_module(f"{__package__}.{name}")
    except Exception as error:
        print(_warning(f"{name} failed ({type(error).__name__}: {error})"), flush=True)
        return None
    return Background(name, lambda: module.Tracker(folder, config, step))


def _warning(what: str) -> str:
    text = " ".join(f"warning: tracker: {what}".split())[:400]
    return f"{text}; training goes on, metrics.jsonl has everything"


class Background:
    """Calls a tracker's methods in order. The first failure is printed and ends it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self.make = name, make
        self.calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST)
        self.failed = self.fell_behind = False
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._put(lambda tracker: tracker.log(step, values))

    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        """Send what is left, then end; `join` waits for that."""
        for call in (lambda tracker: tracker.close(result, stopped), None):
            with contextlib.suppress(queue.Full):
                if not self.failed:
                    self.calls.put(call, timeout=3)

    def join(self, deadline: float) -> None:
        """Wait until all is sent, at most until `deadline` (monotonic)."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self._warn("did not end in time")

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if not self.failed:
            try:
                self.calls.put_nowait(call)
            except queue.Full:
                if not self.fell_behind:
                    print(_warning(f"{self.name} is too slow; numbers are left out"), flush=True)
                self.fell_behind = True

    def _work(self) -> None:
        try:
            tracker = self.make()
            while (call := self.calls.get()) is not None:
                call(tracker)
        except BaseException as error:  # SystemExit of a service's client too
            self._warn(f"failed ({type(error).__name__}: {error})")

    def _warn(self, what: str) -> None:
        if not self.failed:
            self.failed = True
            print(_warning(f"{self.name} {what}"), flush=True)
