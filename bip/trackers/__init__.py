"""Where a run's metrics go beside metrics.jsonl: one file for each tracker, found by its name.

A tracker's file has a class `Tracker` (`base.Tracker`) and imports its package when it is made. A
tracker runs on rank 0, in a thread of its own, and may fail or hang: training goes on.
"""

import importlib
import importlib.util
import pkgutil

from bip.cli import nearest
from bip.errors import UserError
from bip.trackers.base import Tracker

_OWN = ("base", "background")


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _OWN]


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


def tracker_class(name: str) -> type[Tracker]:
    found: type[Tracker] = importlib.import_module(f"{__name__}.{name}").Tracker
    return found
