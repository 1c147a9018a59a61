"""BiP-HPC: bi-level-optimization pruning. `load_compact` reads what `bip export` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bip.exporting.formats.compact import load_compact as load_compact

__all__ = ["load_compact"]


def __getattr__(name: str) -> Any:
    """Imports torch only where it is used: the launcher imports this package without it."""
    if name == "load_compact":
        from bip.exporting.formats.compact import load_compact

        return load_compact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
