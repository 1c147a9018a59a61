"""python -m launch series | status | report | list | logs | resume | cancel | doctor"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bip import cli
from bip.config import RunConfig
from bip.errors import ExitCode, UserError
from launch import logs as run_logs
from launch import watch as watching
from launch.checks import Settings
from launch.doctor import diagnose, lines_of, verdict
from launch.executor import Executor, executor_for, executors_of
from launch.grid import split_lists
from launch.listing import lines_of_sweeps
from launch.local.executor import SAVE_SECONDS
from launch.local.worker import TRAIN
from launch.plan import SeriesOptions, make_plan
from launch.profile import load_profile
from launch.status import Row, as_json, planned_rows
from launch.status import status as read_status
from launch.sweep import STUCK, Run, Sweep
from launch.table import table

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
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
        "list": list_sweeps,
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
    words, lists = split_lists([*argv])
    flags = cli.parse_flags(
        [SeriesOptions, RunConfig],
        words,
        f"{cli.program(*NAMES)} series",
        "Prune a series of keep ratios k. Flags of bip train apply to every stage; a comma list, "
        "as in --lr 0.1,0.01, multiplies the series.",
    )
    packing = {name: flags.get(name) for name in ("runs_per_task", "runs_at_once")}
    profile = load_profile(flags.get("profile"), flags.get("parallelism"), **packing)
    plan = make_plan(flags, profile.ranks, lists)
    for note in plan.notes:
        print(note)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sweep, run_ids = Sweep(plan.folder), [planned.run_id for planned in plan.runs]
    executor = executor_for(sweep, profile, command)
    missing = [run for run in map(Run.of, plan.runs) if not sweep.is_done(run)]
    _prepare(sweep, executor, [planned.config for planned in plan.runs], missing)
    keep_code, fail_fast = flags.get("snapshot", True), flags.get("fail_fast", False)
    if flags.get("dry_run"):
        _show(planned_rows(sweep, [*map(Run.of, plan.runs)]), sweep)
        for text in executor.preview(missing):
            print(text)
        print("dry_run: nothing was submitted or written")
        return ExitCode.DONE
    sweep.add(plan.runs)
    return _submit(sweep, run_ids, executor, flags.get("wait", True), keep_code, fail_fast)


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
    rows = [row for row in read_status(folder) if row.kind not in ("done", "running")]
    missing = [row.run_id for row in rows if not (row.kind == "waiting" and row.queued)]
    for reason in dict.fromkeys(row.reason for row in rows if row.reason.startswith(STUCK)):
        print(f"warning: {reason}", file=sys.stderr)
    configs = [sweep.config(run_id) for run_id in missing]
    if not missing:
        print(f"nothing to resume: all runs of {folder} are done, queued or running")
        return ExitCode.DONE
    last = sweep.jobs / "profile.json"
    facts = load_profile(profile or (last if last.exists() else None), parallelism)
    for config in configs:
        config.batch_per_rank(facts.ranks)
    executor = executor_for(sweep, facts, command)
    _prepare(sweep, executor, configs, [run for run in sweep.runs() if run.run_id in missing])
    return _submit(sweep, missing, executor, wait, snapshot)


def status(folder: Path, json: bool = False, watch: bool = False) -> int:
    """Print the state of the sweep in FOLDER.

    `best %` is the accuracy of a finished run's model, else of its best evaluation so far.

    Args:
        folder: RESULT_DIR/EXP_NAME of a series.
        json: print a JSON list, for programs.
        watch: stay and show every change, until all runs have ended or Ctrl-C.
    """
    sweep = Sweep(folder)
    if watch:
        if json:
            raise UserError("watch: shows a table; leave --watch or --json out")
        sweep.runs()
        try:
            rows = watching.show(sweep, _console(), executors_of(sweep))
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
    else:
        rows = read_status(folder)
    if json:
        print(as_json(rows))
        return ExitCode.DONE
    _show(rows, sweep)
    if any(row.kind in ("failed", "cancelled", "blocked") for row in rows):
        print(f"to run what is missing: {sweep.command('resume')}")
    return ExitCode.DONE


def list_sweeps(folder: Folder = Path("trained_models")) -> int:
    """Print all sweeps below a folder, each with the states of its runs.

    Args:
        folder: RESULT_DIR, or a folder above.
    """
    for line in lines_of_sweeps(folder):
        print(line)
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


def cancel(folder: Path, save_seconds: int = SAVE_SECONDS) -> int:
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
    print(f"to continue: {sweep.command('resume')}")
    return ExitCode.DONE


def doctor(
    profile: Path,
    probe: bool = False,
    folder: Path = Path("trained_models"),
    configs: Path | None = None,
    arch: str | None = None,
    data_dir: Path | None = None,
) -> int:
    """Report what the machines of PROFILE will do to a sweep. Exit code 1 if they cannot run it.

    Args:
        profile: the profile's file.
        probe: also start test tasks on the compute nodes, and check them instead of this machine.
        folder: result folder that the tasks must be able to read.
        configs: settings of a run, whose images are read and whose save is timed.
        arch: its network (default: that of configs).
        data_dir: its images (default: those of configs).
    """
    facts = load_profile(profile)
    if configs is None and (arch or data_dir):
        key = "arch" if arch else "data_dir"
        raise UserError(f"{key}: needs --configs FILE, the settings of a run")
    names = (str(path) if path else None for path in (configs, data_dir))
    settings = Settings(str(folder), facts.ranks, None, next(names), arch, next(names))
    _ = settings.config  # raises UserError
    found = []
    for finding in diagnose(executor_for(Sweep(folder), facts), settings, probe):
        print(lines_of(finding), flush=True)
        found.append(finding)
    print(verdict(found, settings))
    return ExitCode.FAILED if any(f.level == "error" for f in found) else ExitCode.DONE


def _prepare(sweep: Sweep, executor: Executor, configs: list[RunConfig], runs: list[Run]) -> None:
    for run in runs:
        if damage := sweep.damage(run):
            raise UserError(damage)
    for line in executor.prepare(configs, runs):
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)


def _submit(
    sweep: Sweep, run_ids: list[str], executor: Executor, stay: bool, keep_code: bool,
    fail_fast: bool = False,
) -> int:  # fmt: skip
    """Submit the runs; if `stay`, show their progress. Returns 1 if not all are done."""
    look_again = sweep.command("status")
    try:
        sweep.jobs.mkdir(exist_ok=True)
        sweep.fail_fast.touch() if fail_fast else sweep.fail_fast.unlink(missing_ok=True)
        count = executor.submit(run_ids, keep_code)
        if not stay:
            print(f"{count} runs submitted in {sweep.folder}; to see their state: {look_again}")
            return ExitCode.DONE
        print(f"{count} runs submitted, {executor.limit}, in {sweep.folder}", flush=True)
        rows = watching.wait(sweep, run_ids, _console(), executor, fail_fast)
    except KeyboardInterrupt:
        print(f"\nThe runs continue. To see their state: {look_again}")
        return ExitCode.INTERRUPTED
    _show(rows, sweep)
    if all(row.kind == "done" for row in rows):
        return ExitCode.DONE
    print(f"to run what is missing: {sweep.command('resume')}")
    return ExitCode.FAILED


def _show(rows: list[Row], sweep: Sweep) -> None:
    console = _console()
    shown = table(rows, sweep.folder, console.width, sweep.parallelism())
    console.print(shown, crop=False)


def _console() -> Console:
    """Standard output; a file or pipe gets wide lines instead of a terminal's."""
    return Console() if sys.stdout.isatty() else Console(width=180)


if __name__ == "__main__":
    console()
