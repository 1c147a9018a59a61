"""Compact networks against masked ones, and CSR weights against dense ones, on the CPU.

Filters and channels, k in each layer, at random; batch-norm of pruned filters is zero, as in a
finished run. Of each: time of a batch, multiply-accumulates (MACs) and memory at the peak of a
forward, each over the masked network's; and `reached`, the saved time over the saved MACs.
"""

import statistics
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bip import models
from bip.errors import UserError
from bip.exporting.formats.sparse import sparsify
from bip.exporting.shrink import rebuild, shrink
from bip.pruning.choices import LayerType
from bip.pruning.layout import find_followers, find_prunable, keep_count
from bip.training.macs import macs_of
from tests.benchmarks.common import arguments, finish, machine, ratio, take_turns

RATIOS = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1")
SPARSE = ("0.05", "0.02", "0.01")
GOAL = 0.7


@torch.no_grad()
def masked(arch: str, layer_type: LayerType, k: str, images: Tensor) -> nn.Module:
    """A network with random weights and a random mask."""
    torch.manual_seed(0)
    network = models.build(arch, 10, 3).eval()
    layout = find_prunable(network, layer_type)
    weights = dict(network.named_parameters())
    masks: dict[str, Tensor] = {}
    for tensor in layout.tensors:
        kept = torch.zeros(tensor.groups)
        kept[torch.randperm(tensor.groups)[: keep_count(k, tensor.groups)]] = 1
        shape = [n if tensor.axis in (None, d) else 1 for d, n in enumerate(tensor.shape)]
        masks[tensor.name] = kept.view(shape)
        weights[tensor.name].mul_(masks[tensor.name])
    for follower in find_followers(network, layout, images[:2]):
        for parameter in follower.parameters:
            parameter.mul_(masks[follower.tensor.name].flatten())
    return network


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors made inside, while they live; `most` is the peak.

    Working memory inside a kernel is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in self.known:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, free)
        self.now += size
        self.most = max(self.most, self.now)


def peak_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes of the network, and of the tensors that live at the peak of a forward."""
    with Peak() as peak:
        network(images)
    return peak.most + sum(t.nbytes for t in network.state_dict().values())


@torch.no_grad()
def measure(
    arch: str, layer_type: LayerType, k: str, images: Tensor, rounds: int
) -> dict[str, float]:
    """Time, MACs and peak memory of the compact network over the masked one."""
    network = masked(arch, layer_type, k, images)
    shrunk = shrink(network, images[:2])
    small = rebuild(network, shrunk.spec)
    small.load_state_dict(shrunk.state)
    seconds = take_turns(
        {"compact": lambda: small(images), "masked": lambda: network(images)}, rounds, 1
    )
    cost = [macs_of(n, images)[""] for n in (small, network)]
    peaks = [peak_bytes(n, images) for n in (small, network)]
    time, work = ratio(seconds["compact"], seconds["masked"]), cost[0] / cost[1]
    return {
        "ms": 1e3 * statistics.median(seconds["masked"]), "time": time, "macs": work,
        "memory": peaks[0] / peaks[1], "reached": (1 - time) / (1 - work),
    }  # fmt: skip


@torch.no_grad()
def measure_sparse(arch: str, k: str, images: Tensor, rounds: int) -> float:
    """Time with CSR weights over that with the same weights, dense."""
    network = masked(arch, "unstructured", k, images)
    names = [tensor.name for tensor in find_prunable(network, "unstructured").tensors]
    sparse = sparsify(network, names)
    calls = {"sparse": lambda: sparse(images), "dense": lambda: network(images)}
    seconds = take_turns(calls, rounds, 1)
    return ratio(seconds["sparse"], seconds["dense"])


def main() -> None:
    options = arguments(
        __doc__ or "", rounds=3, batch=64, archs="resnet18,resnet20s,vgg16_bn", k=",".join(RATIOS)
    )
    print(machine())
    figures: dict[str, float] = {}
    images = torch.randn(options.batch, 3, 32, 32)
    for arch in options.archs.split(","):
        try:
            models.build(arch, 10, 3)
        except UserError as error:
            print(f"{arch} is left out: {error}")
            continue
        for layer_type in ("filter", "channel"):
            for k in options.k.split(","):
                row = measure(arch, layer_type, k, images, options.rounds)  # type: ignore[arg-type]
                name = f"{arch}_{layer_type}_k{k}"
                print(f"{name:26} " + "  ".join(f"{n} {v:.3g}" for n, v in row.items()), flush=True)
                figures |= {f"{name}_{n}": row[n] for n in ("time", "macs", "memory", "reached")}
        for k in SPARSE:
            figures[f"{arch}_csr_k{k}_time"] = measure_sparse(arch, k, images, options.rounds)
    reached = [value for name, value in figures.items() if name.endswith("_reached")]
    figures["reached_at_goal"] = sum(value >= GOAL for value in reached) / max(1, len(reached))
    figures["reached_median"] = statistics.median(reached)
    finish(figures, options.json)


if __name__ == "__main__":
    main()
