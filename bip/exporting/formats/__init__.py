"""The formats of `bip export`, one per file; to add one, add a file here.

A file defines NAME, for --format; SUFFIXES, what the output's name may end in; and
write(model, out, of) -> Exported, which writes the file whole or not at all. `of` is the option
--of, which most formats ignore.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import Tensor

from bip.exporting.model import Model

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written: the network to time, what it has and costs, and lines for the user.

    None: as in the masked network. `masked` is what it is timed against, and `where` on what, if
    that is not the masked network on the CPU.
    """

    network: Network | None = None
    parameters: int | None = None
    macs: int | None = None  # multiply-accumulates of one image
    notes: list[str] = field(default_factory=list)
    masked: Network | None = None
    where: str | None = None


@dataclass(frozen=True)
class Format:
    """One format; see this package's docstring."""

    name: str
    suffixes: tuple[str, ...]
    write: Callable[[Model, Path, str], Exported]


@cache
def formats() -> dict[str, Format]:
    """Every format by its name."""
    found = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return {part.NAME: Format(part.NAME, part.SUFFIXES, part.write) for part in found}
