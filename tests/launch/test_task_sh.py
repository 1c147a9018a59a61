"""slurm/task.sh and launch/slurm/batch.py carry decisions out, with a fake scontrol and srun."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bip.files import atomic_write_json
from tests.launch.conftest import ROOT
from tests.launch.fake_slurm import CANCELLED, PREEMPTED, REQUEUED, RUNNING, FakeSlurm

NO_ANSWER = "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
GONE = "error: rank 0, which holds the rendezvous store, does not answer"


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_unanswered_calls_are_repeated(fake: FakeSlurm) -> None:
    fake.says(NO_ANSWER, NO_ANSWER, RUNNING)
    fake.refuses("Socket timed out on send/recv operation")
    assert fake.batch(75) == os.EX_TEMPFAIL
    assert fake.calls("requeue") == 2


def test_no_answer_for_ten_minutes_a_refusal_and_a_cancel_are_final(fake: FakeSlurm) -> None:
    fake.says(NO_ANSWER)
    assert fake.batch(75) == 1
    assert "refuses to requeue" in fake.note()
    assert 60 <= fake.calls("show") <= 65
    fake.sweep.failure_path(fake.name).unlink()
    fake.says(RUNNING)
    fake.refuses("Requested operation is presently disabled for job 7_0")
    assert fake.batch(75) == 1
    assert fake.calls("requeue") == 1
    fake.sweep.failure_path(fake.name).unlink()
    fake.says(CANCELLED)
    assert fake.batch(75) == 1
    assert fake.calls("requeue") == 1
    assert f"cancelled; python -m launch resume {fake.sweep.folder}" in fake.note()


@pytest.mark.parametrize("failed", ["error: lr: no", "cancelled; resume"])
def test_fail_fast_cancels_the_others_without_a_launcher(fake: FakeSlurm, failed: str) -> None:
    fake.command("scancel", '#!/bin/bash\necho "$@" >"${0%/*}/cancelled"\n')
    arrays = [{"job": 7, "tasks": [[fake.name], ["b"]]}, {"job": "8", "tasks": [["done", "c"]]}]
    lines = [json.dumps(array) + "\n" for array in arrays]
    (fake.sweep.jobs / "arrays.jsonl").write_text("".join(lines))
    (fake.sweep.folder / "prune" / "done").mkdir(parents=True)
    (fake.sweep.folder / "prune" / "done" / "result.json").write_text("{}")
    fake.sweep.fail_fast.touch()
    assert fake.batch(1, failed=failed) == 1
    noted = {path.stem for path in fake.sweep.jobs.glob("*.failed")}
    if failed.startswith("cancelled"):
        assert noted == {fake.name}
        assert not (fake.bin / "cancelled").exists()
        return
    assert noted == {fake.name, "b", "c"}
    assert (fake.bin / "cancelled").read_text() == "7 8\n"
    reason = json.loads(fake.sweep.failure_path("c").read_text())["reason"]
    assert reason.startswith(f"cancelled, as {fake.name} failed")


@pytest.mark.parametrize(("state", "waits"), [("COMPLETING", False), ("RUNNING", True)])
def test_a_task_that_slurm_has_requeued_is_left_alone(
    fake: FakeSlurm, state: str, waits: bool
) -> None:
    """Its shell ends at once, if the next attempt does not run: that would end with it."""
    fake.says(REQUEUED.replace("COMPLETING", state))
    assert fake.batch(137, lost=GONE) == os.EX_TEMPFAIL
    assert fake.note() == ""
    assert fake.calls("requeue") == 0
    assert (fake.calls("show") > 10) == waits


def test_a_note_of_a_rank_is_final_in_this_attempt_and_later_ones(fake: FakeSlurm) -> None:
    assert fake.batch(75, failed="cancelled by hand") == 1
    assert fake.batch(0, SLURM_RESTART_COUNT="1") == 1
    assert fake.note() == "cancelled by hand"
    assert (fake.calls("ranks"), fake.calls("requeue")) == (1, 0)


def test_a_note_of_a_lost_peer_is_set_aside_when_the_batch_shell_was_killed(
    fake: FakeSlurm,
) -> None:
    atomic_write_json(fake.sweep.loss_path(fake.name), {"reason": GONE})
    assert fake.batch(0, SLURM_RESTART_COUNT="1", SLURM_NNODES="2") == 0
    assert fake.set_aside() == [GONE]
    assert not fake.sweep.loss_path(fake.name).exists()


def test_nodes_are_asked_whether_they_live(fake: FakeSlurm) -> None:
    assert fake.batch(1, lost=GONE, SLURM_NNODES="2") == 1
    assert (fake.note(), fake.calls("probe")) == (GONE, 1)
    fake.sweep.failure_path(fake.name).unlink()
    assert fake.batch(1, nodes=1, lost=GONE, SLURM_NNODES="2") == os.EX_TEMPFAIL
    assert fake.calls("probe") == 3, "one failed probe is not taken for a failed node"
    assert (fake.note(), fake.set_aside()) == ("", [GONE])


def test_losses_are_counted_once_each_and_from_the_last_progress_on(fake: FakeSlurm) -> None:
    fake.profile(retries={"lost": 1})

    def attempt(restarts: int, **how: bool) -> int:
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        lost = "" if "begun" in how else "OSError: [Errno 116] Stale file handle"
        return fake.batch(75 if lost else 1, lost=lost, SLURM_RESTART_COUNT=str(restarts), **how)

    assert attempt(0, begun=False) == os.EX_TEMPFAIL
    assert attempt(0, begun=False) == os.EX_TEMPFAIL, "the same attempt again"
    assert attempt(1, saves=True) == os.EX_TEMPFAIL
    assert attempt(2) == os.EX_TEMPFAIL
    assert attempt(3) == 1
    assert "retries.lost is 1" in fake.note()


def test_a_failure_names_its_last_error_and_both_logs(fake: FakeSlurm) -> None:
    lost = "error: rank 1 (n2 pid 7, f\xfcr \x1b[31m) has another mask"
    assert fake.batch(1, prints=f"step 1\x01\nerror: of another kind\n{lost}\nbye\n") == 1
    assert (
        f"; error: rank 1 (n2 pid 7, f??r ?[31m) has another mask; see {fake.name}.log"
        in fake.note()
    )
    assert "slurm/7_0_0_log.err" in fake.note()
    fake.sweep.failure_path(fake.name).unlink()
    assert fake.batch(1) == 1
    assert "error:" not in fake.note(), "that of the attempt before is still in the log"


def test_a_bus_error_is_found_in_the_log_of_this_attempt(fake: FakeSlurm) -> None:
    word = "Fatal Python error: Bus error\n\nThread 0x7 (most recent call first):\n"
    assert fake.batch(1, prints=word) == os.EX_TEMPFAIL
    assert fake.batch(1) == 1


KILLED = """srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
srun: error: n1: task 0: Terminated
"""


def test_a_killed_rank_is_named_and_retried_within_the_lost_budget(fake: FakeSlurm) -> None:
    """`frames`: what torch prints of its C++ code. The log's last line is the reason."""
    fake.profile(retries={"lost": 1})
    frames = "Exception raised from recvBytes\n" + "frame #0: c10::Error\n" * 40
    assert fake.batch(143, srun=KILLED, prints=frames) == os.EX_TEMPFAIL
    fake.says(RUNNING.replace("Restarts=0", "Restarts=1"))
    assert fake.batch(143, srun=KILLED, prints=frames, SLURM_RESTART_COUNT="1") == 1
    assert "rank 1 on n2 was killed by SIGKILL" in fake.note()
    assert "retries.lost is 1" in fake.note()
    log = (fake.sweep.jobs / f"{fake.name}.log").read_text()
    assert log.splitlines()[-1] == fake.note()


def test_a_rank_killed_at_its_memory_limit_is_final(fake: FakeSlurm) -> None:
    oom = "slurmstepd-n2: error: Detected 1 oom-kill event(s) in StepId=7.0.\n"
    prose = "the user's own line: oom-kill\n"
    assert fake.batch(137, srun=KILLED, prints=prose) == os.EX_TEMPFAIL
    assert fake.batch(137, srun=KILLED, prints=oom, SLURM_MEM_PER_NODE="4000") == 1
    assert "killed by SIGKILL: the memory limit of 4000 MB was hit" in fake.note()
    assert "give more mem" in fake.note()


@pytest.fixture(params=["blocks", "inodes", "read-only"])
def full(request: pytest.FixtureRequest, fake: FakeSlurm) -> Iterator[FakeSlurm]:
    """A sweep whose jobs folder is a real file system that takes no more."""
    jobs = fake.sweep.jobs
    size = ["-o", "size=16k,nr_inodes=16"]
    if subprocess.run(["mount", "-t", "tmpfs", *size, "none", jobs], check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        fake.profile(retries={"lost": 1})
        if request.param == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", jobs], check=True)
        else:
            text = "x" * 4096 if request.param == "blocks" else ""
            with contextlib.suppress(OSError):
                for number in range(99):
                    (jobs / f"filler-{number}").write_text(text)
        yield fake
    finally:
        subprocess.run(["umount", "-l", jobs], check=True)


def test_restarts_are_bounded_where_no_record_can_be_written(full: FakeSlurm) -> None:
    """As `retries.lost` says, though nothing can be counted: SLURM's own count does."""
    codes, printed = [], ""
    for restarts in range(3):
        full.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        codes.append(full.batch(1, begun=False, SLURM_RESTART_COUNT=str(restarts)))
        printed += full.printed
    assert codes == [os.EX_TEMPFAIL, 1, 1]
    assert "takes no records" in printed
    assert "retries.lost is 1; python -m launch resume" in printed
    assert not full.sweep.failure_path(full.name).exists(), "an empty record hides the reason"
    assert not [*full.sweep.jobs.glob("*.new"), *full.sweep.jobs.glob("*.probe")]


def test_no_empty_record_is_left_where_python_does_not_start(full: FakeSlurm) -> None:
    full.command("python3", "#!/bin/bash\nexit 127\n")
    assert full.batch(1) == 1
    assert not full.sweep.failure_path(full.name).exists()


def test_options_of_the_setup_lines_do_not_change_what_follows(fake: FakeSlurm) -> None:
    setup = "set -efuo pipefail; shopt -s nullglob failglob"
    assert fake.batch(0, setup=setup) == 0
    assert fake.batch(1, setup=setup) == 1
    assert fake.note().startswith("exit code 1 of srun")
    for left in ("failed", "begun"):
        (fake.sweep.jobs / f"{fake.name}.{left}").unlink()
    assert fake.batch(1, begun=False, setup=setup) == os.EX_TEMPFAIL


def template(
    fake: FakeSlurm, code: int, restarts: int, **env: str
) -> "subprocess.CompletedProcess[str]":
    fake.command("srun", f"#!/bin/bash\nexit {code}\n")
    fake.says(PREEMPTED.replace("Restarts=0", f"Restarts={restarts}"))
    script = f"source {ROOT}/slurm/task.sh; run_step true"
    return fake.bash(script, SLURM_RESTART_COUNT=str(restarts), **env)


def test_templates(fake: FakeSlurm) -> None:
    assert template(fake, 0, 0).returncode == 0
    assert template(fake, 143, 99).returncode == os.EX_TEMPFAIL
    assert template(fake, 143, 100, BIP_MAX_RESTARTS="200").returncode == os.EX_TEMPFAIL
    done = template(fake, 143, 3, BIP_MAX_RESTARTS="3")
    assert done.returncode == 143
    assert "BIP_MAX_RESTARTS is 3" in done.stderr
    assert fake.calls("requeue") == 2


@pytest.mark.parametrize("python", ["exit 127", "exec /bin/false"])
def test_where_python_does_not_start_requeues_are_bounded(fake: FakeSlurm, python: str) -> None:
    fake.command("python3", f"#!/bin/bash\n{python}\n")
    fake.command("sleep", "#!/bin/bash\n")
    done = template(fake, 75, 9)
    assert done.returncode == os.EX_TEMPFAIL
    assert "python3 does not start" in done.stderr
    assert template(fake, 75, 10).returncode == 75
    assert template(fake, 1, 0).returncode == 1
    assert fake.calls("requeue") == 1
    assert fake.batch(1, lost=GONE) == os.EX_TEMPFAIL
    fake.says(CANCELLED)
    assert fake.batch(75) == os.EX_TEMPFAIL, "SLURM ends it"
    assert fake.calls("requeue") == 2
    fake.says(RUNNING)
    assert fake.batch(75, SLURM_RESTART_COUNT="10") == 1
    assert "already restarted 10 times" in fake.note()
    fake.sweep.failure_path(fake.name).unlink()
    assert fake.batch(1, failed="error: lr: too high") == 1
    assert fake.note() == "error: lr: too high"


@pytest.mark.parametrize(
    ("given", "good", "used"),
    [
        ("", ["python3"], "python3"),
        ("", [".venv"], ".venv/bin/python"),
        ("", [], None),
        ("given/python", ["python3", "given"], "given/python"),
        ("given/python", ["python3"], None),
    ],
)
def test_a_template_finds_the_projects_python_or_asks_for_it(
    fake: FakeSlurm, tmp_path: Path, given: str, good: list[str], used: str | None
) -> None:
    """`good`: which of the pythons have torch. The others are an older one's."""
    clone = tmp_path / "a clone"
    for folder in (".venv/bin", "given"):
        (clone / folder).mkdir(parents=True)
    (clone / "slurm").symlink_to(ROOT / "slurm")
    fake.command("srun", '#!/bin/bash\necho "srun $*"\n')
    for name in ("python3", ".venv", "given"):
        path = {".venv": clone / ".venv/bin/python", "given": clone / "given/python"}.get(
            name, fake.bin / name
        )
        path.write_text(f"#!/bin/bash\nexit {int(name not in good)}\n")
        path.chmod(0o755)
    chosen = f"export PYTHON='{clone / given}'" if given else "unset PYTHON"
    done = fake.bash(f"cd '{clone}'; {chosen}; source slurm/templates/run.sbatch --k 0.5")
    if used is None:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "PYTHON=/path/to/python sbatch" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"{used} -u -m bip train --k 0.5" in done.stdout
