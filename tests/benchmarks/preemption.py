"""What a preemption costs: from the signal to a safe checkpoint, steps lost, agreement, submission.

signal_to_saved_s   from SIGTERM to the end of a real run's save: at most a step plus 1.5 times
                    writing and fsyncing the same bytes
steps_lost          between the save and where the next attempt begins
agree_share         the ranks' exchange of each step, over a ResNet-18 BiP step
submit_1000_s       `launch series` of 1,008 runs to a development cluster, and
status_1000_s       `launch status` of them, each the whole command (null where there is none)
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bip.distributed.control import Control
from bip.distributed.group import Group
from bip.files import read_jsonl
from tests.benchmarks.common import arguments, finish, machine, take_turns
from tests.benchmarks.step import make_method
from tests.distributed.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs" / "Digits"
NETWORKS = ("resnet18", "resnet50")


class SignalledRun:
    """Pretrains a network on Digits, stopped by SIGTERM in its third step or later."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.folder = folder
        self.command = [
            sys.executable, "-m", "bip", "train", "--configs", str(DIGITS / "pretrain.yml"),
            "--arch", arch, "--batch-size", "16",
            "--result-dir", str(folder), "--exp-name", "run", "--print-freq", "1",
            "--checkpoint-minutes", "1000",
        ]  # fmt: skip

    def records(self, name: str) -> list[dict[str, Any]]:
        found = list(self.folder.glob(f"run/pretrain/*/{name}"))
        return list(read_jsonl(found[0])) if found else []

    def stop(self) -> tuple[float, float]:
        """Seconds from the signal to the record after the save, and of the steps before."""
        before = len(self.records("metrics.jsonl"))
        process = subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        began = steps = 0
        times = []
        while steps < 5 and process.poll() is None:
            seen = len(self.records("metrics.jsonl")) - before
            if seen > steps:
                steps = seen
                times.append(time.time())
            time.sleep(0.002)
        began = time.time()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == os.EX_TEMPFAIL
        end = datetime.fromisoformat(self.records("attempts.jsonl")[-1]["time"]).timestamp()
        step = statistics.median(b - a for a, b in pairwise(times))
        return end - began, step

    def bytes_saved(self) -> bytes:
        return next(self.folder.glob("run/pretrain/*/checkpoint/step-*")).read_bytes()

    def steps_lost(self) -> int:
        attempts = self.records("attempts.jsonl")
        pairs = pairwise(attempts)
        return sum(a["step"] - b["step"] for a, b in pairs if b["event"] == "start")


def write_and_fsync(path: Path, data: bytes) -> float:
    """Seconds to write these bytes to a new file and fsync it."""
    began = time.perf_counter()
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - began


def exchange_seconds(group: Group) -> float:
    """Median seconds of one exchange in the middle of a step of 20 ms."""
    control = Control(group)
    seconds = []
    for _ in range(60):
        time.sleep(0.02)
        began = time.perf_counter()
        control.post(0, False, torch.tensor([1, 2]))
        seconds.append(time.perf_counter() - began)
    control.finish()
    return statistics.median(seconds)


@contextmanager
def cluster() -> Iterator[dict[str, str] | None]:
    """The environment of a development cluster; None where none can be started."""
    script = str(ROOT / "slurm" / "dev" / "cluster.sh")
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:
        Path(parent).chmod(0o755)
        place = ["--dir", f"{parent}/cluster"]
        up = subprocess.run([script, "up", *place], capture_output=True, text=True, check=False)
        if up.returncode:
            print(f"no cluster: {up.stderr.strip()}", file=sys.stderr)
            yield None
            return
        try:
            yield os.environ | {"SLURM_CONF": f"{parent}/cluster/etc/slurm.conf"}
        finally:
            subprocess.run([script, "down", *place], check=True)


def launch(env: dict[str, str], *words: object) -> float:
    """Seconds of one command, its start included."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "launch", *map(str, words)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def submission() -> dict[str, float | None]:
    figures: dict[str, float | None] = {"submit_1000_s": None, "status_1000_s": None}
    with cluster() as env, tempfile.TemporaryDirectory() as folder:
        if env is None:
            return figures
        profile, source = Path(folder, "profile.yml"), Path(folder, "dense.pth.tar")
        profile.write_text("executor: slurm\nsbatch: {hold: true}\n")
        torch.save({"state_dict": {}}, source)
        figures["submit_1000_s"] = launch(
            env, "series", "--configs", DIGITS / "bip.yml", "--series", "unstructured", "--seeds",
            ",".join(map(str, range(48))), "--source-net", source, "--profile", profile,
            "--result-dir", folder, "--exp-name", "sweep", "--no-wait",
        )  # fmt: skip
        sweep = Path(folder, "sweep")
        figures["status_1000_s"] = min(launch(env, "status", sweep, "--json") for _ in range(3))
        launch(env, "cancel", sweep)
    return figures


def main() -> None:
    options = arguments(__doc__ or "", rounds=7)
    print(machine())
    figures: dict[str, Any] = {}
    saved: dict[str, float] = {}
    lost = 0
    for arch in NETWORKS:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            run = SignalledRun(Path(folder), arch)
            rows = []
            for turn in range(options.rounds):  # in turn: a disk's speed changes by the minute
                seconds, step = run.stop()
                data = run.bytes_saved()
                plain = write_and_fsync(Path(folder, f"plain-{turn}"), data)
                Path(folder, f"plain-{turn - 1}").unlink(missing_ok=True)  # as a run keeps two
                rows.append((seconds, step, plain, (seconds - step) / plain))
            lost += run.steps_lost()
            saved[arch], step, plain, over = (statistics.median(c) for c in zip(*rows, strict=True))
            figures[f"{arch}_megabytes"] = len(data) / 1e6
            figures[f"{arch}_step_s"] = step
            figures[f"{arch}_write_fsync_s"] = plain
            figures[f"{arch}_saved_over_write"] = over
    bip = make_method("resnet18", 32, "bip")
    numbers = iter(range(10**6))
    step_seconds = statistics.median(take_turns({"s": lambda: bip.step(next(numbers))}, 5, 1)["s"])
    exchange = run_ranks(2, exchange_seconds)[0]
    figures |= {
        "signal_to_saved_s": saved,
        "steps_lost": lost,
        "agree_share": exchange / step_seconds,
        **submission(),
    }
    finish(figures, options.json)


if __name__ == "__main__":
    main()
