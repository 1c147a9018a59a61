"""`launch status` of sweeps that are done, half-done and broken."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bip.files import append_jsonl
from launch.__main__ import main
from launch.sweep import Run, Sweep
from tests.launch.conftest import ROOT, finish, plan_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return plan_sweep(tmp_path, "pretrain,prune,finetune")


def of(sweep: Sweep, stage: str, k: str) -> Run:
    (run,) = [run for run in sweep.runs() if (run.stage, run.k) == (stage, k)]
    return run


def rows(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], Any]:
    assert main(["status", str(sweep.folder), "--json"]) == 0
    return {(row["stage"], row["k"]): row for row in json.loads(capsys.readouterr().out)}


def test_half_finished_sweep(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    finish(sweep, of(sweep, "pretrain", "1").run_id)
    failed, running = of(sweep, "prune", "0.5"), of(sweep, "prune", "0.1")
    sweep.fail(failed.run_id, "exit code 1: RuntimeError: out of memory")
    metrics = sweep.folder / running.folder / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    step = {"event": "step", "epochs": 15}
    for epoch in range(1, 4):
        append_jsonl(metrics, step | {"step": 9 * epoch, "epoch": epoch, "loss": 1 / epoch})
    with open(metrics, "a") as stream:
        stream.write('{"event": "step", "epoch": 4, "epo')  # killed in mid-write
    claim = sweep.claim_path(running.run_id)
    claim.write_text(json.dumps({"started": time.time() - 60, "worker": 1}))
    with open(claim) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = rows(sweep, capsys)
        assert main(["status", str(sweep.folder)]) == 0
    assert {key: row["state"] for key, row in found.items()} == {
        ("pretrain", "1"): "done",
        ("prune", "0.5"): "failed",
        ("prune", "0.1"): "running",
        ("finetune", "0.5"): "blocked",
        ("finetune", "0.1"): "waiting",
    }
    row = found["prune", "0.1"]
    assert (row["epoch"], row["epochs"], row["loss"]) == (3, 15, 1 / 3)
    assert 60 <= row["seconds"] < 90
    assert failed.run_id in found["finetune", "0.5"]["reason"]
    table = capsys.readouterr().out
    shown = ["3/15", "RuntimeError: out of memory", "91.25", "90.00", "4,734", "12.5"]
    shown += ["1 waiting, 1 running, 1 done, 1 failed, 1 blocked", str(sweep.folder)]
    assert [text for text in shown if text not in table] == []
    # The lock is gone with its holder: the run was interrupted and waits for another worker.
    assert rows(sweep, capsys)["prune", "0.1"]["state"] == "waiting"


def test_broken_files_are_shown_not_raised(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a result beats everything."""
    one, other = of(sweep, "prune", "0.5"), of(sweep, "prune", "0.1")
    finish(sweep, one.run_id)
    sweep.fail(one.run_id, "an older attempt")
    sweep.failure_path(other.run_id).write_text("[]")
    found = rows(sweep, capsys)
    assert (found["prune", "0.5"]["state"], found["prune", "0.1"]["state"]) == ("done", "failed")
    assert "unreadable" in found["prune", "0.1"]["reason"]
    (sweep.folder / one.folder / "result.json").write_text("{")
    row = rows(sweep, capsys)["prune", "0.5"]
    assert (row["state"], row["reason"].split(":")[0]) == ("failed", "its result is damaged")
    assert main(["status", str(sweep.folder)]) == 0


def test_sweep_folder_can_be_moved(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    finish(sweep, of(sweep, "prune", "0.5").run_id)
    moved = sweep.folder.rename(sweep.folder.with_name("elsewhere"))
    row = rows(Sweep(moved), capsys)["prune", "0.5"]
    assert row["state"] == "done"
    assert str(row["folder"]).startswith(str(moved))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no series.json"),
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


def test_status_does_not_import_torch(sweep: Sweep) -> None:
    program = (
        "import sys; from launch.__main__ import main; "
        f"main(['status', {str(sweep.folder)!r}]); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
