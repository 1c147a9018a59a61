"""What does the runs of a sweep: one interface, with this machine and SLURM behind it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from bip.config import RunConfig
from launch.local.executor import LocalExecutor
from launch.local.worker import TRAIN
from launch.profile import AnyProfile, Finding, LocalProfile
from launch.slurm.executor import SlurmExecutor
from launch.sweep import Place, Run, Sweep


class Executor(Protocol):
    """Does runs of one sweep. Methods raise UserError for what the user can fix."""

    @property
    def poll_seconds(self) -> float:
        """Time between two looks at the sweep; a look may cost a call of squeue."""

    @property
    def limit(self) -> str:
        """How many runs it does at once, for the user."""

    def prepare(self, configs: Sequence[RunConfig], runs: Sequence[Run]) -> list[str]:
        """Check inputs, machine and disk before `runs` are submitted; lines for the user.

        Nothing is created. `configs` are those of the runs, and perhaps of some that are done.
        """

    def submit(self, run_ids: list[str], keep_code: bool) -> None:
        """Queue what of these runs is not done; their old failures are forgotten.

        With `keep_code`, what starts late runs a copy of the code as it is now.
        """

    def queue(self) -> dict[str, Place]:
        """RUN_ID -> what it knows of a run beyond the files of the sweep."""

    def is_alive(self) -> bool:
        """Whether runs that are waiting may still be started."""

    def cancel(self, save_seconds: float) -> str:
        """End what is queued, then what is running, and mark it; what was ended, for the user.

        A running run gets `save_seconds` to save, where that is not up to a scheduler.
        """

    def logs(self, run_id: str) -> list[Path]:
        """Files that a run may have printed to, the best one first."""

    def examine(self, probe: bool) -> Iterator[Finding]:
        """What it will do to a sweep. With `probe` it starts a task that looks around."""


def executor_for(sweep: Sweep, profile: AnyProfile, command: list[str] = TRAIN) -> Executor:
    """The executor that a profile names; `command` is what trains one local run."""
    if isinstance(profile, LocalProfile):
        return LocalExecutor(sweep, profile, command)
    return SlurmExecutor(sweep, profile)


def executors_of(sweep: Sweep) -> list[Executor]:
    """Those that runs of the sweep were submitted to."""
    kinds = (LocalExecutor, SlurmExecutor)
    return [kind(sweep) for kind in kinds if kind.was_used(sweep)]
