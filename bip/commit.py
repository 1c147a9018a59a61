"""The commit of the code that runs."""

import contextlib
import os
import subprocess
from pathlib import Path


def git_commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the code that runs, with "-dirty" if tracked files differ; None if unknown.

    A snapshot of a sweep's code has it in a file.
    """
    with contextlib.suppress(OSError):
        return (root / "COMMIT").read_text().strip() or None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty",
               "--exclude=*"]  # fmt: skip
    if not (root / ".git").exists():  # a wheel, perhaps inside of another repository
        return None
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # many runs ask at once
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True, env=quiet
        )
        return found.stdout.strip() or None
    return None
