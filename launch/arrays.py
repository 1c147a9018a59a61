"""A sweep as SLURM arrays: one per stage, chunked and chained; submitted through submitit."""

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bip.errors import UserError
from bip.files import append_jsonl, atomic_write_bytes, atomic_write_json, read_jsonl
from launch import slurm
from launch.ledger import Lock, Record, Sweep
from launch.profile import SlurmProfile
from launch.rank import SUBMITTED, run_point
from launch.series import STAGES
from launch.snapshot import ROOT, snapshot
from launch.task import without_job


@dataclass
class Array:
    """One sbatch --array: `tasks[i]` are the RUN_IDs that its task i runs in turn.

    Its tasks wait for `corr` (task i for task i of that array), for `after` (tasks in the queue, or
    points of arrays of this submission, whose tasks must succeed) and for `throttled_by` (that must
    end).
    """

    stage: str
    tasks: list[list[str]]
    parallelism: int = 1
    corr: "Array | None" = None
    after: list["tuple[Array, str] | str"] = field(default_factory=list)
    throttled_by: "Array | None" = None
    job: str = ""

    def task_of(self, run_id: str) -> str:
        """The name of the task that runs a point, once submitted."""
        (index,) = [index for index, task in enumerate(self.tasks) if run_id in task]
        return f"{self.job}_{index}"

    @property
    def dependency(self) -> str:
        """sbatch's --dependency; every array it names has been submitted."""
        names = [one if isinstance(one, str) else one[0].task_of(one[1]) for one in self.after]
        parts = [f"aftercorr:{self.corr.job}"] if self.corr else []
        parts += [f"afterok:{':'.join(names)}"] if names else []
        parts += [f"afterany:{self.throttled_by.job}"] if self.throttled_by else []
        return ",".join(parts)


def plan_arrays(
    records: Sequence[Record],
    run_ids: Collection[str],
    done: Collection[str],
    queued: dict[str, str],
    parallelism: int,
    points_per_task: int = 1,
    max_array_size: int = 1001,
) -> list[Array]:
    """The arrays that run `run_ids`, in an order in which they can be submitted.

    `done` points need nothing; those in `queued` (RUN_ID -> array task) are in the queue already.
    Raises UserError for a point whose need is neither done, queued nor among `run_ids`.
    """
    wanted = [r for r in records if r.run_id in run_ids and r.run_id not in {*done, *queued}]
    needs = {r.run_id: [need for need in r.needs if need not in done] for r in wanted}
    followers: dict[str, list[str]] = {}
    for run_id, needed in needs.items():
        for need in needed:
            followers.setdefault(need, []).append(run_id)
    # need -> the one point that waits for it and for nothing else
    partner = {need: f[0] for need, f in followers.items() if len(f) == len(needs[f[0]]) == 1}
    place: dict[str, Array] = {}  # RUN_ID -> its array in this submission
    for stage in STAGES:
        free, corresponding, other = [], [], []
        for record in [record for record in wanted if record.stage == stage]:
            run_id, needed = record.run_id, needs[record.run_id]
            if missing := [n for n in needed if n not in place and n not in queued]:
                raise UserError(
                    f"{run_id} needs {missing[0]}, which is neither done nor submitted; "
                    "python -m launch resume FOLDER submits both"
                )
            if not needed:
                free.append(run_id)
            elif needed[0] in place and partner.get(needed[0]) == run_id:
                corresponding.append(run_id)
            else:
                other.append(run_id)
        groups = list(_chunks(stage, free, partner, points_per_task, max_array_size))
        for before in unique(place.values()):
            # `before` has the points with partners first: same index, same task.
            follow = [partner[n] for task in before.tasks for n in task if n in partner]
            follow = [run_id for run_id in follow if run_id in corresponding]
            for array in _chunks(stage, follow, {}, points_per_task, max_array_size):
                array.corr = before
                groups.append(array)
        # An array for each need: what waits for one task must not fail with the task beside it.
        alike: dict[tuple[str, ...], list[str]] = {}
        for run_id in other:
            alike.setdefault(tuple(needs[run_id]), []).append(run_id)
        for needed_by_all, run_ids_alike in alike.items():
            for array in _chunks(stage, run_ids_alike, partner, points_per_task, max_array_size):
                array.after += [(place[n], n) for n in needed_by_all if n in place]
                array.after += sorted({queued[n] for n in needed_by_all if n not in place})
                groups.append(array)
        _share(groups, parallelism)
        place |= {run_id: array for array in groups for task in array.tasks for run_id in task}
    return unique(place.values())


def unique(arrays: Iterable[Array]) -> list[Array]:
    return list({id(array): array for array in arrays}.values())


def _chunks(
    stage: str, run_ids: list[str], partner: Collection[str], per_task: int, size: int
) -> Iterator[Array]:
    """Arrays of at most `size` tasks of `per_task` points, those with a partner first."""
    ordered = sorted(run_ids, key=lambda run_id: run_id not in partner)
    tasks = [ordered[at : at + per_task] for at in range(0, len(ordered), per_task)]
    for at in range(0, len(tasks), size):
        yield Array(stage, tasks[at : at + size])


def _share(arrays: list[Array], parallelism: int) -> None:
    """Throttles that add up to `parallelism`; arrays beyond it wait for one before them."""
    together = arrays[:parallelism]
    for number, array in enumerate(together):
        array.parallelism = parallelism // len(together) + (number < parallelism % len(together))
    for number, array in enumerate(arrays[parallelism:]):
        array.parallelism = 1
        array.throttled_by = arrays[number]


def arrays_file(sweep: Sweep) -> Path:
    return sweep.jobs / "arrays.jsonl"


def submitted_tasks(sweep: Sweep) -> dict[str, str]:
    """RUN_ID -> the newest array task that was submitted for it."""
    found: dict[str, str] = {}
    for array in read_jsonl(arrays_file(sweep)):
        for index, run_ids in enumerate(array["tasks"]):
            found |= dict.fromkeys(run_ids, f"{array['job']}_{index}")
    return found


def in_queue(sweep: Sweep) -> dict[str, slurm.Queued]:
    """RUN_ID -> its task in SLURM's queue, for points that were submitted; one squeue call."""
    tasks = submitted_tasks(sweep)
    jobs = {task.split("_")[0] for task in tasks.values()}
    queue = slurm.queue(jobs)
    return {run_id: queue[task] for run_id, task in tasks.items() if task in queue}


def submit_arrays(
    sweep: Sweep,
    profile: SlurmProfile,
    run_ids: Collection[str],
    max_array_size: int,
    keep_code: bool = True,
    told: Callable[[str], None] = print,
) -> list[Array]:
    """Submit what of `run_ids` is neither done nor queued. Their old failures are forgotten.

    Raises UserError when SLURM refuses; arrays that it took before stay, and are in the ledger.
    """
    with Lock.wait(sweep.jobs / "submit.lock"):
        records = sweep.records()
        done = {record.run_id for record in records if sweep.is_done(record)}
        queued = {run_id: waiting.task for run_id, waiting in in_queue(sweep).items()}
        arrays = plan_arrays(
            records, run_ids, done, queued, profile.parallelism, profile.points_per_task,
            max_array_size,
        )  # fmt: skip
        if not arrays:
            return []
        code = snapshot(sweep.folder / "code") if keep_code else ROOT
        atomic_write_json(sweep.jobs / "profile.json", profile.model_dump(mode="json"))
        for array in arrays:
            for run_id in (run_id for task in array.tasks for run_id in task):
                sweep.failure_path(run_id).unlink(missing_ok=True)
        for array in arrays:
            submit_array(sweep, profile, array, code)
            chained = f", {array.dependency}" if array.dependency else ""
            told(
                f"{array.stage}: array {array.job}, {len(array.tasks)} tasks, "
                f"{array.parallelism} at once{chained}"
            )
    return arrays


def submit_array(sweep: Sweep, profile: SlurmProfile, array: Array, code: Path) -> None:
    """One sbatch; sets `array.job` and records it."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    folder = sweep.jobs.absolute() / "slurm"
    folder.mkdir(exist_ok=True)
    points = folder / f"points-{now.replace(':', '')}-{os.getpid()}.txt"
    lines = "".join(" ".join(task) + "\n" for task in array.tasks)
    atomic_write_bytes(points, lines.encode())
    executor = _executor(folder, profile, sweep.folder.absolute(), points)
    executor.update_parameters(**sbatch_parameters(sweep, profile, array, code, now))
    try:
        array.job = executor.submit_tasks(str(sweep.folder.absolute()), len(array.tasks))
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise UserError(f"sbatch: {' '.join(str(error).split())}") from None
    record = {"job": array.job, "stage": array.stage, "tasks": array.tasks, "time": now}
    append_jsonl(arrays_file(sweep), record | {"dependency": array.dependency, "code": code.name})


def sbatch_parameters(
    sweep: Sweep, profile: SlurmProfile, array: Array, code: Path, now: str
) -> dict[str, Any]:
    """What submitit is told: its own names where it has them, SLURM's for the rest."""
    count = len(array.tasks)
    further: dict[str, Any] = {
        "array": f"0-{count - 1}%{array.parallelism}",
        "requeue": True,
        "open-mode": "append",
        **{name.replace("_", "-"): value for name, value in profile.sbatch.items()},
    }
    if profile.mem is not None:
        further["mem"] = profile.mem
    if array.dependency:
        further |= {"dependency": array.dependency, "kill-on-invalid-dep": "yes"}
    environment = {"OMP_NUM_THREADS": str(profile.cpus_per_task)} | profile.env
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    path = shlex.quote(str(code.absolute()))
    setup = [
        *exports,
        *profile.setup,
        f"export {SUBMITTED}={now}",
        # The snapshot before whatever is installed, and instead of the working folder.
        f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"source {path}/slurm/task.sh || exit 1",
    ]
    optional = {
        name: getattr(profile, name)
        for name in ("partition", "account", "qos", "constraint")
        if getattr(profile, name) is not None
    }
    if profile.gpus_per_node:
        optional["gpus_per_node"] = profile.gpus_per_node
    return optional | {
        "job_name": sweep.folder.absolute().name,
        "time": profile.time,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.ntasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "signal_delay_s": profile.signal_lead,
        "array_parallelism": array.parallelism,
        "setup": setup,
        "use_srun": False,  # task.sh starts the ranks, of one point after the other
        "additional_parameters": further,
    }


def _executor(folder: Path, profile: SlurmProfile, sweep: Path, points: Path) -> Any:
    """submitit's executor, with three edges taken off."""
    import submitit  # slow, and only needed here
    from submitit.core.utils import JobPaths

    class ArrayExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            start = [*shlex.split(profile.python), "-u", "-m", "submitit.core._submit"]
            words = ["run_points", str(sweep), str(points), *profile.srun_args, *start, str(folder)]
            return shlex.join(words)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # Inside another job sbatch would take over its variables as options.
            kept = without_job(os.environ)
            foreign = [name for name in os.environ if name not in kept]
            unset = [part for name in [*foreign, "CUDA_VISIBLE_DEVICES"] for part in ("-u", name)]
            return ["env", *unset, "sbatch", str(submission_file_path)]

        def submit_tasks(self, sweep_folder: str, count: int) -> str:
            """An array of `count` tasks, also of one. Returns its job ID."""
            if count > 1:
                jobs = self.map_array(run_point, [sweep_folder] * count)
                return str(jobs[0].job_id.split("_")[0])
            # submitit makes a plain job of a single task; its output and pickle are then named
            # without the index that the task, an array's, looks for.
            logs = JobPaths(folder)
            names = {"output": logs.stdout, "error": logs.stderr}
            for name, path in names.items():
                text = str(path).replace("%j", "%A_%a").replace("%t", "0")
                self.parameters["additional_parameters"][name] = text
            job = self.submit(run_point, sweep_folder)
            os.link(
                job.paths.submitted_pickle, JobPaths(folder, f"{job.job_id}_0").submitted_pickle
            )
            return str(job.job_id)

    return ArrayExecutor(folder)


def cancel(sweep: Sweep) -> list[str]:
    """End all of the sweep's tasks that are in the queue; their names.

    Their points are marked before: a run that is told to stop would else save and requeue itself.
    """
    queued = in_queue(sweep)
    points = [r for r in sweep.records() if r.run_id in queued and not sweep.is_done(r)]
    marked = [r.run_id for r in points if sweep.failure(r) is None]
    for run_id in marked:
        sweep.fail(run_id, f"cancelled; python -m launch resume {sweep.folder} goes on")
    tasks = sorted({waiting.task for waiting in queued.values()})
    try:
        if tasks:
            slurm.ask("scancel", *tasks)
    except slurm.SlurmError:
        for run_id in marked:
            sweep.failure_path(run_id).unlink(missing_ok=True)
        raise
    return tasks
