"""Weights of which 2 of each 4 inputs are kept, for torch's semi-structured tensors on a GPU.

torch packs such matrices by GPU and library, into tensors that no safe load takes. So the file
holds the masked weights in half precision, as torch.save of {"state_dict", "metadata", "arch"},
and `load_semi_structured` packs them where it is called. A linear weight is packed as it is; a
convolution's as the matrix (out, kernel · in), which its unfolded input is multiplied with (torch
has no convolution of these tensors: torch.sparse.semi_structured lists what it has). Layers of
sizes that torch does not take stay dense.
"""

import copy
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip import models
from bip.errors import UserError
from bip.exporting.formats import Exported, Network
from bip.exporting.formats.sparse import is_plain
from bip.exporting.model import Model, check_arch
from bip.files import atomic_write_bytes

NAME = "2:4"
SUFFIXES = (".pt", ".pth")
FITTING = ("1:4", "2:4")  # layer types
TOLERANCE = 1e-2  # of half-precision outputs, relative to their size


def write(model: Model, out: Path, of: str) -> Exported:
    """Only after the packed network's outputs were compared with the masked one's, on the GPU."""
    made = model.facts.layer_type
    if made not in FITTING:
        raise UserError(f"format: 2:4 is for layer types {' and '.join(FITTING)}, not {made}")
    check_gpu("export it as dense, whose file keeps the pattern")
    masked = copy.deepcopy(model.network).half().cuda()
    packed, names = pack(masked, model.masks)
    images = model.sample(8).half().cuda()
    with torch.no_grad():
        expected = masked(images)
        difference = float((packed(images) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"format: the packed network gives other outputs (by {difference:.1e}); nothing was "
            "written; export it as dense"
        )
    content: dict[str, Any] = {"arch": model.facts.arch, "metadata": model.metadata(NAME)}
    content["state_dict"] = {name: value.cpu() for name, value in masked.state_dict().items()}
    content["packed"] = names
    stream = io.BytesIO()
    torch.save(content, stream)
    atomic_write_bytes(out, stream.getvalue())
    notes = [f"note: {len(names)} of {len(model.masks)} pruned layers have sizes that torch packs"]
    where = f"{torch.cuda.get_device_name()} in half precision, copies included"
    return Exported(_on_gpu(packed), notes=notes, masked=_on_gpu(masked), where=where)


def check_gpu(instead: str) -> None:
    """Raise UserError, with another way, unless there is a GPU that can multiply by 2:4."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            "format: 2:4 is packed on a GPU (compute capability 8.0 or later), and there is none "
            f"here; run it on a node that has one, or {instead}"
        )


def _on_gpu(network: nn.Module) -> Network:
    return lambda images: network(images.half().cuda()).float().cpu()


class UnfoldedConv(nn.Module):
    """A 2-d convolution by a linear layer of its input's windows, channels last."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.window: dict[str, Any] = {
            name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")
        }
        self.weight = nn.Parameter(rows(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        places = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, d, p, s in zip(x.shape[2:], *self.window.values(), strict=True)
        ]
        columns = F.unfold(x, **self.window)  # (N, in · kernel, places)
        columns = columns.view(x.shape[0], x.shape[1], -1, columns.shape[2])
        columns = columns.permute(0, 3, 2, 1).flatten(2)  # (N, places, kernel · in)
        out = F.linear(columns.flatten(0, 1), self.weight, self.bias)
        return out.view(x.shape[0], *places, -1).permute(0, 3, 1, 2)


def rows(weight: Tensor) -> Tensor:
    """A weight (out, in, ...) as the matrix (out, kernel · in) whose groups lie side by side."""
    return weight.flatten(2).transpose(1, 2).flatten(1).contiguous() if weight.dim() > 2 else weight


def unfold(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Put `UnfoldedConv` for the convolutions of these weights; returns the layers by name."""
    layers: dict[str, nn.Module] = {}
    for name in names:
        path = name.removesuffix(".weight")
        layer = network.get_submodule(path)
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and is_plain(layer):
            layer = UnfoldedConv(layer)
            network.set_submodule(path, layer)
        if isinstance(layer, (nn.Linear, UnfoldedConv)):
            layers[name] = layer
    return layers


def pack(network: nn.Module, names: Iterable[str]) -> tuple[nn.Module, list[str]]:
    """(a copy of the network on the GPU with packed weights, the names of those packed)."""
    packed: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls these tensors a prototype
        for name in names:
            try:
                matrix = rows(network.get_parameter(name).detach())
                packed[name] = torch.sparse.to_sparse_semi_structured(matrix)
            except RuntimeError as error:
                if "is not supported" not in str(error):
                    raise
    network = copy.deepcopy(network)
    layers = unfold(network, packed)
    for name, layer in layers.items():
        layer.weight = nn.Parameter(packed[name], requires_grad=False)
    return network, list(layers)


def load_semi_structured(path: Path, arch: str | None = None) -> nn.Module:
    """The network of a file that `bip export --format 2:4` wrote, packed, on the GPU.

    Takes half-precision images. `arch`: as of `load_compact`. Raises UserError.
    """
    try:
        content = torch.load(path, weights_only=True)
        metadata, state, names = content["metadata"], content["state_dict"], content["packed"]
        sizes = int(metadata["num_classes"]), int(metadata["channels"])
        if metadata["format"] != NAME:
            raise ValueError(f"its format is {metadata['format']}")
    except Exception as error:  # an unpickler may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a readable 2:4 network ({reason[:100]})") from None
    check_arch(metadata["arch"], arch, path)
    check_gpu("load its state_dict, which is that of a plain network")
    network = models.build(arch or metadata["arch"], *sizes).half()
    network.load_state_dict(state)
    return pack(network.cuda().eval(), names)[0]
