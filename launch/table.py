"""The rows of `launch status` as a table for a terminal of any width."""

import itertools
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from rich.console import Group
from rich.text import Text

from launch.status import Row, Word, sweep_eta
from launch.sweep import FINAL, Sweep

WORDS: tuple[Word, ...] = get_args(Word)
_STYLES: dict[Word, str] = {
    "waiting": "dim",
    **dict.fromkeys(("preempted", "timed out", "requeued", "suspended", "blocked"), "yellow"),
    **dict.fromkeys(("held", "stalled"), "bold yellow"),
    "running": "cyan",
    "done": "green",
    "failed": "bold red",
    "cancelled": "magenta",
}
_AXES = {"stage": "stage", "arch": "arch", "method": "method"}
_AXES |= {"layer_type": "layer type", "seed": "seed"}
# Columns that a narrow terminal does without, the first to go first. The others always stay.
_DROPPED = (
    "folder", "step", "kept", "sparsity %", "seconds", "node", "attempt", "images/s", "task", "ETA",
    "epoch", "stage",
)  # fmt: skip
_GAP = 2  # columns between two columns
_FOLDED = 6  # columns that a folded name has at least


@dataclass
class Column:
    title: str
    cells: list[str]

    @cached_property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))

    @cached_property
    def is_text(self) -> bool:
        names = [cell for cell in self.cells if re.search("[a-df-z]", cell)]  # 1e-05 is a number
        return self.title not in ("k", "ETA") and bool(names)


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
    known = ", ".join(f"{title} {value}" for title, value in shared.items() if value)
    headings = [f"{folder.name}: {summary(rows)}", _left(rows, at_once), known]
    parts: list[Any] = [*(Text(line) for line in headings if line), Text("")]
    parts += [*_lines(columns, [row.state for row in shown], width), Text("")]
    if len(shown) < len(rows):
        parts.append(Text(f"{len(rows) - len(shown)} more runs: launch status shows all", "dim"))
    if means := _fit(_means(rows, axes), width):
        parts += [Text("Over seeds, of finished runs:"), *_lines(means, None, width), Text("")]
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
        "attempt": [number(row.attempt, ".0f") for row in rows],
        "epoch": [epochs(row) for row in rows],
        "step": [number(None if row.kind == "done" else row.step, ".0f") for row in rows],
        "images/s": [number(row.images_per_second, ".0f") for row in rows],
        "ETA": ["" if row.eta is None else duration(row.eta) for row in rows],
        "best %": [number(row.best, ".2f") for row in rows],
        "kept": [number(row.kept, ",.0f") for row in rows],
        "sparsity %": ["" if r.sparsity is None else f"{100 * r.sparsity:.2f}" for r in rows],
        "seconds": [number(row.seconds, ".1f") for row in rows],
        "folder": [os.path.relpath(row.folder, folder) for row in rows],
    }
    if {*cells["attempt"]} <= {"", "1"}:
        del cells["attempt"]
    always = ("k", "state")
    return [Column(name, own) for name, own in cells.items() if any(own) or name in always]


def _means(rows: Iterable[Row], axes: Iterable[str]) -> list[Column]:
    """Means, and sample deviations, of runs that differ by their seed alone; [] if none do."""
    axes = [title for title in axes if title != "seed"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.state == "done" and row.top1 is not None:
            key = "dense" if row.stage == "pretrain" else row.k
            groups.setdefault((key, *(_axis(row, title) for title in axes)), []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return []

    def mean(group: list[Row], name: str, form: str) -> str:
        values = [value for row in group if (value := getattr(row, name)) is not None]
        return format(statistics.fmean(values), form) if values else ""

    def spread(group: list[Row]) -> str:
        values = [row.top1 for row in group if row.top1 is not None]
        return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""

    cells = {title: [key[at] for key in groups] for at, title in enumerate(("k", *axes))}
    found = [*groups.values()]
    cells |= {
        "seeds": [f"{len(group)}" for group in found],
        "top1 %": [mean(group, "top1", ".2f") + spread(group) for group in found],
        "forward-backwards": [mean(group, "forward_backwards", ",.0f") for group in found],
        "epochs": [mean(group, "epochs", ".0f") for group in found],
        "seconds": [mean(group, "seconds", ".1f") for group in found],
    }
    return [Column(name, own) for name, own in cells.items() if any(own)]


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _fit(columns: list[Column], width: int) -> list[Column]:
    for title in _DROPPED:
        if _width(columns) <= width:
            break
        columns = [column for column in columns if column.title != title]
    return columns


def _lines(columns: Sequence[Column], states: Sequence[Word] | None, width: int) -> Iterator[Text]:
    """The header, a rule, and the rows. (rich's own tables take a second for a thousand rows.)"""
    too_much = max(0, _width(columns) - width)
    widths = []
    for column in columns:  # names fold where even the columns that stay do not fit; numbers never
        cut = min(too_much, max(0, column.width - _FOLDED)) if column.is_text else 0
        widths.append(column.width - cut)
        too_much -= cut

    def line(cells: Sequence[str], style: str = "") -> Iterator[Text]:
        folded = [
            [cell[at : at + size] for at in range(0, len(cell), size)] or [""]
            for cell, size in zip(cells, widths, strict=True)
        ]
        for parts in itertools.zip_longest(*folded, fillvalue=""):
            text = Text(no_wrap=True, overflow="ignore", end="\n")
            for column, part, size in zip(columns, parts, widths, strict=True):
                padded = part.ljust(size) if column.is_text else part.rjust(size)
                text.append(padded, style if column.title == "state" else "")
                text.append(" " * _GAP)
            text.rstrip()
            yield text

    yield from line([column.title for column in columns])
    yield Text("─" * min(width, sum(widths) + _GAP * (len(widths) - 1)))
    count = len(columns[0].cells)
    styles = [_STYLES[state] for state in states] if states else count * [""]
    for row, style in zip(range(count), styles, strict=True):
        yield from line([column.cells[row] for column in columns], style)


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
        own = [row for row in rows if row.state == word and row.reason not in ("", word)]
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
        where.append(Text(f"what they printed: {Sweep(folder).command('logs')}"))
    return where
