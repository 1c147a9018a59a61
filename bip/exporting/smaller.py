"""`bip evaluate` of exports that are no checkpoint: compact networks and ONNX files."""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bip.config import RunConfig
from bip.data.batches import open_data
from bip.data.options import DataOptions
from bip.distributed.group import Group
from bip.distributed.heartbeat import Heartbeat
from bip.distributed.rendezvous import join
from bip.errors import UserError
from bip.exporting.formats import compact, onnx
from bip.files import sha256_file
from bip.identity import compare_starts
from bip.training.evaluate import Accuracy, evaluate


def recorded_by(path: Path) -> dict[str, str] | None:
    """The metadata of a compact or ONNX file, with its "format"; None for any other file.

    Raises UserError for a damaged one.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(9)
    except OSError:
        return None  # what reads checkpoints reports it
    if path.suffix == ".onnx":
        return onnx.metadata_of(onnx.session(path.read_bytes(), path)) | {"format": onnx.NAME}
    if path.suffix != ".safetensors" and start[8:] != b"{":
        return None
    metadata = compact.metadata_of(path)
    return metadata if metadata.get("format") == compact.NAME else None


def evaluate_export(config: RunConfig, kind: str) -> dict[str, Any]:
    """Accuracy on the test images of the file `config.source_net`; prints it too.

    Every rank evaluates its share. Raises UserError for a file that does not fit the images.
    """
    path, options = config.source_net, DataOptions.of(config)
    assert path is not None
    group = join(config.result_dir / ".rendezvous")
    heartbeat = Heartbeat(group, config.rank_timeout)
    with heartbeat.watching():
        compare_starts({"checkpoint": sha256_file(path)}, group)
        with group.together():
            network = _network(config, path, kind, group)
            data = open_data(options, group.rank, group.world, group.device)
            _check(network, path, options, data.image_dim, group)
        with closing(data):
            accuracy: Accuracy = evaluate(
                network, data.evaluate("test"), data.eval_size("test"), group,
                bf16=config.precision == "bf16",
            )  # fmt: skip
        group.barrier()
        heartbeat.stop()
    if group.is_first:
        print(accuracy.line)
    group.close()
    return {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}


def _network(config: RunConfig, path: Path, kind: str, group: Group) -> nn.Module:
    if kind == onnx.NAME:
        return OnnxNetwork(path)
    return compact.load_compact(path, config.arch).to(group.device)


def _check(network: nn.Module, path: Path, options: DataOptions, side: int, group: Group) -> None:
    """Raise UserError unless the network takes the data set's images and gives its classes."""
    channels, classes = options.spec.channels, options.classes
    try:
        with torch.no_grad():
            found = network(torch.zeros(1, channels, side, side, device=group.device)).shape
    except Exception as error:  # torch's, or onnxruntime's of any kind
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"dataset: {path} does not take {options.dataset}'s images ({channels} x {side} x "
            f"{side}): {reason}"
        ) from None
    if tuple(found) != (1, classes):
        raise UserError(
            f"num_classes: {path} gives {found[-1]} outputs, {options.dataset} has {classes} "
            "classes"
        )


class OnnxNetwork(nn.Module):
    """An ONNX file run by onnxruntime on the CPU: images to logits, as a module."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = onnx.runner(onnx.session(path.read_bytes(), path))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.run(images.cpu()).to(images.device)
        return found
