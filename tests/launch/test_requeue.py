"""Who requeues a stopped task, and when nobody does: a rank, and both, with a fake scontrol."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bip.errors import UserError
from bip.files import append_jsonl, atomic_write_json
from launch.slurm.client import Task
from launch.slurm.rank import Attempt
from tests.launch.fake_slurm import (
    AT_LIMIT,
    CANCELLED,
    NODE_FAILED,
    PREEMPTED,
    REQUEUED,
    RUNNING,
    FakeSlurm,
    in_minutes,
)


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_what_scontrol_says_of_an_ended_task() -> None:
    told = [Task.parse(line).ended for line in (RUNNING, REQUEUED, AT_LIMIT, CANCELLED)]
    assert told == [False, False, False, True]


def test_a_cancelled_task_is_not_requeued(fake: FakeSlurm) -> None:
    fake.says(CANCELLED)
    assert fake.rank() == 1
    assert fake.note() == f"cancelled; python -m launch resume {fake.sweep.folder} goes on"
    assert fake.events() == []
    for code in (75, 137):
        fake.sweep.failure_path("run").unlink()
        assert fake.batch(code, lost="error: rank 0 is gone") == 1
        assert fake.note() == f"cancelled; python -m launch resume {fake.sweep.folder} goes on"
    assert fake.calls("requeue") == 0


def test_a_note_of_cancel_is_final_before_slurm_says_so(fake: FakeSlurm) -> None:
    """`launch cancel` writes it before scancel; it also stands for a budget that is spent."""
    fake.sweep.fail("run", "cancelled by hand")
    assert fake.rank() == 1
    assert fake.events() == []
    fake.sweep.failure_path("run").unlink()
    assert fake.batch(75, failed="cancelled by hand") == 1
    assert fake.note() == "cancelled by hand"
    assert fake.calls("requeue") == 0


@pytest.mark.parametrize("answer", [REQUEUED, NODE_FAILED])
@pytest.mark.parametrize(("state", "waits"), [("COMPLETING", 0), ("PENDING", 0), ("RUNNING", 15)])
def test_a_task_that_slurm_has_requeued_is_left_alone(
    fake: FakeSlurm, answer: str, state: str, waits: int
) -> None:
    """Its shell ends at once, if the next attempt does not run: that would end with it."""
    fake.says(answer.replace("COMPLETING", state))
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.note() is None
    for count, code in enumerate((143, 137, 1)):  # srun may end before this shell is killed
        assert fake.batch(code, lost="error: rank 0 is gone") == os.EX_TEMPFAIL
        assert fake.note() is None
        assert fake.calls("requeue") == 0
        assert fake.calls("sleep 60") == (count + 1) * waits


def test_other_ranks_leave_at_once_where_the_batch_script_requeues(fake: FakeSlurm) -> None:
    """Parked, they would be killed when rank 0 exits, and a kill is no good save."""
    fake.profile(requeue_by="batch")
    fake.says(PREEMPTED)
    assert fake.rank(SLURM_PROCID="1") == os.EX_TEMPFAIL
    assert fake.events() == []
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.events() == ["requeue"]
    assert fake.calls("requeue") == 0


def test_a_refused_requeue_counts_once_and_ends_with_the_batch_script(fake: FakeSlurm) -> None:
    fake.says(PREEMPTED)
    fake.refuses("Socket timed out")
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.events() == ["requeue", "requeue_refused"]


def test_whatever_goes_wrong_after_the_save_the_batch_script_requeues(fake: FakeSlurm) -> None:
    fake.says(PREEMPTED)
    (fake.run / "attempts.jsonl").mkdir()  # stands for a full disk: nothing can be appended
    assert fake.rank() == os.EX_TEMPFAIL


def lost_budget(fake: FakeSlurm, *records: dict[str, Any], saved: int = 0) -> str | None:
    """What check_lost raises, with retries.lost: 2."""
    fake.profile(retries={"lost": 2})
    (fake.run / "attempts.jsonl").unlink(missing_ok=True)
    for at, record in enumerate(records):
        append_jsonl(
            fake.run / "attempts.jsonl", {"time": f"1970-01-01T00:00:{at:02}.000"} | record
        )
    (fake.run / "checkpoint").mkdir(exist_ok=True)
    manifest = {"format": 1, "checkpoints": [{"name": "x", "sha256": "", "step": saved}]}
    atomic_write_json(fake.run / "checkpoint" / "manifest.json", manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIP_PROFILE", fake.env["BIP_PROFILE"])
        attempt = Attempt(fake.sweep, "run")
        attempt.run_folder = fake.run
        try:
            attempt.check_lost()
        except UserError as error:
            return str(error)
    return None


def start(step: int) -> dict[str, Any]:
    return {"event": "start", "step": step}


def end(cause: str) -> dict[str, Any]:
    return {"event": "end", "cause": cause}


def test_only_silent_attempts_without_progress_use_up_the_budget(fake: FakeSlurm) -> None:
    """Hard preemptions between periodic saves never do."""
    assert lost_budget(fake, *(start(10 * at) for at in range(9)), saved=90) is None
    assert lost_budget(fake, start(5), start(5), saved=5) is None
    told = "3 attempts ended without a word and without progress"
    assert told in (lost_budget(fake, start(5), start(5), start(5), saved=5) or "")
    assert lost_budget(fake, start(5), start(5), start(5), saved=6) is None
    assert lost_budget(fake, start(5), start(5), start(5), end("SIGTERM"), saved=5) is None
    assert told in (lost_budget(fake, *3 * [start(5), end("rank lost: 1")], saved=5) or "")
    lost = {"event": "requeue", "cause": "lost"}
    assert lost_budget(fake, *2 * [start(5), end("SIGTERM"), lost], saved=5) is None
    assert told in (lost_budget(fake, *3 * [start(5), end("SIGTERM"), lost], saved=5) or "")
    assert told in (lost_budget(fake, lost, start(5), lost, lost, saved=5) or "")
    assert told in (lost_budget(fake, lost, lost, lost, saved=5) or ""), "of an older submission"
    assert lost_budget(fake, lost, lost, start(5), lost, saved=6) is None
    preempted = {"event": "requeue", "cause": "preempted"}
    broken = [start(5), end("error: RuntimeError: a process of the compiler died"), preempted]
    assert lost_budget(fake, *9 * broken, saved=5) is None
    gone = lost | {"step": 9}  # before its start could be recorded
    saved = [start(5), end("SIGTERM"), preempted | {"step": 9}]
    assert lost_budget(fake, *saved, gone, gone, saved=9) is None
    assert told in (lost_budget(fake, *saved, gone, gone, gone, saved=9) or "")
    assert lost_budget(fake, start(5), gone, gone, gone, saved=9) is None, "the first saved more"
    causes = "the time to save was too short: a lower --checkpoint-minutes saves more often"
    assert causes in (lost_budget(fake, start(5), start(5), start(5), saved=5) or "")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("RankError('rank 0 is gone')", "lost"),
        ("torch.distributed.DistNetworkError('reset')", "lost"),
        ("RuntimeError('[gloo/pair.cc:5] closed')", "lost"),
        ("LostWorker('a loader process died')", "lost"),
        ("UserError('lr: too high')", "failed"),
        ("ValueError('bug')", "failed"),
        ("OSError(errno.EISDIR, 'Is a directory')", "failed"),
    ],
)
def test_only_a_rank_that_lost_the_others_leaves_it_open(
    fake: FakeSlurm, error: str, kind: str
) -> None:
    assert fake.run_point(f"raise {error}") == 1
    left = sorted(path.suffix for path in fake.sweep.jobs.glob("run.*"))
    assert left == [".begun", f".{kind}"]
    assert (fake.sweep.jobs / "run.begun").read_text() == "7_0.0\n"


def test_losses_by_failed_nodes_count_and_keep_their_reason(fake: FakeSlurm) -> None:
    for at in range(3):
        more = {"SLURM_NNODES": "2", "SLURM_RESTART_COUNT": str(at)}
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={at}"))
        assert fake.batch(1, nodes=1, lost=f"error: {at}", **more) == os.EX_TEMPFAIL
    assert fake.set_aside() == ["error: 0", "error: 1", "error: 2"]
    assert fake.note() is None
    assert fake.calls("requeue") == 3
    assert fake.calls("probe") == 6, "one failed probe is not taken for a failed node"
    attempts = [record for _ in range(3) for record in (start(5), end("error: lost"))]
    told = lost_budget(fake, *attempts, saved=5)
    assert "the profile's retries.lost is 2" in (told or "")
    assert fake.batch(1, nodes=1, failed=str(told), SLURM_NNODES="2") == 1
    assert fake.note() == told, "which is final, whatever the nodes answer"


def test_a_spent_budget_names_its_key(fake: FakeSlurm) -> None:
    fake.profile(retries={"preempted": 1})
    for _ in range(2):
        append_jsonl(
            fake.run / "attempts.jsonl", {"event": "requeue", "time": "2", "cause": "requeued"}
        )
    fake.says(RUNNING.replace("Restarts=0", "Restarts=1"))
    assert fake.rank() == 1
    assert fake.note() == "requeued 3 times; the profile's retries.preempted is 1"


def test_a_signal_that_slurm_knows_nothing_of_is_a_loss(fake: FakeSlurm) -> None:
    """Another rank died before the ranks met, and srun ended this one."""
    fake.profile(retries={"lost": 1})
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.rank() == 1
    assert fake.causes() == ["lost"]
    assert fake.note() == (
        "lost 2 times in a row without progress, the last time: SIGTERM came, and SLURM had "
        "neither preempted the task nor was it at its limit: another rank died before it, or "
        "somebody ended the step; the profile's retries.lost is 1; see run.log"
    )
    assert fake.calls("requeue") == 1


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ([PREEMPTED], "preempted"),
        ([RUNNING, RUNNING, PREEMPTED], "preempted"),
        ([RUNNING, REQUEUED], "requeued"),
        ([RUNNING.replace("2099-01-01T00:00:00", in_minutes(3))], "timed_out"),
        (["!Unable to contact slurm controller"], "preempted"),
    ],
)
def test_what_slurm_did_is_no_loss_also_where_its_record_comes_late(
    fake: FakeSlurm, answers: list[str], cause: str
) -> None:
    fake.profile(retries={"lost": 0})
    fake.says(*answers)
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.causes() == [cause]


BROKEN = "stop.signal = signal.SIGTERM; raise RuntimeError('a process of the compiler died')"
ECHO = "stop.signal = signal.SIGTERM; raise RankError('rank 1: its compiler died')"


@pytest.mark.parametrize("train", [BROKEN, "raise OSError(errno.ESTALE, 'Stale file handle')"])
def test_a_failure_of_the_stop_or_of_a_file_system_is_a_loss(fake: FakeSlurm, train: str) -> None:
    fake.profile(retries={"lost": 1})
    assert fake.run_point(train, SLURM_PROCID="1") == os.EX_TEMPFAIL, "at once"
    assert fake.causes() == []
    fake.sweep.loss_path("run").unlink()  # by which the batch script would count it
    assert fake.run_point(train) == os.EX_TEMPFAIL
    assert fake.note() is None
    assert fake.run_point(train) == 1
    assert fake.causes() == ["lost"]
    told = "RuntimeError: a process" if "Runtime" in train else "OSError: [Errno "
    start = "lost 2 times in a row without progress, the last time: "
    assert (fake.note() or "").startswith(start + told)
    assert fake.calls("requeue") == 1


@pytest.mark.parametrize("train", [BROKEN, ECHO], ids=["own", "of another rank"])
@pytest.mark.parametrize(
    ("answers", "cause"), [((RUNNING, PREEMPTED), "preempted"), ((REQUEUED,), "requeued")]
)
def test_what_slurm_broke_is_no_loss(
    fake: FakeSlurm, train: str, answers: tuple[str, ...], cause: str
) -> None:
    """However often: with a compiler that takes longer than the grace time lasts, say. SLURM's
    record of a preemption comes late; without a grace time it has requeued the task already.
    """
    fake.profile(retries={"lost": 0, "preempted": 2})
    for _ in range(2):
        fake.says(*answers)
        assert fake.run_point(train) == os.EX_TEMPFAIL
    fake.says(*answers)
    assert fake.run_point(train) == 1
    assert fake.causes() == 2 * [cause]
    assert (fake.note() or "").startswith(f"{cause} 3 times, the last time: ")
    assert "compiler died; the profile's retries.preempted is 2" in (fake.note() or "")
    assert not fake.sweep.loss_path("run").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR2"])
def test_without_word_from_slurm_the_batch_script_judges_what_broke(
    fake: FakeSlurm, number: str
) -> None:
    """As in a container without scontrol: the script is outside."""
    fake.profile(retries={"lost": 0}, requeue_by="batch")
    fake.says("!scontrol: not found")
    assert fake.run_point(BROKEN.replace("SIGTERM", number)) == os.EX_TEMPFAIL
    assert fake.causes() == []
    lost = json.loads(fake.sweep.loss_path("run").read_text())["reason"]
    assert lost == "RuntimeError: a process of the compiler died"
    fake.says(RUNNING, PREEMPTED)  # its record comes late
    fake.batch(75, lost=lost)
    assert fake.note() is None
    assert fake.calls("requeue") == 1
    fake.says(RUNNING)
    assert fake.batch(75, lost=lost) == 1
    assert (fake.note() or "").startswith(f"the ranks failed ({lost}) in 1 attempts in a row")


def test_a_rank_does_not_wait_for_one_that_failed(fake: FakeSlurm) -> None:
    """Told to stop by SLURM's end of the step, it would be killed, and that looks like a bug."""
    fake.sweep.note(fake.sweep.loss_path("run"), "OSError: [Errno 116] Stale file handle")
    assert fake.rank(SLURM_PROCID="1") == os.EX_TEMPFAIL


def test_an_echo_without_slurm_s_doing_is_for_the_batch_script_to_judge(fake: FakeSlurm) -> None:
    assert fake.run_point(ECHO) == 1
    assert fake.causes() == []
    told = json.loads(fake.sweep.loss_path("run").read_text())["reason"]
    assert told == "error: rank 1: its compiler died"


def test_a_file_system_that_stays_away_is_final(fake: FakeSlurm) -> None:
    """Nothing can be counted in the run's folder, so the batch script counts."""
    fake.profile(retries={"lost": 3})
    away = "raise OSError(errno.ESTALE, 'Stale file handle')"
    (fake.sweep.folder / "runs").write_text("stands for a folder that is away")
    assert fake.run_point(away) == os.EX_TEMPFAIL
    lost = json.loads(fake.sweep.loss_path("run").read_text())["reason"]
    assert lost == "OSError: [Errno 116] Stale file handle"
    for restarts, code in enumerate((75, 143, 138, 75)):  # the highest of all ranks
        fake.says(RUNNING.replace("Restarts=0", f"Restarts={restarts}"))
        assert fake.note() is None
        fake.batch(code, lost=lost, SLURM_RESTART_COUNT=str(restarts))
    assert fake.calls("requeue") == 3
    assert (fake.note() or "").startswith(
        f"the ranks failed ({lost}) in 4 attempts in a row (exit code 75 of srun); the profile's "
    )


def test_a_rank_that_dies_of_a_bus_error_says_so(
    fake: FakeSlurm, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the words that task.sh looks for: no code of its own may reach srun."""
    assert fake.run_point("os.kill(os.getpid(), signal.SIGBUS)") == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in capfd.readouterr().err.splitlines()


def test_bad_input_is_final_also_when_it_is_told_to_stop(fake: FakeSlurm) -> None:
    assert fake.run_point("stop.signal = signal.SIGTERM; raise UserError('lr: too high')") == 1
    assert fake.note() == "error: lr: too high"


def test_nothing_after_its_end_makes_a_failure_of_a_finished_run(fake: FakeSlurm) -> None:
    """Least of all submitit, which finds the torn result of an attempt that was killed."""
    assert fake.run_point("print('finished')") == 0
    assert fake.note() is None
