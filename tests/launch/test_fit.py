"""What partitions, nodes, QOS and accounts never let start: a line for each limit."""

from typing import Any

import pytest

from launch.profile import SlurmProfile
from launch.slurm.fit import (
    Task,
    accounting_refusals,
    gpus_of,
    has_features,
    megabytes,
    node_refusals,
    partition_refusals,
)

NODE = {
    "NodeName": "n1", "CPUTot": "16", "RealMemory": "64000", "Gres": "gpu:a100:2(S:0-1),shard:4",
    "AvailableFeatures": "a100,ib", "State": "IDLE",
}  # fmt: skip


def task(*, user: dict[str, Any] | None = None, **profile: Any) -> Task:
    """One hour on one node with 4 CPUs, 2 GPUs and 32 GB, of `ann` with the account `pruning`."""
    facts = {"executor": "slurm", "cpus_per_task": 2, "ntasks_per_node": 2, "gpus_per_node": 2,
             "mem": "32G"}  # fmt: skip
    known = {
        "account": "pruning",
        "qos": ("normal",),
        "groups": frozenset({"ann"}),
        "host": "login",
    }
    return Task.of(SlurmProfile.model_validate(facts | profile), **(known | (user or {})))


@pytest.mark.parametrize(
    ("limits", "asks", "named"),
    [
        ({"MaxTime": "00:02:00"}, {}, 'MaxTime=00:02:00, but the profile\'s time is 1:00:00; give '
         'time: "0:02:00"'),
        ({"MaxTime": "1-00:00:00"}, {"time": "1-00:01:00"}, "MaxTime"),
        ({"MaxTime": "1-00:00:00"}, {"time": "1-0"}, ""),
        ({"MaxTime": "UNLIMITED", "MaxNodes": "UNLIMITED", "MinNodes": "0"}, {}, ""),
        ({"MaxTime": "00:02:00"}, {"user": {"flags": frozenset({"PartitionTimeLimit"})}}, ""),
        ({"MaxNodes": "1"}, {"nodes": 2}, "MaxNodes=1, but nodes is 2"),
        ({"MinNodes": "2"}, {}, "MinNodes=2"),
        ({"MaxCPUsPerNode": "3"}, {}, "ntasks_per_node x cpus_per_task is 4"),
        ({"MaxMemPerNode": "32000"}, {}, "MaxMemPerNode=32000, but mem is 32768 MB"),
        ({"MaxMemPerNode": "32000"}, {"mem": None, "sbatch": {"mem-per-cpu": "16G"}}, "65536 MB"),
        ({"MaxMemPerNode": "32000"}, {"mem": 0}, ""),
        ({"AllowAccounts": "other,its"}, {}, "the account is pruning; give account: other"),
        ({"AllowAccounts": "other"}, {"user": {"account": None}}, "no account is given"),
        ({"AllowAccounts": "ALL", "AllowQos": "ALL", "AllowGroups": "ALL"}, {}, ""),
        ({"DenyAccounts": "pruning"}, {}, "DenyAccounts=pruning"),
        ({"AllowQos": "high"}, {}, "the QOS is normal; give qos: high"),
        ({"AllowQos": "high"}, {"user": {"qos": ("normal", "high")}}, ""),
        ({"DenyQos": "normal"}, {}, "DenyQos"),
        ({"AllowGroups": "staff"}, {}, "AllowGroups=staff, but the user is in ann"),
        ({"AllowGroups": "staff"}, {"user": {"groups": None}}, ""),
        ({"AllocNodes": "other"}, {}, "submit on other"),
        ({"AllocNodes": "login[1-9]"}, {}, ""),
        ({"RootOnly": "YES"}, {}, "RootOnly"),
        ({"ReqResv": "YES"}, {}, "sbatch: {reservation: NAME}"),
        ({"ReqResv": "YES"}, {"sbatch": {"reservation": "tuesday"}}, ""),
    ],
)  # fmt: skip
def test_a_partition(limits: dict[str, str], asks: dict[str, Any], named: str) -> None:
    """`named` is in the one refusal; "": there is none."""
    found = [*partition_refusals(task(**asks), {"PartitionName": "low"} | limits)]
    assert [named in text and text.startswith("partition low: ") for text in found] == (
        [True] if named else []
    )


@pytest.mark.parametrize(
    ("nodes", "asks", "never", "waits"),
    [
        ([{}], {}, "", ""),
        ([{}], {"nodes": 2, "gpus_per_node": 0}, "of its 1 nodes 1 have 4 CPUs", ""),
        ([{"CPUTot": "2"}], {}, "0 have 4 CPUs (ntasks_per_node x cpus_per_task)", ""),
        ([{"Gres": "(null)"}], {}, "0 have 2 GPUs (gpus_per_node)", ""),
        ([{"RealMemory": "8000"}], {}, "0 have 32768 MB (mem)", ""),
        ([{}], {"constraint": "h100"}, "the features h100 (constraint)", ""),
        ([{"Gres": ""}, {"CPUTot": "2"}], {}, "0 of its nodes have all of", ""),
        ([{"State": "DOWN*"}], {}, "", "of 1 nodes that fit 0 are up (n1 DOWN*)"),
        ([{"State": "IDLE+DRAIN"}, {}], {"nodes": 2}, "", "1 are up"),
        ([{"State": "IDLE+CLOUD+POWERED_DOWN"}], {}, "", ""),
        ([{"State": "MIXED"}, {"State": "DOWN"}], {}, "", ""),
    ],
)  # fmt: skip
def test_nodes(nodes: list[dict[str, str]], asks: dict[str, Any], never: str, waits: str) -> None:
    found, warning = node_refusals(task(**asks), "low", [NODE | node for node in nodes])
    assert bool(found) == bool(never)
    assert never in " ".join(found)
    assert bool(warning) == bool(waits)
    assert waits in warning


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([{"maxwall": "00:30:00"}], "MaxWall=00:30:00, but the profile's time is 1:00:00; give"),
        ([{"maxwall": "2-00:00:00"}, {"maxwall": "00:30:00"}], ""),  # the first rules
        ([{"maxtres": "cpu=2,node=4"}], "MaxTRES cpu=2, but a task needs 4"),
        ([{"maxtrespernode": "gres/gpu=1"}], "MaxTRESPerNode gres/gpu=1"),
        ([{"maxtresperuser": "mem=16G"}], "mem=16384 MB, but a task needs 32768"),
        ([{"grptres": "billing=2,gres/gpu=8"}], ""),
        ([{"mintresperjob": "gres/gpu=4"}], "ask for more"),
        ([{"maxjobs": "0"}], "maxjobs is 0"),
        ([{"maxjobsperuser": "5"}, {"maxjobs": "0"}], "maxjobs is 0"),
        ([{"maxjobs": "", "grpjobs": ""}], ""),
    ],
)
def test_accounting(records: list[dict[str, str]], named: str) -> None:
    found = [*accounting_refusals(task(), [("QOS x", record) for record in records])]
    assert [named in text and text.startswith("QOS x: ") for text in found] == (
        [True] if named else []
    )


def test_parts() -> None:
    assert [megabytes(t) for t in ("64G", "512M", "1500", "1T", "2048K", "", "x")] == (
        [65536, 512, 1500, 1048576, 2, 0, 0]
    )
    assert [
        gpus_of({"Gres": g}) for g in (NODE["Gres"], "gpu:4", "(null)", "gpu:v100:1,gpu:a:2")
    ] == ([2, 4, 0, 3])
    for constraint, fits in (("a100", True), ("a100&ib", True), ("a100&x", False), ("x|ib", True),
                             ("a100,ib", True), ("[x*2]", True), ("x", False)):  # fmt: skip
        assert has_features(NODE, constraint) == fits, constraint
