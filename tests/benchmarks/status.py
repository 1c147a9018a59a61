"""Seconds that `launch status` takes for a sweep of many runs in many states, torch not among them.

    python -m tests.benchmarks.status [--runs 1000] [--rounds 5]

Makes the folder of such a sweep: half of the runs are done, the others have records of attempts and
a log of 100 epochs. The command runs in a process of its own, imports included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bip.files import atomic_write_json
from launch.plan import make_plan
from launch.sweep import Run, Sweep

CONFIGS = Path(__file__).parents[2] / "configs" / "Digits" / "bip.yml"


def make_sweep(folder: Path, count: int) -> Sweep:
    flags = {"configs": CONFIGS, "result_dir": folder, "exp_name": "many", "series": "0.5"}
    plan = make_plan(flags | {"stages": "pretrain,prune"})
    sweep = Sweep(plan.folder)
    sweep.add(plan.runs)
    dense, pruned = map(Run.of, plan.runs)
    runs = [dense]
    for number in range(count - 1):
        name = f"{pruned.run_id}-{number}"
        runs.append(replace(pruned, run_id=name, folder=f"prune/{name}", seed=number))
    content = {"version": 1, "points": [run.plain() for run in runs]}
    atomic_write_json(sweep.ledger, content)
    step = {"event": "step", "epochs": 100, "steps": 1000, "images_per_second": 1e4, "loss": 0.5}
    lines = [step | {"step": 10 * e, "epoch": e, "seconds": 9.0 * e} for e in range(1, 51)]
    lines += [{"event": "epoch", "step": 500, "epoch": 50, "top1": 90.0}]
    start = {"event": "start", "time": "2026-01-01T00:00:00+00:00", "host": "n1"}
    for number, run in enumerate(runs):
        where = sweep.folder / run.folder
        where.mkdir(parents=True)
        if number % 2 == 0:
            result = {
                "dataset": "Digits",
                "kept": 7,
                "sparsity": 0.5,
                "top1": 91.0,
                "epochs": 100,
                "seconds": 900.0,
            }
            (where / "result.json").write_text(json.dumps(result))
            continue
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (where / "attempts.jsonl").write_text(json.dumps(start) + "\n")
        if number % 10 == 1:
            sweep.fail(run.run_id, "exit code 1: a bug")
    return sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweep = make_sweep(Path(folder), given.runs)
        for form in ([], ["--json"]):
            command = [sys.executable, "-m", "launch", "status", str(sweep.folder), *form]
            seconds = []
            for _ in range(given.rounds):
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds)
            print(
                f"{given.runs} runs {' '.join(form):7} median {median:.2f} s, {min(seconds):.2f} s"
            )


if __name__ == "__main__":
    main()
