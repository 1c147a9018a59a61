"""Whether a profile's task can ever start: its needs against partitions, nodes, QOS and account.

SLURM accepts what a partition or a QOS will never let start (EnforcePartLimits=NO is its default,
for `sbatch --test-only` too). Pure: takes the records of `scontrol` and `sacctmgr`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launch.profile import SlurmProfile
from launch.slurm.client import seconds_of

Record = Mapping[str, str]
UNAVAILABLE = re.compile(r"DOWN|DRAIN|FAIL|FUTURE|INVAL|UNKNOWN|NO_RESPOND|\*|PLANNED_DOWN")
_POWERED = re.compile(r"\+?POWER(ED|ING)_DOWN|\+?POWER(ED|ING)_UP")  # a cloud node: SLURM starts it
# Fields of accounting: the limit, and the reason to name it by
_COUNTS = ("maxjobsperuser", "maxjobs", "grpjobs", "maxsubmitjobsperuser")


@dataclass(frozen=True)
class Task:
    """What one array task asks for, and for whom. None: not known."""

    minutes: int
    nodes: int
    cpus: int  # of a node, as the others
    gpus: int
    memory: float | None  # MB
    constraint: str
    account: str | None
    qos: tuple[str, ...] = ()  # one; or those that may be the default
    groups: frozenset[str] | None = None  # of the user; None: all partitions admit the user
    host: str = ""  # short name of the submitting machine
    reservation: str = ""
    is_root: bool = False
    flags: frozenset[str] = field(default_factory=frozenset)  # of the QOS

    @classmethod
    def of(cls, profile: SlurmProfile, **user: object) -> "Task":
        """`user`: the fields that the profile does not have."""
        cpus = profile.ntasks_per_node * profile.cpus_per_task
        memory = megabytes(profile.mem or "") or None
        if per_cpu := profile.sbatch.get("mem_per_cpu"):
            memory = cpus * megabytes(str(per_cpu))
        known = {
            "minutes": profile.time,
            "nodes": profile.nodes,
            "cpus": cpus,
            "gpus": profile.gpus_per_node,
            "memory": memory,
            "constraint": profile.constraint or "",
            "account": profile.account,
            "reservation": str(profile.sbatch.get("reservation", "")),
        }
        return cls(**(known | user))  # type: ignore[arg-type]


def megabytes(text: str) -> float:
    """SLURM's sizes: 64G, 512M, 1500 (MB); 0 for what is none."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)(?:i?B)?[cn]?", text.strip(), re.IGNORECASE)
    if match is None:
        return 0.0
    return float(match[1]) * 1024.0 ** ("KMGTP".index(match[2].upper() or "M") - 1)


def _names(record: Record, field: str) -> list[str] | None:
    """A list of names; None if all are meant."""
    text = record.get(field, "")
    return None if text in ("", "ALL", "(null)", "N/A") else text.split(",")


def _limit(record: Record, field: str) -> float | None:
    text = record.get(field, "")
    return float(text) if re.fullmatch(r"\d+", text) else None


def _duration(minutes: float) -> str:
    hours, rest = divmod(round(minutes), 60)
    return f"{hours}:{rest:02}:00"


def partition_refusals(task: Task, partition: Record) -> Iterator[str]:
    """Why jobs as this one never start in a partition: its limits, each with the key to change."""
    name = partition.get("PartitionName", "?")

    def refusal(limit: str, ours: str, remedy: str) -> str:
        return f"partition {name}: {limit}={partition[limit]}, but {ours}; {remedy}"

    longest = partition.get("MaxTime", "UNLIMITED")
    if re.match(r"\d", longest) and "PartitionTimeLimit" not in task.flags:
        minutes = seconds_of(longest) / 60
        if task.minutes > minutes:
            ours = f"the profile's time is {_duration(task.minutes)}"
            yield refusal("MaxTime", ours, f'give time: "{_duration(minutes)}" or less')
    most, least = _limit(partition, "MaxNodes"), _limit(partition, "MinNodes")
    if most is not None and task.nodes > most and "PartitionMaxNodes" not in task.flags:
        yield refusal("MaxNodes", f"nodes is {task.nodes}", "give fewer, or another partition")
    if least is not None and task.nodes < least and "PartitionMinNodes" not in task.flags:
        yield refusal("MinNodes", f"nodes is {task.nodes}", "give more, or another partition")
    most = _limit(partition, "MaxCPUsPerNode")
    if most is not None and task.cpus > most:
        ours = f"ntasks_per_node x cpus_per_task is {task.cpus}"
        yield refusal("MaxCPUsPerNode", ours, "give fewer cpus_per_task")
    most = _limit(partition, "MaxMemPerNode")
    if most is not None and (task.memory or 0) > most:
        yield refusal("MaxMemPerNode", f"mem is {task.memory:.0f} MB", f"give mem: {most:.0f}M")
    yield from _admission(task, partition, refusal)


def _admission(
    task: Task, partition: Record, refusal: Callable[[str, str, str], str]
) -> Iterator[str]:
    """Whom a partition lets in."""
    allowed, denied = _names(partition, "AllowAccounts"), _names(partition, "DenyAccounts")
    account = f"the account is {task.account}" if task.account else "no account is given"
    if allowed is not None and task.account not in allowed:
        yield refusal("AllowAccounts", account, f"give account: {allowed[0]}, or another partition")
    elif denied is not None and task.account in denied:
        yield refusal("DenyAccounts", account, "give another account, or another partition")
    allowed, denied = _names(partition, "AllowQos"), _names(partition, "DenyQos")
    names = [name for name in task.qos if name]
    qos = f"the QOS is {' or '.join(names)}" if names else "no QOS is given"
    if allowed is not None and not {*names} & {*allowed}:
        yield refusal("AllowQos", qos, f"give qos: {allowed[0]}, or another partition")
    elif denied is not None and names and {*names} <= {*denied}:
        yield refusal("DenyQos", qos, "give another qos, or another partition")
    allowed = _names(partition, "AllowGroups")
    if allowed is not None and task.groups is not None and not task.groups & {*allowed}:
        ours = f"the user is in {', '.join(sorted(task.groups)[:4])}"
        yield refusal("AllowGroups", ours, "ask the site's support, or give another partition")
    allowed = _names(partition, "AllocNodes")
    is_plain = allowed is not None and "[" not in partition["AllocNodes"]
    if allowed is not None and is_plain and task.host and task.host not in allowed:
        yield refusal("AllocNodes", f"this machine is {task.host}", f"submit on {allowed[0]}")
    if partition.get("RootOnly") == "YES" and not task.is_root:
        yield refusal("RootOnly", "the user is not root", "give another partition")
    if partition.get("ReqResv") == "YES" and not task.reservation:
        yield refusal("ReqResv", "no reservation is given", "give sbatch: {reservation: NAME}")


def gpus_of(node: Record) -> int:
    counts = re.findall(r"gpu(?::[^:,(]+)?:(\d+)", re.sub(r"\([^)]*\)", "", node.get("Gres", "")))
    return sum(map(int, counts))


def has_features(node: Record, constraint: str) -> bool:
    """Whether a node has the features of --constraint: a, a&b, a|b. True for what is not simple."""
    if re.search(r"[\[\](*)]", constraint):
        return True
    own = {*node.get("AvailableFeatures", "").split(",")}
    some = (part.replace(",", "&").split("&") for part in constraint.split("|"))
    return any({*map(str.strip, names)} <= own for names in some)


def node_refusals(task: Task, name: str, nodes: Sequence[Record]) -> tuple[list[str], str]:
    """(why a partition's nodes never fit the task, a warning of nodes that are down now).

    `nodes`: the records of all nodes of partition `name`.
    """
    needs: list[tuple[str, Callable[[Record], bool]]] = [
        (
            f"{task.cpus} CPUs (ntasks_per_node x cpus_per_task)",
            lambda n: int(n.get("CPUTot", 10**9)) >= task.cpus,
        ),
        (f"{task.gpus} GPUs (gpus_per_node)", lambda n: gpus_of(n) >= task.gpus),
        (
            f"{task.memory or 0:.0f} MB (mem)",
            lambda n: float(n.get("RealMemory", "inf")) >= (task.memory or 0),
        ),
        (
            f"the features {task.constraint} (constraint)",
            lambda n: not task.constraint or has_features(n, task.constraint),
        ),
    ]
    found = [
        f"partition {name}: of its {len(nodes)} nodes {count} have {what}, the profile needs "
        f"{task.nodes}"
        for what, fits in needs
        if (count := sum(map(fits, nodes))) < task.nodes
    ]
    fitting = [node for node in nodes if all(fits(node) for _, fits in needs)]
    if not found and len(fitting) < task.nodes:
        every = ", ".join(what for what, _ in needs[: 3 + bool(task.constraint)])
        found.append(
            f"partition {name}: {len(fitting)} of its nodes have all of {every}, the profile needs "
            f"{task.nodes}"
        )
    down = [n for n in fitting if UNAVAILABLE.search(_POWERED.sub("", n.get("State", "")))]
    up = len(fitting) - len(down)
    if found or up >= task.nodes:
        return found, ""
    some = ", ".join(f"{n.get('NodeName')} {n.get('State')}" for n in down[:4])
    return [], (
        f"partition {name}: of {len(fitting)} nodes that fit {up} are up ({some}), the profile "
        f"needs {task.nodes}; tasks wait until more are"
    )


def _tres(text: str) -> dict[str, float]:
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    return {
        n: megabytes(v) if n == "mem" else float(v)
        for n, _, v in pairs
        if v.isdecimal() or (n == "mem" and v[:1].isdigit())
    }


def accounting_refusals(task: Task, records: Sequence[tuple[str, Record]]) -> Iterator[str]:
    """Why limits of QOS and associations never let such a job start.

    `records`: (text that names it, accounting's record), the first that sets a limit rules it:
    the partition's QOS, the job's QOS, the user's association.
    """
    each = {"cpu": task.cpus, "mem": task.memory or 0, "gres/gpu": task.gpus, "node": 1}
    whole = {name: task.nodes * count for name, count in each.items()}
    unit = {"mem": " MB"}
    ruled: set[tuple[str, str]] = set()
    for where, record in records:
        if (text := record.get("maxwall", "")) and ("maxwall", "") not in ruled:
            ruled.add(("maxwall", ""))
            if task.minutes > (minutes := seconds_of(text) / 60):
                yield (
                    f"{where}: MaxWall={text}, but the profile's time is "
                    f'{_duration(task.minutes)}; give time: "{_duration(minutes)}" or less'
                )
        for name, label, ours, few in (
            ("maxtres", "MaxTRES", whole, False),
            ("maxtresperuser", "MaxTRESPerUser", whole, False),
            ("maxtrespernode", "MaxTRESPerNode", each, False),
            ("grptres", "GrpTRES", whole, False),
            ("mintresperjob", "MinTRES", whole, True),
        ):
            for kind, bound in _tres(record.get(name, "")).items():
                if kind not in ours or (name, kind) in ruled:
                    continue
                ruled.add((name, kind))
                count = ours[kind]
                if count < bound if few else count > bound:
                    yield (
                        f"{where}: {label} {kind}={bound:g}{unit.get(kind, '')}, but a task needs "
                        f"{count:g}; ask for {'more' if few else 'less'}, or give another qos or "
                        "account"
                    )
        for name in _COUNTS:
            if record.get(name) == "0" and (name, "") not in ruled:
                yield f"{where}: {name} is 0, so no job starts; give another qos or account"
            if record.get(name):
                ruled.add((name, ""))
