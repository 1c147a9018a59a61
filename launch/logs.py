"""The logs of a sweep: one run's log, or the last error of each failed run."""

import sys
from pathlib import Path

from bip.cli import nearest
from bip.errors import UserError
from launch.executor import Executor, executors_of
from launch.printed import last_error, tail
from launch.status import Row, status
from launch.sweep import Sweep
from launch.watch import polls


def show_failures(sweep: Sweep) -> None:
    """Print the failed runs, each with its last error line and its log's path."""
    failed = [row for row in status(sweep.folder) if row.kind == "failed"]
    for row in failed:
        print(f"{row.run_id}: {row.reason}")
        path = _log(executors_of(sweep), row.run_id)
        error = last_error(tail(path)) if path else None
        if error and error not in row.reason:
            print(f"  {error}")
        print(f"  {path or 'it printed nothing'}")
    print(f"{len(failed)} failed runs; {sweep.command('logs')} RUN shows the log of one")


def show(sweep: Sweep, run: str, follow: bool) -> None:
    """Print a run's log; with `follow` also new lines until the run ends."""
    row = find(status(sweep.folder), run)
    executors = executors_of(sweep)
    shown: dict[Path, int] = {}
    if not follow:
        if not _print_new(_log(executors, row.run_id), shown):
            raise UserError(f"{row.run_id}: no log; the run is {row.state} {row.reason}")
        return
    for _ in polls(sweep, [row.run_id], executors[-1]):
        _print_new(_log(executors, row.run_id), shown)


def find(rows: list[Row], name: str) -> Row:
    """The row of a run, by its RUN_ID, an unambiguous part of one, or its array task."""
    found = [row for row in rows if row.run_id == name]
    found = found or [row for row in rows if row.task == name]
    found = found or [row for row in rows if name in row.run_id]
    if not found:
        known = [row.run_id for row in rows]
        raise UserError(f"RUN: no run {name!r}{nearest(name, known)}; launch status shows them")
    if len(found) > 1:
        some = ", ".join(row.run_id for row in found[:4])
        raise UserError(f"RUN: {name!r} fits {len(found)} runs; give one of {some}, ...")
    return found[0]


def _log(executors: list[Executor], run_id: str) -> Path | None:
    """The first log of a run that is not empty."""
    paths = [path for executor in executors for path in executor.logs(run_id)]
    return next((path for path in paths if path.exists() and path.stat().st_size), None)


def _print_new(path: Path | None, shown: dict[Path, int]) -> bool:
    """Print what was added to a log since the last call; whether there is a log."""
    if path is None:
        return False
    with open(path, "rb") as stream:
        stream.seek(shown.get(path, 0))
        while text := stream.read(1 << 20):
            sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        shown[path] = stream.tell()
    return True
