"""All sweeps below a folder."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from bip.errors import UserError
from launch.status import status
from launch.sweep import Sweep
from launch.table import summary


def sweeps_below(folder: Path) -> list[Path]:
    """The sweep folders; what lies in one is not searched."""
    found = []
    for path, folders, files in os.walk(folder):
        if "series.json" in files:
            found.append(Path(path))
            folders.clear()
        elif "config.yml" in files:  # a run folder
            folders.clear()
    return sorted(found)


def lines_of_sweeps(folder: Path) -> Iterator[str]:
    """One line for each sweep: folder, last change of its ledger, states. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"folder: no such folder: {folder}; give RESULT_DIR")
    for path in sweeps_below(folder):
        try:
            planned = time.strftime("%Y-%m-%d %H:%M", time.localtime(_planned(path)))
            rows = status(path)
            yield f"{path}  {planned}  {len(rows)} runs: {summary(rows)}"
        except (UserError, OSError) as error:
            yield f"{path}  {error}"


def _planned(path: Path) -> float:
    return Sweep(path).ledger.stat().st_mtime
