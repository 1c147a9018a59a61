"""What each of several runs gets that share one task or machine: its CPUs, threads and GPU.

Standard library only: a rank reads its share before its slow imports.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

SHARE = "BIP_SHARE"  # NUMBER/OF: which of the runs at once this is
_MPS = "/tmp/nvidia-mps"  # where CUDA looks for MPS if CUDA_MPS_PIPE_DIRECTORY is not set


@dataclass(frozen=True)
class Share:
    """The part of run `number` of `of`: no CPU is in two parts. `gpu`: its CUDA_VISIBLE_DEVICES."""

    number: int
    of: int
    cpus: tuple[int, ...]
    gpu: str | None = None

    def line(self, env: Mapping[str, str] = os.environ) -> str:
        """For the run's log: what it has, and whether its GPU is shared through MPS."""
        text = f"share {self.number + 1} of {self.of}: CPUs {','.join(map(str, self.cpus))}"
        if self.gpu is None:
            return text
        pipe = Path(env.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS) / "control"
        how = f"through MPS ({pipe})" if pipe.exists() else f"without MPS (no {pipe})"
        return f"{text}; GPU {self.gpu}, shared {how}"


def share_of(
    number: int,
    of: int,
    cpus: Collection[int],
    cores: Mapping[int, int],
    gpus: Collection[str] = (),
) -> Share:
    """Part `number` of `cpus` in `of` equal parts; what does not divide is left idle.

    `cores`: each CPU's physical core, named by its lowest CPU. Parts are made of whole cores where
    they divide, so that runs do not share one by hyper-threading. GPUs are dealt in turn.
    Raises ValueError if there are fewer CPUs than parts.
    """
    if len(cpus) < of:
        raise ValueError(f"{of} runs at once on {len(cpus)} CPUs")
    each = len(cpus) // of
    ordered = sorted(cpus, key=lambda cpu: (cores.get(cpu, cpu), cpu))
    names = [*gpus]
    own = tuple(sorted(ordered[number * each : (number + 1) * each]))
    return Share(number, of, own, names[number % len(names)] if names else None)


def own_share(number: int, of: int, gpus: str | None) -> Share:
    """The share among this process's CPUs; `gpus`: its CUDA_VISIBLE_DEVICES, None if not set."""
    cpus = os.sched_getaffinity(0)
    names = [f"{i}" for i in range(len([*Path("/dev").glob("nvidia[0-9]*")]))]
    if gpus is not None:
        names = [name for name in gpus.split(",") if name]
    return share_of(number, of, cpus, {cpu: _core(cpu) for cpu in cpus}, names)


def _core(cpu: int) -> int:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return int(path.read_text().replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def take_share(env: "os._Environ[str]" = os.environ) -> str:
    """Bind this process to the share that SHARE names, and print it; nothing if it is not set.

    Call it before threads start and before CUDA is used. Returns why it cannot, or "".
    """
    number, sign, of = env.get(SHARE, "").partition("/")
    if not sign:
        return ""
    try:
        share = own_share(int(number), int(of), env.get("CUDA_VISIBLE_DEVICES"))
    except ValueError as error:
        return (
            f"runs_at_once: {error}, which are fewer than the profile's cpus_per_task; lower both"
        )
    os.sched_setaffinity(0, share.cpus)
    if share.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = share.gpu
    print(share.line(env), flush=True)
    return ""
