"""A rank that dies or stalls is named, and the others end in bounded time."""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from bip.distributed.group import Group

LOST = "lost"


class Heartbeat:
    """A thread that beats for this rank and watches the next one (rank + 1).

    A process that is stopped or killed stops beating whatever it was doing. Its watcher writes
    its name into the store, and every rank that reads it says so and exits with code 1, from
    this thread, because the main thread may hang in a collective. One beat and one look per
    rank and interval: the load on the store grows with the ranks, not with their square.
    """

    def __init__(self, group: Group, timeout: float, on_loss: Callable[[str], None]) -> None:
        self.group, self.timeout, self.on_loss = group, timeout, on_loss
        self.interval = min(5.0, timeout / 4)
        self.step = 0
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def note_step(self, step: int) -> None:
        self.step = step

    def start(self) -> None:
        """Begin, with more than one rank."""
        if self.group.world == 1:
            return
        # A connection of its own: the process group's may be blocked in a wait.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set_timeout(timedelta(seconds=self.timeout))
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def report(self, message: str) -> None:
        """Tell the other ranks why this one ends."""
        if self.thread is not None and not self.store.check([LOST]):
            self.store.set(LOST, f"rank {self.group.rank}: {message}")

    def explain(self) -> str | None:
        """After a collective failed: who is gone, if it is known within the time-out."""
        if self.thread is None:
            return None
        deadline = time.monotonic() + self.timeout + 2 * self.interval
        try:
            while time.monotonic() < deadline:
                if self.store.check([LOST]):
                    return str(self.store.get(LOST).decode())
                time.sleep(self.interval / 4)
        except RuntimeError:
            return "rank 0, which holds the rendezvous store, does not answer"
        return None

    def _run(self) -> None:
        watched = (self.group.rank + 1) % self.group.world
        seen, since = b"", time.monotonic()
        looked = since
        while not self.ended.wait(self.interval):
            try:
                name = f"{platform.node()} pid {os.getpid()}"
                self.store.set(f"beat/{self.group.rank}", f"{time.time()} {self.step} {name}")
                # Reading a beat that is not there yet would wait, and blame the store.
                there = self.store.check([f"beat/{watched}"])
                beat = self.store.get(f"beat/{watched}") if there else b""
                lost = self.store.get(LOST).decode() if self.store.check([LOST]) else None
            except RuntimeError:
                if not self.ended.is_set():
                    self._end("rank 0, which holds the rendezvous store, does not answer")
                return
            now = time.monotonic()
            # A rank that was itself suspended (with the whole job, mostly) has not watched.
            slept, looked = now - looked > self.timeout / 2 + self.interval, now
            if beat != seen or slept:
                seen, since = beat, now
            elif now - since > self.timeout and lost is None:
                _, step, host = (beat.decode() or "0 0 never heard of").split(" ", 2)
                lost = (
                    f"rank {watched} ({host}) has not answered for {self.timeout:.0f} s; "
                    f"its last step was {step}"
                )
                self.store.set(LOST, lost)
            if lost is not None and not self.ended.is_set():
                self._end(lost)

    def _end(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        self.on_loss(message)
        os._exit(1)
