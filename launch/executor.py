"""The interface that executes the runs of a sweep, on this machine or under SLURM."""

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
    """Executes runs of one sweep. Methods raise UserError for what the user can fix."""

    @property
    def poll_seconds(self) -> float:
        """Seconds between two reads of the sweep's state, which may call squeue."""

    @property
    def limit(self) -> str:
        """The number of runs at once, as text for the user."""

    def prepare(self, configs: Sequence[RunConfig], runs: Sequence[Run]) -> list[str]:
        """Check inputs, machine and disk before `runs` are submitted; returns lines for the user.

        Creates nothing. `configs` are those of the runs, and perhaps of finished runs.
        """

    def preview(self, runs: Sequence[Run]) -> Iterator[str]:
        """After `prepare`: what submitting `runs` would start, and its cost, as text."""

    def submit(self, run_ids: list[str], keep_code: bool) -> int:
        """Queue those of the runs that are not done, and remove their failure records; how many.

        With `keep_code` tasks that start later run a copy of the present code.
        """

    def queue(self) -> dict[str, Place]:
        """RUN_ID -> state of a run that the sweep's files do not show."""

    def is_alive(self) -> bool:
        """Whether waiting runs may still start."""

    def cancel(self, save_seconds: float) -> str:
        """End and mark the queued runs, then the running ones; returns text for the user.

        A running run gets `save_seconds` to save, unless a scheduler sets that time.
        """

    def logs(self, run_id: str) -> list[Path]:
        """Files that a run may have printed to, the most useful first."""

    def examine(self, probe: bool) -> Iterator[Finding]:
        """Report what will happen to a sweep. With `probe`, also from a test task."""

    def python(self, probe: bool) -> list[str]:
        """The words that start Python on this machine; with `probe`, where the runs will be."""


def executor_for(sweep: Sweep, profile: AnyProfile, command: list[str] = TRAIN) -> Executor:
    """The executor that a profile names; `command` trains one local run."""
    if isinstance(profile, LocalProfile):
        return LocalExecutor(sweep, profile, command)
    return SlurmExecutor(sweep, profile)


def executors_of(sweep: Sweep) -> list[Executor]:
    """Those that runs of the sweep were submitted to."""
    kinds = (LocalExecutor, SlurmExecutor)
    return [kind(sweep) for kind in kinds if kind.was_used(sweep)]
