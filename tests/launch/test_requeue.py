"""A rank carries out what `events` decides, with a fake scontrol; which errors are what."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from bip.errors import LostWorker, RankError, UserError
from launch.slurm import events
from launch.slurm.rank import classify
from tests.launch.fake_slurm import CANCELLED, PREEMPTED, REQUEUED, RUNNING, FakeSlurm


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    slurm = FakeSlurm(tmp_path)
    slurm.says(PREEMPTED)
    return slurm


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (RankError("rank 0 is gone"), events.PEERS),
        (LostWorker("a loader process died"), events.PEERS),
        (torch.distributed.DistNetworkError("reset\nframe #0: c10"), events.PEERS),
        (RuntimeError("[gloo/pair.cc:5] closed"), events.PEERS),
        (UserError("lr: too high"), events.INPUT),
        (ValueError("bug"), events.BUG),
        (OSError(errno.EISDIR, "Is a directory"), events.BUG),
        (OSError(errno.ESTALE, "Stale file handle"), events.PASSING),
        *(
            (OSError(number, os.strerror(number), "f"), events.INPUT)
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
        ),
    ],
)
def test_how_an_error_ends_a_run(error: Exception, end: str) -> None:
    assert classify(error)[0] == end
    assert str(error).splitlines()[0] in classify(error)[1]
    assert "frame #0" not in classify(error)[1]


def test_nothing_after_its_end_makes_a_failure_of_a_finished_run(fake: FakeSlurm) -> None:
    """Least of all submitit, which finds the torn result of an attempt that was killed."""
    assert fake.rank("finishes") == 0
    assert (fake.note(), fake.lost()) == ("", "")
    assert (fake.sweep.jobs / f"{fake.name}.begun").read_text() == "7_0.0\n"


def test_what_is_final_is_recorded_and_by_the_first_rank_alone(fake: FakeSlurm) -> None:
    assert fake.rank("has_bad_input") == 1
    assert fake.note() == "error: lr: too high"
    assert fake.rank("has_a_bug", SLURM_PROCID="1") == 1
    assert fake.note() == "error: lr: too high"
    assert (fake.calls("requeue"), fake.lost()) == (0, "")
    fake.sweep.failure_path(fake.name).unlink()
    assert fake.rank("loses_peers") == 1
    assert (fake.note(), fake.lost()) == ("", "error: rank 1 is gone"), "for the batch script"


@pytest.mark.parametrize("by", ["scontrol", "batch"])
def test_a_saved_run_is_requeued_until_its_budget_is_spent(fake: FakeSlurm, by: str) -> None:
    """SLURM's record of the preemption comes late."""
    fake.profile(retries={"preempted": 1}, requeue_by=by)
    fake.says(RUNNING, PREEMPTED)
    assert fake.rank("saves") == os.EX_TEMPFAIL
    assert fake.causes() == ["preempted"]
    assert fake.rank("saves") == 1
    assert fake.causes() == ["preempted"]
    assert "retries.preempted is 1" in fake.note()
    assert fake.calls("requeue") == (by == "scontrol")


def test_a_task_that_slurm_has_requeued_or_cancelled_is_left_alone(fake: FakeSlurm) -> None:
    fake.says(REQUEUED)
    assert fake.rank("saves") == os.EX_TEMPFAIL
    fake.says(CANCELLED)
    assert fake.rank("saves") == 1
    assert f"python -m launch resume {fake.sweep.folder}" in fake.note()
    assert (fake.calls("requeue"), fake.causes()) == (0, ["requeued"])


def test_the_batch_script_tries_where_a_rank_cannot(fake: FakeSlurm) -> None:
    fake.refuses("Socket timed out")
    assert fake.rank("saves") == os.EX_TEMPFAIL
    assert fake.events() == ["requeue", "requeue_refused"]
    (ledger,) = fake.sweep.folder.rglob("attempts.jsonl")
    ledger.unlink()
    assert fake.rank("saves_and_cannot_record_it") == os.EX_TEMPFAIL
    assert fake.note() == ""
    assert "attempts.jsonl" in fake.lost(), "by which the batch script counts it"


def test_settings_that_were_edited_while_queued_are_not_run(fake: FakeSlurm) -> None:
    """They are another run's, and would train into its folder."""
    path, text = fake.settings, fake.config.to_yaml()
    path.write_text(text.replace("momentum: 0.9", "momentum: 0.8"))
    assert fake.rank("finishes") == 1
    assert f"{path}: changed since it was planned" in fake.note()
    assert "launch series" in fake.note()
    fake.sweep.failure_path(fake.name).unlink()
    path.write_text(text.replace("exp_name: sweep", "exp_name: elsewhere"))
    assert fake.rank("finishes") == 1
    assert "the sweep folder was moved" in fake.note()


def test_losses_count_in_the_ledger_or_else_by_a_note(fake: FakeSlurm) -> None:
    fake.says(RUNNING)
    fake.profile(retries={"lost": 1})
    assert fake.rank("has_no_files", SLURM_PROCID="1") == os.EX_TEMPFAIL
    assert fake.causes() == []
    assert "Stale file handle" in fake.lost(), "by which the batch script counts it"
    fake.sweep.loss_path(fake.name).unlink()
    assert fake.rank("has_no_files") == os.EX_TEMPFAIL
    assert (fake.causes(), fake.lost()) == (["lost"], "")
    assert fake.rank("has_no_files") == 1
    assert "retries.lost is 1" in fake.note()
    fake.sweep.failure_path(fake.name).unlink()
    fake.profile(retries={"lost": 0})
    assert fake.rank("finishes") == 1, "too many before it starts"
    assert "--checkpoint-minutes" in fake.note()


def test_without_an_answer_of_slurm_the_batch_script_decides_what_broke(fake: FakeSlurm) -> None:
    """As in a container without scontrol: the script is outside."""
    fake.profile(retries={"lost": 0}, requeue_by="batch")
    fake.says("!scontrol: not found")
    assert fake.rank("breaks") == os.EX_TEMPFAIL
    assert (fake.causes(), fake.note()) == ([], "")
    reason = fake.lost()
    assert "a process of the compiler died" in reason
    fake.says(RUNNING, PREEMPTED)
    assert fake.batch(75, lost=reason) == os.EX_TEMPFAIL
    fake.says(RUNNING)
    assert fake.batch(75, lost=reason) == 1
    assert reason in fake.note()


def test_a_rank_does_not_wait_for_one_that_failed(fake: FakeSlurm) -> None:
    """Stopped by SLURM's end of the step, it would be killed, and that looks like a bug."""
    fake.sweep.note(fake.sweep.loss_path(fake.name), "OSError: [Errno 116] Stale file handle")
    assert fake.rank("saves", SLURM_PROCID="1") == os.EX_TEMPFAIL


def test_a_rank_that_dies_of_a_bus_error_prints_so(
    fake: FakeSlurm, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the words that batch.py looks for: no code of its own may reach srun."""
    assert fake.rank("dies_of_sigbus") == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in capfd.readouterr().err.splitlines()
