"""The executor for SLURM: a sweep's runs are tasks of arrays."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from bip.config import RunConfig
from bip.errors import UserError
from bip.files import read_jsonl
from bip.machine import for_shell
from launch.inputs import check_inputs
from launch.printed import tail
from launch.profile import Finding, SlurmProfile
from launch.slurm import client as slurm
from launch.slurm.arrays import (
    arrays_file,
    doomed_tasks,
    ended,
    in_queue,
    scripts,
    submit_arrays,
    submitted_tasks,
)
from launch.slurm.chain import plan_arrays
from launch.slurm.doctor import (
    check_disk,
    check_place,
    examine,
    on_nodes,
    preflight,
    probe_nodes,
)
from launch.slurm.reasons import advices, how_it_ended
from launch.slurm.snapshot import ROOT
from launch.sweep import IN_QUEUE, LEFT_QUEUE, STUCK, Place, Run, State, Sweep

_PASSING = {
    "COMPLETING": "SLURM is ending its last attempt",
    "CONFIGURING": "SLURM is preparing its nodes",
}
_HELD = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")


class SlurmExecutor:
    """Executes runs of one sweep as array tasks. Only `prepare` and `submit` need a profile."""

    poll_seconds = 5.0

    def __init__(self, sweep: Sweep, profile: SlurmProfile | None = None) -> None:
        self.sweep = sweep
        self.profile = profile or SlurmProfile.model_validate({"executor": "slurm"})
        self.max_array_size, self.runs_per_task = 1, 1  # set by `prepare`

    @staticmethod
    def was_used(sweep: Sweep) -> bool:
        return arrays_file(sweep).exists()

    @property
    def limit(self) -> str:
        return (
            f"at most {self.profile.parallelism} of a stage at once, beside what an earlier "
            "command has left in the queue"
        )

    def prepare(self, configs: Sequence[RunConfig], runs: Sequence[Run]) -> list[str]:
        if "%" in str(folder := self.sweep.folder.absolute()):
            raise UserError(
                f"result_dir, exp_name: {folder} has a %, which SLURM expands in the names of "
                "logs; give a folder without it"
            )
        with ThreadPoolExecutor(1) as pool:  # ask SLURM while torch is imported
            asked = pool.submit(lambda: preflight(self.profile, runs, self._doomed()))
            sizes = check_inputs(configs, self.profile.ranks)
            limits, self.runs_per_task, lines = asked.result()
        self.max_array_size = limits.max_array_size
        if warning := check_place(configs[0].result_dir.absolute()):
            lines.append(warning)
        return [*lines, check_disk(configs, sizes, self.profile.runs_of_stage)]

    def _doomed(self) -> int:
        """Tasks in the queue that `submit` will replace."""
        if not self.was_used(self.sweep):
            return 0
        queue = in_queue(self.sweep)
        return len(doomed_tasks(self.sweep, *ended(self.sweep, self.sweep.runs()), queue))

    def preview(self, runs: Sequence[Run]) -> Iterator[str]:
        """Every sbatch script, and the most node-hours that one attempt of each task can take."""
        queued = {run_id: q.task for run_id, q in in_queue(self.sweep).items()}
        planned = [run for run in runs if run.run_id not in queued]
        names = {run.run_id for run in planned}
        alone = [replace(run, needs=[n for n in run.needs if n in names]) for run in planned]
        arrays = plan_arrays(
            alone, names, (), {}, self.profile.parallelism, self.runs_per_task, self.max_array_size
        )
        yield from scripts(self.sweep, self.profile, arrays)
        tasks = sum(len(array.tasks) for array in arrays)
        nodes, hours = self.profile.nodes, self.profile.time / 60
        yield (
            f"at most {tasks * nodes * hours:,.1f} node-hours: {tasks} tasks x {nodes} nodes x "
            f"{hours:,.1f} h, the time limit of one attempt"
        )

    def submit(self, run_ids: list[str], keep_code: bool) -> int:
        size, per_task = self.max_array_size, self.runs_per_task
        arrays = submit_arrays(self.sweep, self.profile, run_ids, size, per_task, keep_code)
        if not arrays:
            print("nothing was submitted: all runs are done, in the queue or left out")
        return sum(len(task) for array in arrays for task in array.tasks)

    def queue(self) -> dict[str, Place]:
        sweep, tasks = self.sweep, submitted_tasks(self.sweep)
        try:
            queue = in_queue(sweep)  # before results are read: a task may end in between
            if not queue:
                self._check_shown()
        except slurm.SlurmError as error:
            print(f"warning: {error}; states are from the files only", file=sys.stderr)
            known = [run for run in sweep.runs() if run.run_id in tasks]
            return {run.run_id: Place(self._by_files(run), tasks[run.run_id]) for run in known}
        advice = advices({waiting.task: waiting for waiting in queue.values()}.values())
        places = {
            run_id: Place(
                _state(found, advice.get(task)), task, found.seconds, found.state == "PENDING"
            )
            for run_id, task in tasks.items()
            if (found := queue.get(run_id)) is not None
        }
        # A run that is not in SLURM's queue may be with local workers.
        local = sweep.live_workers() > 0
        left = {name: tasks[name] for name in tasks.keys() - queue.keys()}
        lost = {} if local else self._lost(left)
        places |= {run_id: Place(lost.get(run_id), task) for run_id, task in left.items()}
        if queue and not local:
            blocked = State("blocked", "its task in the queue waits for one that failed")
            for run_ids in doomed_tasks(sweep, *ended(sweep, sweep.runs()), queue).values():
                places |= {name: replace(places[name], state=blocked) for name in run_ids}
        return places

    def _check_shown(self) -> None:
        """Raise SlurmError if SLURM would not show this user the sweep's tasks: then an empty
        queue does not mean that they have ended."""
        owner = arrays_file(self.sweep).stat().st_uid
        private = slurm.settings().get("PrivateData", "") if os.getuid() not in (0, owner) else ""
        if "jobs" in private:
            raise slurm.SlurmError(f"SLURM shows only own jobs (PrivateData={private})")

    def _by_files(self, run: Run) -> State | None:
        """Without an answer of SLURM's: running, if the newest attempt has not ended."""
        records = [*read_jsonl(self.sweep.folder / run.folder / "attempts.jsonl")]
        runs = bool(records) and records[-1].get("event") == "start"
        return State("running", "by its files; SLURM does not show its task") if runs else None

    def _lost(self, left: dict[str, str]) -> dict[str, State]:
        """The states of runs without a result or a record whose task has left the queue."""
        sweep = self.sweep
        runs = [run for run in sweep.runs() if run.run_id in left and not sweep.is_done(run)]
        runs = [run for run in runs if sweep.failure(run) is None]
        if not runs:
            return {}
        known = slurm.ended(left[run.run_id].split("_")[0] for run in runs)
        return {run.run_id: self._left(run, left[run.run_id], known) for run in runs}

    def _left(self, run: Run, task: str, known: dict[str, dict[str, str]]) -> State:
        """That of one run: what SLURM, the newest record and the newest log of its last attempt
        say."""
        record = known.get(task, {})
        began = 0.0
        with contextlib.suppress(ValueError):
            began = datetime.fromisoformat(record.get("start", "")).timestamp()
        files = (self.sweep.log(run.run_id), self._err(task, run.run_id))
        logs = [path for path in files if path.exists()]
        clocks = 60.0  # of the nodes and of the file system may differ by so many seconds
        own = [path for path in logs if path.stat().st_mtime >= began - clocks]
        facts = [how_it_ended(record), self.sweep.newest_reason(run)]
        if own:
            newest = max(own, key=lambda path: path.stat().st_mtime)
            how = f"without a result; see {newest.relative_to(self.sweep.folder)}"
            if lines := tail(newest):
                facts.append(f"it ends with: {lines[-1][:300]}")
        elif logs:
            how = "without a result, and without a log: jobs/slurm may be full or read-only"
        else:
            how = f"and never started; {self.sweep.command('resume')} submits it"
        return State(
            "failed", "; ".join(dict.fromkeys(filter(None, [f"{LEFT_QUEUE} {how}", *facts])))
        )

    def _err(self, task: str, run_id: str) -> Path:
        """What srun reports: on one of several runs at once in its own file."""
        folder = self.sweep.jobs / "slurm"
        own = folder / f"{task}_{run_id}.err"
        return own if own.exists() else folder / f"{task}_0_log.err"

    def is_alive(self) -> bool:
        return True  # tasks that have left the queue are failed

    def cancel(self, save_seconds: float) -> str:
        """Cancel all of the sweep's tasks in the queue; SLURM gives them KillWait to save.

        Their runs are marked first: otherwise a run that gets the signal would requeue its task.
        """
        sweep, queued = self.sweep, in_queue(self.sweep)
        runs = [r for r in sweep.runs() if r.run_id in queued and not sweep.is_done(r)]
        marked = [r.run_id for r in runs if sweep.failure(r) is None]
        for run_id in marked:
            sweep.mark_cancelled(run_id)
        tasks = sorted({waiting.task for waiting in queued.values()})
        try:
            if tasks:
                slurm.ask("scancel", *tasks)
        except slurm.SlurmError:
            for run_id in marked:
                sweep.failure_path(run_id).unlink(missing_ok=True)
            raise
        return f"{len(tasks)} tasks"

    def logs(self, run_id: str) -> list[Path]:
        files = [self.sweep.log(run_id)]
        if task := submitted_tasks(self.sweep).get(run_id):
            files.append(self._err(task, run_id))
        return files

    def examine(self, probe: bool) -> Iterator[Finding]:
        yield from examine(self.profile)
        if probe:
            yield from probe_nodes(self.profile, self.sweep.folder.absolute())

    def python(self, probe: bool) -> list[str]:
        if not probe:
            return [sys.executable]
        values = {"PYTHONPATH": str(ROOT)} | self.profile.env
        exports = [f"export {name}={for_shell(v, f'env: {name}')}" for name, v in values.items()]
        script = "\n".join(["set -e", *exports, *self.profile.setup, 'exec "$@"'])
        words = [*on_nodes(self.profile, 1), "bash", "-c", script, "bash"]
        return [*words, *shlex.split(self.profile.python)]


def _state(queued: slurm.Queued, advice: str | None) -> State:
    if "held" in queued.reason.lower() or queued.state in _HELD:
        release = advice or f"({queued.reason}); scontrol release {queued.task}"
        return State("waiting", f"{STUCK}{release}", "held")
    if advice:
        return State("waiting", f"{STUCK}{advice}")
    if queued.state in ("SUSPENDED", "STOPPED"):
        return State("running", f"SLURM has suspended task {queued.task}", "suspended")
    if queued.state == "PENDING":
        return State("waiting", f"{IN_QUEUE} ({queued.reason})")
    if queued.state == "RUNNING":
        return State("running", "running")
    return State("waiting", _PASSING.get(queued.state, queued.state.lower()))
