"""Find out what a SLURM cluster will do to a sweep, before it is submitted."""

import contextlib
import grp
import os
import platform
import pwd
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bip.config import RunConfig
from bip.data.stores.staging import network_filesystem
from bip.errors import UserError
from bip.files import existing
from bip.slurm import KILL_WAIT
from launch.profile import Finding, SlurmProfile
from launch.slurm import client as slurm
from launch.slurm import fit
from launch.slurm.chain import plan_arrays
from launch.sweep import Run

_PROBE = """
import os, shutil, socket, sys
mark = sys.argv[1]
print("host", socket.gethostname())
print("scontrol", shutil.which("scontrol") or "none")
if not os.path.exists(mark):
    print("folder missing")
else:
    try:
        own = f"{mark}-{socket.gethostname()}-{os.getpid()}"
        open(own, "x").close()
        os.remove(own)
    except OSError as error:
        print("folder", error.strerror)
try:
    import torch
    print("gpus", torch.cuda.device_count())
except ImportError as error:
    print("torch", error)
"""


_SUBMIT_LIMITS = {
    "maxsubmitjobs": "MaxSubmitJobs",
    "maxsubmitjobsperuser": "MaxSubmitJobsPerUser",
    "grpsubmitjobs": "GrpSubmitJobs",
}

_ASSOCIATION = "partition,defaultqos,maxsubmitjobs,grpsubmitjobs,maxjobs,grpjobs,maxwall,maxtres,"
_ASSOCIATION += "grptres"
_QOS = "name,maxsubmitjobsperuser,gracetime,preemptmode,grpsubmitjobs,preempt,preemptexempttime,"
_QOS += "flags,maxjobsperuser,grpjobs,maxwall,maxtres,maxtrespernode,maxtresperuser,grptres,"
_QOS += "mintresperjob"


@dataclass(frozen=True)
class Limits:
    """How many tasks may be submitted at once, and the QOS."""

    max_array_size: int
    max_submit: int | None  # jobs; each task of an array counts
    in_queue: int = 0  # of this user, now
    unknown: str = ""  # why accounting could not be read
    source: str = ""  # name of the SLURM limit in max_submit
    qos: tuple[dict[str, str], ...] = ()  # accounting's records of the jobs' QOS
    partition_qos: tuple[dict[str, str], ...] = ()  # those of the partitions' own QOS
    associations: tuple[dict[str, str], ...] = ()
    account: str | None = None  # of the jobs
    preempted: frozenset[str] = frozenset()  # QOS that another QOS may preempt


def limits(profile: SlurmProfile) -> Limits:
    """The limits of this profile's jobs: those of the user in the account, and of the QOS.

    Raises SlurmError if the controller does not answer, or a command or the partition is missing.
    """
    for command in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        if shutil.which(command) is None:
            raise slurm.SlurmError(f"{command}: not found; submit from a login node")
    partitions = slurm.partitions(profile.partition)
    size = slurm.number(slurm.settings().get("MaxArraySize", ""), 1001) or 1
    user, account = _user(), profile.account
    try:
        if account is None:
            default = slurm.accounting("user", "defaultaccount", f"name={user}")
            account = default[0]["defaultaccount"] if default else None
        found = _associations(user, account, profile)
        known = {record["name"]: record for record in slurm.accounting("qos", _QOS)}
    except slurm.AccountingError as error:
        return Limits(size, None, unknown=str(error), account=account)
    names = [profile.qos or ""]
    if profile.qos is None:  # as slurmctld does
        names = [record["defaultqos"] or "normal" for record in found]
    qos = [known[name] for name in dict.fromkeys(names) if name in known]
    own = [known[name] for p in partitions if (name := p.get("QoS", "")) in known]
    facts: dict[str, Any] = {
        "qos": tuple(qos),
        "partition_qos": tuple(own),
        "associations": tuple(found),
        "account": account,
        "preempted": frozenset(n for q in known.values() for n in q["preempt"].split(",") if n),
    }
    # A group's limit counts jobs of other users too; only a submission shows if it is reached.
    bounds = [
        (int(text), _source(name, record))
        for record in [*found, *qos, *own]
        for name in _SUBMIT_LIMITS
        if (text := record.get(name, "")).isdigit()
    ]
    if not bounds:
        return Limits(size, None, **facts)
    most, source = min(bounds, key=lambda bound: bound[0])
    return Limits(size, most, slurm.jobs_of_user(), source=source, **facts)


def _user() -> str:
    """The user's name; in a container the user's number may have none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())


def _source(limit: str, record: dict[str, str]) -> str:
    """Text that names a limit of an accounting record: a QOS or an association."""
    if "name" not in record:
        return f"{_SUBMIT_LIMITS[limit]} of the user's association"
    group = ", for all its users together" if limit == "grpsubmitjobs" else ""
    return f"{_SUBMIT_LIMITS[limit]} of the QOS {record['name']}{group}"


def _associations(user: str, account: str | None, profile: SlurmProfile) -> list[dict[str, str]]:
    """The user's associations in the account (None: any), without those for other partitions."""
    names = ("", *(profile.partition or "").split(","))
    where = [f"user={user}", *([f"account={account}"] if account else [])]
    found = slurm.accounting("assoc", _ASSOCIATION, *where)
    return [record for record in found if record["partition"] in names]


def examine(profile: SlurmProfile, found: Limits | None = None) -> Iterator[Finding]:
    """Findings from the controller about a profile; nothing is submitted. `found`: the `limits`."""
    try:
        found = found or limits(profile)
        settings = slurm.settings()
        partitions = slurm.partitions(profile.partition)
    except slurm.SlurmError as error:
        yield Finding("error", str(error))
        return
    yield Finding("ok", f"SLURM {settings.get('SLURM_VERSION', '?')} answers")
    yield from _refusals(profile, found, settings, partitions)
    yield _accepted(profile, partitions)
    for partition in partitions:
        where = f" in {partition['PartitionName']}" if len(partitions) > 1 else ""
        yield from _preemption(settings, partition, found, where)
    lead = f"{profile.signal_lead} s (up to 60 s more) before the limit of {profile.time} min"
    text = f"time limit: runs are signalled {lead}, save, and are requeued"
    yield Finding("ok", text, seconds=profile.signal_lead)
    if settings.get("JobRequeue") == "0":
        yield Finding("ok", "JobRequeue=0: tasks ask for --requeue themselves")
    if "none" in settings.get("AccountingStorageType", "none"):
        yield Finding("warning", "no accounting: sacct does not show ended tasks; the ledger does")
    if found.unknown:
        yield Finding("warning", f"limits of the account and QOS are not known: {found.unknown}")
    most = "unknown limits on jobs" if found.unknown else "no limit on jobs"
    if found.max_submit is not None:
        most = f"{found.max_submit} jobs ({found.source}); {found.in_queue} of yours are queued"
    yield Finding("ok", f"submission: arrays of {found.max_array_size} tasks, {most}")


def _refusals(
    profile: SlurmProfile, found: Limits, settings: dict[str, str],
    partitions: list[dict[str, str]],
) -> Iterator[Finding]:  # fmt: skip
    """Why the tasks never start, by the records of partitions, nodes and accounting: an error if no
    partition lets them start."""
    records = [("association of the user", record) for record in found.associations]
    records = [*((f"QOS {record['name']}", record) for record in found.qos), *records]
    records = [*((f"QOS {record['name']}", record) for record in found.partition_qos), *records]
    flags = frozenset(flag for q in found.qos for flag in q["flags"].split(","))
    is_root = os.getuid() == 0
    task = fit.Task.of(
        profile,
        account=found.account,
        qos=tuple(record["name"] for record in found.qos) or (profile.qos or "",),
        groups=None if is_root else _groups(),
        host=platform.node().split(".")[0],
        is_root=is_root,
        flags=flags,
    )
    if re.search("limits|safe|all", settings.get("AccountingStorageEnforce", ""), re.IGNORECASE):
        for text in fit.accounting_refusals(task, records):
            yield Finding("error", text)
    nodes = slurm.nodes()
    refusals: list[list[str]] = []
    for partition in partitions:
        name = partition["PartitionName"]
        if found.unknown:  # neither default is known
            defaults = {"AllowAccounts": profile.account, "AllowQos": profile.qos}
            unknown = {limit for limit, own in defaults.items() if own is None}
            partition = {k: v for k, v in partition.items() if k not in unknown}
        refused = [*fit.partition_refusals(task, partition)]
        if (state := partition.get("State")) != "UP":
            refused.append(f"partition: {name} is {state}")
        if own := [n for n in nodes if name in n.get("Partitions", "").split(",")]:
            never, warning = fit.node_refusals(task, name, own)
            refused += never
            if warning:
                yield Finding("warning", warning)
        refusals.append(refused)
    # A plugin of the site may choose the partition, and from SLURM 23 on an account may be allowed
    # by its parent.
    plugins = settings.get("JobSubmitPlugins", "(null)") not in ("", "(null)")
    is_new = slurm.number(settings.get("SLURM_VERSION", ""), 0) >= 23
    for text in (text for refused in refusals for text in refused):
        maybe = not all(refusals) or (plugins and profile.partition is None)
        maybe |= is_new and "AllowAccounts" in text
        yield Finding("warning" if maybe else "error", text)


def _groups() -> frozenset[str]:
    """The names of the user's groups."""
    names = []
    for number in {os.getgid(), *os.getgroups()}:
        with contextlib.suppress(KeyError):
            names.append(grp.getgrgid(number).gr_name)
    return frozenset(names)


_PARTITION_LIMITS = (
    "MaxTime", "MinNodes", "MaxNodes", "MaxCPUsPerNode", "MaxMemPerNode", "MaxMemPerCPU",
    "AllowAccounts", "DenyAccounts", "AllowQos", "DenyQos", "AllowGroups", "QoS",
)  # fmt: skip
_NO_LIMIT = ("", "UNLIMITED", "ALL", "0", "1", "N/A", "(null)")


def _accepted(profile: SlurmProfile, partitions: Sequence[dict[str, str]]) -> Finding:
    """Whether sbatch accepts the resources: account, QOS, features, memory, limits."""
    asked = {
        "partition": profile.partition, "account": profile.account, "qos": profile.qos,
        "constraint": profile.constraint, "mem": profile.mem, "nodes": profile.nodes,
        "time": profile.time, "ntasks-per-node": profile.ntasks_per_node,
        "cpus-per-task": profile.cpus_per_task, "gpus-per-node": profile.gpus_per_node or None,
        **{name.replace("_", "-"): value for name, value in profile.sbatch.items()},
    }  # fmt: skip
    words = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in asked.items()
        if value is not None and value is not False
    ]
    try:
        slurm.ask("sbatch", "--test-only", *words, "--wrap=true")
    except slurm.SlurmError as error:
        limits = "; ".join(
            f"limits of partition {partition['PartitionName']}: {', '.join(own)}"
            for partition in partitions
            if (own := [f"{name}={value}" for name in _PARTITION_LIMITS
                        if (value := partition.get(name, "")) not in _NO_LIMIT])
        )  # fmt: skip
        return Finding("error", "; ".join(filter(None, [f"these resources are refused: {error}",
                                                        limits])))  # fmt: skip
    return Finding("ok", f"{profile.nodes} nodes x {profile.ntasks_per_node} ranks: accepted")


def _preemption(
    settings: dict[str, str], partition: dict[str, str], found: Limits, where: str
) -> Iterator[Finding]:
    """What happens to a preempted task, and its time to save. `where` is part of the texts."""
    mode = partition.get("PreemptMode", settings.get("PreemptMode", "OFF")).upper()
    grace = slurm.number(partition.get("GraceTime", "0"), 0)
    if "qos" in settings.get("PreemptType", ""):
        if found.unknown:
            text = f"preemption{where}: that of the QOS is not known: {found.unknown}"
            yield Finding("warning", text)
            return
        if found.qos:
            grace = int(slurm.seconds_of(found.qos[0]["gracetime"]))
            own = found.qos[0]["preemptmode"].upper()
            mode = settings.get("PreemptMode", "OFF").upper() if own in ("", "CLUSTER") else own
            names = {record["name"] for record in found.qos}
            if not names & found.preempted and "WITHIN" not in mode:
                which = " or ".join(sorted(names))
                yield Finding("ok", f"preemption{where}: none, as no QOS may preempt {which}")
                return
    if "none" in settings.get("PreemptType", "preempt/none") or mode == "OFF":
        yield Finding("ok", f"preemption{where or ' in this partition'}: none")
        return
    if "SUSPEND" in mode or mode == "GANG":
        yield Finding(
            "ok", f"preemption{where} ({mode}): runs are halted, stay in memory and continue"
        )
        return
    options = settings.get("PreemptParameters", "") + settings.get("SlurmctldParameters", "")
    signal = "the user signal" if "send_user_signal" in options else "SIGTERM"
    kill_wait = slurm.number(settings.get("KillWait", ""), KILL_WAIT)
    seconds = grace or kill_wait
    kind = "GraceTime" if grace else "KillWait; GraceTime is 0"
    if mode == "CANCEL":
        who = f"a run that saves within its GraceTime ({grace} s) requeues its task itself"
        others = "others are" if grace else "GraceTime is 0, so every preempted task is"
        yield Finding(
            "warning",
            f"PreemptMode=CANCEL{where}: {f'{who}; ' * bool(grace)}{others} cancelled, and python "
            "-m launch resume FOLDER submits them again",
        )
    exempt = settings.get("PreemptExemptTime", "")
    if found.qos and (own_exempt := found.qos[0]["preemptexempttime"]):
        exempt = own_exempt
    safe = slurm.seconds_of(exempt) if exempt[:1].isdigit() else 0
    first = f"; never in the first {safe:.0f} s of an attempt (PreemptExemptTime)" if safe else ""
    level: Literal["ok", "warning"] = "ok" if seconds >= 30 else "warning"
    then = f"{signal}, then {seconds} s to finish a step and save ({kind}){first}"
    yield Finding(level, f"preemption{where} ({mode}): {then}", seconds=seconds)


def check_place(folder: Path) -> str | None:
    """A warning if other machines of the cluster may not see the folder."""
    folder = existing(folder)
    elsewhere = slurm.hosts() - {platform.node().split(".")[0]}
    if not elsewhere or network_filesystem(folder.resolve()) is not None:
        return None
    return (
        f"warning: result_dir: {folder} is on no network file system; if the nodes do not see it, "
        "every task fails (python -m launch doctor PROFILE --probe asks them)"
    )


def check_disk(configs: Sequence[RunConfig], parameters: dict[str, int], at_once: int) -> str:
    """A line on what the sweep will write. Raises UserError if the disk has less space.

    `parameters`: each network's number of parameters. `at_once`: runs of a stage at once. A
    finished run keeps two models of weights and scores; a running one keeps two checkpoints, which
    also hold the momentum of two optimizers.
    """
    sizes = [4 * parameters[config.arch] for config in configs]
    going = min(len(configs), at_once * len({config.exp_mode for config in configs}))
    need = sum(2 * 2 * size for size in sizes) + going * 2 * 4 * max(sizes)
    folder = existing(configs[0].result_dir)
    disk = os.statvfs(folder)
    if disk.f_files > 0 and disk.f_favail < (files := 20 * len(configs)):
        raise UserError(
            f"result_dir: {folder} has room for {disk.f_favail} more files (inodes), the sweep "
            f"writes about {files}; delete some, or give another --result-dir"
        )
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"result_dir: {folder} has {_size(free)} free, the sweep writes about {_size(need)}; "
            "free space, or give another --result-dir"
        )
    return f"disk: about {_size(need)} of {_size(free)} free"


def _size(count: float) -> str:
    """Bytes with the unit in which they are not 0.0."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next((f"{count / one:.1f} {unit}" for one, unit in units if count >= one), f"{count} B")


def on_nodes(profile: SlurmProfile, nodes: int) -> list[str]:
    """The words that start one process on each of so many compute nodes, as the tasks start."""
    words = [
        "srun",
        f"--time={min(5, profile.time)}",  # a partition may allow no more
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={profile.cpus_per_task}",
        "--immediate=60",
    ]
    names = ("partition", "account", "qos", "constraint")
    words += [f"--{n}={v}" for n in names if (v := getattr(profile, n))]
    if reservation := profile.sbatch.get("reservation"):
        words.append(f"--reservation={reservation}")
    if profile.gpus_per_node:
        words.append(f"--gpus-per-node={profile.gpus_per_node}")
    return [*words, *profile.srun_args]


def probe_nodes(profile: SlurmProfile, folder: Path) -> Iterator[Finding]:
    """Run the profile's python once on compute nodes and report what it finds. Waits in the queue
    like a task.

    The nodes look for a file that is made for them: a folder of that name may exist there too.
    """
    folder = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".bip-probe-") as mark:
            words = [*on_nodes(profile, profile.nodes), *shlex.split(profile.python)]
            lines = slurm.ask(*words, "-c", _PROBE, mark.name, timeout=180).splitlines()
    except slurm.SlurmError as error:
        busy = "; no node is free now: try again later" * ("busy" in str(error))
        yield Finding("error", f"a task on the compute nodes: {error}{busy}")
        return
    except OSError as error:
        yield Finding("error", f"result_dir: {folder}: {error.strerror}; give another folder")
        return
    facts = [line.partition(" ")[::2] for line in lines]
    hosts = ", ".join(value for name, value in facts if name == "host")
    yield Finding("ok", f"tasks start on {hosts}")
    for name, value in facts:
        if name == "folder":
            how = "is not seen" if value == "missing" else f"cannot be written ({value})"
            text = f"result_dir: {folder} {how} on a compute node; give a shared folder"
            yield Finding("error", text)
        if name == "scontrol" and value == "none" and profile.requeue_by == "scontrol":
            yield Finding("warning", "scontrol: not there in the tasks; give requeue_by: batch")
        if name == "torch":
            yield Finding("error", f"python: {profile.python} cannot run training: {value}")
        if name == "gpus" and int(value) < profile.gpus_per_node:
            text = f"gpus_per_node: a node shows {value} GPUs, not {profile.gpus_per_node}"
            yield Finding("error", text)


def preflight(
    profile: SlurmProfile, runs: Sequence[Run], leaving: int = 0
) -> tuple[Limits, int, list[str]]:
    """Before submission of `runs`: (limits, runs per task, lines for the user).

    `leaving`: tasks in the queue that will be cancelled first. If the user may not submit that many
    tasks, each gets several runs. Raises UserError for what would make every task fail, and if
    there are still too many tasks.
    """
    lines = []
    found = limits(profile)
    for finding in examine(profile, found):
        if finding.level == "error":
            raise UserError(finding.text)
        if finding.level == "warning":
            lines.append(f"warning: {finding.text}")
    per_task = profile.runs_per_task
    if found.max_submit is None or not runs:
        return found, per_task, lines
    free = found.max_submit - found.in_queue + leaving
    run_ids = {run.run_id for run in runs}
    elsewhere = {need for run in runs for need in run.needs} - run_ids

    def tasks(per_task: int) -> int:
        size = found.max_array_size
        arrays = plan_arrays(runs, run_ids, elsewhere, {}, 1, per_task, size)
        return sum(len(array.tasks) for array in arrays)

    if (least := tasks(len(runs))) > free:
        raise UserError(
            f"this user may submit {found.max_submit} jobs ({found.source}) and has "
            f"{found.in_queue} in the queue; "
            f"the sweep needs {least} at the least: wait, or give fewer stages or seeds at once"
        )
    if tasks(per_task) > free:
        per_task = max(per_task, -(-len(runs) // free))
        while tasks(per_task) > free:
            per_task += 1
        more = f"this user may submit {free} more jobs ({found.source})"
        lines.append(f"{per_task} runs per array task: {more}")
    return found, per_task, lines
