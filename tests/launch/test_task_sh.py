"""What a batch script does when its ranks have ended: task.sh, with a fake scontrol and srun."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bip.files import atomic_write_json
from tests.launch.conftest import ROOT
from tests.launch.fake_slurm import PREEMPTED, REQUEUED, RUNNING, FakeSlurm, in_minutes


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_unanswered_calls_are_repeated(fake: FakeSlurm) -> None:
    lost = "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fake.says(lost, lost, RUNNING)
    fake.refuses("Socket timed out on send/recv operation")
    fake.batch(75)
    assert fake.calls("requeue") == 2
    assert fake.calls("sleep 60") == 15, "it waits for SLURM to end it"


def test_a_refusal_is_told_with_how_to_go_on(fake: FakeSlurm) -> None:
    fake.refuses("Requested operation is presently disabled for job 7_0")
    assert fake.batch(75) == 1
    assert fake.calls("requeue") == 1
    assert fake.note() == (
        "saved at its last step, but SLURM refuses to requeue (Requested operation is presently "
        f"disabled for job 7_0); python -m launch resume {fake.sweep.folder} goes on"
    )


def test_no_answer_for_ever_is_told(fake: FakeSlurm) -> None:
    fake.says("!Unable to contact slurm controller")
    assert fake.batch(75, BIP_REQUEUE_SECONDS="1") == 1
    assert "refuses to requeue (Unable to contact slurm controller)" in (fake.note() or "")


def test_a_rank_that_lost_the_others_is_not_final_when_the_batch_shell_died(
    fake: FakeSlurm,
) -> None:
    """Its node failed first: the note of the rank that outlived it is all there is."""
    gone = "error: rank 0, which holds the rendezvous store, does not answer"
    atomic_write_json(fake.sweep.loss_path("run"), {"reason": gone})
    assert fake.batch(0, SLURM_RESTART_COUNT="1", SLURM_NNODES="2") == 0
    assert fake.calls("ranks") == 1
    assert fake.set_aside() == [gone]
    assert not fake.sweep.loss_path("run").exists()


def test_what_a_rank_says_that_lost_the_others_is_final_where_the_nodes_live(
    fake: FakeSlurm,
) -> None:
    assert fake.batch(1, lost="error: mask: rank 1 differs", SLURM_NNODES="2") == 1
    assert fake.note() == "error: mask: rank 1 differs"
    assert fake.calls("probe") == 1
    fake.sweep.failure_path("run").unlink()
    bug = {"failed": "ValueError: bug", "lost": "error: ValueError: bug (rank 1)"}
    assert fake.batch(1, nodes=1, SLURM_NNODES="2", **bug) == 1
    assert fake.note() == "ValueError: bug", "a rank's own, whatever the nodes answer"
    assert fake.batch(0, SLURM_RESTART_COUNT="1") == 1, "and a later attempt does not try again"
    assert fake.calls("ranks") == 2


@pytest.mark.parametrize("code", [1, 137])
def test_a_task_of_which_no_rank_begins_is_tried_again_a_few_times(
    fake: FakeSlurm, code: int
) -> None:
    """The controller was away, say, when the step was to start."""
    fake.profile(retries={"lost": 1})
    away = "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fake.says(away, RUNNING)
    assert fake.batch(code, begun=False) == os.EX_TEMPFAIL
    assert fake.batch(code, begun=False) == os.EX_TEMPFAIL, "the same attempt is counted once"
    for restarts, begun in enumerate((False, True, False), 2):
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        done = fake.batch(75 if begun else code, begun=begun, SLURM_RESTART_COUNT=str(restarts))
        assert done == os.EX_TEMPFAIL, "not in a row"
    fake.says(RUNNING.replace("Restarts=0", "Restarts=5"))
    assert fake.batch(code, begun=False, SLURM_RESTART_COUNT="5") == 1
    assert fake.calls("requeue") == 5
    assert (fake.note() or "").startswith(
        f"no rank began in 2 attempts in a row (exit code {code} of srun); the profile's "
        "retries.lost is 1; see run.log, and "
    )


def test_a_rank_that_dies_before_its_run_starts_is_not_tried_again(fake: FakeSlurm) -> None:
    """Of a missing import, say, or for want of memory; the mark of an earlier attempt is none."""
    assert fake.batch(137) == 1
    assert fake.calls("requeue") == 0
    assert (fake.note() or "").startswith("exit code 137 of srun; see run.log")
    fake.sweep.failure_path("run").unlink()
    fake.says(RUNNING.replace("Restarts=0", "Restarts=1"))
    assert fake.batch(137, begun=False, SLURM_RESTART_COUNT="1") == os.EX_TEMPFAIL


def test_a_rank_that_dies_of_a_file_system_that_is_away_is_tried_again_a_few_times(
    fake: FakeSlurm,
) -> None:
    """A page of a mapped LMDB that cannot be read is a bus error; the other ranks tell of it."""
    fake.profile(retries={"lost": 2})
    word = "Fatal Python error: Bus error\n\nThread 0x7 (most recent call first):\n"
    cases: list[tuple[int, dict[str, str], int]] = [
        (135, {}, os.EX_TEMPFAIL),
        (137, {"prints": word}, os.EX_TEMPFAIL),  # another rank did not end on TERM
        (135, {"lost": "error: rank 0 is gone"}, 1),
    ]
    for restarts, (code, told, status) in enumerate(cases):
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        assert fake.batch(code, **told, SLURM_RESTART_COUNT=str(restarts)) == status
    assert fake.calls("requeue") == 2
    assert (fake.note() or "").startswith(
        "a rank died of SIGBUS: the file system of its data fails or was away in 3 attempts in a "
        "row (exit code 135 of srun); the profile's retries.lost is 2; see run.log, and "
    )
    fake.sweep.failure_path("run").unlink()
    fake.says(RUNNING)
    assert fake.batch(137) == 1, "the log's end of an earlier attempt is none of this one's"


def test_a_preemption_before_a_rank_begins_is_no_loss(fake: FakeSlurm) -> None:
    fake.profile(retries={"lost": 0})
    for count, code in enumerate((75, 138, 140, 143)):
        fake.says(PREEMPTED.replace("Restarts=0", f"Restarts={count}"))
        done = fake.batch(code, begun=False, SLURM_RESTART_COUNT=str(count))
        assert done == os.EX_TEMPFAIL
    assert fake.calls("requeue") == 4
    fake.says(RUNNING, PREEMPTED)
    assert fake.batch(143, begun=False) == os.EX_TEMPFAIL, "SLURM's record may come late"
    fake.says(RUNNING.replace("2099-01-01T00:00:00", in_minutes(3)))
    assert fake.batch(140, begun=False) == os.EX_TEMPFAIL, "nor is the time limit"
    fake.says(RUNNING, REQUEUED)
    assert fake.batch(143, begun=False) == os.EX_TEMPFAIL
    assert fake.calls("requeue") == 6
    assert fake.set_aside() == []


@pytest.mark.parametrize("code", [138, 140, 143])
def test_ranks_that_a_rank_which_cannot_start_takes_along_are_not_tried_for_ever(
    fake: FakeSlurm, code: int
) -> None:
    """Its node lacks what python imports; srun ends the others by TERM, and says that."""
    fake.profile(retries={"lost": 1})
    for count, status in enumerate((os.EX_TEMPFAIL, 1)):
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={count}"))
        more = {"SLURM_NNODES": "2", "SLURM_RESTART_COUNT": str(count)}
        assert fake.batch(code, begun=False, **more) == status
    assert fake.calls("requeue") == 1
    assert (fake.note() or "").startswith(
        f"no rank began in 2 attempts in a row (exit code {code} of srun); the profile's "
        "retries.lost is 1; see run.log, and "
    )


def test_restarts_of_a_sweep_are_bounded(fake: FakeSlurm) -> None:
    """Whatever its ranks say."""
    fake.profile(retries={"preempted": 7, "timed_out": 3})
    for count, status in ((1009, os.EX_TEMPFAIL), (1010, 1)):
        fake.says(PREEMPTED.replace("Restarts=0", f"Restarts={count}"))
        assert fake.batch(75, SLURM_RESTART_COUNT=str(count)) == status
    assert "already restarted 1010 times (BIP_MAX_RESTARTS is 1010)" in (fake.note() or "")


def test_ranks_that_fail_while_slurm_ends_them_are_tried_again(fake: FakeSlurm) -> None:
    """One that heard of another's failure ends by itself, with or without a word."""
    fake.profile(retries={"lost": 0})
    fake.says(PREEMPTED)
    for lost in ("", "error: rank 1: RuntimeError: a process of the compiler died"):
        assert fake.batch(1, lost=lost, SLURM_NNODES="2") == os.EX_TEMPFAIL
    assert fake.set_aside() == [lost]
    assert fake.batch(1, failed="error: lr: too high") == 1, "which is final"
    fake.sweep.failure_path("run").unlink()
    fake.says(RUNNING)  # SLURM's record comes late
    fake.command("sleep", f"#!/bin/bash\necho '{PREEMPTED}' >${{0%/*}}/answers\n")
    assert fake.batch(1, lost="error: rank 1 has gone", SLURM_NNODES="2") == os.EX_TEMPFAIL
    fake.says(RUNNING.replace("2099-01-01T00:00:00", in_minutes(3)))
    assert fake.batch(1) == 1, "a short limit is always near: it counts"
    assert (fake.note() or "").startswith("the ranks failed while SLURM was ending them in 1 att")
    assert fake.calls("requeue") == 3
    assert fake.calls("probe") == 0


def test_ranks_that_do_not_come_in_time_are_tried_again_a_few_times(fake: FakeSlurm) -> None:
    fake.profile(retries={"lost": 1})
    late = "error: ranks: of 2 these did not come in time: 1"
    for count, status in enumerate((os.EX_TEMPFAIL, 1)):
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={count}"))
        more = {"SLURM_NNODES": "2", "SLURM_RESTART_COUNT": str(count)}
        assert fake.batch(1, lost=late, **more) == status
    assert fake.calls("requeue") == 1
    assert fake.set_aside().count(late) == 2
    assert (fake.note() or "").startswith("the ranks did not meet in 2 attempts in a row (exit")


def test_options_of_the_setup_lines_do_not_change_what_follows(fake: FakeSlurm) -> None:
    setup = "set -efuo pipefail; shopt -s nullglob failglob"
    assert fake.batch(0, setup=setup) == 0
    assert fake.batch(1, setup=setup) == 1
    assert (fake.note() or "").startswith("exit code 1 of srun")
    fake.sweep.failure_path("run").unlink()
    fake.says(RUNNING.replace("Restarts=0", "Restarts=1"))
    more = {"setup": setup, "SLURM_RESTART_COUNT": "1"}
    assert fake.batch(1, begun=False, **more) == os.EX_TEMPFAIL


def test_a_missing_command_is_not_tried_again(fake: FakeSlurm) -> None:
    assert fake.batch(2, begun=False) == 1
    assert fake.calls("requeue") == 0


def test_without_a_profile_restarts_are_bounded(fake: FakeSlurm) -> None:
    """The templates: no rank keeps a budget."""
    fake.command("srun", "#!/bin/bash\nexit 143\n")
    line = f"source {ROOT}/slurm/task.sh; run_step true"

    def step(restarts: int, **env: str) -> subprocess.CompletedProcess[str]:
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        env = fake.env | {"SLURM_RESTART_COUNT": str(restarts)} | env
        words = ["bash", "-c", line]
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)

    assert step(99).returncode == os.EX_TEMPFAIL
    assert step(100, BIP_MAX_RESTARTS="200").returncode == os.EX_TEMPFAIL
    assert fake.calls("requeue") == 2
    assert step(100, folder="of the user's").returncode == 143
    assert step(3, BIP_MAX_RESTARTS="3").stderr == (
        "exit code 143 of srun, and already restarted 3 times (BIP_MAX_RESTARTS is 3); the same "
        "sbatch line goes on\n"
    )
    assert fake.calls("requeue") == 2


@pytest.mark.parametrize("code", [os.EX_IOERR, 128 + signal.SIGBUS])
def test_without_a_profile_a_file_system_that_fails_at_once_is_tried_a_few_times(
    fake: FakeSlurm, code: int
) -> None:
    """A hundred requeues would be far too many for a bad sector, and too few for weeks."""

    def step(restarts: int, minutes: float) -> subprocess.CompletedProcess[str]:
        fake.command("srun", f"#!/bin/bash\nexit {code}\n")
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        # Its start is set back while it runs.
        srun = f"srun() {{ began=$((began - {round(60 * minutes)})); command srun; }}"
        line = f"source {ROOT}/slurm/task.sh; {srun}; run_step true"
        env = fake.env | {"SLURM_RESTART_COUNT": str(restarts)}
        words = ["bash", "-c", line]
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)

    assert step(4, 1).returncode == os.EX_TEMPFAIL
    assert step(50, 11).returncode == os.EX_TEMPFAIL
    assert fake.calls("requeue") == 2
    done = step(5, 1)
    assert (done.returncode, done.stderr) == (
        code,
        f"a file system fails, or is away (exit code {code} of srun), within ten minutes, and "
        "already restarted 5 times; the same sbatch line goes on\n",
    )
    assert fake.calls("requeue") == 2


def test_failures_are_counted_from_the_last_progress_on(fake: FakeSlurm) -> None:
    """A node's file system fails its rank once a day, for weeks."""
    fake.profile(retries={"lost": 2})

    def attempt(restarts: int, saves: bool) -> int:
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        lost = "OSError: [Errno 116] Stale file handle"
        return fake.batch(75, lost=lost, saves=saves, SLURM_RESTART_COUNT=str(restarts))

    progress = [True] * 7 + [False, False, True, False, False]
    for restarts, saves in enumerate(progress):
        assert attempt(restarts, saves) == os.EX_TEMPFAIL, restarts
    assert attempt(len(progress), False) == 1
    assert "in 3 attempts in a row" in (fake.note() or "")


def test_a_failure_without_a_note_tells_its_last_error_and_names_both_logs(
    fake: FakeSlurm,
) -> None:
    logs = f"see run.log, and slurm/7_0_0_log.err in {fake.sweep.folder}/jobs"
    lost = 'error: rank 1 ("n2" pid 7, f\xfcr \\\x1b[31m) has not answered for 10 s'
    assert fake.batch(1, prints=f"step 1\x01\nerror: of another kind\n{lost}\nbye\n") == 1
    told = "error: rank 1 (n2 pid 7, f??r ?[31m) has not answered for 10 s"
    assert fake.note() == f"exit code 1 of srun; {told}; {logs}"
    fake.sweep.failure_path("run").unlink()
    assert fake.batch(1) == 1  # the log of the attempt before is still there
    assert fake.note() == (
        f"exit code 1 of srun; see run.log, and slurm/7_0_0_log.err in {fake.sweep.folder}/jobs"
    )
