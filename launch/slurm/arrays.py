"""A sweep's SLURM arrays: submit them (through submitit), find them in the queue, cancel them."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bip.errors import UserError
from bip.files import append_jsonl, atomic_write_bytes, atomic_write_json, read_jsonl
from bip.machine import for_shell
from bip.shipped import shipped
from bip.slurm import KILL_WAIT_NAME
from launch.local.worker import without_job
from launch.profile import SlurmProfile
from launch.slurm import client as slurm
from launch.slurm.chain import Array, plan_arrays
from launch.slurm.rank import PROFILE, SUBMITTED, run_point
from launch.slurm.snapshot import ROOT, snapshot
from launch.sweep import Lock, Run, Sweep

# A failing line of the profile's setup ends the task. (`set -e` would also act inside the functions
# and scripts of `module` and `conda`, which break under it.)
_GUARD = (
    "trap 'code=$?; ((${#BASH_SOURCE[@]} > 1)) || { "
    'echo "setup: exit status $code of: $(sed -n "${LINENO}p" "$0")" >&2; exit "$code"; }\' ERR'
)
# The processes of a cancelled task may take KillWait to end, and SLURM more time to notice.
ENDING_SECONDS = 120.0


def arrays_file(sweep: Sweep) -> Path:
    return sweep.jobs / "arrays.jsonl"


def submitted_tasks(sweep: Sweep) -> dict[str, str]:
    """RUN_ID -> the newest array task submitted for it."""
    found: dict[str, str] = {}
    for array in read_jsonl(arrays_file(sweep)):
        for index, run_ids in enumerate(array["tasks"]):
            found |= dict.fromkeys(run_ids, f"{array['job']}_{index}")
    return found


def in_queue(sweep: Sweep) -> dict[str, slurm.Queued]:
    """RUN_ID -> its task, for runs in SLURM's queue; one squeue call."""
    tasks = submitted_tasks(sweep)
    jobs = {task.split("_")[0] for task in tasks.values()}
    queue = slurm.queue(jobs)
    return {run_id: queue[task] for run_id, task in tasks.items() if task in queue}


def doomed_tasks(
    sweep: Sweep,
    done: Collection[str],
    failed: Collection[str],
    queue: Mapping[str, slurm.Queued],
) -> dict[str, list[str]]:
    """PENDING tasks that will never start, and their runs that are not done.

    They wait for a failed task, or for one that will never start. SLURM ends them too, but up to a
    minute later. `queue` is that of `in_queue`; `done` and `failed` must be read after it.
    """
    waiting = {q.task: q for q in queue.values()}
    dead: set[str] = set()
    doomed = {}
    for array in read_jsonl(arrays_file(sweep)):  # in order: a task comes after those it waits for
        for index, run_ids in enumerate(array["tasks"]):
            task = f"{array['job']}_{index}"
            left = [run_id for run_id in run_ids if run_id not in done]
            found = waiting.get(task)
            if found is not None and found.state == "PENDING":
                never = found.reason == "DependencyNeverSatisfied"
                if never or not dead.isdisjoint(_awaited(array["dependency"], index)):
                    doomed[task] = left
            if task in doomed or (left and found is None) or not {*left}.isdisjoint(failed):
                dead.add(task)
    return doomed


def _awaited(dependency: str, index: int) -> set[str]:
    """The tasks that must succeed before task `index` of an array starts."""
    found: set[str] = set()
    for kind, *names in (part.split(":") for part in dependency.split(",")):
        if kind == "aftercorr":
            found |= {f"{job}_{index}" for job in names}
        elif kind == "afterok":
            found |= {*names}
    return found


def ended(sweep: Sweep, runs: Sequence[Run]) -> tuple[set[str], set[str]]:
    """The runs that are done, and those that failed or were cancelled."""
    done = {run.run_id for run in runs if sweep.is_done(run)}
    others = [run for run in runs if run.run_id not in done]
    return done, {r.run_id for r in others if sweep.failure(r) is not None}


def submit_arrays(
    sweep: Sweep,
    profile: SlurmProfile,
    run_ids: Collection[str],
    max_array_size: int,
    runs_per_task: int = 1,
    keep_code: bool = True,
    report: Callable[[str], None] = print,
) -> list[Array]:
    """Submit those of `run_ids` that are neither done nor queued; remove their failure records.

    Tasks in the queue that wait for a failed one are cancelled first. Their runs are submitted
    again, if what these need is done, in the queue or submitted now.
    Raises UserError when SLURM refuses an array, when a file cannot be written, and on Ctrl-C. The
    message names the arrays submitted before; these stay in the queue and in the ledger.
    """
    arrays: list[Array] = []
    try:
        with Lock.wait(sweep.jobs / "submit.lock"):
            runs = sweep.runs()
            queue = _wait_for_ending(sweep, run_ids, report)
            done, failed = ended(sweep, runs)
            doomed = doomed_tasks(sweep, done, failed, queue)
            queued = {run_id: waiting.task for run_id, waiting in queue.items()}
            hopeful = {run_id: task for run_id, task in queued.items() if task not in doomed}
            left = _left_out(runs, done, failed, hopeful)
            ready = {*done, *hopeful, *run_ids} - {*left}
            if renewed := _renewable(runs, doomed, ready):
                slurm.ask("scancel", *renewed)
                _wait_for_ending(sweep, run_ids, report, cancelled=renewed)
                queued = {name: task for name, task in queued.items() if task not in renewed}
                again = [run_id for task in renewed for run_id in doomed[task]]
                run_ids = list(dict.fromkeys([*run_ids, *again]))
                report(
                    f"cancelled {len(renewed)} tasks ({len(again)} runs) that waited for what "
                    "failed; they are submitted again"
                )
            for reason, count in Counter(left[name] for name in run_ids if name in left).items():
                report(f"left out ({count}): {reason}")
            wanted = [run_id for run_id in run_ids if run_id not in left]
            arrays += plan_arrays(
                runs, wanted, done, queued, profile.parallelism, runs_per_task, max_array_size
            )
            if not arrays:
                return []
            code = snapshot(sweep.folder / "code") if keep_code else ROOT
            facts = sweep.jobs / f"profile-{_stamp(datetime.now(UTC))}.json"
            # The first is for `resume`. The second is for the tasks and never changes.
            for path in (sweep.jobs / "profile.json", facts):
                atomic_write_json(path, profile.model_dump(mode="json"))
            for array in arrays:
                with uninterrupted():
                    submit_array(sweep, profile, array, code, facts)
                chained = f", {array.dependency}" if array.dependency else ""
                report(
                    f"{array.stage}: array {array.job}, {len(array.tasks)} tasks, "
                    f"{array.parallelism} at once{chained}"
                )
    except (UserError, OSError, KeyboardInterrupt) as error:
        jobs = ", ".join(f"{array.stage} {array.job}" for array in arrays if array.job) or "nothing"
        raise UserError(
            f"{str(error) or 'interrupted'}; submitted so far: {jobs}; {sweep.command('resume')} "
            "submits the rest"
        ) from None
    return arrays


def _wait_for_ending(
    sweep: Sweep,
    run_ids: Collection[str],
    report: Callable[[str], None],
    cancelled: Collection[str] = (),
) -> dict[str, slurm.Queued]:
    """RUN_ID -> its task in the queue, after waiting for ending tasks to leave it.

    These are `cancelled`, and tasks with a run of `run_ids` that are ending already. The wait is
    bounded.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    for tries in itertools.count():
        queue = in_queue(sweep)
        ending = {q.task for name, q in queue.items() if name in run_ids} & {
            q.task for q in queue.values() if q.state == "COMPLETING"
        }
        ending |= {q.task for q in queue.values()} & {*cancelled}
        if not ending or time.monotonic() > deadline:
            break
        if tries == 0:
            report(f"waiting for {', '.join(sorted(ending))} to end")
        time.sleep(ENDING_SECONDS / 60)
    return queue


def _renewable(
    runs: Sequence[Run], doomed: Mapping[str, list[str]], ready: Collection[str]
) -> list[str]:
    """The doomed tasks whose runs can all be submitted again: they need only `ready` runs and one
    another."""
    task_of = {run_id: task for task, run_ids in doomed.items() for run_id in run_ids}
    needs = {run.run_id: run.needs for run in runs}
    good = {*ready} - {*task_of}
    renewed: list[str] = []
    # A run comes after those that it needs. (A ledger that was made again may lack runs.)
    for task in dict.fromkeys(task_of[run_id] for run_id in needs if run_id in task_of):
        own = doomed[task]
        if good.issuperset(need for run_id in own for need in needs.get(run_id, [run_id])):
            renewed.append(task)
            good |= {*own}
    return renewed


def _left_out(
    runs: Sequence[Run],
    done: Collection[str],
    failed: Collection[str],
    queued: dict[str, str],
) -> dict[str, str]:
    """RUN_ID -> why it cannot be submitted now: it, or a run that it needs, failed in a task that
    still executes other runs. That task will fail, and with it all that waits for it."""
    left: dict[str, str] = {}
    for run in runs:  # in order: a run comes after those that it needs
        stuck = [need for need in run.needs if need in left]
        if run.run_id in done:
            continue
        if run.run_id in queued and run.run_id in failed:
            task = queued[run.run_id]
            left[run.run_id] = f"still in task {task}; resume when it has ended"
        elif stuck and run.run_id not in queued:
            left[run.run_id] = left[stuck[0]]
    return left


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, SIGHUP and SIGTERM until the block ends. For the main thread.

    Signals that were ignored before stay ignored.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for ours, handler in before.items():
            signal.signal(ours, handler)
    for number in came:
        signal.raise_signal(number)


def _stamp(now: datetime) -> str:
    """For file names; unique with this process's id."""
    return f"{now.isoformat(timespec='milliseconds').replace(':', '')}-{os.getpid()}"


def submit_array(
    sweep: Sweep, profile: SlurmProfile, array: Array, code: Path, facts: Path
) -> None:
    """Run one sbatch; set `array.job` and record it. `facts` is the profile for its tasks."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    now = datetime.now(UTC)
    folder = sweep.jobs.absolute() / "slurm"
    folder.mkdir(exist_ok=True)
    task_list = folder / f"points-{_stamp(now)}.txt"
    lines = "".join(" ".join(task) + "\n" for task in array.tasks)
    atomic_write_bytes(task_list, lines.encode())
    submitted = now.isoformat(timespec="milliseconds")

    def taken(job: str) -> None:  # the array is in the queue now, even if an error follows
        array.job = job
        facts_of_it = {"job": job, "stage": array.stage, "tasks": array.tasks}
        more = {"time": submitted, "dependency": array.dependency, "code": code.name}
        try:
            append_jsonl(arrays_file(sweep), facts_of_it | more)
        except OSError as error:  # unrecorded, it would be lost to `resume` and `cancel`
            raise UserError(_withdraw(array, f"{arrays_file(sweep)}: {error}")) from None

    executor = _executor(folder, profile, sweep.folder.absolute(), task_list, taken)
    parameters = sbatch_parameters(sweep, profile, array, code, submitted, facts)
    further = parameters["additional_parameters"]
    # Of this array alone, so that no other is cancelled by it.
    comment = " ".join(filter(None, [further.get("comment"), f"bip-{_stamp(now)}"]))
    further["comment"] = comment
    executor.update_parameters(**parameters)
    # A task may start at once and must not find an old failure record.
    paths = [sweep.failure_path(run_id) for task in array.tasks for run_id in task]
    notes = {path: path.read_bytes() for path in paths if path.exists()}
    for path in notes:
        path.unlink()
    try:
        executor.submit_tasks(str(sweep.folder.absolute()), len(array.tasks))
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        text = f"sbatch: {slurm.problem(str(error))}"
        raise UserError(text + _withdraw_unanswered(str(error), comment)) from None
    finally:
        if not array.job:
            with contextlib.suppress(OSError):  # such as a full disk, which was reported already
                for path, note in notes.items():
                    atomic_write_bytes(path, note)


def _withdraw(array: Array, problem: str) -> str:
    """Cancel an array that could not be recorded; the message for the user."""
    job, array.job = array.job, ""
    try:
        slurm.ask("scancel", job)
    except slurm.SlurmError as error:
        return f"{problem}; array {job} is not recorded: end it by scancel {job} ({error})"
    return f"{problem}; array {job} could not be recorded and is cancelled"


def scripts(sweep: Sweep, profile: SlurmProfile, arrays: Sequence[Array]) -> Iterator[str]:
    """The sbatch script of each array, with ARRAY1 and so on for their IDs; submits nothing."""
    folder = sweep.jobs.absolute() / "slurm"
    for number, array in enumerate(arrays, 1):
        array.job = f"ARRAY{number}"
        task_list = folder / f"points-{array.job}.txt"
        executor = _executor(folder, profile, sweep.folder.absolute(), task_list, lambda job: None)
        now, facts = datetime.now(UTC).isoformat(timespec="milliseconds"), folder / "profile.json"
        parameters = sbatch_parameters(sweep, profile, array, sweep.folder / "code", now, facts)
        executor.update_parameters(**parameters)
        executor.name_logs()
        command = executor._submitit_command_str
        yield f"# {array.job}: {array.stage}, {len(array.tasks)} tasks"
        yield executor._make_submission_file_text(command, array.job)


def _withdraw_unanswered(error: str, comment: str) -> str:
    """Cancel an array that SLURM took although its answer did not come: nobody would know of it."""
    if not re.search("timed out|Unable to contact|Zero Bytes", error, re.IGNORECASE):
        return ""
    try:
        if not (jobs := slurm.jobs_of_comment(comment)):
            return ""
        slurm.ask("scancel", *jobs)
    except slurm.SlurmError:
        return f"; if squeue -o '%F %k' shows an array with the comment {comment}, scancel it"
    return f"; array {', '.join(jobs)} was taken all the same, and is cancelled"


def sbatch_parameters(
    sweep: Sweep, profile: SlurmProfile, array: Array, code: Path, now: str, facts: Path
) -> dict[str, Any]:
    """submitit's parameters, by its own names where it has them, else by SLURM's."""
    count = len(array.tasks)
    further: dict[str, Any] = {
        "array": f"0-{count - 1}%{array.parallelism}",
        "requeue": True,
        "open-mode": "append",
        "signal": f"USR2@{profile.signal_lead}",  # submitit's default depends on the environment
        **{name.replace("_", "-"): v for name, v in profile.sbatch.items() if v is not False},
    }
    if profile.mem is not None:
        further["mem"] = profile.mem
    if array.dependency:
        further |= {"dependency": array.dependency, "kill-on-invalid-dep": "yes"}
    threads = profile.cpus_per_task // profile.runs_at_once
    environment = {"OMP_NUM_THREADS": str(threads)} | profile.env
    exports = [
        f"export {name}={for_shell(value, f'env: {name}')}" for name, value in environment.items()
    ]
    path = shlex.quote(str(code.absolute()))
    setup = [
        *exports,
        *([_GUARD, *profile.setup, "trap - ERR"] if profile.setup else []),
        f"export {SUBMITTED}={now} {PROFILE}={shlex.quote(str(facts.absolute()))}",
        *([f"export BIP_RUNS_AT_ONCE={profile.runs_at_once}"] if profile.runs_at_once > 1 else []),
        # Import from the snapshot first, and not from the working folder.
        f"export PYTHONSAFEPATH=1 PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"source {shlex.quote(str(shipped('slurm/task.sh', code.absolute())))} || exit 1",
        # For ranks in a container without scontrol; the batch script runs outside of it.
        *(
            [f"export {KILL_WAIT_NAME}=$(decider kill-wait)"]
            if profile.requeue_by == "batch"
            else []
        ),
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
        "array_parallelism": array.parallelism,
        "setup": setup,
        "wckey": None,  # submitit would set its own
        "use_srun": False,  # task.sh starts the ranks
        "additional_parameters": further,
    }


def _executor(
    folder: Path, profile: SlurmProfile, sweep: Path, tasks: Path, taken: Callable[[str], None]
) -> Any:
    """submitit's executor with three changes. `taken` gets the job's ID at once."""
    import submitit  # slow to import, and only needed here
    from submitit.core.utils import JobPaths

    class ArrayExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            start = [*shlex.split(profile.python), "-u", "-m", "submitit.core._submit"]
            words = ["run_points", str(sweep), str(tasks), *profile.srun_args, *start, str(folder)]
            return shlex.join(words)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # Inside another job sbatch would read that job's variables as options.
            kept = without_job(os.environ)
            foreign = [name for name in os.environ if name not in kept]
            unset = [part for name in [*foreign, "CUDA_VISIBLE_DEVICES"] for part in ("-u", name)]
            # If sbatch were ended with its terminal, it might leave an unrecorded job.
            command = "trap '' INT HUP TERM; exec sbatch \"$0\""
            deaf = ["sh", "-c", command, str(submission_file_path)]
            return ["env", *unset, *deaf]

        def _get_job_id_from_submission_command(self, string: bytes | str) -> str:  # type: ignore[override]
            job = str(super()._get_job_id_from_submission_command(string))
            taken(job)
            return job

        def submit_tasks(self, sweep_folder: str, count: int) -> None:
            """Submit an array of `count` tasks by sbatch's own option. (submitit would use its own
            executor class, and make a plain job of a single task.)"""
            self.name_logs()
            job = self.submit(run_point, sweep_folder)
            pickle = job.paths.submitted_pickle
            for index in range(count):
                own = JobPaths(folder, f"{job.job_id}_{index}").submitted_pickle
                try:
                    os.link(pickle, own)
                except OSError:  # ext4 allows at most 65,000 links to a file, some systems none
                    shutil.copyfile(pickle, own)

        def name_logs(self) -> None:
            logs = JobPaths(folder)
            names = {"output": logs.stdout, "error": logs.stderr}
            for name, path in names.items():
                text = str(path).replace("%j", "%A_%a").replace("%t", "0")
                self.parameters["additional_parameters"][name] = text

    return ArrayExecutor(folder)
