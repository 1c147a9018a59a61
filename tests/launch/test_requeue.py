"""Who requeues a stopped task, and when nobody does: task.sh and a rank, with a fake scontrol."""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bip.errors import UserError
from bip.files import append_jsonl, atomic_write_json, read_jsonl
from launch.ledger import Sweep
from launch.profile import SlurmProfile
from launch.rank import Attempt
from launch.slurm import Task
from tests.launch.conftest import DIGITS, ROOT

# What SLURM 22.05 says of a task that runs, has its grace time, was requeued, reached its limit or
# was cancelled.
RUNNING = "JobState=RUNNING Reason=None Restarts=0 EndTime=2099-01-01T00:00:00 PreemptTime=None "
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")
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


def in_minutes(minutes: float) -> str:
    """As scontrol writes it."""
    return (datetime.now() + timedelta(minutes=minutes)).isoformat(timespec="seconds")


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

    def set_aside(self) -> list[str]:
        """What was said of attempts that were not final."""
        return [note["reason"] for note in read_jsonl(self.sweep.jobs / "run.failed.before")]

    def note(self) -> str | None:
        path = self.sweep.failure_path("run")
        return json.loads(path.read_text())["reason"] if path.exists() else None

    def batch(
        self, code: int, *, begun: bool = True, nodes: int = 0, failed: str = "", lost: str = "",
        setup: str = "", **env: str,
    ) -> int:  # fmt: skip
        """task.sh's run_points, whose ranks exit with `code`; its exit status.

        A rank has left its mark if `begun`, and ranks have left their notes. A probe of the
        nodes ends with `nodes`.
        """
        lines = ["#!/bin/bash", "[[ $* != *overlap* ]] || { echo probe >>${0%/*}/calls;"]
        lines[-1] += f" exit {nodes}; }}"
        for text, kind in ((failed, "failed"), (lost, "lost")):
            if text:
                note = json.dumps({"reason": text}, indent=2)
                lines.append(f"echo {shlex.quote(note)} >{self.sweep.jobs}/run.{kind}")
        if begun:
            lines.append(f"echo $BIP_ATTEMPT >{self.sweep.jobs}/run.begun")
        self.command("srun", "\n".join([*lines, f"echo ranks >>${{0%/*}}/calls; exit {code}\n"]))
        (self.sweep.jobs / "points.txt").write_text("run\n")
        words = f"run_points {self.sweep.folder} {self.sweep.jobs}/points.txt true"
        script = f"{setup}\nsource {ROOT}/slurm/task.sh\n{words}"
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

    def run_point(self, train: str, **env: str) -> int:
        """A rank whose training is the Python in `train`, which knows `stop`; its exit status."""
        config = self.sweep.folder / "points" / "run.yml"
        config.parent.mkdir(exist_ok=True)
        text = (DIGITS / "pretrain.yml").read_text()
        config.write_text(text.replace("./trained_models", str(self.sweep.folder / "runs")))
        script = f"""
import atexit, errno, os, signal
import bip.run, torch
from bip.errors import LostWorker, RankError, Stopped, UserError
from launch.rank import run_point
atexit.register(lambda: os._exit(1)) # as submitit would
def train(_, stop):
    {train}
bip.run.train = train
run_point({str(self.sweep.folder)!r})
"""
        env = self.env | {"BIP_POINT": "run", "BIP_ATTEMPT": "7_0.0"} | env
        words = [sys.executable, "-c", script]
        return subprocess.run(words, env=env, timeout=60, check=False).returncode

    def causes(self) -> list[str]:
        """Those of all requeues by ranks."""
        paths = self.sweep.folder.rglob("attempts.jsonl")
        records = [record for path in paths for record in read_jsonl(path)]
        return [record["cause"] for record in records if record["event"] == "requeue"]

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
    for count, code in enumerate((143, 137, 1)):  # srun may end before this shell is killed
        assert fake.batch(code, lost="error: rank 0 is gone") == os.EX_TEMPFAIL
        assert fake.note() is None
        assert fake.calls("requeue") == 0
        assert fake.calls("sleep 900") == count + 1


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
    causes = "the time to save was too short: a lower --checkpoint-minutes saves more often"
    assert causes in (lost_budget(fake, start(5), start(5), start(5), saved=5) or "")


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
    fake.says(RUNNING.replace("2099-01-01T00:00:00", in_minutes(3)))
    assert fake.batch(1) == 1, "a short limit is always near: it counts"
    assert (fake.note() or "").startswith("the ranks failed while SLURM was ending them in 1 att")
    assert fake.calls("requeue") == 2
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


@pytest.mark.parametrize(
    "train",
    [
        "stop.signal = signal.SIGTERM; raise RuntimeError('a process of the compiler died')",
        "raise OSError(errno.ESTALE, 'Stale file handle')",
    ],
)
def test_a_failure_of_the_stop_or_of_a_file_system_is_a_loss(fake: FakeSlurm, train: str) -> None:
    fake.profile(retries={"lost": 1})
    assert fake.run_point(train, SLURM_PROCID="1") == os.EX_TEMPFAIL, "at once"
    assert fake.causes() == []
    assert fake.run_point(train) == os.EX_TEMPFAIL
    assert fake.note() is None
    assert fake.run_point(train) == 1
    assert fake.causes() == ["lost"]
    told = "RuntimeError: a process" if "Runtime" in train else "OSError: [Errno "
    start = "lost 2 times in a row without progress, the last time: "
    assert (fake.note() or "").startswith(start + told)
    assert fake.calls("requeue") == 1


def test_bad_input_is_final_also_when_it_is_told_to_stop(fake: FakeSlurm) -> None:
    assert fake.run_point("stop.signal = signal.SIGTERM; raise UserError('lr: too high')") == 1
    assert fake.note() == "error: lr: too high"


def test_nothing_after_its_end_makes_a_failure_of_a_finished_run(fake: FakeSlurm) -> None:
    """Least of all submitit, which finds the torn result of an attempt that was killed."""
    assert fake.run_point("print('finished')") == 0
    assert fake.note() is None
