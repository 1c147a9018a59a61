"""ONNX, checked with onnxruntime. `--of compact` writes the network without pruned channels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bip.errors import UserError
from bip.exporting.formats import Exported
from bip.exporting.formats.compact import compact
from bip.exporting.model import Model
from bip.files import atomic_write_bytes
from bip.training.macs import macs_of

NAME = "onnx"
SUFFIXES = (".onnx",)
TOLERANCE = 1e-4  # of float32 outputs, relative to their size
MISSING = "format: onnx needs packages that are not installed; pip install 'bip-hpc[onnx]'"


def write(model: Model, out: Path, of: str) -> Exported:
    """Input `images` (N, channels, H, W) for any N, output `logits`."""
    network: nn.Module = model.network
    if of == "compact":
        network = compact(model)[0]
    elif of != "dense":
        raise UserError(f"of: onnx can be of dense or compact, not {of!r}")
    data = to_onnx(network, model.sample(2), model.metadata(NAME))
    run = runner(session(data, out))
    for size in (2, 3):
        images = model.sample(size)
        with torch.no_grad():
            expected = network(images)
        difference = float((run(images) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"format: onnxruntime gives other outputs (by {difference:.1e}); nothing was "
                "written; export it as dense"
            )
    atomic_write_bytes(out, data)
    parameters = sum(p.numel() for p in network.parameters())
    return Exported(run, parameters, macs_of(network, model.sample(1))[""])


def to_onnx(network: nn.Module, sample: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """The network as an ONNX file's bytes, for batches of any size, with these metadata."""
    try:
        import onnxscript  # noqa: F401

        program = torch.onnx.export(
            network, (sample,), input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
        )  # fmt: skip
    except ImportError:
        raise UserError(MISSING) from None
    except Exception as error:  # an operation without a counterpart in ONNX, for one
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"format: torch cannot write this network as ONNX ({reason}); export it as dense"
        ) from None
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString()
    return data


def session(data: bytes, where: Path) -> Any:
    """The file opened by onnxruntime, on as many threads as torch uses. Raises UserError."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(MISSING) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many kinds
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{where}: is not a readable ONNX file ({reason})") from None


def metadata_of(opened: Any) -> dict[str, str]:
    """What `write` recorded in the file; empty for a file of another program."""
    return dict(opened.get_modelmeta().custom_metadata_map)


def runner(opened: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that runs the file: images to its first output."""
    name = opened.get_inputs()[0].name

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(opened.run(None, {name: images.numpy()})[0])

    return run
