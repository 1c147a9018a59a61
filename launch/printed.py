"""What a run printed: the end of its log, and the last error in it."""

import os
import re
from pathlib import Path


def tail(log: Path, begin: int = 0) -> list[str]:
    """The last lines of a log from byte `begin` on, without empty ones."""
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - 16384))
        text = stream.read().decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def last_error(lines: list[str]) -> str | None:
    """The last line that reports an error."""
    # Under torchrun its own report (ChildFailedError) follows the failed rank's lines.
    pattern = r"(?!torch\.distributed)[\w.]*(Error|Exception)\b"
    raised = [line for line in lines if re.match(pattern, line)]
    found = [line for line in lines if line.startswith("error: ")] or raised
    return found[-1] if found else None
