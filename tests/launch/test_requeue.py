"""Who requeues a stopped task, and when nobody does: task.sh and a rank, with a fake scontrol."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bip.errors import UserError
from bip.files import append_jsonl, atomic_write_json, read_jsonl
from launch.ledger import Sweep
from launch.profile import SlurmProfile
from launch.rank import Attempt
from launch.slurm import Task
from tests.launch.conftest import ROOT

# What SLURM 22.05 says of a task that runs, was requeued, reached its limit or was cancelled.
RUNNING = "JobState=RUNNING Reason=None Restarts=0 EndTime=2099-01-01T00:00:00 PreemptTime=None "
REQUEUED = "JobState=COMPLETING Reason=None Restarts=1 EndTime=Unknown PreemptTime=None "
NODE_FAILED = "JobState=COMPLETING Reason=None Restarts=1 EndTime=2099-01-01T00:00:00 "
AT_LIMIT = "JobState=COMPLETING Reason=TimeLimit Restarts=0 EndTime=2026-01-01T00:00:00 "
CANCELLED = "JobState=COMPLETING Reason=None Restarts=0 EndTime=2026-01-01T00:00:00 "

# The lines of `answers` are given in turn, the last one for ever; !TEXT is a failure.
SCONTROL = """#!/bin/bash
cd "$(dirname "$0")"
echo "$1" >>calls
if [[ $1 == requeue ]]; then
  number=$(grep -c requeue calls)
  line=$(sed -n "${number}p" refusals 2>/dev/null || true)
  [[ -z $line ]] || { echo "$line" >&2; exit 1; }
  exit 0
fi
line=$(head -n 1 answers)
[[ $(wc -l <answers) -le 1 ]] || sed -i 1d answers
[[ $line != '!'* ]] || { echo "${line#!}" >&2; exit 1; }
echo "$line"
"""


class FakeSlurm:
    """One array task with one point, `run`, of the sweep in `folder`/sweep."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.sweep = Sweep(folder / "sweep")
        self.run = self.sweep.folder / "prune" / "run"
        self.run.mkdir(parents=True)
        self.sweep.jobs.mkdir()
        self.profile()
        self.command("scontrol", SCONTROL)
        self.command("sleep", "#!/bin/bash\necho sleep $1 >>${0%/*}/calls\n")
        self.says(RUNNING)

    def profile(self, **values: Any) -> None:
        profile = SlurmProfile(executor="slurm", **values).model_dump(mode="json")
        atomic_write_json(self.sweep.jobs / "profile.json", profile)

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def says(self, *answers: str) -> None:
        (self.bin / "answers").write_text("".join(f"{answer}\n" for answer in answers))

    def refuses(self, *messages: str) -> None:
        (self.bin / "refusals").write_text("".join(f"{message}\n" for message in messages))

    def calls(self, name: str) -> int:
        path = self.bin / "calls"
        return path.read_text().splitlines().count(name) if path.exists() else 0

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_PROCID": "0", "BIP_REQUEUE_PAUSE": "0",
            "BIP_PROFILE": str(self.sweep.jobs / "profile.json"),
        }  # fmt: skip

    def note(self) -> str | None:
        path = self.sweep.failure_path("run")
        return json.loads(path.read_text())["reason"] if path.exists() else None

    def batch(self, code: int, **env: str) -> int:
        """task.sh's run_points, whose ranks exit with `code`; its exit status."""
        self.command("srun", f"#!/bin/bash\nexit {code}\n")
        (self.sweep.jobs / "points.txt").write_text("run\n")
        words = f"run_points {self.sweep.folder} {self.sweep.jobs}/points.txt true"
        script = f"source {ROOT}/slurm/task.sh; {words}"
        done = subprocess.run(["bash", "-c", script], env=self.env | env, timeout=60, check=False)
        return done.returncode

    def rank(self, signal_name: str = "SIGTERM", **env: str) -> int:
        """A rank after its agreed save; its exit status."""
        script = f"""
import sys
from pathlib import Path
from launch.ledger import Sweep
from launch.rank import Attempt
attempt = Attempt(Sweep(Path({str(self.sweep.folder)!r})), "run")
attempt.run_folder = Path({str(self.run)!r})
attempt.requeue({signal_name!r})
"""
        words = [sys.executable, "-c", script]
        return subprocess.run(words, env=self.env | env, timeout=60, check=False).returncode

    def events(self) -> list[str]:
        return [record["event"] for record in read_jsonl(self.run / "attempts.jsonl")]


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
    fake.sweep.failure_path("run").unlink()
    assert fake.batch(75) == 1
    assert fake.note() == f"cancelled; python -m launch resume {fake.sweep.folder} goes on"
    assert fake.calls("requeue") == 0
    assert fake.events() == []


def test_a_note_of_cancel_is_final_before_slurm_says_so(fake: FakeSlurm) -> None:
    """`launch cancel` writes it before scancel; it also stands for a budget that is spent."""
    fake.sweep.fail("run", "cancelled by hand")
    assert fake.rank() == 1
    fake.command("srun", "#!/bin/bash\nexit 75\n")
    step = f"source {ROOT}/slurm/task.sh; note={fake.sweep.failure_path('run')} run_step true"
    assert subprocess.run(["bash", "-c", step], env=fake.env, check=False).returncode == 75
    assert fake.note() == "cancelled by hand"
    assert fake.calls("requeue") == 0
    assert fake.events() == []


def test_unanswered_calls_are_repeated(fake: FakeSlurm) -> None:
    lost = "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fake.says(lost, lost, RUNNING)
    fake.refuses("Socket timed out on send/recv operation")
    fake.batch(75)
    assert fake.calls("requeue") == 2
    assert fake.calls("sleep 900") == 1, "it waits for SLURM to end it"


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


@pytest.mark.parametrize("answer", [REQUEUED, NODE_FAILED])
def test_a_task_that_slurm_has_requeued_is_left_alone(fake: FakeSlurm, answer: str) -> None:
    fake.says(answer)
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.note() is None
    fake.batch(143)
    assert fake.calls("requeue") == 0
    assert fake.calls("sleep 900") == 1


def test_other_ranks_leave_at_once_where_the_batch_script_requeues(fake: FakeSlurm) -> None:
    """Parked, they would be killed when rank 0 exits, and a kill is no good save."""
    fake.profile(requeue_by="batch")
    assert fake.rank(SLURM_PROCID="1") == os.EX_TEMPFAIL
    assert fake.events() == []
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.events() == ["requeue"]
    assert fake.calls("requeue") == 0


def test_a_refused_requeue_counts_once_and_ends_with_the_batch_script(fake: FakeSlurm) -> None:
    fake.refuses("Socket timed out")
    assert fake.rank() == os.EX_TEMPFAIL
    assert fake.events() == ["requeue", "requeue_refused"]


def test_whatever_goes_wrong_after_the_save_the_batch_script_requeues(fake: FakeSlurm) -> None:
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
    manifest = {"format": 1, "checkpoints": [{"step": saved}]}
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


def test_errors_taken_for_a_failed_node_count_and_keep_their_reason(fake: FakeSlurm) -> None:
    fake.command(
        "srun", "#!/bin/bash\n[[ $* != *overlap* ]] || echo probe >>${0%/*}/calls\nexit 1\n"
    )
    fake.refuses("Job is pending execution")
    aside = fake.sweep.jobs / "run.failed.before"
    step = f"source {ROOT}/slurm/task.sh; note={fake.sweep.failure_path('run')} run_step true"
    for at in range(3):
        atomic_write_json(fake.sweep.failure_path("run"), {"reason": f"bug {at}", "time": at})
        subprocess.run(["bash", "-c", step], env=fake.env | {"SLURM_NNODES": "2"}, check=False)
    assert [note["reason"] for note in read_jsonl(aside)] == ["bug 0", "bug 1", "bug 2"]
    assert fake.note() is None
    assert fake.calls("probe") == 6, "one failed probe is not taken for a failed node"
    attempts = [record for _ in range(3) for record in (start(5), end("error: bug"))]
    times = [{"time": f"1970-01-01T00:00:0{at}.000+00:00"} for at in (0, 0, 1, 1, 2, 2)]
    told = lost_budget(fake, *(a | t for a, t in zip(attempts, times, strict=True)), saved=5)
    assert "the profile's retries.lost is 2" in (told or "")
    fake.sweep.fail("run", str(told))
    subprocess.run(["bash", "-c", step], env=fake.env | {"SLURM_NNODES": "2"}, check=False)
    assert fake.note() == told, "which is final, whatever the nodes answer"


def test_a_failure_without_words_names_both_logs(fake: FakeSlurm) -> None:
    assert fake.batch(1) == 1
    assert fake.note() == (
        f"exit code 1 of srun; see run.log, and slurm/7_0_0_log.err in {fake.sweep.folder}/jobs"
    )


def test_a_spent_budget_names_its_key(fake: FakeSlurm) -> None:
    fake.profile(retries={"preempted": 1})
    for _ in range(2):
        append_jsonl(
            fake.run / "attempts.jsonl", {"event": "requeue", "time": "2", "cause": "requeued"}
        )
    fake.says(RUNNING.replace("Restarts=0", "Restarts=1"))
    assert fake.rank() == 1
    assert fake.note() == "requeued 3 times; the profile's retries.preempted is 1"
