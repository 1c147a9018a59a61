"""The state of a sweep as a table, read from the ledger and the run folders alone."""

import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.executor import executors_of
from launch.sweep import FINAL, Place, Run, State, StateName, Sweep

_STYLES: dict[StateName, str] = {
    "waiting": "dim",
    "running": "cyan",
    "done": "green",
    "failed": "bold red",
    "cancelled": "magenta",
    "blocked": "yellow",
}
_AXES = {"arch": "arch", "trainer": "trainer", "layer_type": "layer type", "seed": "seed"}


@dataclass(frozen=True)
class Row:
    """One run's state. `top1` is in percent, `sparsity` a fraction, `seconds` wall time."""

    run_id: str
    stage: str
    k: str
    arch: str
    layer_type: str
    trainer: str
    seed: int
    state: StateName
    reason: str = ""
    kept: int | None = None
    sparsity: float | None = None
    top1: float | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    seconds: float | None = None
    folder: str = ""
    task: str = ""  # the newest SLURM array task


def status(folder: Path, run_ids: Collection[str] | None = None) -> list[Row]:
    """One row per run of the sweep in `folder` (or of `run_ids` only).

    Raises UserError if `folder` is no sweep folder.
    """
    sweep = Sweep(folder)
    runs = sweep.runs()
    places: dict[str, Place] = {}
    for executor in executors_of(sweep):  # before results are read, as a task may end in between
        places |= executor.queue()
    states = sweep.states(runs, places)
    wanted = [run for run in runs if run_ids is None or run.run_id in run_ids]
    return [_row(sweep, run, states[run.run_id], places.get(run.run_id)) for run in wanted]


def _row(sweep: Sweep, run: Run, state: State, place: Place | None) -> Row:
    folder = sweep.folder / run.folder
    values = {name: value for name, value in asdict(run).items() if name in Row.__annotations__}
    values |= {"state": state.name, "reason": state.reason, "folder": str(folder)}
    if state.name == "done":
        result = _read_json(folder / "result.json")
        if result is None:
            values["reason"] = "result.json is not readable"
        for name in ("kept", "sparsity", "top1", "epochs", "seconds"):
            values[name] = (result or {}).get(name)
        values["epoch"] = values["epochs"]
    else:
        last = _last_record(folder / "metrics.jsonl")
        values |= {name: last.get(name) for name in ("epoch", "epochs", "loss")}
        if state.name == "running":
            values["seconds"] = place and place.seconds
            if values["seconds"] is None and (started := sweep.claim(run).get("started")):
                values["seconds"] = max(0.0, time.time() - started)
    if place is not None:
        values["task"] = place.task
    return Row(**values)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _last_record(path: Path) -> dict[str, Any]:
    """The newest complete record of a step in metrics.jsonl; reads only its end."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 8192))
            lines = stream.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut above, or still being written
        if isinstance(record, dict) and record.get("event") == "step":
            return record
    return {}


def summary(rows: Iterable[Row]) -> str:
    """'3 done, 1 running'."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(name)} {name}" for name in _STYLES if name in states)


def table(rows: list[Row], folder: Path, width: int) -> Group:
    """The rows as a rich table for `width` columns, the reasons of failed runs, and the folder.

    Values that all pruned networks share are in the title. Run folders have a column if it fits.
    """
    pruned = [row for row in rows if row.stage != "pretrain"] or rows
    shared = [name for name in _AXES if len({getattr(row, name) for row in pruned}) == 1]
    axes = [name for name in _AXES if name not in shared]
    titles = [
        *(("stage", "left"), ("k", "right")),
        *((_AXES[name], "left") for name in axes),
        *(("state", "left"), ("kept", "right"), ("sparsity %", "right"), ("top-1 %", "right")),
        *(("epochs", "right"), ("seconds", "right"), ("folder", "left")),
    ]
    cells = [_cells(row, axes, folder) for row in rows]
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    widths = [max(map(len, column)) for column in zip([t for t, _ in titles], *cells, strict=True)]
    if sum(widths) + 2 * len(widths) > width:
        titles.pop()
    for title, side in titles:
        found.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        styled = [Text(cell, _STYLES[row.state] if cell == row.state else "") for cell in line]
        found.add_row(*styled[: len(titles)])
    known = ", ".join(f"{_AXES[name]} {getattr(pruned[0], name)}" for name in shared if pruned)
    lines = [Text(f"{folder.name}: {summary(rows)}" + (f" ({known})" if known else ""))]
    shown = [row for row in rows if row.reason and row.state != "running"]
    reasons = Counter((row.stage, row.state, row.reason) for row in shown)
    trouble = [
        Text(f"{state} ({stage}{f', {count} runs' if count > 1 else ''}): {reason}", _STYLES[state])
        for (stage, state, reason), count in reasons.items()
    ]
    where = [Text(f"run folders: {folder}/STAGE/RUN_ID")]
    if any(row.state in FINAL[1:] for row in rows):
        where.append(Text(f"what they printed: {Sweep(folder).command('logs')}"))
    return Group(*lines, found, *trouble, *where)


def _cells(row: Row, axes: list[str], folder: Path) -> list[str]:
    return [
        row.stage,
        "dense" if row.stage == "pretrain" else row.k,
        *(str(getattr(row, name)) for name in axes),
        row.state,
        "" if row.kept is None else f"{row.kept:,}",
        "" if row.sparsity is None else f"{100 * row.sparsity:.2f}",
        "" if row.top1 is None else f"{row.top1:.2f}",
        epochs(row),
        "" if row.seconds is None else f"{row.seconds:.1f}",
        os.path.relpath(row.folder, folder),
    ]


def epochs(row: Row) -> str:
    if row.epoch is None:
        return ""
    return f"{row.epoch}" if row.state == "done" else f"{row.epoch}/{row.epochs or '?'}"


def as_json(rows: list[Row]) -> str:
    """The rows as a JSON list, for programs."""
    return json.dumps([asdict(row) for row in rows], indent=2)
