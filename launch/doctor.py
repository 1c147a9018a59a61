"""`launch doctor`: the findings about a profile and its machines, and the verdict on them."""

import textwrap
from collections.abc import Collection, Iterator
from dataclasses import replace

from launch import checks
from launch.executor import Executor
from launch.profile import Finding

WIDTH = 80


def diagnose(executor: Executor, settings: checks.Settings, probe: bool) -> Iterator[Finding]:
    """What the scheduler will do, then what the machine can do."""
    found = []
    for finding in executor.examine(probe):
        found.append(finding)
        yield finding
    if any(finding.level == "error" for finding in found):
        return  # nothing starts there
    seconds = min((f.seconds for f in found if f.seconds is not None), default=None)
    yield from checks.findings(replace(settings, seconds=seconds), executor.python(probe))


def lines_of(finding: Finding) -> str:
    """The finding, folded to the width of a terminal."""
    indent = " " * 9
    first = f"{finding.level:8} "
    return textwrap.fill(
        finding.text, WIDTH, initial_indent=first, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def verdict(found: Collection[Finding], settings: checks.Settings) -> str:
    """The last line: whether a sweep is safe there, and why not."""

    def subjects(level: str) -> str:
        own = [f.text.partition(":")[0] for f in found if f.level == level]
        return ", ".join(dict.fromkeys(own))

    if errors := subjects("error"):
        text = f"not safe: {errors}"
    elif warnings := subjects("warning"):
        text = f"safe, but see the warnings: {warnings}"
    else:
        text = "safe"
    if settings.configs is None:
        text += "; images and save were not tried (--configs FILE)"
    return lines_of(Finding("ok", text)).replace("ok      ", "verdict ", 1)
