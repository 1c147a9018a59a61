"""A rank that dies, freezes or gets stuck is named, and the others end in bounded time."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bip.distributed.group import Group
from bip.errors import RankError, Stopped

STALL = 600.0  # least seconds without progress before a rank that still beats counts as stuck
BEFORE = 6  # times STALL before the first step
GRACE = 10.0  # seconds to record an end; after it the process exits (the disk may be stuck)
_LOST = "lost"
_ACKNOWLEDGED = "acknowledged"  # number of ranks that know that the run ends


class Heartbeat:
    """Two threads of each rank: one beats and checks the next rank, the other watches the first.

    The first writes this rank's beat into the store and reads that of the next rank. A rank that
    is killed or frozen stops beating. A rank whose main thread is stuck still beats, but soon every
    rank waits for it: then rank 0 reads how many collectives each rank has entered
    (`Group.passed`) and names the one with the fewest. The cause is written to the store. Each rank
    that reads it exits with code 1 from this thread, as its main thread may hang in a collective.
    A rank makes one write and one read per interval, so the load on the store grows in proportion
    to the ranks.

    A rank that is alone has one thread, which ends the process when there is no progress.

    The second thread does not use the store, because a store on a frozen host blocks its callers
    forever. It ends the process when the first thread has had no answer for `timeout` seconds.

    `on_end` is called with the cause when the run ends here, before it is published.
    """

    def __init__(
        self,
        group: Group,
        timeout: float,
        on_end: Callable[[str], None] = lambda _cause: None,
        stall: float | None = None,
    ) -> None:
        self.group, self.timeout, self.on_end = group, timeout, on_end
        self.stall = stall or max(STALL, 10 * timeout)
        self.interval = min(5.0, timeout / 4)
        self.step = 0
        self.alive = 0
        self.rounds = 0
        self.main: int | None = None
        self.threads: list[threading.Thread] = []
        self.stopped, self.wake = threading.Event(), threading.Event()
        self.failure: str | None = None  # this rank's own
        self.reported, self.all_know = threading.Event(), threading.Event()
        self.has_acknowledged = False
        self.lost: str | None = None
        self.rounds_to_end = 0
        # The main thread waits to learn which rank is lost.
        self.main_waits, self.cause_known = False, threading.Event()
        self.ending, self.end_recorded = threading.Lock(), threading.Lock()
        self.backstop: threading.Timer | None = None
        self.next_rank = _Silence(2 * self.interval)
        self.own_progress = _Silence(2 * self.interval)

    # Called by the main thread

    def note_step(self, step: int) -> None:
        self.step = step

    def note_alive(self) -> None:
        """Rank 0 waits for something outside the run, so the ranks are not stuck."""
        self.alive += 1

    def note_end(self) -> None:
        """The run's end is recorded already: do not call `on_end`."""
        self.end_recorded.acquire(blocking=False)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Beat while the body runs; may be nested.

        A failure in the body is published to the other ranks. If it only follows from the end of
        another rank, a RankError that names that rank is raised instead.
        """
        is_outer = not self.threads
        if is_outer:
            self._start()
        try:
            yield
        except Stopped:
            raise
        except KeyboardInterrupt:
            if not self.stopped.is_set():
                self._record_end("interrupted")
            raise
        except Exception as error:
            if not self.stopped.is_set() and self.failure is None:
                self._report_failure(error)
            raise
        finally:
            if is_outer:
                self.stop()

    def _report_failure(self, error: Exception) -> None:
        """Publish why this rank ends. The store's host waits until the others have read it."""
        others = self.group.world > 1 and bool(self.threads)
        if others and _is_echo(error):
            self.main_waits = True
            # Time to detect, publish and read, and the store host's grace period.
            if self.cause_known.wait(self.timeout + 12 * self.interval):
                self._record_end(f"rank lost: {self.lost}")
                self.failure = self.lost
                self.reported.set()  # by the rank that detected it
                raise RankError(self.lost) from error
        self._record_end(f"error: {error}")
        self.failure = f"{type(error).__name__}: {error}"
        if others:
            self.wake.set()
            self.reported.wait(2 * self.interval)
            if self.group.holds_store:
                self.all_know.wait(2 * self.interval)

    def stop(self) -> None:
        """End the threads, as other ranks may exit now. Never waits for a stuck store for long."""
        self.stopped.set()
        self.wake.set()
        for thread in self.threads:
            thread.join(self.interval)
        if self.backstop is not None:
            self.backstop.cancel()

    def _start(self) -> None:
        self.main = threading.get_ident()
        if self.group.world == 1:
            alone = threading.Thread(target=self._watch_alone, name="watchdog", daemon=True)
            self.threads = [alone]
            alone.start()
            return
        # A connection of its own: the process group's may be blocked in a wait.
        store: Any = dist.distributed_c10d._get_default_store()
        self.threads = [
            threading.Thread(target=self._beat, args=(store,), name="heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    # Runs in the first thread

    def _beat(self, origin: Any) -> None:
        store = origin
        fresh = False
        while not self.stopped.is_set():
            if self.lost is not None and self.failure is None:
                if self.rounds_to_end == 0:
                    self._end(self.lost)
                self.rounds_to_end -= 1
            try:
                if not fresh:
                    store = store.clone()
                    store.set_timeout(timedelta(seconds=max(1.0, 2 * self.interval)))
                    fresh = True
                self._round(store)
                self.rounds += 1
            except RuntimeError:
                fresh = False  # reconnect; `_watch` ends the process at the time-out
            except Exception as error:  # report a bug here as a bug, not as a lost store
                self._end(f"heartbeat: {type(error).__name__}: {error}")
            waiting = self.failure is not None and not self.all_know.is_set()
            self.wake.wait(min(0.1, self.interval) if waiting else self.interval)
            self.wake.clear()

    def _round(self, store: Any) -> None:
        """Beat and check once. Raises RuntimeError if the store does not answer."""
        store.set(f"beat/{self.group.rank}", self._own_beat())
        if self.failure is not None:
            if not self.reported.is_set():
                store.compare_set(_LOST, "", f"rank {self.group.rank}: {self.failure}")
                self._acknowledge(store)
                self.reported.set()
            if store.add(_ACKNOWLEDGED, 0) >= self.group.world:
                self.all_know.set()
        elif self.lost is None:
            lost = self._missing(store) or self._stuck(store)
            if lost is not None:
                self.lost = store.compare_set(_LOST, "", lost).decode()
            elif store.check([_LOST]):
                self.lost = store.get(_LOST).decode()
            if self.lost is not None:
                self._acknowledge(store)
                # Wait a round: the main thread may fail for the same reason, with a better message.
                # The store's host waits longer, as the others still have to read the cause.
                self.rounds_to_end = 3 if self.group.holds_store else 1

    def _acknowledge(self, store: Any) -> None:
        if not self.has_acknowledged:
            store.add(_ACKNOWLEDGED, 1)
            self.has_acknowledged = True

    def _own_beat(self) -> str:
        beat = {
            "round": self.rounds,
            "passed": self.group.passed,
            "step": self.step,
            "where": _where(self.main),
            "host": f"{platform.node()} pid {os.getpid()}",
        }
        return json.dumps(beat)

    def _missing(self, store: Any) -> str | None:
        """The message that the next rank has stopped beating, if it has."""
        watched = (self.group.rank + 1) % self.group.world
        # Reading a key that does not exist would block, as if the store were lost.
        beat = store.get(f"beat/{watched}") if store.check([f"beat/{watched}"]) else b""
        if self.next_rank.seconds(beat) <= self.timeout:
            return None
        known = json.loads(beat or '{"host": "no beat so far", "step": 0}')
        return (
            f"rank {watched} ({known['host']}) has not answered for {self.timeout:.0f} s; "
            f"its last step was {known['step']}"
        )

    def _stuck(self, store: Any) -> str | None:
        """On rank 0: the message that there is no progress, naming the ranks behind, if so."""
        if not self.group.is_first:
            return None
        if (limit := self._stalled()) is None:
            return None
        keys = [f"beat/{rank}" for rank in range(self.group.world)]
        beats = [json.loads(beat) for beat in store.multi_get(keys)]
        least = min(beat["passed"] for beat in beats)
        behind = {r: beat for r, beat in enumerate(beats) if beat["passed"] == least}
        places = Counter(beat["where"] for beat in beats)
        # Waiting ranks are all at the same line, so name ranks at a rare line first.
        behind = dict(sorted(behind.items(), key=lambda known: places[known[1]["where"]]))
        who = "; ".join(
            f"rank {rank} ({beat['host']}) at step {beat['step']} in {beat['where']}"
            for rank, beat in list(behind.items())[:8]
        )
        equal = len(behind) == self.group.world
        waiting = "all ranks are equally far" if equal else "the others wait for"
        return f"no progress for {limit:.0f} s; {waiting}{':' * equal} {who} {self._if_slow}"

    def _stalled(self) -> float | None:
        """The seconds without progress, if they are too many."""
        # Before the first step data are listed and the network is compiled, which may take long.
        limit = self.stall if self.step else BEFORE * self.stall
        silent = self.own_progress.seconds((self.group.passed, self.alive))
        return limit if silent > limit else None

    @property
    def _if_slow(self) -> str:
        least = f"{self.stall / 10:.0f}"
        return f"(if this is slow and not stuck, give --rank-timeout more than {least})"

    # Runs in the only thread of a rank that is alone

    def _watch_alone(self) -> None:
        while not self.stopped.wait(self.interval):
            if (limit := self._stalled()) is not None:
                self._end(
                    f"no progress for {limit:.0f} s at step {self.step} in {_where(self.main)} "
                    f"{self._if_slow}"
                )

    # Runs in the second thread

    def _watch(self) -> None:
        answers = _Silence(2 * self.interval)
        while not self.stopped.wait(self.interval):
            if answers.seconds(self.rounds) > self.timeout:
                self._end(
                    f"{self.group.store_holder}, which holds the rendezvous store, has not "
                    f"answered for {self.timeout:.0f} s"
                )

    # Called by any thread

    def _record_end(self, cause: str) -> None:
        if self.end_recorded.acquire(blocking=False):
            self.on_end(cause)

    def _end(self, message: str) -> None:
        """Exit with code 1, even if the disk or stderr hangs.

        If the main thread waits to learn which rank is lost, it raises the message instead.
        """
        if self.stopped.is_set() or not self.ending.acquire(blocking=False):
            return
        self.lost = message
        is_mine = True
        try:
            self.backstop = threading.Timer(GRACE, os._exit, (1,))
            self.backstop.daemon = True
            self.backstop.start()
            if self.main_waits:
                is_mine = False
                self.cause_known.set()
                return
            with contextlib.suppress(
                OSError, ValueError
            ):  # stderr is closed, or its reader has ended
                print(f"error: {message}", file=sys.stderr, flush=True)
            self._record_end(f"rank lost: {message}")
        finally:
            if is_mine:
                os._exit(1)


class _Silence:
    """Seconds for which a value has not changed while this process was running.

    A process of a suspended job sees a long pause; it counts as `longest` seconds at most.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self.looked = time.monotonic()
        self.seen: object = None
        self.total = 0.0

    def seconds(self, now_seen: object) -> float:
        now = time.monotonic()
        same = now_seen == self.seen
        self.total = self.total + min(now - self.looked, self.longest) if same else 0.0
        self.seen, self.looked = now_seen, now
        return self.total


def _where(thread: int | None) -> str:
    """The thread's innermost line in this package."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("bip."):
            return f"{module}, line {frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "code outside of this package"


def _is_echo(error: Exception) -> bool:
    """Whether this may be a collective that failed because another rank has ended.

    Gloo raises plain RuntimeErrors, also in a backward pass, where DDP sums gradients. If it is
    this rank's own failure instead, it is only published later.
    """
    if isinstance(error, dist.DistError):
        return True
    if type(error) is not RuntimeError or error.__traceback__ is None:
        return False
    (*_, (innermost, _line)) = traceback.walk_tb(error.__traceback__)
    ways = ("torch.distributed", "torch.autograd", "torch.nn.parallel", "bip.distributed")
    return str(innermost.f_globals.get("__name__")).startswith(ways)
