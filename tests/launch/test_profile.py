"""Profiles: what they hold, and errors that name the file and the key."""

import re
from pathlib import Path
from typing import Any

import pytest

from bip.errors import UserError
from launch.profile import SlurmProfile, load_profile
from tests.launch.conftest import ROOT


def load(folder: Path, text: str) -> Any:
    path = folder / "p.yml"
    path.write_text(text[1:] if text[0] == "!" else f"executor: slurm\n{text}\n")
    return load_profile(path)


@pytest.mark.parametrize("name", ["dev", "gpu", "preemptible", "container"])
def test_profiles_load(name: str) -> None:
    profile = load_profile(ROOT / "slurm" / "profiles" / f"{name}.yml")
    assert isinstance(profile, SlurmProfile)


def test_local_profile_and_the_parallelism_flag() -> None:
    assert load_profile(None).executor == "local"
    assert load_profile(None, 5).parallelism == 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sbatch: {time: 1}\npartition: a\npartition: b", "key 'partition' is written twice"),
        ("time: soon", "time: must be minutes"),
        ("time: 1-", "time: must be minutes"),
        ("time: 1:2:3:4", "time: must be minutes"),
        ("time: '0'", "time: Input should be greater than or equal to 1"),
        ("sbatch: {partition: x}", "sbatch: partition is a key of the profile"),
        ("sbatch: {array: 0-3}", "sbatch: array is set by the launcher"),
        ("sbatch: {ntasks: 3}", "sbatch: ntasks is set by the launcher"),
        ("srun_args: [--label, --kill-on-bad=0]", "srun_args: --kill-on-bad is set by the"),
        ("srun_args: [-N2]", "srun_args: -N2 is set by the launcher"),
        ("srun_args: [--output, x]", "srun_args: --output is set by the launcher"),
        ("srun_args: [--export=NONE]", "srun_args: --export is set by the launcher"),
        ("srun_args: [--export, ALLES]", "srun_args: --export is set by the launcher"),
        ("env: {NCCL-DEBUG: WARN}", "env: 'NCCL-DEBUG' is no name of a shell variable"),
        ('python: "it\'s"', "python: No closing quotation"),
        ("gpus_per_node: 1\nntasks_per_node: 2", "gpus_per_node: 1 GPUs for 2 ranks"),
        ("partion: x", "unknown key 'partion' (perhaps you meant partition)"),
        ("signal_lead: 4000", "signal_lead: 4000 s is not less than the time limit"),
        ("retries: {bug: 3}", "unknown key 'retries.bug'"),
        ("executor: local", "key 'executor' is written twice"),
        ("!executor: local\nparalelism: 3", "unknown key 'paralelism' (perhaps you meant parall"),
        ("!executor: local\ncpus_per_task: 0", "cpus_per_task: "),
        ("!executor: slrm", "executor: "),
        ("!parallelism: 2", "executor: missing"),
        ("!- 1", "must hold 'key: value'"),
    ],
)
def test_errors_name_the_file_and_the_key(text: str, named: str, tmp_path: Path) -> None:
    """`text` is all after `executor: slurm`, or all after a `!`."""
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/p.yml: {named}")) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("'90'", 90), ("30:00", 30), ("'0:30'", 1), ("30:61", 32), ("1:30:00", 90),
        ("00:00:30", 1), ("1-2", 1560), ("1-2:3", 1563), ("1-2:3:4", 1564), ("0-0:0:1", 1),
        ("12:00:00", 720), ("1-00:00:00", 1440), ("150:00", 150),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, minutes: int, tmp_path: Path) -> None:
    """Without quotes, too: YAML 1.1 reads 2:30:00 as 9000, a number to the base 60."""
    profile = load(tmp_path, f"time: {text}\nsignal_lead: 0\nenv: {{CLOCK: 1:30}}")
    assert (profile.time, profile.env) == (minutes, {"CLOCK": "1:30"})


def test_other_arguments_of_srun_are_the_users() -> None:
    words = ["--container-image=/x", "--nodelist=n1", "-l", "--cpu-bind=none", "--mpi", "none"]
    words += ["--export=ALL,PATH=/nowhere", "--export", "ALL", "--exp=ALL"]
    assert SlurmProfile(executor="slurm", srun_args=words).srun_args == words


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gpus_per_node: 3", "gpus_per_node"),  # more than ranks
        ("runs_per_task: 3", "runs_per_task"),
        ("points_per_task: 3", "runs_per_task"),  # its first name
    ],
)
def test_what_else_is_read(text: str, key: str, tmp_path: Path) -> None:
    assert load(tmp_path, text).model_dump()[key] == 3
