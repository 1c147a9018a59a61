"""Real SLURM clusters on this machine, started and ended by slurm/dev/cluster.sh."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLUSTER_SH = Path(__file__).resolve().parents[2] / "slurm" / "dev" / "cluster.sh"
CANNOT_RUN_HERE = 3


def cluster_sh(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run cluster.sh, whatever its exit status."""
    return subprocess.run(
        [CLUSTER_SH, *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,  # packages may have to be installed
    )


class Cluster:
    """A cluster that runs in `directory` until `down`.

    Attributes:
        environment: with it SLURM's commands, and `sbatch` from anywhere, use this cluster.
    """

    def __init__(self, directory: Path, **options: object) -> None:
        """Start it; options as those of `cluster.sh up`, `True` for a flag."""
        self.directory = directory
        up = ["up", "--dir", directory]
        for name, setting in options.items():
            up += [f"--{name}"] if setting is True else [f"--{name}", setting]
        done = cluster_sh(*up)
        if done.returncode == CANNOT_RUN_HERE:
            # Where nobody reads the skips, they would pass for a test.
            end = pytest.fail if os.environ.get("CI") else pytest.skip
            end(f"no SLURM cluster on this machine: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        name, _, conf = done.stdout.splitlines()[-1].removeprefix("export ").partition("=")
        self.failed: set[str] = set()  # nodes, by the test
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = outside | {name: conf}

    def control(self, *arguments: str) -> str:
        """`cluster.sh fail n1` and the like: its output."""
        if arguments[0] == "fail":
            self.failed.add(arguments[1])
        done = cluster_sh(*arguments, "--dir", self.directory)
        assert done.returncode == 0, done.stderr
        if arguments[0] == "recover":
            self.failed.discard(arguments[1])
        return done.stdout

    def revive(self) -> None:
        """Start what crashed by itself, as an operator would: SLURM 22.05's slurmd did ("unaligned
        tcache chunk detected"), and its node would be down for good."""
        for path in (self.directory / "run").glob("n[0-9]*.pid"):
            alive = Path("/proc", path.read_text().strip()).exists()
            if path.stem not in self.failed and not alive:
                print(f"slurmd of {path.stem} has crashed, and is started again", flush=True)
                self.control("recover", path.stem)

    def run(self, *command: object) -> str:
        """The output of a command of SLURM's; SubprocessError if it fails, or hangs."""
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=180,
        ).stdout.strip()

    def submit(self, script: str, *options: object) -> str:
        """`sbatch` the lines of a bash script: the job's id."""
        wrapped = ["--parsable", "--output=/dev/null", *options, f"--wrap={script}"]
        return self.run("sbatch", *wrapped)

    def job(self, job: str) -> dict[str, str]:
        """slurmctld's record of a job (or of one array task, `A_k`)."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def accounted(self, job: str, field: str) -> list[str]:
        """One field of the job's accounting records, earlier attempts and all tasks included."""
        records = self.run("sacct", "-DXnP", "--jobs", job, "--format", field)
        return records.splitlines()

    def wait_for_accounting(self, job: str, *states: str) -> None:
        self.wait(lambda: self.accounted(job, "state") == list(states), f"accounted: {states}")

    def wait_for_state(self, job: str, state: str, seconds: float = 240) -> None:
        self.wait(lambda: self.job(job)["JobState"] == state, f"job {job} is {state}", seconds)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 240) -> None:
        """Poll until the condition holds; fail with the queue and the nodes if it never does."""
        deadline = time.monotonic() + seconds
        self.revive()
        while not condition():
            self.revive()
            if time.monotonic() > deadline:
                seen = f"{self.run('squeue')}\n{self.run('sinfo')}"
                pytest.fail(f"not within {seconds} s: {what}\n{seen}")
            time.sleep(0.2)

    def wait_for_empty_queue(self) -> None:
        self.wait(lambda: not self.run("squeue", "-h"), "the queue is empty")

    def down(self) -> None:
        self.control("down")
