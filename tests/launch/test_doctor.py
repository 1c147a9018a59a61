"""What the doctor and submission make of a cluster, with fake sacctmgr, scontrol and squeue."""

import os
from pathlib import Path

import pytest

from bip.config import build_config
from bip.errors import UserError
from launch.__main__ import main
from launch.profile import SlurmProfile
from launch.slurm import doctor
from launch.slurm.doctor import check_disk, check_place, examine, limits, preflight
from tests.launch.test_arrays import sweep_of

# sacctmgr answers with a file's lines: user, assoc and qos. assoc's lines begin with the account.
SACCTMGR = """#!/bin/bash
cd "$(dirname "$0")"
[[ -e $3 ]] || { echo "You are not running a supported accounting_storage plugin" >&2; exit 1; }
account=$(grep -oE 'account=\\S*' <<<"$*" | cut -d= -f2)
case $3 in
  assoc) grep "^$account" assoc | cut -d' ' -f2 ;;
  *) cat "$3" ;;
esac
"""
SCONTROL = """#!/bin/bash
cat "$(dirname "$0")/$2"
"""
SQUEUE = """#!/bin/bash
cat "$(dirname "$0")/queue"
"""


class FakeCluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"sacctmgr": SACCTMGR, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
            self.file(name, text)
        for name in ("sbatch", "srun", "scancel"):
            self.file(name, "#!/bin/bash\n")
        self.file("queue", "")
        self.file("node", "NodeName=n1 NodeAddr=x NodeHostName=n1.site.org Version=22\n")
        self.settings(PreemptType="preempt/partition_prio", PreemptMode="REQUEUE")
        self.partition(PreemptMode="REQUEUE", GraceTime="40", QoS="N/A")

    def file(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def settings(self, **values: str) -> None:
        values = {"MaxArraySize": "500", "KillWait": "30 sec"} | values
        values |= {"AccountingStorageType": "accounting_storage/slurmdbd"}
        self.file("config", "".join(f"{name:24} = {value}\n" for name, value in values.items()))

    def partition(self, **values: str) -> None:
        values = {"PartitionName": "low", "Default": "YES", "State": "UP"} | values
        line = " ".join(f"{k}={v}" for k, v in values.items())
        self.file("partition", f"{line}\nPartitionName=gpu Default=NO State=UP\n")

    def accounting(self, assoc: str, qos: str) -> None:
        self.file("user", "mine\n")
        self.file("assoc", assoc)
        self.file("qos", qos)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("USER", raising=False)
    return FakeCluster(folder)


def profile(**values: object) -> SlurmProfile:
    return SlurmProfile(executor="slurm", **values)  # type: ignore[arg-type]


ASSOC = "mine ||90|\nother |tiny|1|\nmine gpu|fast|7|\n"
QOS = "normal|80|00:01:30|cluster|\ntiny|2|00:00:00|cancel|\nfast|60|00:00:10|requeue|55\n"


def test_limits_are_those_of_the_account_and_qos_that_are_used(cluster: FakeCluster) -> None:
    cluster.accounting(ASSOC, QOS)
    own = "MaxSubmitJobsPerUser of the QOS normal"
    found = limits(profile())
    assert (found.max_array_size, found.max_submit, found.source) == (500, 80, own)
    last = list(examine(profile(qos="fast")))[-1].text
    assert last == (
        "submission: arrays of 500 tasks, 55 jobs (GrpSubmitJobs of the QOS fast, for all its "
        "users together); 0 of yours are queued"
    )
    assert limits(profile(account="other")).source == "MaxSubmitJobs of the user's association"
    assert limits(profile(account="other")).max_submit == 1
    assert limits(profile(qos="tiny")).max_submit == 2
    assert limits(profile(partition="gpu")).max_submit == 7
    cluster.partition(QoS="tiny")
    assert limits(profile()).max_submit == 2
    assert limits(profile(partition="low,gpu")).max_submit == 2


def test_the_qos_is_that_of_the_default_account(cluster: FakeCluster) -> None:
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    cluster.accounting("other |tiny|1|\nmine |fast||\n", QOS)
    text = "preemption (REQUEUE): SIGTERM, then 10 s to finish a step and save (GraceTime)"
    assert preemption(cluster) == [("warning", text)]


def test_a_missing_command_is_named(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster.folder / "srun").unlink()
    monkeypatch.setenv("PATH", str(cluster.folder))
    (finding,) = examine(profile())
    assert (finding.level, finding.text) == ("error", "srun: not found; submit from a login node")
    with pytest.raises(UserError, match="srun: not found; submit from a login node"):
        preflight(profile(), sweep_of(3))


def test_without_accounting_there_is_no_limit(cluster: FakeCluster) -> None:
    assert limits(profile()) == doctor.Limits(500, None)
    assert "no limit on jobs" in list(examine(profile()))[-1].text


def test_accounting_that_does_not_answer_is_told(cluster: FakeCluster) -> None:
    cluster.file("sacctmgr", "#!/bin/bash\necho 'Unable to contact slurm dbd' >&2; exit 1\n")
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    warnings = [finding.text for finding in examine(profile()) if finding.level == "warning"]
    assert warnings == [
        "preemption: that of the QOS is not known: sacctmgr -nP: Unable to contact slurm dbd",
        "limits of the account and QOS are not known: sacctmgr -nP: Unable to contact slurm dbd",
    ]
    assert preflight(profile(), sweep_of(3))[0].max_submit is None


def test_points_share_tasks_until_all_tasks_fit_beside_what_is_queued(cluster: FakeCluster) -> None:
    """2 seeds x (1 + 10 + 10) points; 80 - 67 = 13 jobs are free: 1 + 2 x 2 x 3 tasks of 4."""
    cluster.accounting(ASSOC, QOS)
    records = sweep_of(10, seeds=2)
    cluster.file("queue", "x\n" * 38)
    assert preflight(profile(), records)[1:] == (1, [])
    cluster.file("queue", "x\n" * 67)
    told = "4 runs per array task: this user may submit 13 more jobs (MaxSubmitJobsPerUser "
    told += "of the QOS normal)"
    assert preflight(profile(), records)[1:] == (4, [told])
    cluster.file("queue", "x\n" * 76)
    with pytest.raises(
        UserError, match=r"may submit 80 jobs \(.* normal\) and has 76 in the queue; .* needs 5"
    ):
        preflight(profile(), records)


def test_a_limit_of_none_at_all(cluster: FakeCluster) -> None:
    cluster.accounting(ASSOC, "normal|0|00:00:00|cluster|\n")
    with pytest.raises(UserError, match="this user may submit 0 jobs"):
        preflight(profile(), sweep_of(3))


def preemption(cluster: FakeCluster, **values: object) -> list[tuple[str, str]]:
    found = [(finding.level, finding.text) for finding in examine(profile(**values))]
    return [(level, text) for level, text in found if text.lower().startswith("preempt")]


def test_seconds_to_save_are_those_of_the_partition(cluster: FakeCluster) -> None:
    text = "preemption (REQUEUE): SIGTERM, then 40 s to finish a step and save (GraceTime)"
    assert preemption(cluster) == [("ok", text)]
    cluster.partition(PreemptMode="REQUEUE", GraceTime="0")
    assert "30 s to finish a step and save (KillWait; GraceTime is 0)" in preemption(cluster)[0][1]
    cluster.partition(PreemptMode="OFF")
    assert preemption(cluster) == [("ok", "preemption in this partition: none")]
    cluster.partition(PreemptMode="GANG,SUSPEND", GraceTime="0")
    text = "preemption (GANG,SUSPEND): runs are halted, stay in memory and continue"
    assert preemption(cluster) == [("ok", text)]


def test_several_partitions_are_examined_each(cluster: FakeCluster) -> None:
    lines = "PartitionName=low State=UP PreemptMode=REQUEUE GraceTime=40\n"
    lines += "PartitionName=gpu State=DOWN PreemptMode=OFF GraceTime=0\nPartitionName=x State=UP\n"
    cluster.file("partition", lines)
    assert preemption(cluster, partition="low,gpu") == [
        ("ok", "preemption in low (REQUEUE): SIGTERM, then 40 s to finish a step and save "
         "(GraceTime)"),
        ("ok", "preemption in gpu: none"),
    ]  # fmt: skip
    found = {(finding.level, finding.text) for finding in examine(profile(partition="low,gpu"))}
    assert ("warning", "partition: gpu is DOWN") in found
    (finding,) = examine(profile(partition="low,none"))
    assert (finding.level, finding.text) == ("error", "partition: there is no none")
    (finding,) = examine(profile())
    assert finding.text == "partition: there is no default one; name one in the profile"


def test_where_the_qos_is_preempted_its_own_facts_count(cluster: FakeCluster) -> None:
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    cluster.accounting(ASSOC, QOS)
    assert "(REQUEUE): SIGTERM, then 90 s" in preemption(cluster)[0][1]
    told, seconds = preemption(cluster, qos="tiny")
    assert told[0] == "warning"
    assert "PreemptMode=CANCEL" in told[1]
    assert "(CANCEL): SIGTERM, then 30 s" in seconds[1]


def test_a_folder_of_this_machine_only_is_warned_of(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "not" / "yet"
    assert f"result_dir: {tmp_path} is on no network file system" in (check_place(place) or "")
    monkeypatch.setattr(doctor, "network_filesystem", lambda path: "nfs4")
    assert check_place(place) is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{cluster.folder}:{os.environ['PATH']}")
    monkeypatch.setattr("platform.node", lambda: "n1")
    assert check_place(place) is None, "all nodes are this machine"


def test_a_sweep_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    facts = {"exp_name": "x", "exp_mode": "pretrain", "arch": "resnet18", "dataset": "CIFAR10"}
    config = build_config(facts | {"result_dir": tmp_path / "out"})
    assert check_disk([config], {"resnet18": 1000}, 1).startswith("disk: about 0.0 of ")
    with pytest.raises(UserError, match=r"result_dir: .* GB free, the sweep writes about"):
        check_disk([config], {"resnet18": 10**14}, 1)


@pytest.mark.parametrize("words", [["{}"], ["--profile", "{}"], ["--profile={}"]])
def test_the_profile_is_given_in_every_spelling(
    words: list[str], cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yml"
    path.write_text("executor: slurm\n")
    assert main(["doctor", *(word.format(path) for word in words)]) == 0
    assert "arrays of 500 tasks" in capsys.readouterr().out
