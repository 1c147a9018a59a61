"""`launch status` on sweeps that were written by hand, finished, half-finished and broken."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bip.config import RunConfig
from bip.files import append_jsonl, atomic_write_json
from launch.__main__ import main
from launch.plan import SeriesOptions, make_plan
from launch.sweep import Run, Sweep
from tests.launch.conftest import DIGITS, ROOT

RESULT = {"kept": 4734, "sparsity": 0.9, "top1": 91.25, "epochs": 15, "seconds": 12.5}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """pretrain, prune and finetune of two k, planned and not begun."""
    flags = {"configs": DIGITS / "bip.yml", "result_dir": tmp_path, "exp_name": "hand"}
    assert not (set(flags) - set(RunConfig.model_fields)) - set(SeriesOptions.model_fields)
    plan = make_plan(flags | {"series": "0.5,0.1", "stages": "pretrain,prune,finetune"})
    found = Sweep(plan.folder)
    found.add(plan.points)
    return found


def of(sweep: Sweep, stage: str, k: str) -> Run:
    (record,) = [r for r in sweep.runs() if (r.stage, r.k) == (stage, k)]
    return record


def finish(sweep: Sweep, record: Run) -> None:
    folder = sweep.folder / record.folder
    folder.mkdir(parents=True)
    atomic_write_json(folder / "result.json", RESULT)


def rows(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> dict[tuple[str, str], dict[str, object]]:
    assert main(["status", str(sweep.folder), "--json"]) == 0
    return {(row["stage"], row["k"]): row for row in json.loads(capsys.readouterr().out)}


def test_half_finished_sweep(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    finish(sweep, of(sweep, "pretrain", "1"))
    failed, running = of(sweep, "prune", "0.5"), of(sweep, "prune", "0.1")
    sweep.fail(failed.run_id, "exit code 1: RuntimeError: out of memory")
    metrics = sweep.folder / running.folder / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    for epoch in range(1, 4):
        append_jsonl(metrics, {"event": "step", "step": 9 * epoch, "epoch": epoch, "epochs": 15,
                               "loss": 1 / epoch})  # fmt: skip
    with open(metrics, "a") as stream:
        stream.write('{"event": "step", "epoch": 4, "epo')  # killed in mid-write
    claim = sweep.claim_path(running.run_id)
    claim.write_text(json.dumps({"started": time.time() - 60, "worker": 1}))
    with open(claim) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = rows(sweep, capsys)
        assert main(["status", str(sweep.folder)]) == 0
    states = {key: row["state"] for key, row in found.items()}
    assert states == {
        ("pretrain", "1"): "done",
        ("prune", "0.5"): "failed",
        ("prune", "0.1"): "running",
        ("finetune", "0.5"): "blocked",
        ("finetune", "0.1"): "waiting",
    }
    row = found["prune", "0.1"]
    assert (row["epoch"], row["epochs"], row["loss"]) == (3, 15, 1 / 3)
    assert 60 <= row["seconds"] < 90  # type: ignore[operator]
    assert found["finetune", "0.5"]["reason"] == f"needs {failed.run_id}, which failed"
    table = capsys.readouterr().out
    shown = ["3/15", "RuntimeError: out of memory", "91.25", "90.00", "4,734", "12.5"]
    shown += ["1 waiting, 1 running, 1 done, 1 failed, 1 blocked", str(sweep.folder)]
    assert [text for text in shown if text not in table] == []
    # The lock is gone with its holder: the run was interrupted and waits for another worker.
    assert rows(sweep, capsys)["prune", "0.1"]["state"] == "waiting"


def test_result_beats_everything(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    record = of(sweep, "prune", "0.5")
    sweep.fail(record.run_id, "an older attempt")
    finish(sweep, record)
    assert rows(sweep, capsys)["prune", "0.5"]["state"] == "done"


def test_broken_files_are_shown_not_raised(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    record = of(sweep, "prune", "0.5")
    finish(sweep, record)
    (sweep.folder / record.folder / "result.json").write_text("{")
    sweep.failure_path(of(sweep, "prune", "0.1").run_id).write_text("[]")
    found = rows(sweep, capsys)
    assert found["prune", "0.5"]["reason"] == "result.json is not readable"
    assert found["prune", "0.1"]["reason"] == "failed (its record is unreadable)"
    assert main(["status", str(sweep.folder)]) == 0


def test_sweep_folder_can_be_moved(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    finish(sweep, of(sweep, "prune", "0.5"))
    moved = sweep.folder.rename(sweep.folder.with_name("elsewhere"))
    row = rows(Sweep(moved), capsys)["prune", "0.5"]
    assert row["state"] == "done"
    assert str(row["folder"]).startswith(str(moved))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "not a sweep folder (no series.json)"),
        ("{", "not a readable ledger"),
        ("{}", "not a readable ledger"),
        ('{"version": 99, "points": []}', "format version 99"),
        ('{"version": 1, "points": [{"run_id": "x"}]}', "not a readable ledger"),
    ],
)
def test_other_folders_are_a_clear_error(
    content: str | None, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "series.json").write_text(content)
    assert main(["status", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert named in line


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["a", "--jsn"]])
def test_bad_status_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_status_does_not_import_torch(sweep: Sweep) -> None:
    program = (
        "import sys; from launch.__main__ import main; "
        f"main(['status', {str(sweep.folder)!r}]); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
