"""Pictures of masks, as PNG files. They need matplotlib, which the extra `report` installs."""

import io
from pathlib import Path
from typing import Any

from bip.errors import UserError
from bip.files import atomic_write_bytes, may_pass


def figure(width: float, height: float) -> Any:
    """An empty figure of inches. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("picture: needs matplotlib; pip install 'bip-hpc[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: Path) -> None:
    """Write the figure as a PNG file. Raises UserError if the file cannot be written."""
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=120)
    try:
        atomic_write_bytes(path, stream.getvalue())
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(f"picture: {path} cannot be written ({error.strerror})") from None


def check(path: Path | None) -> None:
    """Raise UserError, before any work, for a name or folder that cannot be right."""
    if path is None:
        return
    if path.suffix != ".png":
        raise UserError(f"picture: must end in .png, not {path.name}")
    if not path.parent.is_dir():
        raise UserError(f"picture: no such folder: {path.parent}")
