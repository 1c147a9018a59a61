"""Checkpoints: tensors and plain types, verified on load, never half-written.

A save writes a step-named file, then replaces `manifest.json` (the commit point), then links
`checkpoint.pth.tar` to the newest. The checkpoint before it is kept until the next save.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bip.checkpoint_path import checkpoint_of
from bip.config import RunConfig
from bip.errors import UserError
from bip.files import (
    NOT_SUPPORTED,
    DigestWriter,
    atomic_open,
    atomic_write_json,
    may_pass,
    read_json,
)
from bip.training import sources
from bip.training.sources import SCORES as SCORES
from bip.training.sources import State as State

if TYPE_CHECKING:  # importing it compiles kernels, which the launcher does not need
    from bip.pruning.state import PrunedParameters

FORMAT = 1
SEAL = "sha256"  # key of a sealed state's own digest
# Two of these keys mark a file of this project, also if a third is damaged.
OWN = {"mask", "masked", "fingerprint", "progress", SEAL}


def pack_mask(mask: Tensor) -> Tensor:
    """A mask of 0s and 1s as bits (uint8), eight to a byte."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy() != 0))


def unpack_mask(bits: Tensor, size: int) -> Tensor:
    """The inverse of `pack_mask`: the uint8 mask (size,)."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size))


def network_state(network: nn.Module, pruned: "PrunedParameters | None") -> dict[str, Tensor]:
    """state_dict on the CPU with θ instead of z, and the scores as `LAYER.popup_scores`.

    Tensors that are on the CPU already are shared, not copied, and change with the next step.
    """
    state = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    if pruned is None:
        return state
    weights, scores = pruned.weights.detach().cpu(), pruned.scores.detach().cpu()
    for tensor in pruned.layout.tensors:
        state[tensor.name] = pruned.view(weights, tensor)
        state[tensor.name.removesuffix("weight") + SCORES] = pruned.view(scores, tensor)
    return state


def model_state(config: RunConfig, network: nn.Module, pruned: "PrunedParameters | None") -> State:
    """The content of every checkpoint: the network, its mask, and the run's settings."""
    state = {
        "format": FORMAT,
        "arch": config.arch,
        "state_dict": network_state(network, pruned),
        "mask": pack_mask(pruned.mask) if pruned else None,
        "masked": [t.name for t in pruned.layout.tensors] if pruned else [],
        "config": config.to_plain(),
        "fingerprint": config.fingerprint(),
    }
    # As where its mask was made: pruned filters keep their biases and batch-norm pairs.
    return state | ({"constants": "kept"} if pruned and pruned.keeps_constants else {})


def split_state(state: State) -> tuple[dict[str, Tensor], Tensor | None]:
    """(state_dict without scores, mask bits) of a checkpoint."""
    weights = {
        name.removeprefix("module."): value
        for name, value in state["state_dict"].items()
        if not name.endswith(SCORES)
    }
    return weights, state.get("mask")


def layer_masks(state: State) -> dict[str, Tensor]:
    """The masks by weight name, uint8 in the weight's shape."""
    weights, bits = split_state(state)
    if bits is None:
        return {}
    sizes = [weights[name].numel() for name in state["masked"]]
    parts = unpack_mask(bits, sum(sizes)).split(sizes)
    return {
        name: part.view(weights[name].shape)
        for name, part in zip(state["masked"], parts, strict=True)
    }


@torch.no_grad()
def restore_model(
    network: nn.Module, pruned: "PrunedParameters | None", state: State, where: str
) -> None:
    """Load a checkpoint into the network (in place) and, where given, into θ, scores and mask.

    A published checkpoint has scores but no mask: its own rule gives the mask, and pruned filters
    keep their biases and batch-norm pairs, as there. Raises UserError naming `where` and what does
    not fit.
    """
    foreign = "foreign" in state
    if foreign:
        state = sources.fit(state, network, where)
    weights, _ = split_state(state)
    sources.check(network.state_dict(), weights, where)
    network.load_state_dict(weights)
    if pruned is None:
        return
    masks = state.get("masks") or layer_masks(state)
    if foreign and not masks:
        layer_type = pruned.layout.layer_type
        masks = sources.published_masks(state, layer_type, pruned.k, pruned.scope)
    scores = {
        name.removeprefix("module."): value
        for name, value in state["state_dict"].items()
        if name.endswith(SCORES)
    }
    for name in masks.keys() - {tensor.name for tensor in pruned.layout.tensors}:
        if name in weights and not bool(masks[name].all()):
            raise UserError(
                f"{where}: prunes {name} too, which this run would leave dense; give it as "
                "--source-net"
            )
    for tensor in pruned.layout.tensors:
        name = tensor.name.removesuffix("weight") + SCORES
        if tensor.name not in masks or name not in scores or scores[name].shape != tensor.shape:
            raise UserError(
                f"{where}: has no fitting {name}; it is not a network pruned with layer_type "
                f"{pruned.layout.layer_type}"
            )
        pruned.view(pruned.weights, tensor).copy_(weights[tensor.name])
        pruned.view(pruned.scores, tensor).copy_(scores[name])
        pruned.view(pruned.mask, tensor).copy_(masks[tensor.name])
    if foreign or state.get("constants") == "kept":
        pruned.followers, pruned.keeps_constants = (), True
    pruned.write_z()


def hash_tensors(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) over names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def seal(state: State) -> State:
    """The state with its own digest, which `decode` verifies even where the file was moved.

    For models that other runs start from. A run's own checkpoints have their digests in the
    manifest, computed during the write.
    """
    return state | {SEAL: _digest(state)}


def _digest(state: State) -> str:
    """SHA-256 (hex) of all tensors and plain values except the seal."""
    tensors = dict(state["state_dict"])
    if state.get("mask") is not None:
        tensors["mask"] = state["mask"]
    plain = {name: state[name] for name in state.keys() - {"state_dict", "mask", SEAL}}
    text = json.dumps(plain, sort_keys=True, default=repr)
    return hashlib.sha256((hash_tensors(tensors) + text).encode()).hexdigest()


def write_checkpoint(path: Path, state: State) -> str:
    """Write a checkpoint file, whole or not at all, and return its SHA-256 (hex)."""
    with atomic_open(path) as stream, DigestWriter(stream) as writer:
        try:
            torch.save(state, writer)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch hides the stream's OSError behind it
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return writer.hexdigest()


def decode(data: bytes, where: Path, key: str | None = None, skip_objects: bool = False) -> State:
    """The state in a file's bytes, of this project or foreign (`sources`). Runs no code from it.

    `key`, `skip_objects`: see `sources.recognise` and `sources.load`. Raises UserError.
    """
    state, metadata = sources.load(data, where, skip_objects)
    if not (isinstance(state, dict) and len(OWN & state.keys()) >= 2):
        return sources.recognise(state, metadata, where, key)
    if "state_dict" not in state:
        raise UserError(f"{where}: not a checkpoint: it has no state_dict")
    if key is not None:
        raise UserError(f"source_key: {where} is a checkpoint of this project; leave the key out")
    if (version := state.get("format", FORMAT)) != FORMAT:
        raise UserError(
            f"{where}: checkpoint format {version}, not {FORMAT}; it was written by another "
            "version of this program"
        )
    if (digest := state.pop(SEAL, None)) is not None and digest != _digest(state):
        raise UserError(
            f"{where}: damaged: its content is not what was written; make it again, or "
            "restore the file"
        )
    return state


def read_checkpoint(path: Path, key: str | None = None, skip_objects: bool = False) -> State:
    """Read one checkpoint file, or that of a run's folder. Raises UserError naming it.

    Damage is detected if the checkpoint is sealed or still in its run's folder.
    """
    path = checkpoint_of(path)
    try:
        data, real = path.read_bytes(), path.resolve()
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    known = {entry["name"]: entry["sha256"] for entry in CheckpointFolder(real.parent).entries()}
    if known.get(real.name) not in (None, hashlib.sha256(data).hexdigest()):
        raise UserError(
            f"{path}: damaged: its SHA-256 is not that in the manifest; give another one"
        )
    return decode(data, path, key, skip_objects)


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Write without torch's checksums of the archive's parts: they would take as long as the
    writing, torch.load never checks them, and the manifest has the SHA-256 of the whole file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _free_name(step: int, committed: set[str]) -> str:
    """A file name for this step's checkpoint that the manifest does not name yet."""
    names = (f"step-{step:09d}{f'-{n}' if n else ''}.pth.tar" for n in itertools.count())
    return next(name for name in names if name not in committed)


class CheckpointFolder:
    """A run's checkpoints. Only rank 0 uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "manifest.json"
        self.newest = folder / "checkpoint.pth.tar"
        self.best = folder / "model_best.pth.tar"

    def entries(self) -> list[dict[str, Any]]:
        """The committed checkpoints, newest first: name, sha256, step.

        If the manifest is damaged: all checkpoint files, with sha256 None (unverified).
        """
        try:
            found = (read_json(self.manifest) or {"checkpoints": []})["checkpoints"]
            return [{key: entry[key] for key in ("name", "sha256", "step")} for entry in found]
        except (UserError, KeyError, TypeError):
            pass
        steps = {path.name: path.name[5:].split(".")[0] for path in self.folder.glob("step-*.tar")}
        newest = sorted((name for name in steps if steps[name][:9].isdigit()), reverse=True)
        return [{"name": n, "sha256": None, "step": int(steps[n][:9])} for n in newest]

    def save(self, state: State, step: int, keep_before: int = 1) -> Path:
        """Commit `state` as the newest checkpoint and drop all but the `keep_before` before it.

        Raises OSError (disk full, read-only) with every earlier checkpoint intact.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        committed = [old for old in self.entries() if (self.folder / old["name"]).exists()]
        path = self.folder / _free_name(step, {old["name"] for old in committed})
        with _without_crc32():
            digest = write_checkpoint(path, state)
        entry = {"name": path.name, "sha256": digest, "step": step}
        before = committed[:keep_before]
        atomic_write_json(self.manifest, {"format": FORMAT, "checkpoints": [entry, *before]})
        self._name_newest(path.name)
        kept = {entry["name"], *(old["name"] for old in before)}
        for other in self.folder.glob("step-*.pth.tar"):
            if other.name not in kept:
                other.unlink(missing_ok=True)
        for torn in self.folder.glob(".*.tmp"):  # left by attempts killed while writing
            torn.unlink(missing_ok=True)
        return path

    def _name_newest(self, name: str) -> None:
        temporary = self.folder / f".{self.newest.name}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(name)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            shutil.copyfile(self.folder / name, temporary)  # a file system without such links
        os.replace(temporary, self.newest)

    def load(self) -> State | None:
        """The newest checkpoint whose digest is right; None if there are no checkpoints.

        A damaged one is renamed to *.damaged, reported, and the one before it is used. Raises
        OSError if the file system is unreachable.
        """
        entries = self.entries()
        unread: OSError | None = None
        if any(entry["sha256"] is None for entry in entries):
            print(f"{self.manifest}: damaged; using the checkpoints beside it without verification")
        for entry in entries:
            path = self.folder / entry["name"]
            try:
                data = path.read_bytes()
                if entry["sha256"] in (None, hashlib.sha256(data).hexdigest()):
                    return decode(data, path)
                reason = "its SHA-256 is wrong"
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(path.name + ".damaged"))
            except OSError as error:
                if may_pass(error):
                    unread = error
                    if (
                        error.errno != errno.EIO
                    ):  # EIO may also be a bad sector, so the file counts as damaged
                        raise
                reason = error.strerror or str(error)
            except UserError as error:
                if entry["sha256"] is not None:
                    raise
                reason = str(error)
            print(f"checkpoint {path} cannot be used: {reason}; trying the one before", flush=True)
        if unread is not None:
            raise unread
        if entries:
            raise UserError(
                f"{self.folder}: no checkpoint is readable; remove the folder to start again"
            )
        return None
