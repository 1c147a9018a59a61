"""Submission, resubmission and cancelling of arrays, with fake sbatch, squeue and scancel."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bip.errors import UserError
from bip.files import read_jsonl
from launch.__main__ import main
from launch.plan import make_plan
from launch.profile import SlurmProfile, load_profile
from launch.slurm import arrays
from launch.slurm.arrays import submit_arrays
from launch.slurm.executor import SlurmExecutor
from launch.status import Row, status
from launch.sweep import Sweep
from launch.watch import wait
from tests.launch.conftest import DIGITS

SBATCH = """#!/bin/bash
cd "$(dirname "$0")"
cp "$1" script-$(ls script-* 2>/dev/null | wc -l)
env >environment
number=$(ls script-* | wc -l)
if [[ -e refuse-$number ]]; then echo "sbatch: error: no way" >&2; exit 1; fi
if [[ -e interrupt-$number ]]; then kill -$(<interrupt-$number) $PPID $$; fi
echo "Submitted batch job $((100 + number))"
"""
# The lines of queue-1, queue-2 ... in turn; then those of `queue`.
SQUEUE = """#!/bin/bash
cd "$(dirname "$0")"
echo "$@" >squeue-args
env >squeue-environment
first=$(ls queue-* 2>/dev/null | head -n 1)
cat "${first:-queue}"
[[ -z $first ]] || rm "$first"
"""
SCANCEL = """#!/bin/bash
cd "$(dirname "$0")"
ls ../out/hand/jobs/*.failed >notes-at-scancel
echo "$@" >scancel-args
[[ ! -e refuse-scancel ]] || { echo "scancel: error: no" >&2; exit 1; }
"""


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(arrays, "ENDING_SECONDS", 0.6)
    return folder


@pytest.fixture
def sweep(bin: Path, tmp_path: Path) -> Sweep:
    """pretrain, and prune of two k."""
    flags = {"configs": DIGITS / "bip.yml", "result_dir": tmp_path / "out", "exp_name": "hand"}
    plan = make_plan(flags | {"series": "0.5,0.1", "stages": "pretrain,prune"})
    found = Sweep(plan.folder)
    found.add(plan.points)
    return found


def submit(sweep: Sweep, *told: list[str], per_task: int = 1) -> list[str]:
    """Everything that is missing; the jobs."""
    profile = SlurmProfile(executor="slurm")
    names = [record.run_id for record in sweep.runs()]
    say = told[0].append if told else print
    taken = submit_arrays(sweep, profile, names, 1001, per_task, keep_code=False, report=say)
    return [array.job for array in taken]


def recorded(sweep: Sweep) -> list[str]:
    return [record["job"] for record in read_jsonl(sweep.jobs / "arrays.jsonl")]


def finish(sweep: Sweep, run_id: str) -> None:
    (record,) = [r for r in sweep.runs() if r.run_id == run_id]
    folder = sweep.folder / record.folder
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")


def test_every_task_finds_its_pickle_and_its_own_profile(sweep: Sweep, bin: Path) -> None:
    assert submit(sweep) == ["101", "102"]
    pickles = {path.name for path in (sweep.jobs / "slurm").glob("*_submitted.pkl")}
    assert {"101_0_submitted.pkl", "102_0_submitted.pkl", "102_1_submitted.pkl"} <= pickles
    script = (bin / "script-1").read_text()
    assert "#SBATCH --array=0-1%2" in script
    assert "#SBATCH --dependency=afterok:101_0" in script
    (facts,) = sweep.jobs.glob("profile-*.json")
    assert f"BIP_PROFILE={facts}" in script


def test_submission_from_inside_a_job_does_not_inherit_it(
    sweep: Sweep, bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_JWT", "token")
    submit(sweep)
    kept = ["SLURM_CONF=/etc/slurm.conf", "SLURM_JWT=token"]
    assert sorted(options(bin / "environment")) == kept


def options(environment: Path) -> list[str]:
    """What a command that wrote its environment there may have taken for options."""
    names = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SUBMITIT_")
    return [line for line in environment.read_text().splitlines() if line.startswith(names)]


def test_options_in_the_environment_change_nothing(
    sweep: Sweep, bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_PARTITION", "SBATCH_EXPORT", "SQUEUE_STATES", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "NONE")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    # submitit reads it once in a process.
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJobEnvironment.USR_SIG", "USR1")
    submit(sweep)
    script = (bin / "script-0").read_text()
    assert "#SBATCH --signal=USR2@120\n" in script
    assert "USR1" not in script
    assert "wckey" not in script
    status(sweep.folder)
    assert options(bin / "environment") == ["SLURM_CONF=/etc/slurm.conf"]
    assert options(bin / "squeue-environment") == ["SLURM_CONF=/etc/slurm.conf"]


def test_a_refused_array_leaves_the_first_known_and_its_own_failures(
    sweep: Sweep, bin: Path
) -> None:
    dense, *pruned = [record.run_id for record in sweep.runs()]
    for run_id in (dense, *pruned):
        sweep.fail(run_id, "before")
    (bin / "refuse-2").touch()
    with pytest.raises(UserError) as error:
        submit(sweep)
    assert str(error.value).startswith("sbatch: ")
    assert str(error.value).endswith(
        f"no way; submitted so far: pretrain 101; python -m launch resume {sweep.folder} submits "
        "the rest"
    )
    assert "\n" not in str(error.value)
    assert recorded(sweep) == ["101"]
    left = [run_id for run_id in (dense, *pruned) if sweep.failure_path(run_id).exists()]
    assert left == pruned


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's handler, also where a shell's `&` has made this process ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_sbatch_leaves_no_unknown_array(sweep: Sweep, bin: Path) -> None:
    (bin / "interrupt-1").write_text("INT")
    with pytest.raises(UserError, match="interrupted; submitted so far: pretrain 101; python -m"):
        submit(sweep)
    assert recorded(sweep) == ["101"]
    assert not (bin / "script-1").exists()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_take_effect_at_the_end_of_a_submission(number: int) -> None:
    """As they did before it: those that were ignored stay so."""
    came: list[int] = []
    outer = signal.signal(number, lambda n, _: came.append(n))
    try:
        with arrays.uninterrupted():
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
        signal.signal(number, signal.SIG_IGN)
        with arrays.uninterrupted():
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, outer)


def test_a_lost_terminal_during_sbatch_ends_the_program_after_it(sweep: Sweep, bin: Path) -> None:
    (bin / "interrupt-1").write_text("TERM")

    def submit_in_a_terminal() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        submit(sweep)

    process = multiprocessing.get_context("fork").Process(target=submit_in_a_terminal)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert recorded(sweep) == ["101"]
    assert (sweep.jobs / "slurm" / "101_0_submitted.pkl").exists()
    assert not (bin / "script-1").exists()


def test_an_array_that_slurm_took_is_recorded_whatever_follows(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(UserError, match="disk full; submitted so far: pretrain 101"):
        submit(sweep)
    assert recorded(sweep) == ["101"]


def test_an_array_that_cannot_be_recorded_is_cancelled(
    sweep: Sweep, bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dense = sweep.runs()[0].run_id
    sweep.fail(dense, "before")
    monkeypatch.setattr(arrays, "append_jsonl", fail)
    told = "No space left on device; array 101 could not be recorded and is cancelled; submitted "
    with pytest.raises(UserError, match=told + "so far: nothing"):
        submit(sweep)
    assert (bin / "scancel-args").read_text() == "101\n"
    assert recorded(sweep) == []
    assert sweep.failure_path(dense).exists()
    (bin / "refuse-scancel").touch()
    with pytest.raises(UserError, match=r"array 102 is not recorded: end it by scancel 102 \("):
        submit(sweep)


def test_a_pickle_with_too_many_links_is_copied(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "link", fail)
    submit(sweep)
    folder = sweep.jobs / "slurm"
    one, other = (folder / f"102_{index}_submitted.pkl" for index in (0, 1))
    assert one.read_bytes() == other.read_bytes()


def test_a_setup_line_that_fails_ends_the_task(sweep: Sweep, bin: Path) -> None:
    """With its name; what fails inside a function or a sourced file is that one's affair."""
    (bin / "inner.sh").write_text("false; inner() { false; true; }\n")
    setup = [f"source {bin}/inner.sh", "inner", "if false; then", "true", "fi", "echo here"]
    for lines, told in ((setup, "here\n"), ([*setup, "test 1 = 2 # no"], "here\n")):
        profile = SlurmProfile(executor="slurm", setup=lines)
        names = [sweep.runs()[0].run_id]
        submit_arrays(sweep, profile, names, 1001, keep_code=False)
        newest = max(bin.glob("script-*"))
        text = newest.read_text().replace("\n# command", "\nexit 0")
        newest.write_text(text)
        done = subprocess.run(["bash", newest], capture_output=True, text=True, check=False)
        assert done.stdout == told
        failed = lines != setup
        assert done.returncode == failed
        assert done.stderr == "setup: exit status 1 of: test 1 = 2 # no\n" * failed


def test_a_batch_shell_tells_its_ranks_of_kill_wait(sweep: Sweep, bin: Path) -> None:
    (bin / "scontrol").write_text("#!/bin/bash\necho 'KillWait                = 45 sec'\n")
    (bin / "scontrol").chmod(0o755)
    profile = SlurmProfile(executor="slurm", requeue_by="batch")
    submit_arrays(sweep, profile, [sweep.runs()[0].run_id], 1001, keep_code=False)
    text = (bin / "script-0").read_text().replace("\n# command", "\necho $BIP_KILL_WAIT; exit 0")
    assert subprocess.check_output(["bash", "-c", text], text=True) == "45\n"


def test_a_folder_that_cannot_be_written_is_one_line(sweep: Sweep) -> None:
    (sweep.jobs / "slurm").touch()
    with pytest.raises(UserError, match=r"File exists.*; submitted so far: nothing; python -m"):
        submit(sweep)


def test_resume_keeps_the_users_runs_per_task(sweep: Sweep) -> None:
    submit(sweep, per_task=2)
    facts = json.loads((sweep.jobs / "profile.json").read_text())
    assert facts["runs_per_task"] == 1
    assert load_profile(sweep.jobs / "profile.json") == SlurmProfile(executor="slurm")


def test_cancel_marks_its_points_before_slurm_tells_them(sweep: Sweep, bin: Path) -> None:
    submit(sweep)
    dense, *pruned = [record.run_id for record in sweep.runs()]
    finish(sweep, dense)
    (bin / "queue").write_text("101_0|RUNNING|None|1:00\n102_0|PENDING|x|0:00\n")
    assert SlurmExecutor(sweep).cancel(0) == "2 tasks"
    assert (bin / "scancel-args").read_text() == "101_0 102_0\n"
    assert (bin / "notes-at-scancel").read_text().split("/")[-1] == f"{pruned[0]}.failed\n"
    (row,) = status(sweep.folder, [pruned[0]])
    assert row.state == "cancelled"
    assert row.reason == f"cancelled; python -m launch resume {sweep.folder} continues it"


def test_a_refused_cancel_marks_nothing(sweep: Sweep, bin: Path) -> None:
    submit(sweep)
    (bin / "queue").write_text("101_0|RUNNING|None|1:00\n")
    (bin / "refuse-scancel").touch()
    with pytest.raises(UserError, match="scancel"):
        SlurmExecutor(sweep).cancel(0)
    assert not list(sweep.jobs.glob("*.failed"))


def test_resume_waits_for_cancelled_tasks_to_end(sweep: Sweep, bin: Path) -> None:
    submit(sweep)
    dense = sweep.runs()[0].run_id
    sweep.fail(dense, "cancelled")
    for number in (1, 2):
        (bin / f"queue-{number}").write_text("101_0|COMPLETING|None|1:00\n")
    told: list[str] = []
    assert submit(sweep, told) == ["103", "104"]
    assert told[0] == "waiting for 101_0 to end"
    assert "#SBATCH --dependency=afterok:103_0" in (bin / "script-3").read_text()


def test_a_failed_point_whose_task_goes_on_is_left_out_and_said(sweep: Sweep, bin: Path) -> None:
    dense, one, _ = [record.run_id for record in sweep.runs()]
    finish(sweep, dense)
    assert submit(sweep, per_task=2) == ["101"]
    (bin / "queue").write_text("101_0|RUNNING|None|1:00\n")
    sweep.fail(one, "bug")
    told: list[str] = []
    assert submit(sweep, told) == []
    assert told == ["left out (1): still in task 101_0; resume when it has ended"]


def test_what_needs_a_point_that_is_left_out_gets_no_dead_chain(sweep: Sweep, bin: Path) -> None:
    dense = sweep.runs()[0].run_id
    submit(sweep)
    (bin / "queue").write_text("101_0|RUNNING|None|1:00\n")
    sweep.fail(dense, "bug")
    told: list[str] = []
    assert submit(sweep, told) == []
    assert told == ["left out (3): still in task 101_0; resume when it has ended"]


def test_status_of_what_left_the_queue_says_where_to_look_and_how_to_go_on(
    sweep: Sweep, bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    assert main(["status", str(sweep.folder)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    resume = f"python -m launch resume {sweep.folder}"
    assert f"left SLURM's queue and never started; {resume} submits it" in told
    (sweep.jobs / "slurm" / "101_0_0_log.err").touch()
    assert main(["status", str(sweep.folder)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "left SLURM's queue without a result; see jobs/slurm/101_0_0_log.err" in told
    assert told.endswith(f"python -m launch resume {sweep.folder}")
    # Any colleague's look finds the jobs; squeue fails for one unknown ID, but not for two.
    assert "--jobs=101,102,101" in (bin / "squeue-args").read_text()
    assert "--me" not in (bin / "squeue-args").read_text()


def test_one_look_at_the_queue_does_not_end_the_watch(
    sweep: Sweep,
    bin: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen as gone three times, the file system away between, then all are there, then done."""
    monkeypatch.setattr(SlurmExecutor, "poll_seconds", 0.01)
    submit(sweep)
    run_ids = [record.run_id for record in sweep.runs()]
    looks: list[list[Row]] = []
    away = iter([OSError(errno.ESTALE, "Stale file handle", str(sweep.ledger))] * 2)

    def look(*_: object) -> list[Row]:
        if len(looks) == 2 and (error := next(away, None)):
            raise error
        looks.append(status(sweep.folder))
        if len(looks) == 3:
            lines = "".join(f"{task}|RUNNING|None|1:00\n" for task in ("101_0", "102_0", "102_1"))
            (bin / "queue").write_text(lines)
        if len(looks) == 5:
            for run_id in run_ids:
                finish(sweep, run_id)
        return looks[-1]

    monkeypatch.setattr("launch.watch.status", look)
    rows = wait(sweep, run_ids, Console(quiet=True), SlurmExecutor(sweep))
    assert [row.state for row in looks[1]] == ["failed", "blocked", "blocked"]
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        f"warning: [Errno 116] Stale file handle: '{sweep.ledger}'; the runs are left alone, "
        "and looked for again for an hour"
    )
    assert [row.state for row in rows] == ["done"] * 3
    monkeypatch.setattr("launch.watch.LEFT_SECONDS", 0.05)
    monkeypatch.setattr("launch.watch.status", lambda *_: looks[1])
    rows = wait(sweep, run_ids, Console(quiet=True), SlurmExecutor(sweep))
    assert [row.state for row in rows] == ["failed", "blocked", "blocked"]

    def never(*_: object) -> list[Row]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("launch.watch.UNREACHABLE_SECONDS", 0.05)
    monkeypatch.setattr("launch.watch.status", never)
    with pytest.raises(OSError, match="Stale"):
        wait(sweep, run_ids, Console(quiet=True), SlurmExecutor(sweep))


def test_nothing_is_cancelled_of_a_sweep_that_was_not_submitted(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", str(sweep.folder)]) == 2
    assert "submitted" in capsys.readouterr().err


def test_logs_of_a_task_are_its_batch_scripts_where_its_run_printed_nothing(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    run_id = sweep.runs()[1].run_id
    (sweep.jobs / "slurm" / "102_0_0_log.err").write_text("srun: error: no node\n")
    capsys.readouterr()
    for name in ("102_0", run_id):
        assert main(["logs", str(sweep.folder), name]) == 0
        assert capsys.readouterr().out == "srun: error: no node\n"
    sweep.log(run_id).write_text("step 1\nValueError: bug\n")
    sweep.fail(run_id, "exit code 1 of srun")
    assert main(["logs", str(sweep.folder), "102_0"]) == 0
    assert capsys.readouterr().out == sweep.log(run_id).read_text()
    assert main(["logs", str(sweep.folder)]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in (run_id, "ValueError: bug", str(sweep.log(run_id))))
    assert main(["logs", str(sweep.folder), "prune"]) == 2, "several"
    assert main(["logs", str(sweep.folder), "101_9"]) == 2, "none"
    assert len(capsys.readouterr().err.splitlines()) == 2
