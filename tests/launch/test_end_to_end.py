"""The user's commands with the real training: Digits, three stages, two k."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import DIGITS, ROOT


def launch(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "launch", *argv],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_series_of_three_stages_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    line = ("series", "--configs", str(DIGITS / "bip.yml"), "--series", "0.5,0.1", "--stages",
            "pretrain,prune,finetune", "--epochs", "1", "--result-dir", str(tmp_path),
            "--exp-name", "digits")  # fmt: skip
    first = launch(*line)
    assert first.returncode == 0, first.stderr
    rows = json.loads(launch("status", str(tmp_path / "digits"), "--json").stdout)
    assert [(row["stage"], row["k"], row["state"]) for row in rows] == [
        ("pretrain", "1", "done"),
        ("prune", "0.5", "done"),
        ("prune", "0.1", "done"),
        ("finetune", "0.5", "done"),
        ("finetune", "0.1", "done"),
    ]
    masks = {}
    for row in rows:
        result = json.loads((Path(row["folder"]) / "result.json").read_text())
        assert (result["kept"], result["epochs"], result["top1"]) == (
            row["kept"], 1, row["top1"],
        )  # fmt: skip
        masks[row["stage"], row["k"]] = result["mask_sha256"]
    # Each fine-tuning has the mask of its own pruning: the chain was wired rightly.
    assert masks["finetune", "0.5"] == masks["prune", "0.5"] != masks["prune", "0.1"]
    assert masks["finetune", "0.1"] == masks["prune", "0.1"]
    again = launch(*line)
    assert again.returncode == 0
    assert "5 of 5 runs were finished before" in again.stdout
