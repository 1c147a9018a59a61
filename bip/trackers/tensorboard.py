"""TensorBoard's event files, in the run folder. Always on."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from bip.trackers import base


class Tracker(base.Tracker):
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        super().__init__(folder, config, step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in config.items()}
        # (SummaryWriter.add_hparams would make a second run of it.)
        for summary in hparams(plain, {"test/top1": 0.0, "train/loss": 0.0})[:2]:  # type: ignore[no-untyped-call]
            self.board.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        self.board.close()
