"""SLURM's reasons, by its names, and what a user is advised to do."""

import pytest

from bip.slurm import problem
from launch.slurm.client import Queued
from launch.slurm.events import will_not_change
from launch.slurm.reasons import advice, advices, how_it_ended


@pytest.mark.parametrize(
    ("reasons", "named"),
    [
        ("JobHeldUser JobHeldAdmin launch_failed_requeued_held SPECIAL_EXIT REQUEUE_HOLD",
         "scontrol release 7_1"),
        ("PartitionTimeLimit", "MaxTime"),
        ("PartitionNodeLimit", "nodes"),
        ("PartitionDown PartitionInactive", "partition starts nothing"),
        ("AccountNotAllowed InvalidAccount Job's_account_not_permitted_to_use_this_partition",
         "another account"),
        ("QOSNotAllowed InvalidQOS", "another qos"),
        ("BadConstraints", "constraint"),
        ("ReqNodeNotAvail,_UnavailableNodes:n[1-2]", "sinfo -R"),
        ("ReqNodeNotAvail,_Reserved_for_maintenance", "with less time"),
        ("Reservation ReservationDeleted", "reservation"),
        ("DependencyNeverSatisfied", "resume"),
        ("QOSMaxWallDurationPerJobLimit AssocMaxWallDurationPerJobLimit QOSMaxCpuPerJobLimit "
         "QOSMaxGRESPerJob QOSMinCpuNotSatisfied QOSMinGRES AssocMaxNodePerJobLimit",
         "one task asks"),
        ("AssocMaxJobsLimit QOSMaxJobsPerUserLimit QOSGrpCpuLimit AssocGrpGRES QOSMaxGRESPerUser "
         "AssocGrpNodeLimit QOSMaxCpuPerUserLimit QOSGrpJobsLimit", "when others end"),
        ("AssocGrpCPUMinutesLimit QOSGrpBillingMinutes QOSUsageThreshold QOSGrpGRESMinutes "
         "AssocGrpCPURunMinutesLimit", "budget"),
        ("Licenses", "scontrol show licenses"),
    ],
)  # fmt: skip
def test_reasons_that_do_not_pass(reasons: str, named: str) -> None:
    for reason in reasons.split():
        assert named in advice(reason, "7_1"), reason


def test_reasons_that_pass() -> None:
    for reason in ("Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "None",
                   "Cleaning", "NodeDown", "SchedDefer"):  # fmt: skip
        assert advice(reason, "7_1") == "", reason


def test_held_tasks_are_named_together_and_many_by_their_array() -> None:
    held = [Queued(f"7_{at}", "PENDING", "JobHeldUser", 0) for at in range(3)]
    others = [Queued("8_0", "RUNNING", "None", 5), Queued("8_1", "PENDING", "Priority", 0)]
    found = advices([*held, *others])
    assert {*found} == {"7_0", "7_1", "7_2"}
    assert "scontrol release 7_0,7_1,7_2 " in found["7_1"]
    many = [Queued(f"7_{at}", "PENDING", "JobHeldUser", 0) for at in range(30)]
    assert "scontrol release 7 " in advices(many)["7_9"]
    (text,) = advices([Queued("9_0", "REQUEUE_HOLD", "None", 0)]).values()
    assert "scontrol release 9_0" in text


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"state": "FAILED", "exitcode": "0:53", "nodelist": "n1"}, "exit code 0:53 on n1: SLURM "
         "could not start its batch script; mostly the node cannot write to jobs/slurm"),
        ({"state": "PENDING", "reason": "JobLaunchFailure"}, "could not start"),
        ({"state": "OUT_OF_MEMORY", "exitcode": "0:125"}, "give more mem"),
        ({"state": "TIMEOUT", "exitcode": "0:0"}, "signal_lead"),
        ({"state": "FAILED", "exitcode": "3:0", "nodelist": "None assigned"},
         "SLURM: FAILED, exit code 3:0"),
        ({"state": "COMPLETED", "exitcode": "0:0"}, "SLURM: COMPLETED"),
        ({}, ""),
    ],
)  # fmt: skip
def test_how_a_task_ended(record: dict[str, str], named: str) -> None:
    found = how_it_ended(record)
    assert found.endswith(named) or named in found
    assert bool(found) == bool(named)


@pytest.mark.parametrize(
    ("printed", "named"),
    [
        ("scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
         "scontrol: fatal: Could not establish a configuration source", "set SLURM_CONF"),
        ("slurm_load_jobs error: Unable to contact slurm controller (x)", "try again"),
        ("sinfo: error: If munged is up, restart with --num-threads=10", "munge does not work"),
        ("sbatch: hello from the site\nsbatch: error: Batch job submission failed: Invalid qos",
         "sbatch: error: Batch job submission failed: Invalid qos"),
        ("", "no message"),
    ],
)  # fmt: skip
def test_an_error_of_a_command_is_one_line_with_advice(printed: str, named: str) -> None:
    found = problem(printed)
    assert named in found
    assert "\n" not in found
    assert will_not_change(found) == ("Invalid" in printed), "advice changes no decision"
