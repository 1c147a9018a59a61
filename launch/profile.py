"""A profile: the facts of the machine or cluster that a sweep runs on."""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bip.cli import nearest, one_line
from bip.errors import UserError
from bip.shipped import given_or_shipped, shipped
from bip.yaml_file import read_yaml, refuse_leading_zeros

# Options of sbatch that the launcher sets from the profile's keys, or that would break the array of
# tasks.
_OURS = {"array", "requeue", "no_requeue", "open_mode", "signal", "output", "error", "dependency"}
_OURS |= {"kill_on_invalid_dep", "job_name", "export", "export_file", "wrap", "wait", "input"}
_OURS |= {"ntasks", "tasks_per_node", "ntasks_per_core", "ntasks_per_socket", "ntasks_per_gpu"}
_OURS |= {"quiet", "parsable", "test_only", "help", "usage", "version", "clusters", "chdir"}
# The same for srun, with their one-letter forms.
_OURS_OF_SRUN = {"kill-on-bad-exit": "K", "output": "o", "error": "e", "input": "i", "ntasks": "n"}
_OURS_OF_SRUN |= {"nodes": "N", "cpus-per-task": "c", "open-mode": "", "ntasks-per-node": ""}
_OURS_OF_SRUN |= {"export": "", "multi-prog": "", "pty": ""}  # except --export=ALL,NAME=VALUE


def _minutes(value: object) -> object:
    """A time limit in whole minutes, rounded up, from any form that sbatch takes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value)
    if match is None:
        raise ValueError("must be minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS")
    days, *clock = match.groups()
    parts = [int(part) for part in clock if part is not None]
    if days is None and len(parts) < 3:
        parts.insert(0, 0)  # without days one number is minutes, and two are minutes and seconds
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return (int(days or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)


@dataclass(frozen=True)
class Finding:
    """A finding about a profile's machines. An error fails every run; a warning may cost work.

    `text` begins with its subject and a colon. `seconds`: what it leaves a run to save.
    """

    level: Literal["ok", "warning", "error"]
    text: str
    seconds: float | None = None


class Profile(BaseModel):
    """The keys of every profile. Names are SLURM's where SLURM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    executor: str = Field(description="what starts the jobs")
    parallelism: int = Field(2, ge=1, description="runs at once")
    runs_at_once: int = Field(1, ge=1, description="runs that share CPUs and GPU")
    ntasks_per_node: int = Field(1, ge=1, description="processes (ranks) of one run on a node")
    cpus_per_task: int = Field(1, ge=1, description="threads of one rank (OMP_NUM_THREADS)")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the runs")

    @model_validator(mode="before")
    @classmethod
    def _keep_text(cls, values: dict[str, Any]) -> dict[str, Any]:
        refuse_leading_zeros(cls, values)
        return values

    @property
    def ranks(self) -> int:
        """Processes of one run."""
        return self.ntasks_per_node

    @model_validator(mode="after")
    def _one_rank_each(self) -> Self:
        if self.runs_at_once > 1 < self.ranks:
            raise ValueError(
                f"runs_at_once: a run has {self.ranks} ranks; runs that share CPUs or a GPU have "
                "one: give ntasks_per_node: 1 and one node, or runs_at_once: 1"
            )
        return self


class LocalProfile(Profile):
    """This machine, without a scheduler."""

    executor: Literal["local"] = Field(description="what starts the jobs")
    runs_at_once: int = Field(
        1,
        ge=1,
        description="2 or more: as parallelism, and each run is bound to its part of all CPUs, "
        "with as many threads; they share the GPUs",
    )

    @model_validator(mode="before")
    @classmethod
    def _all_at_once(cls, values: dict[str, Any]) -> dict[str, Any]:
        at_once = values.get("runs_at_once", 1)
        return {"parallelism": at_once} | values if at_once != 1 else values

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.runs_at_once == 1:
            return self
        if self.parallelism != self.runs_at_once:
            raise ValueError(
                f"runs_at_once: {self.runs_at_once}, but parallelism is {self.parallelism}; "
                "leave parallelism out"
            )
        if self.cpus_per_task != 1:
            raise ValueError("runs_at_once: divides all CPUs; leave cpus_per_task out")
        if (cpus := len(os.sched_getaffinity(0))) < self.runs_at_once:
            raise ValueError(
                f"runs_at_once: {self.runs_at_once} runs on the {cpus} CPUs of this machine; "
                f"give {cpus} or less"
            )
        return self

    @property
    def threads(self) -> int:
        """Threads of one rank."""
        if self.runs_at_once == 1:
            return self.cpus_per_task
        return len(os.sched_getaffinity(0)) // self.runs_at_once


class Retries(BaseModel):
    """How often a run may be interrupted, by cause, before it counts as failed.

    Counted since the task was submitted. A bug or a lack of memory is never retried. (A full
    /dev/shm is, because it looks like an unreachable file system.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preempted: int = Field(default=100, ge=0, description="the scheduler took the nodes")
    timed_out: int = Field(default=100, ge=0, description="the time limit came")
    lost: int = Field(
        default=5,
        ge=0,
        description="attempts in a row without a save or progress: a node, rank or disk failed",
    )


class SlurmProfile(Profile):
    """A SLURM cluster: the resources of an array task, and how it is requeued."""

    executor: Literal["slurm"] = Field(description="what starts the jobs")
    parallelism: int = Field(2, ge=1, description="array tasks of one stage at once")
    # The resources of a task
    partition: str | None = Field(None, description="partition, or several: a,b")
    account: str | None = Field(None, description="account")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="node features")
    time: Annotated[int, BeforeValidator(_minutes)] = Field(
        60, ge=1, description="time limit of one attempt: minutes, H:MM:SS or D-H:MM:SS"
    )
    nodes: int = Field(1, ge=1, description="nodes of one run")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of one run on a node; a rank uses one")
    mem: str | None = Field(None, description="memory of a node, such as 64G")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="further sbatch options, such as {reservation: NAME}"
    )
    # How its ranks start
    setup: list[str] = Field(
        default_factory=list,
        description="shell lines before the ranks start; a line that fails ends the task",
    )
    srun_args: list[str] = Field(default_factory=list, description="further srun arguments")
    python: str = Field(sys.executable, description="python of the ranks, on the compute nodes")
    runs_per_task: int = Field(
        1,
        ge=1,
        description="runs of one array task, one after the other",
        validation_alias=AliasChoices(
            "runs_per_task", "points_per_task"
        ),  # the name in version 0.1.0
    )
    runs_at_once: int = Field(
        1,
        ge=1,
        description="runs of one array task at once: each is bound to its part of cpus_per_task, "
        "and they share the GPU",
    )
    # How it is interrupted
    signal_lead: int = Field(
        120, ge=0, le=65535, description="seconds before the time limit at which runs are signalled"
    )
    requeue_by: Literal["scontrol", "batch"] = Field(
        "scontrol",
        description="scontrol: rank 0 requeues; batch: the batch script does (with runs_at_once "
        "always)",
    )
    retries: Retries = Field(Retries(), description="by cause")

    @field_validator("partition", "account", "qos", "constraint", "mem", "sbatch")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        for text in value.values() if isinstance(value, dict) else [value]:
            if re.search(r"[\x00-\x1f]", str(text)):  # the lines after it would be shell commands
                raise ValueError(f"must be one line, not {text!r}")
        return value

    @field_validator("sbatch")
    @classmethod
    def _no_key_twice(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        options = {name.replace("-", "_"): value for name, value in options.items()}
        for name, value in options.items():
            if str(value).lower() in ("yes", "no", "on", "off"):
                raise ValueError(f"{name}: write true or false, not {value}")
            if name in cls.model_fields:
                raise ValueError(f"{name} is a key of the profile; give it there")
            if name in _OURS:
                raise ValueError(f"{name} is set by the launcher; leave it out")
        return options

    @field_validator("srun_args")
    @classmethod
    def _not_ours(cls, words: list[str]) -> list[str]:
        for word, following in zip(words, [*words, ""][1:], strict=True):
            name, sign, value = word.partition("=")
            # srun accepts the beginning of a long name.
            long = name[2:] and [ours for ours in _OURS_OF_SRUN if ours.startswith(name[2:])]
            short = name[1:2] in [*_OURS_OF_SRUN.values()]
            # The ranks need the whole environment of the batch script; additions are harmless.
            if long == ["export"] and re.match(r"ALL(,|$)", value if sign else following):
                continue
            if (name.startswith("--") and long) or (re.match(r"-\w", name) and short):
                raise ValueError(f"{name} is set by the launcher; leave it out")
        return words

    @field_validator("env")
    @classmethod
    def _shell_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"{name!r} is no name of a shell variable")
        return env

    @field_validator("python")
    @classmethod
    def _words(cls, python: str) -> str:
        if not shlex.split(python):  # raises ValueError for an open quote
            raise ValueError("must name a program")
        return python

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.signal_lead >= 60 * self.time:
            raise ValueError(f"signal_lead: {self.signal_lead} s is not less than the time limit")
        # On clusters that allocate whole nodes, there may be more GPUs than ranks.
        if 0 < self.gpus_per_node < self.ntasks_per_node:
            raise ValueError(
                f"gpus_per_node: {self.gpus_per_node} GPUs for {self.ntasks_per_node} ranks "
                "(ntasks_per_node); a rank uses one GPU, and shares none"
            )
        if self.runs_at_once > self.runs_per_task:
            raise ValueError(
                f"runs_at_once: {self.runs_at_once} is more than a task has, as runs_per_task is "
                f"{self.runs_per_task}; give that more"
            )
        if self.runs_at_once > self.cpus_per_task:
            raise ValueError(
                f"runs_at_once: {self.runs_at_once} runs on the {self.cpus_per_task} CPUs of a "
                f"task (cpus_per_task); give {self.runs_at_once} CPUs or more"
            )
        return self

    @property
    def runs_of_stage(self) -> int:
        """Runs of one stage at once."""
        return self.parallelism * self.runs_at_once

    @property
    def threads(self) -> int:
        """Threads of one rank."""
        return self.cpus_per_task // self.runs_at_once

    @property
    def ranks(self) -> int:
        return self.nodes * self.ntasks_per_node


AnyProfile = LocalProfile | SlurmProfile
PROFILES: dict[str, type[AnyProfile]] = {"local": LocalProfile, "slurm": SlurmProfile}


def load_profile(
    path: Path | None, parallelism: int | None = None, **flags: int | None
) -> AnyProfile:
    """The profile in `path` (None: the local one); `parallelism` and other `flags` beat the file's.

    Raises UserError naming the file and the key.
    """
    path = given_or_shipped(path) if path else shipped("slurm/profiles/local.yml")
    if not path.is_file():
        raise UserError(f"profile: no such file: {path}")
    values = read_yaml(path)
    kind = values.get("executor")
    if kind not in PROFILES:
        known = ", ".join(PROFILES)
        found = "missing" if kind is None else f"{kind!r} is unknown{nearest(str(kind), PROFILES)}"
        raise UserError(f"{path}: executor: {found}; one of {known}")
    if parallelism is not None and parallelism < 1:
        raise UserError(f"parallelism: must be at least 1, not {parallelism}")
    model = PROFILES[kind]
    given = {name: value for name, value in flags.items() if value is not None}
    if kind == "local" and given.get("runs_at_once", 1) != 1:
        given["parallelism"] = given["runs_at_once"]  # here the same, so it beats the file's too
    if parallelism is not None:
        given["parallelism"] = parallelism
    try:
        return model(**values | given)
    except ValidationError as error:
        raise one_line(error, model.model_fields, str(path)) from None
