"""The state of every run of a sweep, from the ledger, the run folders and the queue."""

import json
import math
import os
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bip.files import json_object, read_jsonl
from bip.methods import find
from launch.executor import executors_of
from launch.sweep import Place, Run, State, StateName, Sweep

# What people see. `preempted`, `timed out` and `requeued` wait in the queue to go on.
Word = Literal[
    "waiting", "preempted", "timed out", "requeued", "held", "running", "stalled", "suspended",
    "done", "failed", "cancelled", "blocked",
]  # fmt: skip
_CAUSES: dict[str, Word] = {"preempted": "preempted", "timed_out": "timed out"}
STALLED_SECONDS = 180.0  # without a heartbeat, which a run gives every few seconds
_BLOCKS = (1 << 14, 1 << 18, 1 << 22)  # bytes of a log's end that are searched for a record


@dataclass(frozen=True)
class Row:
    """One run's state. `state` is the exact word, `kind` the group that commands act by.

    `best` and `top1` are in percent: of a finished run its model's accuracy, else the best
    evaluation so far and the last. `sparsity` is a fraction, `seconds` wall time, `eta` seconds.
    """

    run_id: str
    stage: str
    k: str
    arch: str
    layer_type: str
    trainer: str
    method: str
    seed: int
    state: Word
    kind: StateName
    reason: str = ""
    kept: int | None = None
    sparsity: float | None = None
    top1: float | None = None
    best: float | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    forward_backwards: int | None = None  # since the dense network
    eta: float | None = None
    attempt: int | None = None  # executions so far, this one included
    node: str = ""
    task: str = ""  # the newest SLURM array task
    queued: bool = False  # that task is pending
    folder: str = ""
    swept: dict[str, str] = field(default_factory=dict)


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
    with ThreadPoolExecutor(8) as pool:  # on a network file system each read waits
        found = [(sweep, run, states[run.run_id], places.get(run.run_id)) for run in wanted]
        return list(pool.map(lambda facts: _row(*facts), found))


def planned_rows(sweep: Sweep, runs: Collection[Run]) -> list[Row]:
    """Rows of runs that were not submitted yet, and perhaps done before."""
    states = {True: State("done"), False: State("waiting")}
    return [_row(sweep, run, states[sweep.is_done(run)], None) for run in runs]


def _row(sweep: Sweep, run: Run, state: State, place: Place | None) -> Row:
    folder = sweep.folder / run.folder
    values = {name: getattr(run, name) for name in run.__annotations__ if name in _FIELDS}
    values |= {"method": _method(run), "folder": str(folder), "task": place.task if place else ""}
    values["queued"] = place is not None and place.queued
    values |= {"state": state.word or state.name, "kind": state.name, "reason": state.reason}
    if state.name == "done":
        return Row(**values | _result(folder / "result.json"))
    attempts = _Attempts(folder / "attempts.jsonl")
    values |= _progress(folder / "metrics.jsonl")
    values |= {"attempt": len(attempts.starts) or None, "node": attempts.node}
    if state.name == "running":
        values["seconds"] = place and place.seconds
        claim = sweep.claim(run) if values["seconds"] is None else {}
        if isinstance(started := claim.get("started"), int | float):
            values["seconds"] = max(0.0, time.time() - started)
        values["node"] = attempts.node or str(claim.get("host", ""))
        silent = 0.0 if state.word else _silent(folder)
        if attempts.is_open and silent > STALLED_SECONDS:
            values |= {"state": "stalled", "eta": None, "images_per_second": None}
            values["reason"] = (
                f"no heartbeat for {silent / 60:.0f} min; its node may have failed or cannot reach "
                "the file system"
            )
    else:
        values |= {"eta": None, "images_per_second": None}
        times = attempts.of_task(values["task"])
        if state.name == "waiting" and not state.word and times:
            values["state"] = attempts.cause
            often = f"interrupted {times} time{'s' * (times > 1)}"
            values["reason"] = "; ".join(filter(None, [state.reason, often]))
    return Row(**values)


_FIELDS = {*Row.__annotations__}


def _method(run: Run) -> str:
    """The name of its method, where the ledger has the published one."""
    if run.stage == "pretrain":
        return "dense"
    try:
        return find(run.trainer, "prune").name
    except ValueError:  # of another version
        return run.trainer


class _Attempts:
    """What attempts.jsonl records, whatever is damaged in it."""

    def __init__(self, path: Path) -> None:
        try:
            self.records = [*read_jsonl(path)]
        except OSError:
            self.records = []
        self.starts = [record for record in self.records if record.get("event") == "start"]

    @cached_property
    def node(self) -> str:
        return str(self.starts[-1].get("host", "")).split(".")[0] if self.starts else ""

    @property
    def is_open(self) -> bool:
        return bool(self.records) and self.records[-1].get("event") == "start"

    def of_task(self, task: str) -> int:
        """How many attempts ran in the SLURM task that has the run now."""
        ids = ("slurm_array_job_id", "slurm_array_task_id")
        return sum("_".join(str(start.get(name)) for name in ids) == task for start in self.starts)

    @property
    def cause(self) -> Word:
        """Why the last attempt waits to go on."""
        last = self.records[-1] if self.records else {}
        return _CAUSES.get(str(last.get("cause")), "requeued")


def _result(path: Path) -> dict[str, Any]:
    try:
        result = json_object(path.read_bytes())
    except OSError:
        result = None
    if result is None:
        return {"reason": "result.json is not readable"}
    names = ("kept", "sparsity", "top1", "epochs", "seconds", "forward_backwards")
    found: dict[str, Any] = {name: _number(result, name) for name in names}
    found["best"] = _number(result, "best_top1")
    if found["best"] is None:
        found["best"] = found["top1"]
    return found | {"epoch": found["epochs"], "attempt": _number(result, "attempts")}


def _progress(path: Path) -> dict[str, Any]:
    """The newest records of a step and of an evaluation, and the time left by them."""
    step, epoch = _newest(path)
    names = ("epoch", "epochs", "loss", "step", "steps", "images_per_second")
    found: dict[str, Any] = {name: _number(step, name) for name in names}
    top1, best = _number(epoch, "top1"), _number(epoch, "best_so_far")
    found |= {"top1": top1, "best": top1 if best is None else best}
    seconds = _number(step, "seconds")
    if seconds is not None and found["step"] and found["steps"]:
        since = time.time() - path.stat().st_mtime
        left = (found["steps"] - found["step"]) * seconds / found["step"]
        found["eta"] = max(0.0, left - max(0.0, since))
    return found


def _newest(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest records of a step and of an epoch in metrics.jsonl; reads only its end."""
    found: dict[str, dict[str, Any]] = {}
    for block in _BLOCKS:
        try:
            with open(path, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - block))
                lines = stream.read().splitlines()
        except OSError:
            break
        for line in reversed(lines):  # one may be cut above, or still be being written
            if (record := json_object(line)) is not None:
                found.setdefault(str(record.get("event")), record)
            if found.keys() >= {"step", "epoch"}:
                break
        if found.keys() >= {"step", "epoch"} or block >= size:
            break
    return found.get("step", {}), found.get("epoch", {})


def _number(record: dict[str, Any], name: str) -> Any:
    """A number of a record; None if it is missing or no finite number."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _silent(folder: Path) -> float:
    """Seconds since the run touched its lock (`bip.lock`); 0 if there is none."""
    try:
        with os.scandir(folder) as entries:
            beats = [e.stat().st_mtime for e in entries if e.name.startswith(".lock.")]
    except OSError:
        return 0.0
    return time.time() - max(beats) if beats else 0.0


def sweep_eta(rows: Collection[Row], at_once: int) -> float | None:
    """Seconds of work left of a sweep with `at_once` runs at once; None if nothing is known.

    A waiting run is taken to need the mean time of those of its stage. Waiting for the cluster
    does not count.
    """
    total = 0.0
    for stage in {row.stage for row in rows}:
        own = [row for row in rows if row.stage == stage]
        left = [row for row in own if row.kind in ("waiting", "running")]
        known = [row.seconds for row in own if row.kind == "done" and row.seconds is not None]
        known += [length for row in own if (length := _length(row)) is not None]
        if left and not known:
            return None
        mean = sum(known) / len(known) if known else 0.0
        needs = [mean * _rest(row) if row.eta is None else row.eta for row in left]
        if needs:
            total += max(max(needs), sum(needs) / max(1, at_once))
    return total


def _length(row: Row) -> float | None:
    """The seconds that a running run will have taken."""
    if row.eta is None or not row.step or not row.steps or row.step >= row.steps:
        return None
    return row.eta / (1 - row.step / row.steps)


def _rest(row: Row) -> float:
    return 1 - row.step / row.steps if row.step and row.steps else 1.0


def as_json(rows: list[Row]) -> str:
    """The rows as a JSON list, for programs."""
    return json.dumps([asdict(row) for row in rows], indent=2)
