"""Where a run's metrics go beside metrics.jsonl: one file for each tracker, found by its name.

A tracker's file has a class `Tracker` (`base.Tracker`) and is imported only where it is used. A
tracker runs on rank 0, in a thread of its own, and may fail or hang: training goes on.
"""

import importlib.util
import pkgutil

from bip.cli import nearest
from bip.errors import UserError

ALWAYS = "tensorboard"  # needs no --tracker
_OTHERS = (ALWAYS, "base", "background")


def names() -> list[str]:
    """What --tracker takes."""
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _OTHERS]


def parse(text: str | None) -> list[str]:
    """The trackers of a comma list. Raises ValueError, with the right names, for an unknown one."""
    found = [part.strip() for part in text.split(",")] if text else []
    for name in found:
        if name not in names():
            raise ValueError(f"must be of {', '.join(names())}{nearest(name, names())}")
        if found.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return found


def check_installed(text: str | None) -> None:
    """Raise UserError, naming the extra, if the package of a tracker is missing."""
    for name in parse(text):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker: {name} is not installed; pip install 'bip-hpc[{name}]'")
