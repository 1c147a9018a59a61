"""What a run reports during training: lines on the terminal, metrics.jsonl, trackers."""

import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch

from bip.config import RunConfig
from bip.distributed.group import Group
from bip.errors import Stopped
from bip.files import append_jsonl, atomic_write_bytes, read_jsonl
from bip.trackers import ALWAYS, parse
from bip.trackers.background import Background, start
from bip.training.forward import Report

FINISHED_SECONDS, STOPPED_SECONDS = 60.0, 3.0  # that the end of an attempt waits for trackers


class RunningMean:
    """Loss and accuracy over the forward-backwards since the last report, kept on the device."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.started = time.perf_counter()

    def add(self, reports: list[Report]) -> None:
        self.reports += reports

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body's time from throughput. Waits for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # count the time of steps that the GPU has not finished yet
        started = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - started

    def take(self, group: Group) -> dict[str, float]:
        """loss, top1 (percent) and images per second of all ranks. Waits for the device."""
        sums = torch.stack(
            [
                torch.stack([report.loss for report in self.reports]).double().sum(),
                torch.stack([report.correct for report in self.reports]).double().sum(),
            ]
        )
        loss, correct = group.sum_(sums).tolist()
        count = group.world * sum(report.count for report in self.reports)
        seconds = time.perf_counter() - self.started
        self.reports, self.started = [], time.perf_counter()
        return {
            "loss": loss / count,
            "top1": 100 * correct / count,
            "images_per_second": count / seconds,
        }


class Throughput:
    """Images per second of all ranks since the last `take`, without pauses."""

    def __init__(self, world: int) -> None:
        self.world, self.images, self.started = world, 0, time.perf_counter()

    def add(self, reports: list[Report]) -> None:
        self.images += self.world * sum(report.count for report in reports)

    def take(self) -> float:
        rate = self.images / (time.perf_counter() - self.started)
        self.images, self.started = 0, time.perf_counter()
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body's time; the device has nothing to do when it begins."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - max(began, self.started)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: of the GPU, or of the host where it computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class RunLog:
    """Rank 0's log of one attempt; on the other ranks it does nothing.

    metrics.jsonl has everything; trackers get its numbers by tags such as train/loss.
    """

    def __init__(
        self, folder: Path, active: bool, step: int = 0, evaluated: int = 0,
        config: RunConfig | None = None,
    ) -> None:  # fmt: skip
        """Continue the log after `step`, and after the end of an epoch at step `evaluated`. Remove
        later records: they are of a killed attempt, and this attempt will report them again.
        """
        self.active = active
        self.result: dict[str, Any] | None = None  # set when the run is done
        self.trackers: list[Background] = []
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        last = dict.fromkeys(("epoch", "layers"), evaluated)
        records = list(read_jsonl(self.path))
        kept = [r for r in records if r.get("step", math.inf) <= last.get(r.get("event", ""), step)]
        if len(kept) < len(records):
            lines = "".join(json.dumps(record) + "\n" for record in kept)
            atomic_write_bytes(self.path, lines.encode())
        tested = [r["top1"] for r in kept if r.get("event") == "epoch" and "top1" in r]
        self.best = max(tested, default=0.0)
        if config is not None:
            started = [
                start(name, folder, config.to_plain(), step)
                for name in [ALWAYS, *parse(config.tracker)]
            ]
            self.trackers = [tracker for tracker in started if tracker is not None]

    def record(self, event: str, step: int, text: str, /, **values: Any) -> None:
        """One record in metrics.jsonl, its numbers in the trackers, one line on the terminal."""
        if not self.active:
            return
        if event == "epoch":
            self.best = max(self.best, values["top1"])
            values["best_so_far"] = self.best
        append_jsonl(self.path, {"event": event, "step": step, **values})
        for tracker in self.trackers:
            tracker.log(step, tags(event, values))
        if text:
            print(text, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Send what trackers still have. An attempt that was stopped has little time for it."""
        deadline = time.monotonic() + (FINISHED_SECONDS if self.result else STOPPED_SECONDS)
        for tracker in self.trackers:
            tracker.close(self.result, isinstance(error, Stopped))
        for tracker in self.trackers:
            tracker.join(deadline)


def tags(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by clean names: train/loss, test/top1, kept/conv1.weight."""
    groups = {"step": "train", "epoch": "test"}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and name != "names":
            layers = zip(values["names"], value, strict=True)
            found |= {f"{name}/{layer}": number for layer, number in layers}
        elif name not in ("epoch", "epochs", "steps", "names"):
            group, _, rest = name.partition("_")
            in_own = event == "epoch" and group == "holdout"
            found[f"holdout/{rest}" if in_own else f"{groups.get(event, event)}/{name}"] = value
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
