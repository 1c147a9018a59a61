"""Which rank died, and whether for lack of memory, by what SLURM and the kernel print."""

import pytest

from launch.slurm.deaths import first_death, memory_limit_hit


@pytest.mark.parametrize(
    ("printed", "death"),
    [
        ("srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Terminated\n",
         "rank 1 on n1 was killed by SIGKILL"),
        ("srun: error: n1: task 0: Terminated\nsrun: error: n2: task 1: Exited with exit code 3\n",
         "rank 1 on n2 ended with exit code 3"),
        ("srun: error: n2: tasks 0-3: Segmentation fault (core dumped)\n",
         "one of ranks 0-3 on n2 was killed by SIGSEGV"),
        ("srun: error: gpu-07.site: task 12: Out Of Memory\n",
         "rank 12 on gpu-07.site was killed by SIGKILL, out of memory"),
        ("srun: error: n1: tasks 0,2: Aborted\n", "one of ranks 0,2 on n1 was killed by SIGABRT"),
        ("srun: error: n1: task 0: User defined signal 2\n", ""),
        ("srun: error: Could not open stdout file: Read-only file system\nstep 1\n", ""),
    ],
)  # fmt: skip
def test_the_first_rank_that_ended_by_itself(printed: str, death: str) -> None:
    assert first_death(printed) == death


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"printed": "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0."},
         "4000 MB was hit: SLURM reports"),
        ({"printed": "slurmstepd: error: Step 7.0 exceeded memory limit (5 > 4), being killed"},
         "SLURM reports"),
        ({"accounted": "RUNNING|\nOUT_OF_MEMORY|3.9G\n"}, "OUT_OF_MEMORY (MaxRSS 3994 MB)"),
        ({"accounted": "FAILED|4090000K\n"}, "its processes came to the limit (MaxRSS 3994 MB)"),
        ({"accounted": "FAILED|1676K\nFAILED|900M\n"}, ""),
        ({"accounted": "FAILED|4090000K\n", "limit_mb": 0}, ""),
        ({"oom_kills": 2}, "cgroup counts 2 out-of-memory kills"),
        ({"kernel": "oom-kill:constraint=CONSTRAINT_MEMCG"}, "the kernel's log"),
        ({}, ""),
    ],
)  # fmt: skip
def test_signs_of_a_memory_limit(facts: dict[str, object], named: str) -> None:
    known = {"printed": "", "accounted": "", "limit_mb": 4000, "oom_kills": 0, "kernel": ""}
    found = memory_limit_hit(**(known | facts))  # type: ignore[arg-type]
    assert named in found
    assert bool(found) == bool(named)
    assert not found or "give more mem" in found
