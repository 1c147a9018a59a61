"""What a run reports during training: lines on the terminal, metrics.jsonl, TensorBoard."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bip.distributed.group import Group
from bip.files import append_jsonl, atomic_write_bytes, read_jsonl
from bip.training.forward import Report


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


class RunLog:
    """Rank 0's log of one attempt; on the other ranks it does nothing."""

    def __init__(self, folder: Path, active: bool, step: int = 0, evaluated: int = 0) -> None:
        """Continue the log after `step`, and after the evaluation at step `evaluated`. Remove later
        records: they are of a killed attempt, and this attempt will report them again.
        """
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: rank 0 only

        self.path = folder / "metrics.jsonl"
        last = {"step": step, "epoch": evaluated}
        records = list(read_jsonl(self.path))
        kept = [record for record in records if record["step"] <= last.get(record["event"], step)]
        if len(kept) < len(records):
            lines = "".join(json.dumps(record) + "\n" for record in kept)
            atomic_write_bytes(self.path, lines.encode())
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def record(self, event: str, step: int, text: str, **values: Any) -> None:
        """One record in metrics.jsonl, its numbers in TensorBoard, one line on the terminal."""
        if not self.active:
            return
        append_jsonl(self.path, {"event": event, "step": step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{event}/{name}", value, step)
        print(text, flush=True)

    def close(self) -> None:
        if self.active:
            self.board.close()
