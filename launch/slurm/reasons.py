"""What SLURM's reasons mean to a user: of tasks that wait, and of tasks that have ended. Pure."""

import re
from collections.abc import Iterable, Mapping

from launch.slurm.client import Queued

# (SLURM's reason, what to do). Reasons that pass by themselves (Priority, Resources, Dependency,
# JobArrayTaskLimit, BeginTime) are not here. The first that fits counts.
_CHANGE = "change the profile, then cancel and resume"
_WAITING: list[tuple[str, str]] = [
    (r"[Hh]eld|HOLD|SPECIAL", "held; scontrol release {tasks} lets it start"),
    (r"PartitionTimeLimit", f"its time is over the partition's MaxTime; {_CHANGE} with less time"),
    (r"PartitionNodeLimit|PartitionConfig", "the partition's limits (nodes, time, accounts) do not "
     f"allow it; doctor names them; {_CHANGE}"),
    (r"PartitionDown|PartitionInactive", "the partition starts nothing now; wait for the site, or "
     f"{_CHANGE} with another partition"),
    (r"Account.?NotAllowed|account not permitted|InvalidAccount", "the account may not use this "
     f"partition; {_CHANGE} with another account or partition"),
    (r"(?i)group not permitted|GroupNotAllowed", "the user's groups may not use this partition; "
     f"{_CHANGE} with another partition"),
    (r"QOS.?NotAllowed|QOS not permitted|InvalidQOS", "the QOS may not be used here; "
     f"{_CHANGE} with another qos or partition"),
    (r"BadConstraints|NodeConfig|NotAvailable$", "no node has what it asks for; "
     f"{_CHANGE} with another constraint, gpus_per_node, mem or cpus_per_task"),
    (r"[Mm]aintenance", "its nodes are reserved for maintenance before its limit would end; it "
     f"starts after that, or {_CHANGE} with less time"),
    (r"ReqNodeNotAvail|DOWN, DRAINED", "nodes that it needs are down, drained or "
     "reserved; it starts when they are back; sinfo -R shows why"),
    (r"ReservationDeleted|Reservation$", "its reservation has not started, or is gone; "
     f"{_CHANGE} with another reservation"),
    (r"DependencyNeverSatisfied", "what it waits for has failed; resume submits both again"),
    (r"(QOS|Assoc).*(Minutes|RunMin|UsageThreshold|Billing)", "the budget of the account or QOS is "
     f"spent; wait for a new one, or {_CHANGE} with another account or qos"),
    (r"(QOS|Assoc)\w*(PerJob|PerNode|MinCpu|MinGRES|MinMem|MinNode|MinBB|Wall|Min\w*NotSatisfied)",
     f"one task asks for more, or for less, than a limit of its QOS or account allows; {_CHANGE} "
     "with other resources, qos or account"),
    (r"(QOS|Assoc)\w*(Max|Grp|Limit)", "a limit of the QOS or account counts all your jobs (Grp: "
     "the group's): it starts when others end; if none run, give another qos or account"),
    (r"Licenses", "licences are in use; scontrol show licenses"),
    (r"BurstBuffer", "its burst buffer failed; scontrol show burst"),
    (r"DeadLine", "its deadline has passed; cancel and resume"),
    (r"JobLaunchFailure|Prolog", "SLURM could not start it; see slurmd's log, or ask the site"),
]  # fmt: skip

_ENDED: list[tuple[str, str]] = [
    (r"0:53|JobLaunchFailure|launch failed", "SLURM could not start its batch script; mostly the "
     "node cannot write to jobs/slurm (full, read-only, or not shared)"),
    (r"OUT_OF_MEMORY|OutOfMemory", "its memory limit was hit; give more mem in the profile"),
    (r"NODE_FAIL", "its node failed"),
    (r"BOOT_FAIL", "its node did not boot"),
    (r"TIMEOUT", "its time limit came before it had saved; give a larger signal_lead"),
    (r"DEADLINE", "its deadline came"),
    (r"PREEMPTED", "preempted, and not requeued"),
    (r"CANCELLED", "cancelled"),
]  # fmt: skip
_SHOWN = 6  # more tasks are named by their array


def advice(reason: str, tasks: str) -> str:
    """What to do for tasks that wait for this reason; "" if it passes by itself."""
    # squeue has _ for the spaces of a sentence.
    found = (text for sign, text in _WAITING if re.search(sign, reason.replace("_", " ")))
    return next(found, "").format(tasks=tasks)


def advices(queue: Iterable[Queued]) -> dict[str, str]:
    """Task -> what to do, for those in the queue that need somebody to do something."""
    alike: dict[tuple[str, str], list[str]] = {}
    for one in queue:
        if one.state not in ("RUNNING", "COMPLETING"):
            reason = one.state if one.state.endswith(("_HOLD", "_EXIT")) else one.reason
            alike.setdefault((one.task.split("_")[0], reason), []).append(one.task)
    found: dict[str, str] = {}
    for (job, reason), tasks in alike.items():
        names = ",".join(tasks) if len(tasks) <= _SHOWN else job
        if text := advice(reason, names):
            found |= dict.fromkeys(tasks, f"{reason}: {text}")
    return found


def how_it_ended(record: Mapping[str, str]) -> str:
    """How SLURM says that a task ended, from its fields state, exitcode, reason and nodelist."""
    facts = [record.get("state", ""), record.get("exitcode", ""), record.get("reason", "")]
    known = " ".join(facts)
    why = next((text for sign, text in _ENDED if re.search(sign, known)), "")
    nodes = record.get("nodelist", "")
    where = f" on {nodes}" if nodes and nodes[0] not in "N(" else ""
    code = f", exit code {facts[1]}" if facts[1] not in ("", "0:0") else ""
    return f"SLURM: {facts[0]}{code}{where}{': ' * bool(why)}{why}" if facts[0] else ""
