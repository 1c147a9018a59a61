"""Waiting for a sweep: a live display on a terminal, otherwise a line per finished run."""

import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bip.files import may_pass
from launch.executor import Executor
from launch.status import Row, status
from launch.sweep import FINAL, LEFT_QUEUE, STUCK, Sweep
from launch.table import duration, epochs, summary, table

# Workers need a moment to start; after this time without one, no run will start.
DEAD_SECONDS = 30.0
# A task may be missing from the queue for a moment (SLURM restarts, a result is being written).
LEFT_SECONDS = 60.0
UNREACHABLE_SECONDS = 3600.0  # for which the sweep's file system may be unreachable
FAIL_FAST_SECONDS = 120.0  # for the other runs to save
# Workers check the queue every quarter of a second.
LEAVING_SECONDS = 5.0


def wait(
    sweep: Sweep, run_ids: Collection[str], console: Console, executor: Executor,
    fail_fast: bool = False,
) -> list[Row]:  # fmt: skip
    """Watch until every run is final, or no more runs can start.

    With `fail_fast` the first failure cancels the others. Returns the final rows.
    """
    rows = _look(sweep, run_ids, executor.poll_seconds)
    reported = {row.run_id for row in rows if row.kind == "done"}  # by an earlier command
    if reported:
        console.print(f"{len(reported)} of {len(rows)} runs were finished before")
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    overall = progress.add_task(sweep.folder.name, total=len(rows))
    warned: set[str] = set()  # of tasks that will not start by themselves
    with Live(progress, console=console, refresh_per_second=4, auto_refresh=False) as live:
        for rows in polls(sweep, run_ids, executor):
            failed = [row for row in rows if row.kind == "failed"]
            if fail_fast and failed:
                fail_fast = False
                console.print(f"fail_fast: {_name(failed[0])} failed: {failed[0].reason}")
                console.print(f"cancelled {executor.cancel(FAIL_FAST_SECONDS)}")
            for row in rows:
                if row.kind in FINAL and row.run_id not in reported:
                    reported.add(row.run_id)
                    console.print(_finished(row, len(reported), len(rows)), soft_wrap=True)
            stuck = {row.reason for row in rows if row.reason.startswith(STUCK)}
            for reason in sorted(stuck - warned):
                console.print(Text(f"warning: {reason}", style="yellow"), soft_wrap=True)
            warned |= stuck
            if console.is_terminal:
                progress.update(overall, completed=len(reported), description=summary(rows))
                running = [_running(row) for row in rows if row.kind == "running"]
                live.update(Group(progress, *running), refresh=True)
        live.update(Text(""))
    _let_workers_leave(sweep)
    return rows


def show(sweep: Sweep, console: Console, executors: Sequence[Executor]) -> list[Row]:
    """Show the table of `launch status` until every run is final; returns the final rows.

    On a terminal in place; elsewhere it is printed whenever a state changes.
    """
    run_ids = [run.run_id for run in sweep.runs()]
    pause = max([2.0, *(executor.poll_seconds for executor in executors)])
    before: list[tuple[str, str]] = []
    rows: list[Row] = []
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not rows or any(row.kind not in FINAL for row in rows):
            if rows:
                time.sleep(pause)
            rows = _look(sweep, run_ids, pause)
            if console.is_terminal:
                height = max(5, console.height - 12)
                shown = table(rows, sweep.folder, console.width, sweep.parallelism(), height)
                live.update(shown, refresh=True)
            elif before != (before := [(row.run_id, row.state) for row in rows]) and any(
                row.kind not in FINAL
                for row in rows  # the caller shows the final rows
            ):
                console.print(table(rows, sweep.folder, console.width, sweep.parallelism()))
        live.update(Text(""))
    return rows


def _look(sweep: Sweep, run_ids: Collection[str], pause: float) -> list[Row]:
    """`status`, retried for an hour while the sweep's file system is unreachable."""
    began, warned = time.monotonic(), False
    while True:
        try:
            return status(sweep.folder, run_ids)
        except OSError as error:
            if not may_pass(error) or time.monotonic() - began > UNREACHABLE_SECONDS:
                raise
            if not warned:
                print(
                    f"warning: {error}; the runs continue; their state is read again for an hour",
                    file=sys.stderr,
                )
            warned = True
            time.sleep(pause)


def _is_alive(executor: Executor) -> bool:
    try:
        return executor.is_alive()
    except OSError as error:
        if not may_pass(error):
            raise
        return True  # unknown


def _let_workers_leave(sweep: Sweep) -> None:
    """Wait a moment for workers without runs to exit.

    A command given right after this one would otherwise leave its runs to these workers, which
    have the environment of an earlier command.
    """
    end = time.monotonic() + LEAVING_SECONDS
    with contextlib.suppress(OSError):
        while sweep.live_workers() and not sweep.unfinished() and time.monotonic() < end:
            time.sleep(0.05)


def _without_hasty(rows: list[Row], since: dict[str, float]) -> list[Row]:
    """Show rows whose tasks have just left the queue, and those that they block, as waiting.

    `since` holds when (monotonic) each was first seen without a task.
    """
    left = {row.run_id for row in rows if row.reason.startswith(LEFT_QUEUE)}
    now = time.monotonic()
    for run_id in [run_id for run_id in since if run_id not in left]:
        del since[run_id]
    hasty = {run_id for run_id in left if now - since.setdefault(run_id, now) < LEFT_SECONDS}
    return [
        replace(row, state="waiting", kind="waiting", reason="")
        if row.run_id in hasty or (hasty and row.kind == "blocked")
        else row
        for row in rows
    ]


def polls(sweep: Sweep, run_ids: Collection[str], executor: Executor) -> Iterator[list[Row]]:
    """Yield the rows repeatedly until all are final."""
    alive = time.monotonic()
    since: dict[str, float] = {}
    while True:
        rows = _without_hasty(_look(sweep, run_ids, executor.poll_seconds), since)
        yield rows
        if all(row.kind in FINAL for row in rows):
            return
        if _is_alive(executor):
            alive = time.monotonic()
        elif time.monotonic() - alive > DEAD_SECONDS:
            print(
                f"error: no worker is alive ({summary(rows)}); see {sweep.jobs}/*_log.err, then "
                "repeat the command",
                file=sys.stderr,
            )
            return
        time.sleep(executor.poll_seconds)


def _name(row: Row) -> str:
    ratio = "" if row.stage == "pretrain" else f" k {row.k}"
    swept = "".join(f" {key} {value}" for key, value in row.swept.items())
    return f"{row.stage}{ratio} {row.arch} {row.method} {row.layer_type} seed {row.seed}{swept}"


def _finished(row: Row, count: int, total: int) -> Text:
    if row.kind == "done":
        end = f"{row.seconds:.1f} s" if row.seconds is not None else row.reason
        top1 = f", top-1 {row.top1:.2f}%" if row.top1 is not None else ""
        return Text(f"[{count}/{total}] done     {_name(row)}{top1}, {end}")
    return Text(f"[{count}/{total}] {row.state:8} {_name(row)}: {row.reason}")


def _running(row: Row) -> Text:
    """What changes is first, as a narrow terminal cuts off the end."""
    epoch = f"epoch {epochs(row)}" if row.epoch is not None else "starting"
    loss = "" if row.loss is None else f"  loss {row.loss:.4f}"
    seconds = "" if row.seconds is None else f"  {row.seconds:.0f} s"
    eta = "" if row.eta is None else f"  ETA {duration(row.eta)}"
    line = f"  {epoch}{loss}{seconds}{eta}  {_name(row)}"
    return Text(line, style="cyan", no_wrap=True, overflow="ellipsis")
