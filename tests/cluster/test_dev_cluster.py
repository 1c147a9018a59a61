"""slurm/dev/cluster.sh: the cluster is a real one, and nothing of it is left behind."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.cluster import CLUSTER_SH, Cluster, cluster_sh

pytestmark = pytest.mark.cluster

# Both nodes, whole; the second attempt ends at once.
WHOLE = ("--nodes=2", "--exclusive")
TWO_ATTEMPTS = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exec sleep 1000'


@pytest.fixture(scope="module")
def other(cluster: Cluster, start_cluster: Callable[..., Cluster]) -> Cluster:
    """A second cluster, beside the first."""
    options = {"send-user-signal": True, "grace-time": 300, "job-requeue": 0}
    return start_cluster(nodes=1, **options, **{"max-array-size": 4})


def refused(cluster: Cluster, *command: str) -> bool:
    return subprocess.run(command, env=cluster.environment, capture_output=True).returncode != 0


def states_of_nodes(cluster: Cluster) -> dict[str, str]:
    lines = cluster.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
    return dict(line.split() for line in lines)


def processes_of(directory: Path) -> list[str]:
    """Living processes that name the directory or have a file of it open, as `pid command`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + b"\0" + (process / "environ").read_bytes()
            files = [os.readlink(link) for link in [*(process / "fd").iterdir(), process / "cwd"]]
        except OSError:  # it ended meanwhile
            continue
        if os.fsencode(directory) in words or any(f.startswith(str(directory)) for f in files):
            found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found


def test_both_nodes_are_idle_and_partitions_as_declared(cluster: Cluster) -> None:
    cluster.wait(lambda: set(states_of_nodes(cluster).values()) == {"idle"}, "all nodes idle")
    assert set(states_of_nodes(cluster)) == {"n1", "n2"}
    low, high = (cluster.run("scontrol", "show", "partition", name) for name in ("low", "high"))
    assert all(text in low for text in ("PriorityTier=1 ", "PreemptMode=REQUEUE"))
    assert all(text in high for text in ("PriorityTier=10 ", "PreemptMode=OFF"))


def test_an_array_runs_and_is_accounted(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("echo $SLURM_ARRAY_TASK_ID", "--array=0-2", f"--output={tmp_path}/%a")
    cluster.wait_for_accounting(job, *["COMPLETED"] * 3)
    assert sorted(cluster.accounted(job, "jobid")) == [f"{job}_{task}" for task in range(3)]
    assert [(tmp_path / str(task)).read_text() for task in range(3)] == ["0\n", "1\n", "2\n"]


def test_a_step_spans_both_nodes(cluster: Cluster) -> None:
    nodes = cluster.run("srun", *WHOLE, "--ntasks=2", "printenv", "SLURMD_NODENAME")
    assert sorted(nodes.split()) == ["n1", "n2"]


def test_jobs_on_one_node_get_different_gpus(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--array=0-1", "--nodelist=n1", "--gpus-per-node=1", f"--output={tmp_path}/%a")
    job = cluster.submit("echo $CUDA_VISIBLE_DEVICES; sleep 3", *options)
    cluster.wait_for_accounting(job, "COMPLETED", "COMPLETED")
    assert {(tmp_path / task).read_text() for task in "01"} == {"0\n", "1\n"}
    assert refused(cluster, "sbatch", "--gpus-per-node=3", "--wrap=true")


def test_high_preempts_low_which_is_requeued(cluster: Cluster) -> None:
    low = cluster.submit(TWO_ATTEMPTS, *WHOLE)
    cluster.wait_for_state(low, "RUNNING")
    high = cluster.submit("true", *WHOLE, "--partition=high")
    cluster.wait_for_state(high, "COMPLETED")
    cluster.wait_for_state(low, "COMPLETED")
    assert cluster.job(low)["Restarts"] == "1"
    assert cluster.job(high)["Restarts"] == "0"
    cluster.wait_for_accounting(low, "PREEMPTED", "COMPLETED")


def test_a_failed_node_requeues_its_job(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        f"echo $$ >> {tmp_path}/pid; {TWO_ATTEMPTS}", "--nodelist=n2", "--exclusive"
    )
    cluster.wait((tmp_path / "pid").exists, "the job has started")
    cluster.control("fail", "n2")
    assert not Path("/proc", (tmp_path / "pid").read_text().strip(), "cwd").exists()
    assert states_of_nodes(cluster)["n2"].startswith("down")
    cluster.control("recover", "n2")
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.wait_for_accounting(job, "NODE_FAIL", "COMPLETED")


def test_a_job_outlives_restarts_of_the_daemons(cluster: Cluster, tmp_path: Path) -> None:
    wait_for_file = f"touch {tmp_path}/on; until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    job = cluster.submit(wait_for_file, "--nodelist=n1")
    cluster.wait((tmp_path / "on").exists, "the job has started")
    for daemon in ("slurmctld", "slurmdbd", "n1"):
        cluster.control("restart", daemon)
    assert cluster.job(job)["JobState"] == "RUNNING"
    (tmp_path / "go").touch()
    cluster.wait_for_accounting(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "0"


def test_status_and_a_second_up(cluster: Cluster) -> None:
    status = cluster.control("status")
    assert "accounting: works" in status
    assert "NOT" not in status
    first, line = cluster.control("up").splitlines()
    assert first.startswith("already running")
    assert line == f"export SLURM_CONF={cluster.environment['SLURM_CONF']}"
    assert (cluster.directory / "env.sh").read_text().strip() == line


def test_send_user_signal(other: Cluster, tmp_path: Path) -> None:
    """On preemption the step gets USR2, not TERM, and may requeue its job in the grace period."""
    task, out = tmp_path / "task.sh", tmp_path / "out"
    task.write_text(
        "#!/bin/bash\n"
        "trap 'echo TERM' TERM\n"
        "trap 'echo USR2; scontrol requeue $SLURM_JOB_ID' USR2\n"
        "echo on\n"
        '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || while :; do sleep 0.1; done\n'
    )
    options = ("--requeue", "--signal=USR2@1", f"--output={out}", "--open-mode=append")
    low = other.submit(f"srun bash {task}", "--exclusive", *options)
    other.wait(lambda: out.exists() and "on" in out.read_text(), "the step has started")
    high = other.submit("true", "--exclusive", "--partition=high")
    other.wait_for_state(high, "COMPLETED")
    other.wait_for_state(low, "COMPLETED")
    assert other.job(low)["Restarts"] == "1"
    lines = out.read_text().split()
    signals = [line for line in lines if line in ("USR2", "TERM")]
    assert signals[0] == "USR2", lines


def test_job_requeue_and_max_array_size(other: Cluster) -> None:
    assert refused(other, "sbatch", "--array=0-4", "--wrap=true")
    job = other.submit("sleep 1000", "--array=0-3")
    assert other.job(f"{job}_0")["Requeue"] == "0"
    other.wait_for_state(f"{job}_0", "RUNNING")
    assert refused(other, "scontrol", "requeue", f"{job}_0")
    other.run("scancel", job)


def test_down_leaves_nothing_and_the_first_cluster_alone(
    cluster: Cluster, start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    third = start_cluster(nodes=1)
    assert third.run("sinfo", "-h", "-o", "%D", "-p", "low") == "1"
    script = f"trap '' TERM; srun sleep 1000 & sleep 1000 & touch {tmp_path}/on; wait"
    third.submit(script, f"--chdir={third.directory}")
    kept = cluster.submit("sleep 1000")
    third.wait((tmp_path / "on").exists, "the job has started")
    cluster.wait_for_state(kept, "RUNNING")
    # munged, mariadbd, slurmdbd, slurmctld, slurmd, slurmstepd, the batch script: the oracle sees
    assert len(processes_of(third.directory)) >= 7
    third.down()
    assert processes_of(third.directory) == []
    assert not third.directory.exists()
    assert cluster.job(kept)["JobState"] == "RUNNING"
    cluster.run("scancel", kept)


def assert_error(named: str, *arguments: object) -> None:
    done = cluster_sh(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_down_and_up_refuse_what_they_did_not_make(cluster: Cluster) -> None:
    foreign, copy = (cluster.directory.with_name(name) for name in ("foreign", "copy"))
    foreign.mkdir()
    copy.mkdir()
    (foreign / "file").touch()
    shutil.copy(cluster.directory / ".slurm-dev-cluster", copy)
    for folder in (foreign, copy):
        assert_error(f"{folder} was not made by", "down", "--dir", folder)
    assert_error(f"--dir: {foreign} is neither new nor", "up", "--dir", foreign)
    assert [file.name for file in foreign.iterdir()] == ["file"]
    assert "n1: running" in cluster.control("status")


def test_a_start_that_fails_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurmd").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    (tmp_path / "slurmd").chmod(0o755)
    folder = cluster.directory.with_name("fails")
    done = cluster_sh("up", "--dir", folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: n1 does not answer")
    assert done.stderr.endswith("\nbroken\n")
    assert not folder.exists()
    assert processes_of(folder) == []


def test_an_interrupted_start_leaves_nothing(cluster: Cluster) -> None:
    folder = cluster.directory.with_name("interrupted")
    command = [str(CLUSTER_SH), "up", "--dir", str(folder)]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job of `&` ignores it
    up = subprocess.Popen(command, start_new_session=True, preexec_fn=default)
    cluster.wait((folder / "run" / "munged.pid").exists, "a daemon has started")
    os.killpg(up.pid, signal.SIGINT)
    up.wait(30)
    assert not folder.exists()
    assert processes_of(folder) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("up --nodes none", "--nodes needs a whole number, not 'none'"),
        ("up --nodes 0", "--nodes is 1 to 64"),
        ("up --node 3", "unknown option '--node'"),
        ("up --requeue-delay 2", "--requeue-delay is at least 5"),
        ("up --preempt-mode OFF", "--preempt-mode is REQUEUE or CANCEL, not 'OFF'"),
        ("up --dir /tmp/" + "long" * 20, "--dir: at most 64 characters"),
        ("down --nodes 3", "--nodes is an option of up"),
        ("fail --dir /tmp/x", "unknown"),
        ("start", "unknown command 'start'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: str, named: str) -> None:
    assert_error(named, *arguments.split())
