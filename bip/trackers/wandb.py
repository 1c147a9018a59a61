"""Weights & Biases. WANDB_MODE, WANDB_PROJECT and so on act as usual; without a key it is offline.

`wandb sync RUN_FOLDER/wandb/offline-run-*` sends what was written offline. All attempts of a run
folder have one ID, so they become one run there.
"""

import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from bip.trackers import base


class Tracker(base.Tracker):
    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        super().__init__(folder, config, step)
        known = self.remembered() or uuid.uuid4().hex[:16]
        self.remember(known)
        self.run = wandb.init(
            id=known,
            resume="allow",
            dir=str(folder),
            name=folder.name,
            project=os.environ.get("WANDB_PROJECT", config["exp_name"]),
            group=config["exp_mode"],
            config=config,
            mode=os.environ.get("WANDB_MODE", "online" if _has_key() else "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        self.run.summary.update(result or {})
        if stopped:  # W&B shows it as preempted, otherwise as failed
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if result is not None else 1)


def _has_key() -> bool:
    """Whether W&B has a key for its server, in the environment or from `wandb login`."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(server)
    except (OSError, netrc.NetrcParseError):
        known = None
    return bool(known or os.environ.get("WANDB_API_KEY"))
