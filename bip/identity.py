"""What must agree between a run and its source, its earlier attempts and its ranks."""

import hashlib
import platform
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from bip.checkpoint_path import agrees, k_in_name
from bip.commit import git_commit
from bip.config import RunConfig, build_config, paths
from bip.distributed.group import Group
from bip.errors import UserError
from bip.training import sources
from bip.training.checkpoint import State, read_checkpoint

_SAME_START = "start all of them with one command, one installation and one copy of the data"
_REMEDIES = {
    "threads": "set OMP_NUM_THREADS to one number for all",
    "CPU capability": "ask for nodes of one kind (constraint)",
    "GPU capability": "ask for GPUs of one kind (constraint)",
}


def with_source_of_resume(config: RunConfig) -> RunConfig:
    """`config` with the source_net that the checkpoint of --resume names, if none is given."""
    if config.resume is None or config.source_net is not None:
        return config
    before = read_checkpoint(config.resume).get("config", {}).get("source_net")
    return config.model_copy(update={"source_net": Path(before)}) if before else config


def check_source(config: RunConfig, state: State, key: str = "source_net") -> None:
    """Raise UserError unless the source's network fits the run; to fine-tune, its k and layer type.

    Of a foreign file, whether it is pruned, and what it records or its name says of k.
    """
    if "foreign" in state:
        _check_foreign(config, state, key)
        return
    arch = state.get("arch")
    if isinstance(arch, str) and arch != config.arch:
        raise UserError(f"{key}: holds the network {arch}, but arch is {config.arch}")
    before = state["config"]
    pruned = config.method.starts_from == "pruned"
    if pruned and not is_pruned(before):
        raise UserError(f"{key}: holds a dense network; finetune starts from a pruned one")
    if is_pruned(before):
        if config.method.in_rounds and not config.evaluate:
            _check_round(config, before, key)
            return
        made = f"holds a network pruned with layer_type {before['layer_type']}, k {before['k']}"
        if config.evaluate and not config.method.has_mask:
            raise UserError(f"{key}: {made}; evaluate it with these and --exp-mode prune")
        if not pruned and not config.evaluate:
            remedy = f"; fine-tune it with --layer-type {before['layer_type']} --k {before['k']}"
            raise UserError(
                f"{key}: {made}; {config.exp_mode} starts from a dense one"
                + remedy * (config.exp_mode == "finetune")
            )
    for name, mine in (("layer_type", config.layer_type), ("k", config.k_text)):
        if is_pruned(before) and before[name] != mine:
            raise UserError(
                f"{key}: was pruned with {name} {before[name]}, but {name} is {mine}; "
                "they must be the same"
            )


def is_pruned(recorded: dict[str, Any]) -> bool:
    """Whether the run of these settings ended with a mask. (`transfer` fine-tunes without one.)"""
    dense = recorded.get("layer_type", "dense") == "dense"
    return recorded.get("exp_mode", "pretrain") != "pretrain" and not dense


def _check_foreign(config: RunConfig, state: State, key: str) -> None:
    """Other programs name networks differently, so that only the weights show whether arch fits."""
    pruned = sources.is_pruned(state)
    path = getattr(config, key)
    named = k_in_name(path)
    if config.method.starts_from == "pruned":
        if not pruned:
            raise UserError(
                f"{key}: {path} has no scores and no mask, so it is a dense network; finetune "
                "starts from a pruned one, or trains a dense one on with --layer-type dense"
            )
    elif not config.evaluate:
        if pruned and named != 1:
            raise UserError(
                f"{key}: {path} has scores or a mask, so it is a pruned network; "
                f"{config.exp_mode} starts from a dense one (if it was pretrained with k = 1, put "
                "k-1.0 in its file name)"
            )
        return
    elif not (pruned and config.method.has_mask):
        return
    recorded = state["facts"].get("k")
    for k, source in ((recorded, "it records"), (named, "its name says")):
        if k is not None and not agrees(config.k, Decimal(k)):
            raise UserError(
                f"{key}: {path} was pruned with k {k}, as {source}, but k is {config.k_text}; give "
                f"--k {k}" + (", or rename it" if source == "its name says" else "")
            )
    if config.layer_type not in (may := sources.layer_types(state)):
        raise UserError(
            f"layer_type: {path} was pruned with {' or '.join(may)}, not {config.layer_type}"
        )


def _check_round(config: RunConfig, before: dict[str, Any], key: str) -> None:
    """A round starts from one of its own method that kept more."""
    for name, mine in (("trainer", config.trainer), ("layer_type", config.layer_type)):
        if before[name] != mine:
            raise UserError(f"{key}: was pruned with {name} {before[name]}, but {name} is {mine}")
    if Decimal(before["k"]) <= config.k:
        raise UserError(
            f"{key}: was pruned with k {before['k']}; a round keeps less than the one before, "
            f"but k is {config.k_text}"
        )


def check_same_source(config: RunConfig, before: str | None, now: str | None) -> None:
    """Raise UserError if the source's SHA-256 has changed. None: unknown."""
    if None not in (before, now) and before != now:
        raise UserError(
            f"source_net: {config.source_net} is not the file that {config.run_folder} started "
            "from; give another --exp-name, or remove the run folder"
        )


def difference(config: RunConfig, before: dict[str, Any]) -> str:
    """'lr 0.1 (now 0.2)' for the first setting of `identity` that changed."""
    now = config.identity()
    try:
        old = build_config(before).identity()
    except UserError:  # it has a setting that this version lacks
        old = before
    for key in now:
        if old.get(key) != now[key]:
            return f"{key} {old.get(key)} (now {now[key]})"
    return "a setting of another version"


def code_version() -> str:
    """SHA-256 (hex) of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version() -> str | None:
    try:
        return version("bip-hpc")
    except PackageNotFoundError:  # run from a folder that is not installed
        return None


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Where a run was finished, and by what."""
    return {
        "git_commit": git_commit(),
        "host": platform.node(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {
            "bip": _version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "numpy": numpy.__version__,
        },
    }


def start_facts(config: RunConfig, group: Group) -> dict[str, str]:
    """What must be the same on all ranks of one attempt, by name: all but the node's own paths."""
    plain = config.to_plain()
    return {
        "code of bip": code_version()[:16],
        "torch": torch.__version__,
        "world layout": f"{group.world} ranks",
        **_arithmetic(group.device),
        **{name: str(plain[name]) for name in plain if name not in paths()},
        "settings": config.fingerprint()[:16],
    }


def _arithmetic(device: torch.device) -> dict[str, str]:
    """What decides the last bits of the updates that every rank computes for itself."""
    facts = {"kind of device": device.type}
    if device.type == "cuda":
        # The CPUs of GPU nodes may differ: their results are exact or broadcast.
        major, minor = torch.cuda.get_device_capability(device)
        return facts | {"GPU capability": f"{major}.{minor}"}
    capability = torch.backends.cpu.get_cpu_capability()
    return facts | {"CPU capability": capability, "threads": str(torch.get_num_threads())}


def compare_starts(own: dict[str, str], group: Group) -> None:
    """Raise UserError on every rank, naming the first fact in which a rank differs from rank 0."""
    first, *others = group.all_objects(own)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            here, there = first.get(name, "not given"), other.get(name, "not given")
            if here != there:
                remedy = _REMEDIES.get(name, _SAME_START)
                raise UserError(
                    f"ranks start differently: {name} is {here} on rank 0, {there} on rank {rank}; "
                    f"{remedy}"
                )
