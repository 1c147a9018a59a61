"""How ranks ended that left no record: which, on which node, by which signal, for lack of memory?

Read from what srun and slurmstepd print, from accounting, the task's cgroup and the kernel's log.
Standard library only, and for Python 3.8 (see `bip/slurm.py`).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bip.slurm import SlurmError, ask

# How srun names signals, as `strsignal` does.
_SIGNALS = {
    "Killed": "SIGKILL",
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE",
    "Out Of Memory": "SIGKILL, out of memory",
}
# srun ends the other ranks by these after the first.
_FOLLOWS = ("Terminated", "User defined signal", "Hangup", "Interrupt", "Continued")
_OOM = re.compile(
    r"oom.kill|Out Of Memory|exceeded (?:\w+ )?memory limit|OUT_OF_MEMORY", re.IGNORECASE
)


def first_death(printed: str) -> str:
    """The first rank that srun reports as ended by itself: 'rank 1 on n2 was killed by SIGKILL'."""
    for node, ranks, how in re.findall(
        r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)\s*$", printed, re.MULTILINE
    ):
        if how.startswith(_FOLLOWS):
            continue
        name = f"rank {ranks} on {node}" if ranks.isdigit() else f"one of ranks {ranks} on {node}"
        sign = next((text for words, text in _SIGNALS.items() if how.startswith(words)), "")
        if sign:
            return f"{name} was killed by {sign}"
        return f"{name} ended with {how.lower().replace('exited with ', '')}"
    return ""


def memory_limit_hit(
    printed: str, accounted: str, limit_mb: float, oom_kills: int, kernel: str
) -> str:
    """What shows that the task's memory limit was hit, and what to do; "" if nothing does.

    `printed` by srun and slurmstepd; `accounted`: sacct's line ID|STATE|MAXRSS of the step;
    `oom_kills`: the kernel's count in the task's cgroup; `kernel`: its log's lines on this job.
    """
    most = max(map(_megabytes, re.findall(r"\|(\d[\d.]*[KMGT]?)", accounted)), default=0.0)
    shown = [
        text
        for is_shown, text in (
            (_OOM.search(printed), "SLURM reports an out-of-memory kill"),
            ("OUT_OF_MEMORY" in accounted, "accounting shows OUT_OF_MEMORY"),
            (oom_kills, f"the task's cgroup counts {oom_kills} out-of-memory kills"),
            (kernel, "the kernel's log shows an out-of-memory kill in this job"),
            (limit_mb and most >= 0.97 * limit_mb, "its processes came to the limit"),
        )
        if is_shown
    ]
    if not shown:
        return ""
    size = f" of {limit_mb:.0f} MB" * bool(limit_mb)
    used = f" (MaxRSS {most:.0f} MB)" * bool(most)
    return f"the memory limit{size} was hit: {shown[0]}{used}; give more mem in the profile"


def _megabytes(text: str) -> float:
    unit = "KMGT".find(text[-1])
    return float(text.rstrip("KMGT")) * 1024.0 ** (unit - 1 if unit >= 0 else -2)


def look(printed: str, env: Mapping[str, str]) -> str:
    """`memory_limit_hit` for the task around this process."""
    job = env.get("SLURM_JOB_ID", "")
    accounted = kernel = ""
    with contextlib.suppress(SlurmError):
        answer = ask("sacct", "-nPj", job, "--format=JobID,State,MaxRSS", timeout=10)
        steps = re.findall(r"^[\d_]+\.\d+\|.*$", answer, re.MULTILINE)
        accounted = "".join(steps[-1:])  # those before were other runs of the task
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.check_output(
            ["dmesg"], stderr=subprocess.DEVNULL, timeout=10, universal_newlines=True
        )
        kernel = "".join(re.findall(rf"oom-kill:constraint=CONSTRAINT_MEMCG.*job_{job}\b", lines))
    per_cpu = float(env.get("SLURM_MEM_PER_CPU") or 0) * float(env.get("SLURM_CPUS_ON_NODE") or 1)
    limit = float(env.get("SLURM_MEM_PER_NODE") or 0) or per_cpu
    return memory_limit_hit(printed, accounted, limit, _oom_kills(), kernel)


def _oom_kills() -> int:
    """Out-of-memory kills that the kernel counts in this job's cgroup, steps included."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            path = line.rpartition(":")[2]
            if match := re.match(r"(.*/job_\d+)", path):
                for root, name in (("", "memory.events"), ("/memory", "memory.oom_control")):
                    events = Path(f"/sys/fs/cgroup{root}{match[1]}/{name}")
                    with contextlib.suppress(OSError):
                        found = re.search(r"^oom_kill (\d+)", events.read_text(), re.MULTILINE)
                        return int(found[1]) if found else 0
    return 0
