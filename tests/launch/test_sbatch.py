"""Submission, resubmission and cancelling of arrays."""

import errno
import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bip.errors import UserError
from bip.files import append_jsonl, read_jsonl
from launch.__main__ import main
from launch.profile import SlurmProfile, load_profile
from launch.slurm import arrays
from launch.slurm.arrays import submit_arrays
from launch.slurm.executor import SlurmExecutor
from launch.status import Row, status
from launch.sweep import Sweep
from launch.watch import wait
from tests.launch.conftest import finish, plan_sweep
from tests.launch.fake_cluster import FakeCluster


@pytest.fixture
def sweep(cluster: FakeCluster, tmp_path: Path) -> Sweep:
    """pretrain, and prune of two k."""
    return plan_sweep(tmp_path / "out")


@pytest.fixture
def ids(sweep: Sweep) -> list[str]:
    return [run.run_id for run in sweep.runs()]


def submit(sweep: Sweep, *lines: list[str], per_task: int = 1, **profile: object) -> list[str]:
    """Everything that is missing; the jobs."""
    facts = SlurmProfile(executor="slurm", **profile)  # type: ignore[arg-type]
    names = [run.run_id for run in sweep.runs()]
    report = lines[0].append if lines else print
    taken = submit_arrays(sweep, facts, names, 1001, per_task, keep_code=False, report=report)
    return [array.job for array in taken]


def recorded(sweep: Sweep) -> list[str]:
    return [record["job"] for record in read_jsonl(sweep.jobs / "arrays.jsonl")]


def failing(number: int) -> object:
    """A function that raises this OSError."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_every_task_finds_its_pickle_and_its_own_profile(
    sweep: Sweep, cluster: FakeCluster
) -> None:
    assert submit(sweep, per_task=1) == ["101", "102"]
    pickles = {path.name for path in (sweep.jobs / "slurm").glob("*_submitted.pkl")}
    assert {"101_0_submitted.pkl", "102_0_submitted.pkl", "102_1_submitted.pkl"} <= pickles
    script = cluster.script.read_text()
    assert "#SBATCH --array=0-1%2" in script
    assert "#SBATCH --dependency=afterok:101_0" in script
    (facts,) = sweep.jobs.glob("profile-*.json")
    assert f"BIP_PROFILE={facts}" in script


def test_a_pickle_with_too_many_links_is_copied(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EMLINK))
    submit(sweep)
    one, other = ((sweep.jobs / "slurm" / f"102_{at}_submitted.pkl").read_bytes() for at in (0, 1))
    assert one == other


def test_variables_of_slurm_in_the_environment_change_nothing(
    sweep: Sweep, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the job around it, and options; but the cluster and the user's token are kept."""
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SBATCH_EXPORT", "SQUEUE_STATES",
                 "SACCT_FORMAT"):  # fmt: skip
        monkeypatch.setenv(name, "5")
    for name in ("SLURM_CONF", "SLURM_JWT"):
        monkeypatch.setenv(name, "kept")
    # submitit reads it once in a process.
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJobEnvironment.USR_SIG", "USR1")
    submit(sweep)
    script = cluster.script.read_text()
    assert "#SBATCH --signal=USR2@120\n" in script
    assert "USR1" not in script
    assert "wckey" not in script
    status(sweep.folder)
    for name in ("environment", "squeue-environment"):
        names = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SUBMITIT_")
        left = [line for line in cluster.read(name).splitlines() if line.startswith(names)]
        assert sorted(left) == ["SLURM_CONF=kept", "SLURM_JWT=kept"]


def test_a_refused_array_leaves_the_first_known_and_its_own_failures(
    sweep: Sweep, cluster: FakeCluster, ids: list[str]
) -> None:
    for run_id in ids:
        sweep.fail(run_id, "before")
    cluster.file("refuse-2")
    with pytest.raises(UserError, match=r"^sbatch: .*; submitted so far: pretrain 101; python -m"):
        submit(sweep)
    assert recorded(sweep) == ["101"]
    assert [run_id for run_id in ids if sweep.failure_path(run_id).exists()] == ids[1:]


def test_an_array_that_slurm_took_without_an_answer_is_cancelled(
    sweep: Sweep, cluster: FakeCluster
) -> None:
    """Else it would run beside the one that `resume` submits."""
    cluster.file("late-2")
    with pytest.raises(UserError, match=r"Socket timed out.*; array 102 was taken all the same"):
        submit(sweep)
    assert cluster.cancelled == ["102"]
    assert recorded(sweep) == ["101"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's handler, also where a shell's `&` has made this process ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_sbatch_leaves_no_unknown_array(sweep: Sweep, cluster: FakeCluster) -> None:
    cluster.file("interrupt-1", "INT")
    with pytest.raises(UserError, match="interrupted; submitted so far: pretrain 101; python -m"):
        submit(sweep)
    assert recorded(sweep) == ["101"]
    assert cluster.script.name == "script-0"


def test_a_lost_terminal_during_sbatch_ends_the_program_after_it(
    sweep: Sweep, cluster: FakeCluster
) -> None:
    cluster.file("interrupt-1", "TERM")

    def submit_in_a_terminal() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        submit(sweep)

    process = multiprocessing.get_context("fork").Process(target=submit_in_a_terminal)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert recorded(sweep) == ["101"]
    assert (sweep.jobs / "slurm" / "101_0_submitted.pkl").exists()
    assert cluster.script.name == "script-0"


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


def test_an_array_that_slurm_took_is_recorded_whatever_follows(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EMLINK))
    monkeypatch.setattr("shutil.copyfile", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space left.*; submitted so far: pretrain 101"):
        submit(sweep)
    assert recorded(sweep) == ["101"]


def test_an_array_that_cannot_be_recorded_is_cancelled(
    sweep: Sweep, cluster: FakeCluster, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.fail(ids[0], "before")
    monkeypatch.setattr(arrays, "append_jsonl", failing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space.*; array 101 .* cancelled; .* so far: nothing"):
        submit(sweep)
    assert cluster.cancelled == ["101"]
    assert recorded(sweep) == []
    assert sweep.failure_path(ids[0]).exists()
    cluster.file("refuse-scancel")
    with pytest.raises(UserError, match=r"array 102 is not recorded: end it by scancel 102 \("):
        submit(sweep)


def test_a_folder_that_cannot_be_written_is_one_line(sweep: Sweep) -> None:
    (sweep.jobs / "slurm").touch()
    with pytest.raises(UserError, match=r"File exists.*; submitted so far: nothing; python -m"):
        submit(sweep)


def test_a_setup_line_that_fails_ends_the_task(sweep: Sweep, cluster: FakeCluster) -> None:
    """With its name; what fails inside a function or a sourced file is that one's affair."""
    cluster.file("inner.sh", "false; inner() { false; true; }\n")
    setup = [f"source {cluster.folder}/inner.sh", "inner", "if false; then", "true", "fi", "echo x"]
    for last, code, err in (("true", 0, ""), ("test 1 = 2", 1, "setup: exit status 1 of: test 1")):
        submit(sweep, setup=[*setup, last])
        text = cluster.script.read_text().replace("\n# command", "\nexit 0")
        cluster.script.write_text(text)
        done = subprocess.run(["bash", cluster.script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "x\n")
        assert done.stderr.startswith(err)
        assert bool(done.stderr) == bool(code)


def test_ranks_of_a_batch_shell_know_kill_wait(sweep: Sweep, cluster: FakeCluster) -> None:
    cluster.file("scontrol", "#!/bin/bash\necho 'KillWait                = 45 sec'\n")
    submit(sweep, requeue_by="batch")
    text = cluster.script.read_text().replace("\n# command", "\necho $BIP_KILL_WAIT; exit 0")
    assert subprocess.check_output(["bash", "-c", text], text=True) == "45\n"


def test_resume_keeps_the_users_runs_per_task(sweep: Sweep) -> None:
    submit(sweep, per_task=2)
    facts = json.loads((sweep.jobs / "profile.json").read_text())
    assert facts["runs_per_task"] == 1
    assert load_profile(sweep.jobs / "profile.json") == SlurmProfile(executor="slurm")


def test_cancel_marks_its_runs_before_slurm_signals_them(
    sweep: Sweep, cluster: FakeCluster, ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", str(sweep.folder)]) == 2, "nothing was submitted"
    submit(sweep)
    finish(sweep, ids[0])
    cluster.queue(t101_0="RUNNING", t102_0="PENDING")
    cluster.file("refuse-scancel")
    assert main(["cancel", str(sweep.folder)]) == 2
    assert not list(sweep.jobs.glob("*.failed"))
    (cluster.folder / "refuse-scancel").unlink()
    capsys.readouterr()
    assert main(["cancel", str(sweep.folder)]) == 0
    assert "cancelled 2 tasks" in capsys.readouterr().out
    assert cluster.cancelled == ["101_0", "102_0"]
    assert cluster.read("notes-at-scancel").split("/")[-1] == f"{ids[1]}.failed\n"
    (row,) = status(sweep.folder, [ids[1]])
    assert row.state == "cancelled"
    assert f"python -m launch resume {sweep.folder}" in row.reason


def test_resume_waits_for_cancelled_tasks_to_end(
    sweep: Sweep, cluster: FakeCluster, ids: list[str]
) -> None:
    submit(sweep)
    sweep.fail(ids[0], "cancelled")
    for file in ("queue-1", "queue-2"):
        cluster.queue(file, t101_0="COMPLETING")
    lines: list[str] = []
    assert submit(sweep, lines) == ["103", "104"]
    assert lines[0] == "waiting for 101_0 to end"
    assert "#SBATCH --dependency=afterok:103_0" in cluster.script.read_text()


@pytest.mark.parametrize(("dense_is_done", "count"), [(True, 1), (False, 3)])
def test_a_failed_run_whose_task_goes_on_is_left_out_with_what_needs_it(
    dense_is_done: bool, count: int, sweep: Sweep, cluster: FakeCluster, ids: list[str]
) -> None:
    if dense_is_done:
        finish(sweep, ids[0])
    submit(sweep, per_task=2)
    cluster.queue(t101_0="RUNNING")
    sweep.fail(ids[1] if dense_is_done else ids[0], "bug")
    lines: list[str] = []
    assert submit(sweep, lines) == []
    assert lines == [f"left out ({count}): still in task 101_0; resume when it has ended"]


def test_status_of_what_left_the_queue_names_its_log_and_how_to_go_on(
    sweep: Sweep, cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    assert main(["status", str(sweep.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"never started; python -m launch resume {sweep.folder}" in shown
    (sweep.jobs / "slurm" / "101_0_0_log.err").touch()
    assert main(["status", str(sweep.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "without a result; see jobs/slurm/101_0_0_log.err" in shown
    assert shown.endswith(f"python -m launch resume {sweep.folder}")
    # Any colleague's look finds the jobs; squeue fails for one unknown ID, but not for two.
    assert "--jobs=101,102,101" in cluster.read("squeue-args")
    assert "--me" not in cluster.read("squeue-args")


def test_tasks_that_slurm_hides_from_a_colleague_have_not_left_the_queue(
    sweep: Sweep, cluster: FakeCluster, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    submit(sweep)
    cluster.settings(PrivateData="accounts,jobs,usage")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert {row.kind for row in status(sweep.folder)} == {"waiting"}
    assert "PrivateData=accounts,jobs,usage" in capsys.readouterr().err
    cluster.settings(PrivateData="none")
    assert {row.kind for row in status(sweep.folder)} == {"failed", "blocked"}


def test_a_profiles_comment_does_not_cancel_other_arrays(
    sweep: Sweep, cluster: FakeCluster
) -> None:
    cluster.file("late-1")
    cluster.file("queue", "77|ours\n")
    with pytest.raises(UserError, match="array 101 was taken all the same"):
        submit(sweep, sbatch={"comment": "ours"})
    assert cluster.cancelled == ["101"]


def test_one_look_at_the_queue_does_not_end_the_watch(
    sweep: Sweep, cluster: FakeCluster, ids: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Seen as gone three times, its files unreachable between, then all are there, then done."""
    monkeypatch.setattr(SlurmExecutor, "poll_seconds", 0.01)
    submit(sweep)
    looks: list[list[Row]] = []
    unreachable = [OSError(errno.ESTALE, "Stale file handle")] * 2

    def look(*_: object) -> list[Row]:
        if len(looks) == 2 and unreachable:
            raise unreachable.pop()
        looks.append(status(sweep.folder))
        if len(looks) == 3:
            cluster.queue(**dict.fromkeys(("t101_0", "t102_0", "t102_1"), "RUNNING"))
        if len(looks) == 5:
            finish(sweep, *ids)
        return looks[-1]

    def watch() -> list[str]:
        rows = wait(sweep, ids, Console(quiet=True), SlurmExecutor(sweep))
        return [row.state for row in rows]

    lost = ["failed", "blocked", "blocked"]
    monkeypatch.setattr("launch.watch.status", look)
    assert watch() == ["done"] * 3
    assert [row.state for row in looks[1]] == lost
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: [Errno 116] Stale")
    monkeypatch.setattr("launch.watch.LEFT_SECONDS", 0.05)
    monkeypatch.setattr("launch.watch.status", lambda *_: looks[1])
    assert watch() == lost
    monkeypatch.setattr("launch.watch.UNREACHABLE_SECONDS", 0.05)
    monkeypatch.setattr("launch.watch.status", failing(errno.ESTALE))
    with pytest.raises(OSError, match="Stale"):
        watch()


def test_logs_of_a_task_are_its_batch_scripts_where_its_run_printed_nothing(
    sweep: Sweep, ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def logs(*words: str) -> str:
        capsys.readouterr()
        assert main(["logs", str(sweep.folder), *words]) == 0
        return capsys.readouterr().out

    submit(sweep)
    (sweep.jobs / "slurm" / "102_0_0_log.err").write_text("srun: error: no node\n")
    assert logs("102_0") == logs(ids[1]) == "srun: error: no node\n"
    sweep.log(ids[1]).write_text("step 1\nValueError: bug\n")
    sweep.fail(ids[1], "exit code 1 of srun")
    assert logs("102_0") == sweep.log(ids[1]).read_text()
    assert all(text in logs() for text in (ids[1], "ValueError: bug", str(sweep.log(ids[1]))))
    for several_or_none in ("prune", "101_9"):
        assert main(["logs", str(sweep.folder), several_or_none]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def resume(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`launch resume --no-wait`: exit code, stdout, stderr. Inputs are not checked."""
    profile = sweep.folder / "slurm.yml"
    profile.write_text("executor: slurm\n")
    capsys.readouterr()
    code = main(["resume", str(sweep.folder), "--profile", str(profile), "--no-wait"])
    return code, *capsys.readouterr()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs read is not looked at before submission."""
    monkeypatch.setattr("launch.slurm.executor.check_inputs", lambda *_: {"digits_net": 9})


def test_waiting_tasks_that_need_somebody_are_shown_with_what_to_do(
    sweep: Sweep, cluster: FakeCluster, ids: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sweep)
    held = "launch failed requeued held"
    cluster.queue(t101_0=f"PENDING|{held}", t102_0="PENDING|PartitionTimeLimit", t102_1="PENDING|x")
    states = {row.run_id: row.reason for row in status(sweep.folder)}
    assert f"{held}: held; scontrol release 101_0" in states[ids[0]]
    assert "MaxTime" in states[ids[1]]
    assert states[ids[2]] == "in the queue (x)"
    code, out, err = resume(sweep, capsys)
    assert code == 0
    assert "nothing to resume" in out
    assert "warning: in the queue, " in err
    assert "scontrol release 101_0" in err
    for name in range(1, 4):  # looks of `wait`; then all is done
        cluster.queue(f"queue-{name}", t101_0="PENDING|JobHeldUser")
    cluster.queue(t101_0="COMPLETING")
    executor = SlurmExecutor(sweep)
    executor.poll_seconds = 0.01
    finish(sweep, *ids[1:])
    sweep_done = threading.Timer(1, finish, [sweep, ids[0]])
    sweep_done.start()
    console = Console(file=io.StringIO(), width=200)
    wait(sweep, ids, console, executor)
    sweep_done.join()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("scontrol release 101_0") == 1, "said once"


SACCT = """#!/bin/bash
echo "101_0|FAILED|0:53|None|n2|2026-01-02T00:00:00"
"""


def test_a_task_that_slurm_could_not_start_is_said_so(sweep: Sweep, cluster: FakeCluster) -> None:
    """Its batch script wrote nothing, as the node could not write its log."""
    submit(sweep)
    cluster.file("sacct", SACCT)
    row = status(sweep.folder)[0]
    assert row.state == "failed"
    for text in ("exit code 0:53 on n2", "could not start its batch script", "launch resume"):
        assert text in row.reason
    log = sweep.log(row.run_id)
    log.write_text("of an earlier attempt\n")
    os.utime(log, (1, 1))
    assert "without a log: jobs/slurm may be full" in status(sweep.folder)[0].reason
    os.utime(log)
    assert "it ends with: of an earlier attempt" in status(sweep.folder)[0].reason


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"{}", b"\xff\xfe"])
def test_a_damaged_result_is_no_result_and_names_the_way_out(
    content: bytes, sweep: Sweep, cluster: FakeCluster, ids: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    finish(sweep, ids[0])
    folder = sweep.folder / sweep.runs()[0].folder
    (folder / "result.json").write_bytes(content)
    submit(sweep)
    row = status(sweep.folder)[0]
    assert row.state == "failed"
    assert f"mv {folder} {folder}.damaged, then python -m launch resume" in row.reason
    code, _, err = resume(sweep, capsys)
    assert code == 2
    assert row.reason in err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_failure_record_is_replaced_by_the_newest_reason_found(
    content: str, sweep: Sweep, ids: list[str]
) -> None:
    sweep.failure_path(ids[0]).write_text(content)
    sweep.log(ids[0]).write_text("error: older\n")
    os.utime(sweep.log(ids[0]), (1, 1))
    folder = sweep.folder / sweep.runs()[0].folder
    folder.mkdir(parents=True)
    time = "2026-01-01T00:00:00.000+00:00"
    record = {"event": "end", "time": time, "cause": "error: result_dir: No space left", "step": 3}
    append_jsonl(folder / "attempts.jsonl", record)
    row = status(sweep.folder)[0]
    assert row.state == "failed"
    assert row.reason.endswith("the newest reason found: error: result_dir: No space left")


@pytest.mark.usefixtures("unchecked")
def test_a_second_resume_claims_no_run_of_the_first(
    sweep: Sweep, cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looked before the first had submitted, and submits after it."""
    code, out, _ = resume(sweep, capsys)
    assert code == 0
    assert "3 runs submitted" in out
    for look in ("queue-1", "queue-2"):
        cluster.queue(look)
    cluster.queue(t101_0="PENDING", t102_0="PENDING", t102_1="PENDING")
    code, out, _ = resume(sweep, capsys)
    assert code == 0
    assert "0 runs submitted" in out


@pytest.mark.usefixtures("cluster", "unchecked")
def test_suggested_commands_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders with spaces and quotes are quoted."""
    sweep = plan_sweep(tmp_path / "my team's results")
    _, out, _ = resume(sweep, capsys)
    main(["cancel", str(sweep.folder)])
    main(["logs", str(sweep.folder)])
    shown = out + capsys.readouterr().out
    for verb in ("status", "resume", "logs"):
        assert f"python -m launch {verb} {shlex.quote(str(sweep.folder))}" in shown, verb
