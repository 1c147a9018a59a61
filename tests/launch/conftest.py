"""Sweeps without training: a stand-in for `bip train` under real workers, and planned sweeps."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bip.files import atomic_write_json, read_jsonl
from launch.__main__ import main
from launch.plan import make_plan
from launch.slurm import arrays
from launch.status import Row, status
from launch.sweep import Run, Sweep
from tests.launch.fake_cluster import FakeCluster

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "Digits"

# Takes --configs FILE like bip train; FAKE_* steer it. Keeps no lock and no order of its own.
FAKE_TRAIN = """
import os, sys, time
from pathlib import Path
from bip.config import build_config, merge
from bip.distributed.signals import StopRequest, signal_name
from bip.errors import Stopped
from bip.files import append_jsonl, atomic_write_json

stop = StopRequest().install()

config = build_config(merge({"configs": Path(sys.argv[2])}))
log = Path(os.environ["FAKE_LOG"])

def record(event):
    append_jsonl(log, {
        "event": event, "run_id": config.run_id, "stage": config.exp_mode, "k": config.k_text,
        "pid": os.getpid(), "time": time.time(), "threads": os.environ["OMP_NUM_THREADS"],
        "environment": dict(os.environ),
    })

record("start")
if config.k_text in os.environ.get("FAKE_FAIL", "").split(","):
    print("a line before")
    print("error: data_dir: the disk is on fire", file=sys.stderr)
    sys.exit(2)
if config.source_net and config.source_net.name == "model_best.pth.tar":
    assert (config.source_net.parents[1] / "result.json").exists(), "started before its source"
while Path(os.environ.get("FAKE_HOLD", "/nonexistent")).exists():
    if stop.signal:
        time.sleep(float(os.environ.get("FAKE_SAVE", "0")))
        record("saved")
        print(Stopped(signal_name(stop.signal), 3), file=sys.stderr)
        sys.exit(75)
    time.sleep(0.02)
time.sleep(float(os.environ.get("FAKE_SECONDS", "0.05")))
config.run_folder.mkdir(parents=True, exist_ok=True)
best = config.run_folder / "checkpoint" / "model_best.pth.tar"
best.parent.mkdir(exist_ok=True)
best.touch()
record("end")
atomic_write_json(config.run_folder / "result.json", {
    "kept": 7, "sparsity": 1 - float(config.k), "top1": 91.5, "epochs": config.epochs,
    "seconds": 1.25,
})
"""


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not true within {seconds} s: {condition}")


class FakeSweep:
    """One sweep in a temporary folder whose runs are FAKE_TRAIN."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "results"
        self.folder = self.results / "sweep"
        self.log = folder / "log.jsonl"
        self.hold = folder / "hold"
        self.script = folder / "fake_train.py"
        self.script.write_text(FAKE_TRAIN)
        self.command = [sys.executable, str(self.script)]

    def argv(self, *more: str) -> list[str]:
        place = ["--result-dir", str(self.results), "--exp-name", "sweep"]
        return ["series", "--configs", str(DIGITS / "bip.yml"), *place, *more]

    def series(self, *more: str) -> int:
        return main(self.argv(*more), self.command)

    def resume(self, *more: str) -> int:
        return main(["resume", str(self.folder), *more], self.command)

    def rows(self) -> list[Row]:
        return status(self.folder)

    def states(self) -> list[str]:
        return [row.state for row in self.rows()]

    def claim(self) -> dict[str, Any]:
        """What the worker of the one running run noted."""
        sweep = Sweep(self.folder)
        (run,) = filter(sweep.is_running, sweep.runs())
        return sweep.claim(run)

    def events(self, event: str) -> list[dict[str, Any]]:
        return [record for record in read_jsonl(self.log) if record["event"] == event]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSweep]:
    sweep = FakeSweep(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(sweep.log))
    monkeypatch.setenv("FAKE_HOLD", str(sweep.hold))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield sweep
    sweep.hold.unlink(missing_ok=True)  # a failed test leaves no run waiting for ever


def run_of(run_id: str, stage: str, *needs: str) -> Run:
    fixed = {"k": "0.5", "seed": 1, "arch": "a", "layer_type": "unstructured", "trainer": "base"}
    return Run(run_id=run_id, stage=stage, folder="", config="", needs=[*needs], **fixed)  # type: ignore[arg-type]


def runs_of(values: int, seeds: int = 1) -> list[Run]:
    """pretrain dS -> prune pS.V -> finetune fS.V for each seed S and value V."""
    pairs = [(f"{seed}", f"{seed}.{value}") for seed in range(seeds) for value in range(values)]
    return [
        *(run_of(f"d{seed}", "pretrain") for seed in range(seeds)),
        *(run_of(f"p{one}", "prune", f"d{seed}") for seed, one in pairs),
        *(run_of(f"f{one}", "finetune", f"p{one}") for _, one in pairs),
    ]


def plan_sweep(result_dir: Path, stages: str = "pretrain,prune") -> Sweep:
    """`hand`, of two k, planned and not started."""
    flags = {"configs": DIGITS / "bip.yml", "result_dir": result_dir, "exp_name": "hand"}
    plan = make_plan(flags | {"series": "0.5,0.1", "stages": stages})
    sweep = Sweep(plan.folder)
    sweep.add(plan.runs)
    return sweep


def finish(sweep: Sweep, *run_ids: str) -> None:
    """As a run that ended well does."""
    result = {"kept": 4734, "sparsity": 0.9, "top1": 91.25, "epochs": 15, "seconds": 12.5}
    folders = {run.run_id: sweep.folder / run.folder for run in sweep.runs()}
    for run_id in run_ids:
        folders[run_id].mkdir(parents=True)
        atomic_write_json(folders[run_id] / "result.json", result)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setattr(arrays, "ENDING_SECONDS", 0.6)
    return FakeCluster(tmp_path / "bin")
