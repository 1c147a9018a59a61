"""Many small runs on one machine: one after the other on all cores, and one on each core at once.

Trains `--runs` resnet20s (seeds 1, 2, ...) for `--steps` steps of 128 Digits images at 32 pixels,
as a sweep of `python -m launch series`, start-up included: with `parallelism: 1` and as many
threads as cores, then with `runs_at_once` as many as cores. The two take turns, `--rounds` times.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.common import arguments, finish, machine, ratio, take_turns


def sweep(runs: int, steps: int, profile: str) -> Callable[[], None]:
    """A sweep with this profile, in a folder of its own each time."""

    def run() -> None:
        with tempfile.TemporaryDirectory(prefix="bip-packing-") as folder:
            path = Path(folder) / "profile.yml"
            path.write_text(f"executor: local\n{profile}\n")
            words = ["series", "--configs", "configs/Digits/pretrain.yml", "--arch", "resnet20s"]
            words += ["--image-dim", "32", "--batch-size", "128", "--seeds", f"1-{runs}"]
            words += ["--epochs", "1000", "--max-steps", str(steps), "--eval-every", "1000"]
            words += ["--profile", str(path), "--result-dir", folder, "--exp-name", "packing"]
            command = [sys.executable, "-m", "launch", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return run


def main() -> None:
    options = arguments(__doc__ or "", rounds=2, runs=4, steps=30)
    cores = len(os.sched_getaffinity(0))
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} at the start")
    began = time.perf_counter()
    seconds = take_turns(
        {
            "in_turn": sweep(
                options.runs, options.steps, f"parallelism: 1\ncpus_per_task: {cores}"
            ),
            "at_once": sweep(options.runs, options.steps, f"runs_at_once: {cores}"),
        },
        options.rounds,
        warm_up=0,
    )
    figures = {f"{name}_s": min(found) for name, found in seconds.items()}
    figures["at_once_over_in_turn"] = ratio(seconds["at_once"], seconds["in_turn"])
    print(f"{time.perf_counter() - began:.0f} s; load {os.getloadavg()[0]:.1f} at the end")
    finish(figures, options.json)


if __name__ == "__main__":
    main()
