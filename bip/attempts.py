"""The ledger of a run's attempts, attempts.jsonl: where, how and why each started and ended."""

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bip.config import RunConfig
from bip.distributed.group import Group
from bip.files import append_jsonl, read_jsonl
from bip.identity import code_version


class Attempts:
    """The records of one run folder. Only rank 0 uses it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "attempts.jsonl"

    def starts(self) -> list[dict[str, Any]]:
        return [record for record in read_jsonl(self.path) if record["event"] == "start"]

    def record(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_jsonl(self.path, {"event": event, "time": now, **facts})

    def start(self, config: RunConfig, group: Group, loader: str, step: int) -> None:
        """Record a start at `step`, with all that may differ between two attempts."""
        slurm = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
        self.record(
            "start",
            step=step,
            host=platform.node(),
            pid=os.getpid(),
            world=group.world,
            device=str(group.device),
            torch=torch.__version__,
            code=code_version(),
            threads=torch.get_num_threads(),
            loader=loader,
            num_workers=config.num_workers,
            test_batch_size=config.test_batch_size,
            data_dir=str(config.data_dir),
            source_net=str(config.source_net) if config.source_net else None,
            **{key.lower(): os.environ[key] for key in slurm if key in os.environ},
        )

    def changes(self, world: int, loader: str, local_batch_norm: bool) -> Iterator[str]:
        """A line for each difference from the last attempt that changes results slightly."""
        if not (before := self.starts()):
            return
        loader_before, world_before = before[-1].get("loader", loader), before[-1]["world"]
        if loader_before != loader and "dali" in (loader_before, loader):
            yield (
                f"loader {loader_before} before, {loader} now: the images and crops are the same, "
                "decoded pixels differ slightly"
            )
        if world_before != world:
            yield (
                f"{world_before} ranks before, {world} now: the images and their order are the "
                "same, sums differ in their last bits"
                + ("; batch-norm averages over other parts of a batch" * local_batch_norm)
            )
