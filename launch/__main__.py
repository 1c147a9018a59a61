"""python -m launch series | status | report | logs | resume | cancel | doctor"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bip import cli
from bip.config import RunConfig, build_config, read_yaml
from bip.errors import ExitCode, UserError
from launch import logs as run_logs
from launch.executor import Executor, executor_for, executors_of
from launch.local.worker import TRAIN
from launch.plan import SeriesOptions, make_plan
from launch.profile import load_profile
from launch.status import Row, as_json, table
from launch.status import status as read_status
from launch.sweep import Run, Sweep
from launch.watch import wait as watch

RunName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
Folders = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER...")]
NAMES = ("launch", "bip-launch")  # of the package, and of the console script


def main(argv: list[str], command: list[str] = TRAIN) -> int:
    """Run one command; its exit code, by the table in `bip.errors`.

    `command` is what trains one local run.
    """
    commands: dict[str, cli.Command] = {
        "series": partial(series, command=command),
        "status": status,
        "report": report,
        "logs": logs,
        "resume": partial(resume, command=command),
        "cancel": cancel,
        "doctor": doctor,
    }
    return cli.run(*NAMES, commands, argv)


def console() -> None:
    """The console script `bip-launch`: run the command of this process and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def series(*argv: str, command: list[str]) -> int:
    """Prune a whole series of k: plan, submit, wait, print the table."""
    flags = cli.parse_flags(
        [SeriesOptions, RunConfig],
        [*argv],
        f"{cli.program(*NAMES)} series",
        "Prune a series of keep ratios k. Flags of bip train apply to every stage.",
    )
    profile = load_profile(flags.get("profile"), flags.get("parallelism"))
    plan = make_plan(flags, profile.ranks)
    for note in plan.notes:
        print(note)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sweep, run_ids = Sweep(plan.folder), [planned.run_id for planned in plan.runs]
    executor = executor_for(sweep, profile, command)
    missing = [run for run in map(Run.of, plan.runs) if not sweep.is_done(run)]
    _prepare(executor, [planned.config for planned in plan.runs], missing)
    sweep.add(plan.runs)
    keep_code = flags.get("snapshot", True)
    return _submit(sweep, run_ids, executor, flags.get("wait", True), keep_code)


def resume(
    folder: Path,
    profile: Path | None = None,
    parallelism: int | None = None,
    wait: bool = True,
    snapshot: bool = True,
    *,
    command: list[str],
) -> int:
    """Submit the missing, failed and cancelled runs of FOLDER.

    Args:
        folder: RESULT_DIR/EXP_NAME of a series.
        profile: the cluster's facts (default: those of the last submission).
        parallelism: runs at once, under SLURM of each stage (default: the profile's).
        wait: stay and show the progress.
        snapshot: queued tasks run a copy of the code as it is now.
    """
    sweep = Sweep(folder)
    rows = [row for row in read_status(folder) if row.state not in ("done", "running")]
    missing = [row.run_id for row in rows if not row.reason.startswith("in the queue")]
    configs = _check_unchanged(sweep, missing)
    if not missing:
        print(f"nothing to resume: all runs of {folder} are done, queued or running")
        return ExitCode.DONE
    last = sweep.jobs / "profile.json"
    facts = load_profile(profile or (last if last.exists() else None), parallelism)
    for config in configs:
        config.batch_per_rank(facts.ranks)
    executor = executor_for(sweep, facts, command)
    _prepare(executor, configs, [run for run in sweep.runs() if run.run_id in missing])
    return _submit(sweep, missing, executor, wait, snapshot)


def status(folder: Path, json: bool = False) -> int:
    """Print the state of the sweep in FOLDER.

    Args:
        folder: RESULT_DIR/EXP_NAME of a series.
        json: print a JSON list, for programs.
    """
    rows = read_status(folder)
    if json:
        print(as_json(rows))
        return ExitCode.DONE
    _show(rows, folder)
    if any(row.state in ("failed", "cancelled", "blocked") for row in rows):
        print(f"to run what is missing: python -m launch resume {folder}")
    return ExitCode.DONE


def report(folders: Folders, out: Path | None = None) -> None:
    """Draw the finished runs of FOLDER...: figures, tables and one HTML page.

    Args:
        folders: RESULT_DIR/EXP_NAME of series, and CSVs of published figures to compare with.
        out: folder of what is written (default: report/ in the first FOLDER).
    """
    from launch.report import report as write_report

    if not folders:
        raise UserError("folders: missing; give FOLDER..., each RESULT_DIR/EXP_NAME of a series")
    first = folders[0]
    if out is None and first.suffix == ".csv":
        raise UserError("out: missing; give --out DIR, as the first argument is no sweep folder")
    write_report([*folders], out or first / "report")


def logs(folder: Path, run: RunName = "", follow: bool = False) -> int:
    """Print a run's log; without RUN, the failed runs of FOLDER and the last error of each.

    Args:
        folder: RESULT_DIR/EXP_NAME of a series.
        run: a RUN_ID, an unambiguous part of one, or a SLURM array task.
        follow: print new lines until the run ends, or Ctrl-C.
    """
    sweep = Sweep(folder)
    if not run:
        if follow:
            raise UserError("follow: give a RUN to follow; launch status shows which are running")
        run_logs.show_failures(sweep)
        return ExitCode.DONE
    try:
        run_logs.show(sweep, run, follow)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def cancel(folder: Path, save_seconds: int = 120) -> int:
    """End the waiting runs of FOLDER, then make the running ones save and stop.

    Args:
        folder: RESULT_DIR/EXP_NAME of a series.
        save_seconds: seconds for local runs to save before they are killed (under SLURM: KillWait).
    """
    sweep = Sweep(folder)
    sweep.runs()
    executors = executors_of(sweep)
    if not executors:
        raise UserError(f"{folder}: nothing to cancel, as nothing was submitted")
    for executor in executors:
        print(f"cancelled {executor.cancel(save_seconds)}")
    print(f"to continue: python -m launch resume {folder}")
    return ExitCode.DONE


def doctor(profile: Path, probe: bool = False, folder: Path = Path("trained_models")) -> int:
    """Report what the machines of PROFILE will do to a sweep. Exit code 1 if they cannot run it.

    Args:
        profile: the profile's file.
        probe: also start a test task on the compute nodes.
        folder: result folder that the tasks must be able to read.
    """
    findings = executor_for(Sweep(folder), load_profile(profile)).examine(probe)
    code = ExitCode.DONE
    for finding in findings:
        print(f"{finding.level:8} {finding.text}")
        if finding.level == "error":
            code = ExitCode.FAILED
    return code


def _prepare(executor: Executor, configs: list[RunConfig], runs: list[Run]) -> None:
    for line in executor.prepare(configs, runs):
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)


def _submit(
    sweep: Sweep, run_ids: list[str], executor: Executor, stay: bool, keep_code: bool
) -> int:
    """Submit the runs; if `stay`, show their progress. Returns 1 if not all are done."""
    look_again = f"python -m launch status {sweep.folder}"
    try:
        executor.submit(run_ids, keep_code)
        if not stay:
            print(f"{len(run_ids)} runs in {sweep.folder}; to see their state: {look_again}")
            return ExitCode.DONE
        print(f"{len(run_ids)} runs, {executor.limit}, in {sweep.folder}", flush=True)
        rows = watch(sweep, run_ids, _console(), executor)
    except KeyboardInterrupt:
        print(f"\nThe runs continue. To see their state: {look_again}")
        return ExitCode.INTERRUPTED
    _show(rows, sweep.folder)
    if all(row.state == "done" for row in rows):
        return ExitCode.DONE
    print(f"to run what is missing: python -m launch resume {sweep.folder}")
    return ExitCode.FAILED


def _check_unchanged(sweep: Sweep, run_ids: list[str]) -> list[RunConfig]:
    """The configurations of these runs. Raises UserError if one has changed since the plan."""
    configs = []
    for run_id in run_ids:
        path = sweep.folder / "points" / f"{run_id}.yml"
        config = build_config(read_yaml(path), str(path))
        if config.run_id != run_id:
            raise UserError(
                f"{path}: changed since it was planned (its settings are those of "
                f"{config.run_id}); plan the new settings with python -m launch series"
            )
        if config.run_folder.absolute() != (sweep.folder / config.exp_mode / run_id).absolute():
            raise UserError(
                f"{path}: writes to {config.run_folder.parents[1]}, not to {sweep.folder}; the "
                "sweep folder was moved"
            )
        configs.append(config)
    return configs


def _show(rows: list[Row], folder: Path) -> None:
    console = _console()
    console.print(table(rows, folder, console.width), soft_wrap=False)


def _console() -> Console:
    """Standard output; a file or pipe gets wide lines instead of a terminal's."""
    return Console() if sys.stdout.isatty() else Console(width=180)


if __name__ == "__main__":
    console()
