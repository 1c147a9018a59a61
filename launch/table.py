"""The rows of `launch status` as a table for a terminal of any width."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.status import Row, Word, sweep_eta
from launch.sweep import FINAL

WORDS: tuple[Word, ...] = get_args(Word)
_STYLES: dict[Word, str] = {
    "done": "green",
    "running": "cyan",
    "stalled": "bold yellow",
    "suspended": "yellow",
    "waiting": "dim",
    "preempted": "yellow",
    "timed out": "yellow",
    "requeued": "yellow",
    "held": "bold yellow",
    "blocked": "yellow",
    "cancelled": "magenta",
    "failed": "bold red",
}
_AXES = {
    "stage": "stage",
    "arch": "arch",
    "method": "method",
    "layer_type": "layer type",
    "seed": "seed",
}
# Columns that a narrow terminal does without, the first to go first. The others always stay.
_DROPPED = (
    "folder", "step", "kept", "sparsity %", "seconds", "node", "attempt", "images/s", "task", "ETA",
    "epoch", "stage",
)  # fmt: skip
_GAP = 2  # columns between two columns


@dataclass(frozen=True)
class Column:
    title: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))

    @property
    def is_text(self) -> bool:
        return self.title not in ("k", "seed") and any(re.search("[a-z]", c) for c in self.cells)


def table(rows: list[Row], folder: Path, width: int, at_once: int = 1, height: int = 0) -> Group:
    """The rows as a rich table for `width` columns, below it every state with its reasons.

    What is the same in all pruned networks is in the heading. Columns are dropped in a fixed order
    until the rest fits; no number is cut. Of more rows than `height` (0: no limit) those that are
    running or in trouble come first, and the others are counted.
    """
    shared = _shared(rows)
    shown = _most_important(rows, height)
    axes = [title for title in _axes(rows) if title not in shared]
    columns = _fit(_columns(shown, axes, folder), width)
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    # Where even the columns that stay do not fit, names fold; numbers never do.
    folds = _width(columns) > width
    least = _width([c for c in columns if not c.is_text]) + sum(
        _GAP + 4 for c in columns if c.is_text
    )
    found.width = least if folds and least > width else None
    for column in columns:
        found.add_column(
            column.title,
            justify="left" if column.is_text else "right",
            no_wrap=not (folds and column.is_text),
            overflow="fold",
        )
    for row, line in zip(shown, zip(*(c.cells for c in columns), strict=True), strict=True):
        state = {row.state: _STYLES[row.state]}
        found.add_row(*(Text(cell, state.get(cell, "")) for cell in line))  # type: ignore[call-overload]
    known = ", ".join(f"{title} {value}" for title, value in shared.items() if value)
    headings = [f"{folder.name}: {summary(rows)}", _left(rows, at_once), known]
    parts: list[Any] = [*(Text(line) for line in headings if line), Text(""), found, Text("")]
    if len(shown) < len(rows):
        parts.append(Text(f"{len(rows) - len(shown)} more runs: launch status shows all", "dim"))
    return Group(*parts, *_reasons(rows), *_where(rows, folder))


def summary(rows: Iterable[Row]) -> str:
    """'3 done, 1 running'."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(name)} {name}" for name in WORDS if name in states)


def epochs(row: Row) -> str:
    if row.epoch is None:
        return ""
    return f"{row.epoch}" if row.kind == "done" else f"{row.epoch}/{row.epochs or '?'}"


def duration(seconds: float) -> str:
    """'1:05:00', '0:00:09' or '3d 04h'."""
    whole = math.ceil(seconds)
    if whole >= 100 * 3600:
        return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def _left(rows: Sequence[Row], at_once: int) -> str:
    unfinished = any(row.kind in ("waiting", "running") for row in rows)
    eta = sweep_eta(rows, at_once) if unfinished else None
    return "" if eta is None else f"about {duration(eta)} of work left, {at_once} runs at once"


def _shared(rows: Sequence[Row]) -> dict[str, str]:
    """What all runs have in common; but for the stage, all pruned networks."""
    pruned = [row for row in rows if row.stage != "pretrain"] or rows
    values = {
        title: {_axis(row, title) for row in (rows if title == "stage" else pruned)}
        for title in _axes(rows)
    }
    return {title: found.pop() for title, found in values.items() if len(found) == 1}


def _axes(rows: Iterable[Row]) -> list[str]:
    swept = dict.fromkeys(name for row in rows for name in row.swept)
    return [*_AXES.values(), *swept]


def _axis(row: Row, title: str) -> str:
    names = {shown: name for name, shown in _AXES.items()}
    value = getattr(row, names[title]) if title in names else row.swept.get(title, "")
    return str(value)


def _columns(rows: Sequence[Row], axes: Sequence[str], folder: Path) -> list[Column]:
    """All columns in which a row has something."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells: dict[str, list[str]] = {
        **{title: [_axis(row, title) for row in rows] for title in axes if title == "stage"},
        "k": ["dense" if row.stage == "pretrain" else row.k for row in rows],
        **{title: [_axis(row, title) for row in rows] for title in axes if title != "stage"},
        "state": [row.state for row in rows],
        "task": [row.task for row in rows],
        "node": [row.node for row in rows],
        "attempt": [number(row.attempt, "d") for row in rows],
        "epoch": [epochs(row) for row in rows],
        "step": [number(None if row.kind == "done" else row.step, "d") for row in rows],
        "images/s": [number(row.images_per_second, ".0f") for row in rows],
        "ETA": ["" if row.eta is None else duration(row.eta) for row in rows],
        "best %": [number(row.best, ".2f") for row in rows],
        "kept": [number(row.kept, ",d") for row in rows],
        "sparsity %": ["" if r.sparsity is None else f"{100 * r.sparsity:.2f}" for r in rows],
        "seconds": [number(row.seconds, ".1f") for row in rows],
        "folder": [os.path.relpath(row.folder, folder) for row in rows],
    }
    if {*cells["attempt"]} <= {"", "1"}:
        del cells["attempt"]
    always = ("k", "state")
    return [Column(name, own) for name, own in cells.items() if any(own) or name in always]


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _fit(columns: list[Column], width: int) -> list[Column]:
    for title in _DROPPED:
        if _width(columns) <= width:
            break
        columns = [column for column in columns if column.title != title]
    return columns


def _most_important(rows: list[Row], height: int) -> list[Row]:
    if not height or len(rows) <= height:
        return rows
    ranks = {name: rank for rank, name in enumerate(("running", "failed", "cancelled", "blocked"))}
    chosen = sorted(
        range(len(rows)),
        key=lambda at: (ranks.get(rows[at].kind, 3 if rows[at].state == "held" else 9), at),
    )
    return [rows[at] for at in sorted(chosen[:height])]


def _reasons(rows: Sequence[Row]) -> list[Text]:
    """For each state and stage that has reasons, one line for each of them."""
    found = []
    for word in WORDS:
        own = [row for row in rows if row.state == word and row.reason]
        if word == "running":
            own = [row for row in own if row.reason != word]
        if word == "held" and (tasks := list(dict.fromkeys(row.task for row in own))):
            text = f"held ({len(own)}): scontrol release {','.join(tasks)}"
            found.append(Text(text, _STYLES[word]))
            continue
        for (stage, reason), count in Counter((row.stage, row.reason) for row in own).items():
            runs = f", {count} runs" if count > 1 else ""
            found.append(Text(f"{word} ({stage}{runs}): {reason}", _STYLES[word]))
    return found


def _where(rows: Iterable[Row], folder: Path) -> list[Text]:
    where = [Text(f"run folders: {folder}/STAGE/RUN_ID")]
    if any(row.kind in FINAL[1:] for row in rows):
        where.append(Text(f"what they printed: python -m launch logs {folder}"))
    return where
