"""What the doctor and submission make of a cluster."""

import os
from pathlib import Path

import pytest

from bip.config import build_config
from bip.errors import UserError
from launch import checks
from launch.__main__ import main
from launch.profile import SlurmProfile
from launch.slurm import doctor
from launch.slurm.doctor import (
    Limits,
    check_disk,
    check_place,
    examine,
    limits,
    preflight,
    probe_nodes,
)
from tests.launch.conftest import runs_of
from tests.launch.fake_cluster import FakeCluster

ASSOC = "mine ||90|\nother |tiny|1|\nmine gpu|fast|7|\n"
QOS = "normal|80|00:01:30|cluster|\ntiny|2|00:00:00|cancel|\nfast|60|00:00:10|requeue|55\n"
QOS += "urgent|9|00:00:00|cluster||normal,tiny,fast|\n"


def profile(**values: object) -> SlurmProfile:
    return SlurmProfile(executor="slurm", **values)  # type: ignore[arg-type]


def findings(level: str = "", **values: object) -> list[str]:
    """Those of a level that starts so."""
    return [f.text for f in examine(profile(**values)) if f.level.startswith(level)]


def preemption(level: str, **values: object) -> str:
    """The one finding about it that has this level."""
    (text,) = (text for text in findings(level, **values) if text.startswith("preemption"))
    return text


@pytest.mark.parametrize(
    ("values", "most", "source"),
    [
        ({}, 80, "MaxSubmitJobsPerUser of the QOS normal"),
        ({"qos": "fast"}, 55, "GrpSubmitJobs of the QOS fast, for all its users together"),
        ({"qos": "tiny"}, 2, "MaxSubmitJobsPerUser of the QOS tiny"),
        ({"account": "other"}, 1, "MaxSubmitJobs of the user's association"),
        ({"partition": "gpu"}, 7, "MaxSubmitJobs of the user's association"),
    ],
)
def test_limits_are_those_of_the_account_and_qos_that_are_used(
    values: dict[str, str], most: int, source: str, cluster: FakeCluster
) -> None:
    cluster.accounting(ASSOC, QOS)
    found = limits(profile(**values))
    assert (found.max_array_size, found.max_submit, found.source) == (500, most, source)
    assert f"{most} jobs ({source}); 0 of yours are queued" in findings(**values)[-1]


@pytest.mark.parametrize("partition", [None, "low,gpu"])
def test_the_qos_of_a_partition_binds_too(partition: str | None, cluster: FakeCluster) -> None:
    cluster.accounting(ASSOC, QOS)
    cluster.partition(QoS="tiny")
    assert limits(profile(partition=partition)).max_submit == 2


def test_without_accounting_there_is_no_limit(cluster: FakeCluster) -> None:
    assert limits(profile()) == Limits(500, None)
    assert "no limit on jobs" in findings()[-1]


def test_accounting_that_does_not_answer_is_reported(cluster: FakeCluster) -> None:
    cluster.file("sacctmgr", "#!/bin/bash\necho 'Unable to contact slurm dbd' >&2; exit 1\n")
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    warnings = findings("warning")
    assert [text.split()[0] for text in warnings] == ["preemption:", "limits"]
    assert all("not known: sacctmgr -nP: Unable to contact" in text for text in warnings)
    assert preflight(profile(), runs_of(3))[0].max_submit is None


def test_a_missing_command_is_named(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster.folder / "srun").unlink()
    monkeypatch.setenv("PATH", str(cluster.folder))
    (text,) = findings("error")
    assert text.startswith("srun: not found")
    with pytest.raises(UserError, match="srun: not found"):
        preflight(profile(), runs_of(3))


def test_runs_share_tasks_until_all_tasks_fit_beside_what_is_queued(cluster: FakeCluster) -> None:
    """2 seeds x (1 + 10 + 10) runs; 80 - 67 = 13 jobs are free: 1 + 2 x 2 x 3 tasks of 4."""
    cluster.accounting(ASSOC, QOS)
    runs = runs_of(10, seeds=2)
    cluster.file("queue", "x\n" * 38)
    assert preflight(profile(), runs)[1:] == (1, [])
    cluster.file("queue", "x\n" * 67)
    _, per_task, (line,) = preflight(profile(), runs)
    assert per_task == 4
    assert all(text in line for text in ("4 runs per array task", "13 more", "QOS normal"))
    cluster.file("queue", "x\n" * 76)
    with pytest.raises(UserError, match=r"80 jobs \(.* normal\) and has 76 in the queue.*needs 5"):
        preflight(profile(), runs)
    cluster.accounting(ASSOC, "normal|0|00:00:00|cluster|\n")
    with pytest.raises(UserError, match="may submit 0 jobs"):
        preflight(profile(), runs_of(3))


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ["(REQUEUE): SIGTERM, then 40 s", "(GraceTime)"]),
        ({"GraceTime": "0"}, "ok", ["then 45 s", "(KillWait; GraceTime is 0)"]),
        ({"GraceTime": "10"}, "warning", ["then 10 s"]),
        ({"PreemptMode": "OFF"}, "ok", ["in this partition: none"]),
        ({"PreemptMode": "GANG,SUSPEND", "GraceTime": "0"}, "ok", ["(GANG,SUSPEND): runs are"]),
    ],
)
def test_seconds_to_save_are_those_of_the_partition(
    facts: dict[str, str], level: str, texts: list[str], cluster: FakeCluster
) -> None:
    cluster.partition(**{"PreemptMode": "REQUEUE", "GraceTime": "40"} | facts)
    assert all(text in preemption(level) for text in texts)


def test_where_the_qos_is_preempted_its_own_facts_count(cluster: FakeCluster) -> None:
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    cluster.accounting(ASSOC, QOS)
    assert "(REQUEUE): SIGTERM, then 90 s" in preemption("ok")
    assert "(CANCEL): SIGTERM, then 45 s" in preemption("ok", qos="tiny")
    assert any("PreemptMode=CANCEL" in text for text in findings("warning", qos="tiny"))
    cluster.accounting("other |tiny|1|\nmine |fast||\n", QOS)  # that of the default account
    assert "(REQUEUE): SIGTERM, then 10 s" in preemption("warning")
    assert preemption("ok", qos="urgent").endswith("none, as no QOS may preempt urgent")


@pytest.mark.parametrize(
    ("grace", "texts"),
    [("30", ["within its GraceTime (30 s) requeues", "others are cancelled"]),
     ("0", ["GraceTime is 0, so every preempted task is cancelled"])],
)  # fmt: skip
def test_which_runs_requeue_themselves_where_preemption_cancels(
    grace: str, texts: list[str], cluster: FakeCluster
) -> None:
    cluster.partition(PreemptMode="CANCEL", GraceTime=grace)
    (text,) = (text for text in findings("warning") if "CANCEL:" in text)
    assert all(part in text for part in [*texts, "launch resume FOLDER"])


def test_the_time_without_preemption_is_reported(cluster: FakeCluster) -> None:
    cluster.settings(PreemptType="preempt/partition_prio", PreemptExemptTime="00:10:00")
    cluster.partition(PreemptMode="REQUEUE", GraceTime="40")
    assert "never in the first 600 s" in preemption("ok")
    cluster.settings(PreemptType="preempt/qos", PreemptMode="REQUEUE")
    cluster.accounting(ASSOC, "normal|80|00:01:30|cluster||normal|00:02:00\n")
    assert "never in the first 120 s" in preemption("ok")


def test_what_a_partition_never_starts_is_refused_before_submission(cluster: FakeCluster) -> None:
    cluster.partition(MaxTime="00:02:00", QoS="N/A")
    with pytest.raises(UserError, match=r"partition low: MaxTime=00:02:00.*time: \"0:02:00\""):
        preflight(profile(), runs_of(3))
    cluster.partition(AllowAccounts="other")
    cluster.accounting(ASSOC, QOS)
    with pytest.raises(UserError, match="low: AllowAccounts=other, but the account is mine"):
        preflight(profile(), runs_of(3))
    assert not [text for text in findings("error", account="other") if "partition" in text]
    assert any("AllowAccounts" in text for text in findings("warning", partition="low,gpu"))
    assert not findings("error", partition="low,gpu"), "the other one may start it"


def test_what_the_accounting_never_starts_is_refused_where_it_is_enforced(
    cluster: FakeCluster,
) -> None:
    cluster.accounting("mine |||||0\n", "")
    assert not findings("error")
    cluster.settings(AccountingStorageEnforce="associations,limits")
    (text,) = findings("error")
    assert text.startswith("association of the user: grpjobs is 0") or "maxjobs is 0" in text


def test_a_refusal_by_sbatch_names_the_partitions_limits(cluster: FakeCluster) -> None:
    text = "#!/bin/bash\necho 'sbatch: lua: hello' >&2\necho 'allocation failure: no' >&2\n"
    cluster.file("sbatch", text + "echo 'sbatch: error: Requested partition' >&2; exit 1\n")
    cluster.partition(MaxTime="2-00:00:00", MaxNodes="4")
    (text,) = findings("error")
    assert "sbatch: error: Requested partition; limits of partition low: MaxTime=2-00:00" in text


def test_a_probe_looks_for_a_file_in_the_nearest_folder_that_exists(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    place = tmp_path / "not" / "yet"
    cluster.file("srun", '#!/bin/bash\nwhile [[ $1 != -c ]]; do shift; done; exec python3 "$@"\n')
    texts = {f.level: f.text for f in probe_nodes(profile(), place)}
    assert texts["ok"].startswith("tasks start on")
    assert "result_dir" not in str(texts), texts
    assert not list(tmp_path.glob(".bip-probe*")), "nothing is left"
    elsewhere = 'exec python3 -c "$2" /nowhere\n'
    cluster.file("srun", f"#!/bin/bash\nwhile [[ $1 != -c ]]; do shift; done; {elsewhere}")
    assert f"{tmp_path} is not seen on a compute node" in str([*probe_nodes(profile(), place)])


def test_several_partitions_are_examined_each(cluster: FakeCluster) -> None:
    lines = "PartitionName=low State=UP PreemptMode=REQUEUE GraceTime=40\n"
    lines += "PartitionName=gpu State=DOWN PreemptMode=OFF GraceTime=0\nPartitionName=x State=UP\n"
    cluster.file("partition", lines)
    found = findings("ok", partition="low,gpu")
    low, gpu = (text for text in found if text.startswith("preemption"))
    assert low.startswith("preemption in low (REQUEUE): SIGTERM, then 40 s")
    assert gpu == "preemption in gpu: none"
    assert "partition: gpu is DOWN" in findings("warning", partition="low,gpu")
    assert findings("error", partition="gpu") == ["partition: gpu is DOWN"]
    assert findings(partition="low,none") == ["partition: there is no none"]
    (text,) = findings()
    assert text.startswith("partition: there is no default one")


def test_a_folder_of_this_machine_only_is_warned_of(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "not" / "yet"
    assert f"result_dir: {tmp_path} is on no network file system" in (check_place(place) or "")
    with monkeypatch.context() as nfs:
        nfs.setattr(doctor, "network_filesystem", lambda path: "nfs4")
        assert check_place(place) is None
    monkeypatch.setattr("platform.node", lambda: "n1")
    assert check_place(place) is None, "all nodes are this machine"


def test_a_sweep_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    facts = {"exp_name": "x", "exp_mode": "pretrain", "arch": "resnet18", "dataset": "CIFAR10"}
    config = build_config(facts | {"result_dir": tmp_path / "out"})
    assert check_disk([config], {"resnet18": 1000}, 1).startswith("disk: about 48.0 kB of ")
    with pytest.raises(UserError, match=r"result_dir: .*--result-dir"):
        check_disk([config], {"resnet18": 10**14}, 1)


def test_a_disk_without_room_for_more_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    facts = [*real]
    facts[7] = 19  # f_favail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(facts))
    config = build_config({"exp_name": "x", "exp_mode": "pretrain", "arch": "resnet18",
                           "dataset": "CIFAR10", "result_dir": tmp_path})  # fmt: skip
    if real.f_files:
        with pytest.raises(UserError, match="19 more files"):
            check_disk([config], {"resnet18": 1000}, 1)


@pytest.mark.parametrize("words", [["{}"], ["--profile", "{}"], ["--profile={}"]])
def test_the_profile_is_given_in_every_spelling(
    words: list[str], cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "findings", lambda *_: iter([]))  # see test_checks.py
    path = tmp_path / "p.yml"
    path.write_text("executor: slurm\n")
    assert main(["doctor", *(word.format(path) for word in words)]) == 0
    out = capsys.readouterr().out
    assert "arrays of 500 tasks" in out
    assert out.splitlines()[-1].startswith("verdict  safe")
