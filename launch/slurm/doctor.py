"""Find out what a SLURM cluster will do to a sweep, before it is submitted."""

import os
import platform
import pwd
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bip.config import RunConfig
from bip.data.stores.staging import network_filesystem
from bip.errors import UserError
from bip.slurm import KILL_WAIT
from launch.profile import Finding, SlurmProfile
from launch.slurm import client as slurm
from launch.slurm.chain import plan_arrays
from launch.sweep import Run

_PROBE = """
import os, shutil, socket, sys
folder = sys.argv[1]
print("host", socket.gethostname())
print("scontrol", shutil.which("scontrol") or "none")
print("folder", "seen" if os.path.exists(folder) else "missing")
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


@dataclass(frozen=True)
class Limits:
    """How many tasks may be submitted at once, and the QOS."""

    max_array_size: int
    max_submit: int | None  # jobs; each task of an array counts
    in_queue: int = 0  # of this user, now
    unknown: str = ""  # why accounting could not be read
    source: str = ""  # name of the SLURM limit in max_submit
    qos: tuple[dict[str, str], ...] = ()  # accounting's records of the jobs' QOS


def limits(profile: SlurmProfile) -> Limits:
    """The limits of this profile's jobs: those of the user in the account, and of the QOS.

    Raises SlurmError if the controller does not answer, or a command or the partition is missing.
    """
    for command in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        if shutil.which(command) is None:
            raise slurm.SlurmError(f"{command}: not found; submit from a login node")
    partitions = slurm.partitions(profile.partition)
    size = slurm.number(slurm.settings().get("MaxArraySize", ""), 1001) or 1
    user = pwd.getpwuid(os.getuid()).pw_name
    account = profile.account
    try:
        if account is None:
            default = slurm.accounting("user", "defaultaccount", f"name={user}")
            account = default[0]["defaultaccount"] if default else None
        found = _associations(user, account, profile)
        qos = _qos_records(profile, found, partitions)
    except slurm.AccountingError as error:
        return Limits(size, None, unknown=str(error))
    # A group's limit counts jobs of other users too; only a submission shows if it is reached.
    bounds = [
        (int(text), _source(name, record))
        for record in [*found, *qos]
        for name in _SUBMIT_LIMITS
        if (text := record.get(name, "")).isdigit()
    ]
    if not bounds:
        return Limits(size, None, qos=tuple(qos))
    most, source = min(bounds, key=lambda bound: bound[0])
    return Limits(size, most, slurm.jobs_of_user(), source=source, qos=tuple(qos))


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
    fields = "partition,defaultqos,maxsubmitjobs,grpsubmitjobs"
    found = slurm.accounting("assoc", fields, *where)
    return [record for record in found if record["partition"] in names]


def _qos_records(
    profile: SlurmProfile, associations: list[dict[str, str]], partitions: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Accounting's records of the QOS of the profile's jobs, then of the partitions' QOS."""
    names = [profile.qos or ""]
    if profile.qos is None:  # as slurmctld does
        names = [record["defaultqos"] or "normal" for record in associations]
    names += [partition.get("QoS", "") for partition in partitions]
    fields = "name,maxsubmitjobsperuser,gracetime,preemptmode,grpsubmitjobs"
    known = {record["name"]: record for record in slurm.accounting("qos", fields)}
    return [known[name] for name in dict.fromkeys(names) if name in known]


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
    down = [partition for partition in partitions if partition.get("State") != "UP"]
    for partition in down:
        text = f"partition: {partition['PartitionName']} is {partition.get('State')}"
        yield Finding("error" if down == partitions else "warning", text)
    yield _accepted(profile)
    for partition in partitions:
        where = f" in {partition['PartitionName']}" if len(partitions) > 1 else ""
        yield from _preemption(settings, partition, found, where)
    lead = f"{profile.signal_lead} s (up to 60 s more) before the limit of {profile.time} min"
    yield Finding("ok", f"time limit: runs are signalled {lead}, save, and are requeued")
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


def _accepted(profile: SlurmProfile) -> Finding:
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
        return Finding("error", f"these resources are refused: {error}")
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
        yield Finding(
            "warning",
            f"PreemptMode=CANCEL{where}: SLURM cancels preempted tasks; python -m launch resume "
            "FOLDER submits those again that could not requeue themselves",
        )
    level: Literal["ok", "warning"] = "ok" if seconds >= 30 else "warning"
    then = f"{signal}, then {seconds} s to finish a step and save ({kind})"
    yield Finding(level, f"preemption{where} ({mode}): {then}")


def check_place(folder: Path) -> str | None:
    """A warning if other machines of the cluster may not see the folder."""
    while not folder.exists():
        folder = folder.parent
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
    folder = configs[0].result_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"result_dir: {folder} has {free / 1e9:.1f} GB free, the sweep writes about "
            f"{need / 1e9:.1f} GB; give another --result-dir"
        )
    return f"disk: about {need / 1e9:.1f} of {free / 1e9:.1f} GB free"


def probe_nodes(profile: SlurmProfile, folder: Path) -> Iterator[Finding]:
    """Run the profile's python once on compute nodes and report what it finds. Waits in the queue
    like a task."""
    words = [
        "srun",
        "--time=5",
        f"--nodes={profile.nodes}",
        "--ntasks-per-node=1",
        "--immediate=60",
    ]
    words += [f"--{n}={v}" for n in ("partition", "account", "qos") if (v := getattr(profile, n))]
    if profile.gpus_per_node:
        words.append(f"--gpus-per-node={profile.gpus_per_node}")
    try:
        python = shlex.split(profile.python)
        command = [*words, *profile.srun_args, *python, "-c", _PROBE, str(folder)]
        lines = slurm.ask(*command, timeout=180).splitlines()
    except slurm.SlurmError as error:
        yield Finding("error", f"a task on the compute nodes: {error}")
        return
    facts = [line.partition(" ")[::2] for line in lines]
    hosts = ", ".join(value for name, value in facts if name == "host")
    yield Finding("ok", f"tasks start on {hosts}")
    for name, value in facts:
        if name == "folder" and value == "missing":
            yield Finding("error", f"{folder} is not seen on a compute node; give a shared folder")
        if name == "scontrol" and value == "none" and profile.requeue_by == "scontrol":
            yield Finding("warning", "no scontrol in the tasks: give requeue_by: batch")
        if name == "torch":
            yield Finding("error", f"python: {profile.python} cannot run training: {value}")
        if name == "gpus" and int(value) < profile.gpus_per_node:
            yield Finding("error", f"a node shows {value} GPUs, not {profile.gpus_per_node}")


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
