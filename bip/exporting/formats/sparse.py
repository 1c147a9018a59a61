"""Unstructured weights as torch CSR matrices (out, in · kernel), in a file for torch.load.

The file is {"state_dict", "shapes", "arch", ...}; `load_sparse` builds a network that multiplies
with them. What is not pruned stays dense.
"""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip import models
from bip.errors import UserError
from bip.exporting.formats import Exported
from bip.exporting.model import Model, check_arch
from bip.files import atomic_write_bytes
from bip.training.macs import macs_of, positions

NAME = "sparse"
SUFFIXES = (".pt", ".pth")


def write(model: Model, out: Path, of: str) -> Exported:
    """Grouped convolutions, and those that are not 2-d, stay dense."""
    if model.facts.layer_type != "unstructured":
        raise UserError(
            f"format: sparse is for unstructured masks, not {model.facts.layer_type or 'dense'}; "
            "use compact or dense"
        )
    network = sparsify(model.network, list(model.masks))
    content: dict[str, Any] = {"arch": model.facts.arch, "metadata": model.metadata(NAME)}
    content["state_dict"] = network.state_dict()
    stream = io.BytesIO()
    torch.save(content, stream)
    atomic_write_bytes(out, stream.getvalue())
    kept = sum(int(mask.sum()) for mask in model.masks.values())
    pruned = sum(mask.numel() for mask in model.masks.values()) - kept
    parameters = sum(p.numel() for p in model.network.parameters()) - pruned
    sample = model.sample(1)
    uses = positions(model.network, tuple(sample.shape[1:]))
    saved = sum(uses.get(name, 0) * int((mask == 0).sum()) for name, mask in model.masks.items())
    return Exported(network, parameters, macs_of(model.network, sample)[""] - saved)


class SparseLinear(nn.Module):
    """A linear layer with a CSR weight (out, in): (N, in) -> (N, out)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", csr(layer.weight))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        out = (self._buffers["weight"] @ x.t()).t()  # type: ignore[operator]
        bias = self._buffers["bias"]
        return out if bias is None else out + bias


class SparseConv(nn.Module):
    """A 2-d convolution with a CSR weight (out, in · kernel), by unfolding its input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", csr(layer.weight.flatten(1)))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.window: dict[str, Any] = {
            name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")
        }

    def forward(self, x: Tensor) -> Tensor:
        window = [self.window[n] for n in ("padding", "dilation", "kernel_size", "stride")]
        sides = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], *window, strict=True)
        ]
        columns = F.unfold(x, **self.window)  # (N, in · kernel, positions)
        flat = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        out = self._buffers["weight"] @ flat  # type: ignore[operator]
        out = out.view(-1, x.shape[0], *sides).transpose(0, 1)
        bias = self._buffers["bias"]
        return out if bias is None else out + bias.view(-1, 1, 1)


def csr(matrix: Tensor) -> Tensor:
    """The matrix in compressed sparse rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        return matrix.detach().to_sparse_csr()


def sparsify(network: nn.Module, names: list[str]) -> nn.Module:
    """A copy of the network whose layers of these weights multiply with CSR matrices."""
    network = copy.deepcopy(network)
    for name in names:
        path = name.removesuffix(".weight")
        layer = network.get_submodule(path)
        if isinstance(layer, nn.Linear):
            network.set_submodule(path, SparseLinear(layer))
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and is_plain(layer):
            network.set_submodule(path, SparseConv(layer))
    return network.eval()


def is_plain(layer: nn.Conv2d) -> bool:
    """Whether unfolding pads as it does."""
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def load_sparse(path: Path, arch: str | None = None) -> nn.Module:
    """The network of a file that `bip export --format sparse` wrote. Raises UserError.

    `arch`: as of `load_compact`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the check of its indices takes time
            content = torch.load(path, weights_only=True)
        metadata, state = content["metadata"], content["state_dict"]
        sizes = int(metadata["num_classes"]), int(metadata["channels"])
    except Exception as error:  # an unpickler may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is not a readable sparse network ({reason[:100]})") from None
    check_arch(metadata["arch"], arch, path)
    network = models.build(arch or metadata["arch"], *sizes)
    is_csr = [name for name, value in state.items() if value.layout == torch.sparse_csr]
    network = sparsify(network, is_csr)
    for name in is_csr:
        network.get_submodule(name.removesuffix(".weight"))._buffers["weight"] = state[name]
    rest = {name: value for name, value in state.items() if name not in is_csr}
    missing, unexpected = network.load_state_dict(rest, strict=False)
    odd = sorted({*missing} ^ {*is_csr}) + sorted(unexpected)
    if odd:
        raise UserError(f"{path}: does not fit the network {arch}: {odd[0]}; give its own --arch")
    return network
