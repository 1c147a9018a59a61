"""python -m launch series | status"""

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bip.config import RunConfig
from bip.errors import UserError
from bip.flags import nearest, parse_flags
from launch.ledger import Sweep
from launch.profile import load_profile
from launch.series import Plan, SeriesOptions, make_plan
from launch.status import Row, as_json, status, table
from launch.submit import submit
from launch.task import TRAIN
from launch.watch import wait

USAGE = """usage: python -m launch COMMAND ...

  series    prune a whole series of k: plan, submit, wait, print the table
  status    FOLDER [--json]: how far a sweep is

python -m launch COMMAND --help tells more.
"""


def main(argv: list[str], command: list[str] = TRAIN) -> int:
    """Run one command and return its exit code; `command` is what trains one run."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "series": lambda rest: series(rest, command),
        "status": show_status,
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


def series(argv: list[str], command: list[str]) -> int:
    """0: all points are done; 1: some are not; 2 (by UserError): bad input, nothing created."""
    flags = parse_flags(
        [SeriesOptions, RunConfig],
        argv,
        "python -m launch series",
        "Prune a series of keep ratios k. Flags of bip train apply to every stage.",
    )
    profile = load_profile(flags.get("profile"), flags.get("parallelism"))
    plan = make_plan(flags, profile.ntasks_per_node)
    check_networks(plan)
    for note in plan.notes:
        print(note)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sweep, run_ids = Sweep(plan.folder), [point.run_id for point in plan.points]
    sweep.add(plan.points)
    look_again = f"python -m launch status {sweep.folder}"
    try:
        submit(sweep, profile, run_ids, command)
        if not flags.get("wait", True):
            print(f"{len(run_ids)} runs in {sweep.folder}; to look: {look_again}")
            return 0
        at_once = f"at most {profile.parallelism} at once"
        print(f"{len(run_ids)} runs, {at_once}, in {sweep.folder}", flush=True)
        rows = wait(sweep, run_ids, _console())
    except KeyboardInterrupt:
        print(f"\nThe runs go on. To look again: {look_again}")
        return 130
    show(rows, sweep.folder)
    return 0 if all(row.state == "done" for row in rows) else 1


def check_networks(plan: Plan) -> None:
    """Build every network of the plan without memory. Raises UserError for an unknown one."""
    import torch  # seconds to import: only here, after all that is quick to check

    from bip import models
    from bip.data.datasets import dataset_spec

    for arch, dataset in {(p.config.arch, p.config.dataset) for p in plan.points}:
        spec = dataset_spec(dataset)
        with torch.device("meta"):
            models.build(arch, spec.classes, spec.channels)


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
    return 0


def show(rows: list[Row], folder: Path) -> None:
    console = _console()
    console.print(table(rows, folder, console.width), soft_wrap=False)


def _console() -> Console:
    """Standard output; a file or pipe gets wide lines instead of those of a narrow terminal."""
    return Console() if sys.stdout.isatty() else Console(width=180)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
