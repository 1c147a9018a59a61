"""python -m launch series | status | resume | cancel | doctor"""

import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bip.cli import call, nearest, parse_flags
from bip.config import RunConfig, build_config, read_yaml
from bip.errors import UserError
from bip.files import may_pass
from launch.inputs import check_inputs
from launch.local.executor import submit
from launch.local.worker import TRAIN
from launch.plan import SeriesOptions, make_plan
from launch.profile import LocalProfile, SlurmProfile, load_profile
from launch.slurm.arrays import arrays_file, cancel, doomed_now, submit_arrays
from launch.slurm.doctor import check_disk, check_place, examine, preflight
from launch.slurm.doctor import probe as doctor_probe
from launch.status import Row, as_json, status, table
from launch.sweep import Record, Sweep
from launch.watch import wait

USAGE = """usage: python -m launch COMMAND ...

  series    prune a whole series of k: plan, submit, wait, print the table
  status    FOLDER [--json]: how far a sweep is
  resume    FOLDER: submit what is missing or failed
  cancel    FOLDER: end the sweep's SLURM tasks
  doctor    PROFILE: what the cluster will do to a sweep

python -m launch COMMAND --help tells more.
"""


def main(argv: list[str], command: list[str] = TRAIN) -> int:
    """Run one command and return its exit code; `command` is what trains one run."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "series": lambda rest: series(rest, command),
        "status": show_status,
        "resume": lambda rest: resume(rest, command),
        "cancel": cancel_sweep,
        "doctor": doctor,
    }
    name, *rest = argv or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if name not in commands:
            raise UserError(f"unknown command {name!r}{nearest(name, commands)}; see --help")
        return commands[name](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while planning; later `run` says how the runs go on
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno == errno.EPIPE:  # as in `status FOLDER | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at exit
            return 141  # what a shell says of a program that SIGPIPE ended
        if not may_pass(error):
            raise
        print(f"error: {error}; try again", file=sys.stderr)
        return os.EX_TEMPFAIL


def series(argv: list[str], command: list[str]) -> int:
    """0: all points are done; 1: some are not; 2 (by UserError): bad input, nothing created."""
    flags = parse_flags(
        [SeriesOptions, RunConfig],
        argv,
        "python -m launch series",
        "Prune a series of keep ratios k. Flags of bip train apply to every stage.",
    )
    profile = load_profile(flags.get("profile"), flags.get("parallelism"))
    plan = make_plan(flags, profile.ranks)
    for note in plan.notes:
        print(note)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sweep, run_ids = Sweep(plan.folder), [point.run_id for point in plan.points]
    records = [r for r in map(Record.of, plan.points) if not sweep.is_done(r)]
    submission = prepare(sweep, profile, [point.config for point in plan.points], records)
    sweep.add(plan.points)
    keep_code = flags.get("snapshot", True)
    return run(sweep, run_ids, submission, command, flags.get("wait", True), keep_code)


@dataclass(frozen=True)
class Submission:
    """A profile, checked; the most tasks that one array may have, and the points of a task."""

    profile: LocalProfile | SlurmProfile
    max_array_size: int = 0
    points_per_task: int = 1


def prepare(
    sweep: Sweep,
    profile: LocalProfile | SlurmProfile,
    configs: list[RunConfig],
    records: list[Record],
) -> Submission:
    """All checks of inputs, cluster and disk. Raises UserError; nothing is created.

    `records` are the points that are to be submitted.
    """
    if not isinstance(profile, SlurmProfile):
        check_inputs(configs)
        return Submission(profile)
    if "%" in str(folder := sweep.folder.absolute()):
        raise UserError(
            f"result_dir, exp_name: {folder} has a %, which SLURM expands in the names of logs; "
            "give a folder without it"
        )
    with ThreadPoolExecutor(1) as pool:  # SLURM answers while torch is imported
        asked = pool.submit(lambda: preflight(profile, records, len(doomed_now(sweep))))
        sizes = check_inputs(configs)
        limits, per_task, lines = asked.result()
    if warning := check_place(configs[0].result_dir.absolute()):
        lines.append(warning)
    lines.append(check_disk(configs, sizes, profile.parallelism))
    for line in lines:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)
    return Submission(profile, limits.max_array_size, per_task)


def run(
    sweep: Sweep,
    run_ids: list[str],
    submission: Submission,
    command: list[str],
    stay: bool,
    keep_code: bool = True,
) -> int:
    """Submit the points, and unless `stay` is False show how they go on. Returns the exit code."""
    profile = submission.profile
    look_again = f"python -m launch status {sweep.folder}"
    try:
        if isinstance(profile, SlurmProfile):
            size, per_task = submission.max_array_size, submission.points_per_task
            if not submit_arrays(sweep, profile, run_ids, size, per_task, keep_code):
                print("nothing was submitted: all is done, in the queue or left out")
        else:
            submit(sweep, profile, run_ids, command)
        if not stay:
            print(f"{len(run_ids)} runs in {sweep.folder}; to look: {look_again}")
            return 0
        at_once = f"at most {profile.parallelism} at once"
        if isinstance(profile, SlurmProfile):
            at_once = f"at most {profile.parallelism} of a stage at once"
            at_once += ", beside what an earlier command has left in the queue"
        print(f"{len(run_ids)} runs, {at_once}, in {sweep.folder}", flush=True)
        rows = wait(sweep, run_ids, _console(), isinstance(profile, SlurmProfile))
    except KeyboardInterrupt:
        print(f"\nThe runs go on. To look again: {look_again}")
        return 130
    show(rows, sweep.folder)
    if all(row.state == "done" for row in rows):
        return 0
    print(f"to run what is missing: python -m launch resume {sweep.folder}")
    return 1


def resume(argv: list[str], command: list[str]) -> int:
    """Submit the points of FOLDER that are neither done nor under way; exit code as of `series`."""
    codes = [0]

    def given(
        folder: Path,
        profile: Path | None = None,
        parallelism: int | None = None,
        wait: bool = True,
        snapshot: bool = True,
    ) -> None:
        """Submit what is missing or failed, as a new array.

        Args:
            folder: RESULT_DIR/EXP_NAME of a series.
            profile: the cluster's facts (default: those of the last submission).
            parallelism: runs at once, under SLURM of each stage (default: the profile's).
            wait: stay and show the progress.
            snapshot: queued tasks run a copy of the code as it is now.
        """
        sweep = Sweep(folder)
        rows = [row for row in status(folder) if row.state not in ("done", "running")]
        missing = [row.run_id for row in rows if not row.reason.startswith("in the queue")]
        configs = check_unchanged(sweep, missing)
        if not missing:
            print(f"nothing to resume: all of {folder} is done or under way")
            return
        last = sweep.jobs / "profile.json"
        facts = load_profile(profile or (last if last.exists() else None), parallelism)
        for config in configs:
            config.batch_per_rank(facts.ranks)
        records = [record for record in sweep.records() if record.run_id in missing]
        submission = prepare(sweep, facts, configs, records)
        codes.append(run(sweep, missing, submission, command, wait, snapshot))

    call({"resume": given}, ["resume", *argv], "python -m launch")
    return codes[-1]


def check_unchanged(sweep: Sweep, run_ids: list[str]) -> list[RunConfig]:
    """The configurations of these points. Raises UserError if one is not what was planned."""
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


def cancel_sweep(argv: list[str]) -> int:
    """End all SLURM tasks of a sweep."""

    def given(folder: Path) -> None:
        """End the sweep's SLURM tasks; what is saved stays.

        Args:
            folder: RESULT_DIR/EXP_NAME of a series.
        """
        sweep = Sweep(folder)
        sweep.records()
        if not arrays_file(sweep).exists():
            raise UserError(
                f"{folder}: no SLURM array was submitted for it; local runs end with their "
                "processes (kill those that its jobs/*.lock name)"
            )
        tasks = cancel(sweep)
        print(f"cancelled {len(tasks)} tasks; to go on: python -m launch resume {folder}")

    call({"cancel": given}, ["cancel", *argv], "python -m launch")
    return 0


def doctor(argv: list[str]) -> int:
    """0: nothing stands against the profile; 1: something does."""

    def given(profile: Path, probe: bool = False, folder: Path = Path("trained_models")) -> None:
        """What the cluster of a profile will do to a sweep.

        Args:
            profile: the profile's file.
            probe: also start a task and ask what it sees.
            folder: result folder that the tasks must see.
        """
        facts = load_profile(profile)
        if not isinstance(facts, SlurmProfile):
            raise UserError(f"{profile}: executor is {facts.executor}; the doctor knows SLURM")
        findings = list(examine(facts))
        if probe:
            findings += doctor_probe(facts, folder.absolute())
        for finding in findings:
            levels.append(finding.level)
            print(f"{finding.level:8} {finding.text}")

    levels: list[str] = []
    # The one name in all commands, with and without "=".
    words = [word.removeprefix("--profile=") for word in argv if word != "--profile"]
    call({"doctor": given}, ["doctor", *words], "python -m launch")
    return 1 if "error" in levels else 0


def show_status(argv: list[str]) -> int:
    """Print the state of the sweep in FOLDER."""
    folders = [arg for arg in argv if not arg.startswith("-")]
    flags = [arg for arg in argv if arg.startswith("-")]
    if "-h" in flags or "--help" in flags:
        print("usage: python -m launch status FOLDER [--json]\n\nFOLDER: RESULT_DIR/EXP_NAME")
        return 0
    if unknown := [flag for flag in flags if flag != "--json"]:
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0], ['--json'])}")
    if len(folders) != 1:
        raise UserError(f"status takes one FOLDER (RESULT_DIR/EXP_NAME), not {len(folders)}")
    rows = status(Path(folders[0]))
    if flags:
        print(as_json(rows))
    else:
        show(rows, Path(folders[0]))
        if any(row.state in ("failed", "blocked") for row in rows):
            print(f"to run what is missing: python -m launch resume {folders[0]}")
    return 0


def show(rows: list[Row], folder: Path) -> None:
    console = _console()
    console.print(table(rows, folder, console.width), soft_wrap=False)


def _console() -> Console:
    """Standard output; a file or pipe gets wide lines instead of those of a narrow terminal."""
    return Console() if sys.stdout.isatty() else Console(width=180)


def console() -> None:
    """The script `bip-launch`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
