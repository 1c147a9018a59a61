"""A sweep folder that version 0.1.0 wrote goes on: its ledger, its run folders, its checkpoint.

tests/fixtures/sweep-0.1.0.tar.gz: a dense network, and four pruning runs of it: one done, one
preempted after 3 of 8 steps, one failed, one that never started. `expected_losses.json` holds the
losses of the preempted run where nothing preempted it.
"""

import json
import tarfile
from pathlib import Path

import pytest

from bip.files import read_jsonl
from launch.__main__ import main
from launch.status import status

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sweep-0.1.0.tar.gz"
PREEMPTED = "digits_net-bilevel-unstructured-k0.1-s1234-c289de45"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "kept"
    for path in (folder / "points").iterdir():  # they name the place where they were planned
        path.write_text(path.read_text().replace("/tmp/results", str(tmp_path)))
    return folder


def test_its_states_are_read(kept: Path) -> None:
    states = {(row.trainer, row.k): row.state for row in status(kept) if row.stage == "prune"}
    assert states["bilevel", "0.5"] == "done"
    assert states["base", "0.5"] == "failed"
    assert {states["bilevel", "0.1"], states["base", "0.1"]} <= {"waiting", "failed"}


def test_it_is_resumed_where_it_stopped(kept: Path) -> None:
    assert main(["resume", str(kept)]) == 0
    assert {row.state for row in status(kept)} == {"done"}
    run = kept / "prune" / PREEMPTED
    starts = [r["step"] for r in read_jsonl(run / "attempts.jsonl") if r["event"] == "start"]
    assert starts == [0, 3]
    losses = [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["event"] == "step"]
    expected = json.loads((kept / "expected_losses.json").read_text())
    assert losses == pytest.approx(expected, rel=1e-3)
