"""An array task without SLURM: scontrol and srun are scripts that give prepared answers."""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from bip.config import build_config
from bip.files import atomic_write_json, read_jsonl
from bip.yaml_file import read_yaml
from launch.profile import SlurmProfile
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, ROOT

# What SLURM 22.05 says of a task that runs, has its grace time, was requeued, reached its limit or
# was cancelled.
RUNNING = "JobState=RUNNING Reason=None Restarts=0 EndTime=2099-01-01T00:00:00 PreemptTime=None "
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")
REQUEUED = "JobState=COMPLETING Reason=None Restarts=1 EndTime=Unknown PreemptTime=None "
NODE_FAILED = "JobState=COMPLETING Reason=None Restarts=1 EndTime=2099-01-01T00:00:00 "
AT_LIMIT = "JobState=COMPLETING Reason=TimeLimit Restarts=0 EndTime=2026-01-01T00:00:00 "
CANCELLED = "JobState=COMPLETING Reason=None Restarts=0 EndTime=2026-01-01T00:00:00 "

# The lines of `answers` are given in turn, the last one for ever; !TEXT is a failure.
SCONTROL = """#!/bin/bash
cd "$(dirname "$0")"
echo "$1" >>calls
if [[ $1 == requeue ]]; then
  number=$(grep -c requeue calls)
  line=$(sed -n "${number}p" refusals 2>/dev/null || true)
  [[ -z $line ]] || { echo "$line" >&2; exit 1; }
  exit 0
fi
line=$(head -n 1 answers)
[[ $(wc -l <answers) -le 1 ]] || sed -i 1d answers
[[ $line != '!'* ]] || { echo "${line#!}" >&2; exit 1; }
echo "$line"
"""


def in_minutes(minutes: float) -> str:
    """As scontrol writes it."""
    return (datetime.now() + timedelta(minutes=minutes)).isoformat(timespec="seconds")


class FakeSlurm:
    """One array task with one run, `name`, of the sweep in `folder`/sweep."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.sweep = Sweep(folder / "sweep")
        settings |= {"result_dir": folder, "exp_name": "sweep"}
        self.config = build_config(read_yaml(DIGITS / "pretrain.yml") | settings)
        self.name, self.run = self.config.run_id, self.config.run_folder
        self.run.mkdir(parents=True)
        self.sweep.jobs.mkdir()
        self.settings = self.sweep.folder / "points" / f"{self.name}.yml"
        self.settings.parent.mkdir()
        self.settings.write_text(self.config.to_yaml())
        self.printed = ""  # by task.sh, to stderr
        self.profile()
        self.command("scontrol", SCONTROL)
        self.says(RUNNING)

    def profile(self, **values: Any) -> None:
        profile = SlurmProfile(executor="slurm", **values).model_dump(mode="json")
        atomic_write_json(self.sweep.jobs / "profile.json", profile)

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def says(self, *answers: str) -> None:
        (self.bin / "answers").write_text("".join(f"{answer}\n" for answer in answers))

    def refuses(self, *messages: str) -> None:
        (self.bin / "refusals").write_text("".join(f"{message}\n" for message in messages))

    def calls(self, name: str) -> int:
        path = self.bin / "calls"
        return path.read_text().splitlines().count(name) if path.exists() else 0

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_PROCID": "0", "BIP_REQUEUE_PACE": "0",
            "BIP_PROFILE": str(self.sweep.jobs / "profile.json"),
        }  # fmt: skip

    def set_aside(self) -> list[str]:
        """The reasons of attempts that were not final."""
        return [
            note["reason"] for note in read_jsonl(self.sweep.jobs / f"{self.name}.failed.before")
        ]

    def note(self) -> str:
        """Why the run is given up; "" if it is not."""
        return _reason(self.sweep.failure_path(self.name))

    def lost(self) -> str:
        """How a rank lost the others."""
        return _reason(self.sweep.loss_path(self.name))

    def batch(
        self, code: int, *, begun: bool = True, nodes: int = 0, failed: str = "", lost: str = "",
        setup: str = "", prints: str = "", srun: str = "", saves: bool = False, **env: str,
    ) -> int:  # fmt: skip
        """task.sh's run_points, whose ranks print and exit with `code`; its exit status.

        A rank has left its mark if `begun`, and ranks have left their notes, and a checkpoint if
        it `saves`. A probe of the nodes ends with `nodes`. `srun`: what srun prints itself.
        """
        lines = ["#!/bin/bash", "[[ $* != *overlap* ]] || { echo probe >>${0%/*}/calls;"]
        lines[-1] += f" exit {nodes}; }}"
        for text, kind in ((failed, "failed"), (lost, "lost")):
            if text:
                note = json.dumps({"reason": text}, indent=2)
                lines.append(f"echo {shlex.quote(note)} >{self.sweep.jobs}/{self.name}.{kind}")
        lines.append(f"printf %s {shlex.quote(prints)} >>{self.sweep.jobs}/{self.name}.log")
        if srun:
            log = self.sweep.jobs / "slurm" / "7_0_0_log.err"
            log.parent.mkdir(exist_ok=True)
            lines.append(f"printf %s {shlex.quote(srun)} >>{log}")
        if begun:
            lines.append(f"echo $BIP_ATTEMPT >{self.sweep.jobs}/{self.name}.begun")
        (self.run / "checkpoint").mkdir(exist_ok=True)
        if saves:
            lines.append(f"/bin/sleep 0.05; touch {self.run}/checkpoint/manifest.json")
        self.command("srun", "\n".join([*lines, f"echo ranks >>${{0%/*}}/calls; exit {code}\n"]))
        (self.bin / "points.txt").write_text(f"{self.name}\n")
        words = f"run_points {self.sweep.folder} {self.bin}/points.txt true"
        script = f"{setup}\nsource {ROOT}/slurm/task.sh\n{words}"
        done = self.bash(script, **env)
        self.printed = done.stderr
        return done.returncode

    def bash(self, script: str, **env: str) -> "subprocess.CompletedProcess[str]":
        words = ["bash", "-c", script]
        return subprocess.run(words, env=self.env | env, text=True, capture_output=True, timeout=60)

    def rank(self, ends: str, **env: str) -> int:
        """A rank whose run ends as `rank_that.py` lists; its exit status."""
        env = self.env | {"BIP_POINT": self.name, "BIP_ATTEMPT": "7_0.0"} | env
        words = [sys.executable, "-m", "tests.launch.rank_that", ends, str(self.sweep.folder)]
        return subprocess.run(words, env=env, timeout=120, check=False).returncode

    def records(self) -> list[dict[str, Any]]:
        """Of all ranks."""
        paths = self.sweep.folder.rglob("attempts.jsonl")
        return [record for path in paths for record in read_jsonl(path)]

    def causes(self) -> list[str]:
        """Those of all requeues by ranks."""
        return [r["cause"] for r in self.records() if r["event"] == "requeue"]

    def events(self) -> list[str]:
        return [record["event"] for record in self.records()]


def _reason(path: Path) -> str:
    return str(json.loads(path.read_text())["reason"]) if path.exists() else ""
