"""The table of `launch status` at several widths, and the words of every state.

The tables in golden/ are written again by `python -m tests.launch.test_table`; their diff is read.
"""

import io
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bip.files import append_jsonl
from launch.__main__ import main
from launch.status import Row, status, sweep_eta
from launch.table import table
from tests.launch.conftest import finish, plan_sweep
from tests.launch.fake_cluster import FakeCluster

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (80, 120, 200)
FOLDER = Path("/results/sweep")
KINDS = {name: name for name in ("done", "running", "failed", "cancelled", "blocked")}
KINDS |= {"stalled": "running", "suspended": "running"}
REASONS = {
    "waiting": "in the queue (Priority)",
    "preempted": "in the queue (Priority); interrupted 12 times",
    "held": "in the queue (JobHeldUser); scontrol release 4711_6",
    "stalled": "no heartbeat for 7 min",
    "failed": "exit code 2: error: data_dir: no such folder",
}


def rows_of(trainers: tuple[str, ...] = ("bip", "hydra")) -> list[Row]:
    words = ("done", "running", "preempted", "timed out", "failed", "waiting", "held", "stalled")
    ks = ("0.8", "0.64", "0.512", "0.0092", "0.41", "0.2097", "0.0144", "0.001")
    found = []
    for method, (at, (word, k)) in itertools.product(
        trainers, enumerate(zip(words, ks, strict=True))
    ):
        kind = KINDS.get(word, "waiting")
        run_id = f"resnet18-{method}-unstructured-k{k}-s1234-0123abcd"
        found.append(
            Row(
                run_id, "prune", k, "resnet18", "unstructured", method, method, 1234,
                word, kind, REASONS.get(word, ""),  # type: ignore[arg-type]
                best=91.25, epoch=12, epochs=100, attempt=13 if word == "preempted" else 1,
                kept=8_935_034 if word == "done" else None,
                sparsity=0.2 if word == "done" else None,
                step=None if word == "waiting" else 23_412, steps=39_000,
                images_per_second=12_345.6 if word == "running" else None,
                eta=8_000.0 if word == "running" else None,
                seconds=16_000.0 if kind in ("done", "running") else None,
                node="gpu-node-17", task=f"4711_{at}", folder=f"{FOLDER}/prune/{run_id}",
            )
        )  # fmt: skip
    return found


def draw(rows: list[Row], width: int) -> str:
    console = Console(width=width, no_color=True, legacy_windows=False, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(rows, FOLDER, width, 4), crop=False)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_is_the_recorded_one_and_fits(width: int) -> None:
    text = draw(rows_of(), width)
    assert text == (GOLDEN / f"status-{width}.txt").read_text()
    assert max(map(len, text.splitlines())) <= width
    for row in rows_of():
        assert any({row.k, *row.state.split()} <= {*line.split()} for line in text.splitlines())


@pytest.mark.parametrize("width", [20, 44, 60, 80])
def test_no_number_is_cut_however_many_axes_vary(width: int) -> None:
    rows = [
        replace(row, arch=f"torchvision/a_long_name_{at % 3}", seed=1234567 + at,
                swept={"lr": f"0.{at:06}", "wd": f"{at}e-05"})
        for at, row in enumerate(rows_of())
    ]  # fmt: skip
    words = {*draw(rows, width).split()}
    for row in rows:
        assert words >= {row.k, str(row.seed), row.swept["lr"], row.swept["wd"], "91.25"}


def test_a_sweep_of_one_kind_has_it_in_the_heading() -> None:
    text = draw(rows_of(("bip",)), 80)
    assert "arch resnet18, method bip, layer type unstructured, seed 1234" in text
    assert text.count("resnet18") == 1
    assert "scontrol release 4711_6" in text
    assert "interrupted 12 times" in text


def test_methods_are_compared_by_means_over_seeds() -> None:
    done = [row for row in rows_of() if row.state == "done"]
    rows = [
        replace(row, seed=seed, top1=top1, epochs=12, forward_backwards=300)
        for row, both in zip(done, ((54.0, 55.0), (52.25, 52.75)), strict=True)
        for seed, top1 in enumerate(both)
    ]
    assert "Over seeds" not in draw(rows[::2], 80)
    text = draw([*rows, *(r for r in rows_of() if r.state != "done")], 80).split("Over seeds")[1]
    header, _, bip, hydra = [line.split() for line in text.splitlines()[1:5]]
    assert header[:5] == ["k", "method", "seeds", "top1", "%"]
    assert bip == ["0.8", "bip", "2", "54.50", "±", "0.71", "300", "12", "16000.0"]
    assert hydra[1:6] == ["hydra", "2", "52.50", "±", "0.35"]


def test_eta_takes_waiting_runs_to_need_the_mean_of_their_stage() -> None:
    def row(kind: str, **values: Any) -> Row:
        one = rows_of()[0]
        return replace(one, kind=kind, step=None, seconds=None, eta=None, **values)  # type: ignore[arg-type]

    done = replace(row("done"), seconds=100.0)
    running = replace(row("running"), eta=50.0, step=50, steps=100)
    waiting = row("waiting")
    assert sweep_eta([done, running, waiting, waiting], 1) == 250
    assert sweep_eta([done, running, waiting, waiting], 2) == 125
    assert sweep_eta([done, waiting], 99) == 100, "a run cannot be split"
    assert sweep_eta([waiting, waiting], 2) is None
    tuned = replace(waiting, stage="finetune")
    assert sweep_eta([done, tuned], 2) is None


class Task:
    """`hand` with its two pruning runs in array 7; the first has been in `attempts`."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster, self.sweep = cluster, plan_sweep(cluster.folder.parent / "out")
        self.dense, self.run, self.other = self.sweep.runs()
        finish(self.sweep, self.dense.run_id)
        tasks = [[self.run.run_id], [self.other.run_id]]
        facts = {"job": "7", "stage": "prune", "tasks": tasks, "dependency": ""}
        self.sweep.jobs.mkdir(exist_ok=True)
        append_jsonl(self.sweep.jobs / "arrays.jsonl", facts)
        self.folder = self.sweep.folder / self.run.folder
        self.folder.mkdir(parents=True)
        self.cluster.queue(t7_1="PENDING|Priority")

    def record(self, event: str, **facts: Any) -> None:
        task = {"slurm_array_job_id": "7", "slurm_array_task_id": "0", "host": "n5.site.org"}
        now = {"time": datetime.now(UTC).isoformat(), "step": 3}
        append_jsonl(self.folder / "attempts.jsonl", {"event": event, **now, **task, **facts})

    def beat(self, seconds_ago: float) -> None:
        lock = self.folder / ".lock.4"
        lock.touch()
        os.utime(lock, (time.time() - seconds_ago,) * 2)

    @property
    def row(self) -> Row:
        return status(self.sweep.folder)[1]


@pytest.fixture
def task(cluster: FakeCluster) -> Task:
    return Task(cluster)


@pytest.mark.parametrize(
    ("queued", "events", "state", "said"),
    [
        ("PENDING|Priority", [], "waiting", "Priority"),
        ("PENDING|Priority", ["start", "preempted"] * 3, "preempted", "interrupted 3 times"),
        ("PENDING|Priority", ["start", "timed_out"], "timed out", "interrupted 1 time"),
        ("PENDING|BeginTime", ["start", "lost"], "requeued", "interrupted 1 time"),
        ("PENDING|BeginTime", ["start"], "requeued", "interrupted 1 time"),
        ("PENDING|JobHeldUser", ["start", "preempted"], "held", "scontrol release 7_0"),
        ("PENDING|launch failed requeued held", ["start"], "held", "scontrol release 7_0"),
        ("REQUEUE_HOLD|None", [], "held", "scontrol release 7_0"),
        ("PENDING|DependencyNeverSatisfied", [], "blocked", "failed"),
        ("RUNNING|None", ["start"], "running", ""),
        ("RUNNING|None", ["start", "preempted", "start"], "running", ""),
        ("SUSPENDED|None", ["start"], "suspended", "7_0"),
    ],
)
def test_the_word_of_each_state_in_the_queue(
    task: Task, queued: str, events: list[str], state: str, said: str
) -> None:
    for event in events:
        task.record("start") if event == "start" else task.record("requeue", cause=event)
    task.beat(3)
    task.cluster.queue(t7_0=queued, t7_1="PENDING|Priority")
    row = task.row
    assert row.state == state
    assert said in row.reason
    assert (row.attempt, row.node) == ((events.count("start"), "n5") if events else (None, ""))


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("cancelled; python -m launch resume x continues it", "cancelled"),
        ("preempted and cancelled; python -m launch resume x continues it", "cancelled"),
        ("timed_out 3 times; the profile's retries.timed_out is 2", "failed"),
    ],
)
def test_a_cancelled_run_is_not_failed(task: Task, reason: str, state: str) -> None:
    task.sweep.fail(task.run.run_id, reason)
    assert (task.row.state, task.row.kind, task.row.reason) == (state, state, reason)


def test_a_run_without_heartbeat_is_stalled(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    task.record("start")
    task.cluster.queue(t7_0="RUNNING|None")
    task.beat(600)
    assert (task.row.state, task.row.kind) == ("stalled", "running")
    assert main(["status", str(task.sweep.folder)]) == 0
    assert "no heartbeat for 10 min" in capsys.readouterr().out


def test_an_unreachable_controller_turns_no_running_run_into_a_waiting_one(task: Task) -> None:
    task.cluster.file("squeue", "#!/bin/sh\necho 'slurm_load_jobs error: Timed out' >&2; exit 1\n")
    task.beat(3)
    task.record("start")
    assert (task.row.state, task.row.task) == ("running", "7_0")
    assert "SLURM does not show" in task.row.reason
    task.record("requeue", cause="preempted")
    assert task.row.state == "preempted"


def test_progress_is_the_newest_records(task: Task) -> None:
    metrics = task.folder / "metrics.jsonl"
    step = {"event": "step", "epochs": 4, "steps": 40, "images_per_second": 99.5}
    append_jsonl(metrics, {"event": "epoch", "step": 10, "top1": 50.0, "best_so_far": 60.0})
    append_jsonl(metrics, {"event": "layers", "step": 10, "names": ["x" * 100] * 400})
    for at in range(11, 21):
        append_jsonl(metrics, step | {"step": at, "epoch": 2, "loss": 0.5, "seconds": 10.0 * at})
    append_jsonl(metrics, {"event": "layers", "step": 20, "names": ["x" * 100] * 400})
    task.record("start")
    task.beat(3)
    task.cluster.queue(t7_0="RUNNING|None")
    row = task.row
    assert (row.epoch, row.step, row.steps, row.images_per_second) == (2, 20, 40, 99.5)
    assert (row.top1, row.best) == (50.0, 60.0)
    assert row.eta == pytest.approx(200, abs=2)


def damage(data: bytes) -> Iterator[bytes]:
    random.seed(1)
    yield from (b"", b"\0" * 64, b"{", b"null\n", b"[]\n", b"5\n", b'"x"\n', b"\xff\xfe{}\n")
    yield from (data[: len(data) // 2], data + data[:9], data.replace(b":", b";"))
    for text in (b'"start"', b'"7"', b"3", b'"step"'):
        yield from (data.replace(text, other) for other in (b"null", b"[]", b'{"a": 1}', b"1e999"))
    for _ in range(8):
        broken = bytearray(data)
        for at in random.choices(range(len(data)), k=5):
            broken[at] = random.randrange(256)
        yield bytes(broken)


@pytest.mark.parametrize(
    "names",
    [("attempts.jsonl", "metrics.jsonl", "profile.json"), ("result.json",), ("RUN.failed",)],
)
def test_a_damaged_file_of_a_run_hides_no_other(
    task: Task, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for event in ("start", "requeue", "start"):
        task.record(event, cause="preempted")
    append_jsonl(task.folder / "metrics.jsonl", {"event": "step", "step": 3, "epoch": 3})
    task.cluster.queue(t7_0="RUNNING|None", t7_1="PENDING|Priority")
    paths = [
        (task.folder if name[:4] in ("atte", "metr", "resu") else task.sweep.jobs)
        / name.replace("RUN", task.run.run_id)
        for name in names
    ]
    good = [p.read_bytes() if p.exists() else b'{"top1": 3, "reason": "start"}' for p in paths]
    for damaged in zip(*map(damage, good), strict=True):
        for path, data in zip(paths, damaged, strict=True):
            path.write_bytes(data)
        assert main(["status", str(task.sweep.folder), "--json"]) == 0
        first, second, last = json.loads(capsys.readouterr().out)
        assert (first["state"], last["state"]) == ("done", "waiting")
        assert second["state"] in ("done", "failed", "cancelled", "running")
        draw(status(task.sweep.folder), 80)


def test_a_damaged_ledger_is_one_line_or_read(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = task.sweep.ledger
    text = ledger.read_bytes()
    values = json.loads(text)["points"]
    broken: list[Callable[[dict[str, Any]], Any]] = [
        lambda run: run.pop("run_id"),
        lambda run: run.update(needs=None),
        lambda run: run.update(k=None), lambda run: run.update(stage="x"),
        lambda run: run.update(more=1), lambda run: run.update(swept=[1]),
    ]  # fmt: skip
    cases = [*damage(text)]
    for change in broken:
        run = dict(values[1])
        change(run)
        cases.append(json.dumps({"version": 1, "points": [values[0], run]}).encode())
    for data in cases:
        ledger.write_bytes(data)
        code = main(["status", str(task.sweep.folder)])
        err = capsys.readouterr().err
        assert code in (0, 2)
        assert code == 0 or (err.startswith(f"error: {ledger}") and err.count("\n") == 1)


def test_watch_prints_changes_until_all_is_final(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan_sweep(tmp_path)
    finish(sweep, *(run.run_id for run in sweep.runs()))
    assert main(["status", str(sweep.folder), "--watch"]) == 0
    assert "3 done" in capsys.readouterr().out
    assert main(["status", str(sweep.folder), "--watch", "--json"]) == 2
    assert "watch:" in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for columns in WIDTHS:
        (GOLDEN / f"status-{columns}.txt").write_text(draw(rows_of(), columns))
