"""`bip export`: write a trained network in another format, and report what that saves."""

from pathlib import Path

import torch

from bip.cli import nearest
from bip.errors import UserError
from bip.exporting.formats import Exported, formats
from bip.exporting.measure import latency
from bip.exporting.model import Facts, Model, read_model
from bip.files import may_pass
from bip.pruning.choices import LayerType, Scope
from bip.training.macs import macs_of

ROUNDS = 5


def export(
    checkpoint: Path,
    out: Path,
    format: str = "dense",
    of: str = "dense",
    batch: int = 16,
    arch: str | None = None,
    k: str | None = None,
    layer_type: LayerType | None = None,
    scope: Scope | None = None,
    num_classes: int | None = None,
    image_dim: int | None = None,
) -> None:
    """Write a checkpoint's network in another format, and print what that saves.

    Args:
        checkpoint: a checkpoint of this project, or a published one.
        out: the file to write: .safetensors or .pth (dense), .pth.tar (reference), .safetensors
            (compact), .onnx (onnx), .pt (sparse, 2:4).
        format: dense: masked weights under plain names. reference: the published layout. compact:
            without pruned filters and channels (bip.load_compact reads it). onnx: checked with
            onnxruntime. sparse: unstructured weights as torch CSR matrices. 2:4: of layer type 2:4
            (or 1:4), for torch's semi-structured tensors; it needs a GPU.
        of: what onnx is made of, dense or compact.
        batch: images of a batch of which the latency is measured; 0 leaves that out.
        arch: of a published checkpoint that does not record it.
        k: keep ratio of a published checkpoint.
        layer_type: of a published checkpoint.
        scope: of a published checkpoint; HYDRA's are "layer".
        num_classes: of a published checkpoint (default: what its last layer has).
        image_dim: side of the images that are measured, pixels (default: the data set's, or 32).
    """
    if format not in formats():
        known = ", ".join(formats())
        raise UserError(f"format: unknown {format!r}{nearest(format, formats())}; known: {known}")
    chosen = formats()[format]
    given = Facts(
        arch=arch, num_classes=num_classes, image_dim=image_dim, k=k, layer_type=layer_type,
        scope=scope,
    )  # fmt: skip
    model = read_model(checkpoint, given)
    if not out.parent.is_dir():
        raise UserError(f"out: no such folder: {out.parent}")
    if out.is_dir():
        raise UserError(f"out: {out} is a folder; give the name of a file")
    if not out.name.endswith(chosen.suffixes):
        raise UserError(f"out: {out.name}: {format} is written as {' or '.join(chosen.suffixes)}")
    if of != "dense" and format != "onnx":
        raise UserError(f"of: only onnx can be of {of}; leave --of out")
    if out.exists() and out.samefile(checkpoint):
        raise UserError(f"out: {out} is the checkpoint itself; give another name")
    if batch < 0:
        raise UserError(f"batch: must be 0 or more, not {batch}")
    try:
        exported = chosen.write(model, out, of)
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from None
    print(f"wrote {out} ({format})")
    for note in exported.notes:
        print(note)
    print("\n".join(_table(model, out, exported, batch)))


def _table(model: Model, out: Path, exported: Exported, batch: int) -> list[str]:
    """What the masked network and the exported one cost, a line each."""
    network = model.network
    parameters = sum(p.numel() for p in network.parameters())
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    rows = [
        ("bytes", size, out.stat().st_size),
        ("parameters", parameters, exported.parameters or parameters),
    ]
    cost = macs_of(network, model.sample(1))[""]
    rows.append(("MACs of an image", cost, cost if exported.macs is None else exported.macs))
    lines = [f"{'':18} {'masked':>15} {'exported':>15} {'ratio':>8}"]
    lines += [
        f"{name:18} {before:15,} {after:15,} {after / max(1, before):8.3f}"
        for name, before, after in rows
    ]
    if batch:
        images = model.sample(batch)
        after = exported.network or network
        before = exported.masked or network
        first, second = (1e3 * s for s in latency([before, after], images, ROUNDS))
        lines.append(f"{'ms of a batch':18} {first:15.2f} {second:15.2f} {second / first:8.3f}")
        side, where = model.facts.image_dim, exported.where
        where = where or f"the CPU, {torch.get_num_threads()} threads"
        lines.append(f"(batch of {batch} images of {side} x {side} on {where}, median of {ROUNDS})")
    return lines
