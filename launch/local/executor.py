"""The executor for this machine: submitit starts workers that share the sweep's queue."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bip.config import RunConfig
from bip.errors import UserError
from bip.files import atomic_write_json
from bip.machine import expanded
from launch.inputs import check_inputs
from launch.local.processes import RunProcess
from launch.local.worker import POLL_SECONDS, TRAIN, VISIBLE_GPUS, without_job, work
from launch.profile import Finding, LocalProfile
from launch.sweep import FINAL, Lock, Place, Queue, Run, Sweep

_A_YEAR_IN_MINUTES = 366 * 24 * 60
SAVE_SECONDS = 120  # that `launch cancel` gives a run
KILL_SECONDS = 15.0  # loader processes may outlive a killed run by some seconds


class LocalExecutor:
    """Executes runs of one sweep on this machine. Only `submit` needs a profile."""

    poll_seconds = 0.5

    def __init__(
        self, sweep: Sweep, profile: LocalProfile | None = None, command: list[str] = TRAIN
    ) -> None:
        self.sweep, self.command = sweep, command
        self.profile = profile or LocalProfile.model_validate({"executor": "local"})

    @staticmethod
    def was_used(sweep: Sweep) -> bool:
        return sweep.queue_path.exists()

    @property
    def limit(self) -> str:
        return f"at most {self.profile.parallelism} at once"

    def prepare(self, configs: Sequence[RunConfig], runs: Sequence[Run]) -> list[str]:
        check_inputs(configs, self.profile.ranks)
        return []

    def preview(self, runs: Sequence[Run]) -> Iterator[str]:
        ranks = self.profile.ntasks_per_node
        yield f"{len(runs)} runs on this machine, {self.limit}, {ranks} ranks each"

    def submit(self, run_ids: list[str], keep_code: bool = False) -> int:
        """Queue the runs and start missing workers.

        A call while workers are alive adds to their queue. There are never more than `parallelism`
        runs at once.
        """
        sweep, profile = self.sweep, self.profile
        atomic_write_json(sweep.jobs / "profile.json", profile.model_dump(mode="json"))
        facts = profile.model_dump(exclude={"executor"}) | {"cpus_per_task": profile.threads}
        if lock := Lock.try_acquire(sweep.jobs / "submit.lock"):  # fails where there are no locks
            lock.close()
        facts["env"] = {k: expanded(v, f"env: {k}") for k, v in profile.env.items()}
        sweep.set_queue(Queue(run_ids=run_ids, command=self.command, **facts))
        count = min(profile.parallelism, sweep.unfinished()) - sweep.live_workers()
        if count > 0:
            _start_apart(sweep, count)
        return len(run_ids)

    def queue(self) -> dict[str, Place]:
        return {}  # the sweep's files show everything

    def is_alive(self) -> bool:
        return self.sweep.live_workers() > 0

    def cancel(self, save_seconds: float) -> str:
        sweep = self.sweep
        runs = {run.run_id: run for run in sweep.runs()}
        states = sweep.states(runs.values())
        queued = {*sweep.queue().run_ids}
        waiting = [n for n in runs if n in queued and states[n].name not in (*FINAL, "running")]
        running = [n for n in runs if states[n].name == "running"]
        # Workers check this mark before they start a run, so no further run starts.
        for run_id in [*waiting, *running]:
            sweep.mark_cancelled(run_id)
        self._stop([runs[name] for name in running + waiting], save_seconds)
        return f"{len(waiting) + len(running)} runs, of which {len(running)} were running"

    def _stop(self, runs: list[Run], save_seconds: float) -> None:
        """Make running runs save and stop. Raises UserError for runs on other machines."""
        deadline = time.monotonic() + save_seconds
        processes: dict[str, RunProcess] = {}
        killed: set[str] = set()
        while running := [run for run in runs if self.sweep.is_running(run)]:
            late = time.monotonic() - deadline
            claims = {run.run_id: self.sweep.claim(run) for run in running}
            for run in running:
                name, claim = run.run_id, claims[run.run_id]
                if "run" not in claim:  # the run is just starting
                    continue
                if name not in processes:
                    processes[name] = RunProcess(claim["run"], claim["ranks"])
                    print(f"waiting for {name} to save (at most {save_seconds:.0f} s)")
                if not processes[name].has_open(self.sweep.claim_path(name)):
                    continue
                if late < 0:
                    processes[name].ask_to_stop()
                elif name not in killed:
                    killed.add(name)
                    print(f"killed {name}, which did not stop in time")
                    processes[name].kill()
            hosts = {str(claim.get("host", platform.node())) for claim in claims.values()}
            if platform.node() not in hosts or late > KILL_SECONDS:
                raise UserError(
                    f"{len(running)} runs are on other machines; give the same command on "
                    f"{', '.join(sorted(hosts))}"
                )
            time.sleep(POLL_SECONDS)

    def logs(self, run_id: str) -> list[Path]:
        return [self.sweep.log(run_id)]

    def examine(self, probe: bool) -> Iterator[Finding]:
        profile, cpus = self.profile, len(os.sched_getaffinity(0))
        threads = profile.parallelism * profile.ntasks_per_node * profile.threads
        sizes = f"{profile.parallelism} runs x {profile.ntasks_per_node} ranks x "
        sizes += f"{profile.threads} threads on {cpus} CPUs of this machine"
        yield Finding("warning" if threads > cpus else "ok", f"CPUs: {sizes}")
        text = f"launch cancel: a run has {SAVE_SECONDS} s to save (--save-seconds)"
        yield Finding("ok", text, seconds=SAVE_SECONDS)

    def python(self, probe: bool) -> list[str]:
        env = {k: expanded(v, f"env: {k}") for k, v in self.profile.env.items()}
        return ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable]


def _start_apart(sweep: Sweep, count: int) -> None:
    """Start workers from a process in a new session.

    submitit starts local jobs in its caller's session, where Ctrl-C or a closed terminal would end
    them.
    """
    env = without_job(os.environ)
    if "CUDA_VISIBLE_DEVICES" in env:
        env[VISIBLE_GPUS] = env["CUDA_VISIBLE_DEVICES"]
    log = sweep.jobs / "submit.log"
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.local.executor", str(sweep.folder), str(count)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # an interrupt here would leave only some workers
            raise
    if code:
        raise UserError(f"the workers could not be started; see {log}")


def _start_workers(folder: Path, count: int) -> None:
    """`count` submitit jobs on this machine, each a worker of the sweep in `folder`."""
    import submitit  # slow to import, and only needed here

    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=_A_YEAR_IN_MINUTES, name=folder.name)
    executor.map_array(work, [str(folder)] * count)


if __name__ == "__main__":
    _start_workers(Path(sys.argv[1]), int(sys.argv[2]))
