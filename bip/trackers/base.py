"""The interface of a tracker."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from bip.files import atomic_write_bytes


class Tracker(ABC):
    """One run in a tracking service. Any method may raise or hang (`background.Background`)."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Start the tracker's run for a run folder, or go on with the one it has after `step`.

        `config`: the run's settings as plain types.
        """
        self.folder, self.config, self.step = folder, config, step

    @abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, by tags such as train/loss."""

    @abstractmethod
    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        """End this attempt.

        `result`: if it has finished the run. `stopped`: by a signal, so another will go on; without
        either it has failed.
        """

    def remembered(self) -> str | None:
        """The tracker's ID of this run, as an earlier attempt has recorded it."""
        try:
            return self._note.read_text().strip() or None
        except FileNotFoundError:
            return None

    def remember(self, value: str) -> None:
        atomic_write_bytes(self._note, f"{value}\n".encode())

    @property
    def _note(self) -> Path:
        return self.folder / f"tracker-{type(self).__module__.rpartition('.')[2]}.id"
