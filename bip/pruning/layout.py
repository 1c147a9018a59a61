"""The layout of the flat buffers: which weights can be pruned, in which groups; `keep_count`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor, nn

from bip.errors import UserError
from bip.pruning.budgets import erk
from bip.pruning.choices import GROUP_AXIS, PATTERNS, LayerType, Scope


def keep_count(k: Decimal | Fraction | str, n: int) -> int:
    """How many of n elements the keep ratio k keeps: n − floor((1 − k)·n), at least 1.

    Exact: k counts as the decimal it was written as (floats keep 801 of 1,000 at 0.8).
    Raises ValueError unless 0 < k <= 1 and n >= 1.
    """
    ratio = Fraction(k)
    if not 0 < ratio <= 1 or n < 1:
        raise ValueError(f"keep_count needs 0 < k <= 1 and n >= 1, not k={k}, n={n}")
    return max(1, n - math.floor((1 - ratio) * n))


@dataclass(frozen=True)
class PrunableTensor:
    """One weight tensor's place in the flat buffers.

    `start:stop` are flat positions in logical (NCHW) order. A group is one index along `axis`
    (0: output filter, 1: input channel); without an axis each weight is a group of its own.
    """

    name: str
    shape: torch.Size
    start: int
    fan_in: int
    axis: int | None
    first_group: int

    @property
    def size(self) -> int:
        return self.shape.numel()

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def groups(self) -> int:
        return self.size if self.axis is None else self.shape[self.axis]


@dataclass(frozen=True)
class Segment:
    """Positions `start:stop` that are ranked together; the `keep` largest are kept.

    Raises ValueError unless 1 <= keep <= size.
    """

    name: str
    start: int
    stop: int
    keep: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.size:
            raise ValueError(f"{self.name}: cannot keep {self.keep} of {self.size}")

    @property
    def size(self) -> int:
        return self.stop - self.start


def with_counts(segments: tuple[Segment, ...], counts: Sequence[int]) -> tuple[Segment, ...]:
    """The same segments with other numbers kept."""
    return tuple(replace(s, keep=count) for s, count in zip(segments, counts, strict=True))


@dataclass(frozen=True)
class Layout:
    """Every prunable tensor of a network in module order; `dense` names the other weights."""

    tensors: tuple[PrunableTensor, ...]
    dense: tuple[str, ...]
    layer_type: LayerType

    @property
    def size(self) -> int:
        """Prunable weights."""
        return self.tensors[-1].stop

    @property
    def groups(self) -> int:
        """Number of groups; each is kept or pruned as a whole."""
        return self.tensors[-1].first_group + self.tensors[-1].groups

    @property
    def is_grouped(self) -> bool:
        """Whether whole filters or channels are pruned, not single weights."""
        return self.layer_type in GROUP_AXIS

    def segments(self, k: Decimal | Fraction, scope: Scope) -> tuple[Segment, ...]:
        """The rankings over groups: one of the whole network, or one per tensor.

        Each tensor keeps the ratio k in the scope "layer", its share by `erk` of what the network
        keeps in the scope "erk". Raises UserError if that is less than 1 for each tensor.
        Of a pattern n:m one segment of m stands for every m weights; at its own k it keeps n.
        """
        if self.layer_type in PATTERNS:
            of = PATTERNS[self.layer_type][1]
            return (Segment(f"each {of}", 0, of, keep_count(k, of)),)
        if scope == "global":
            return (Segment("network", 0, self.groups, keep_count(k, self.groups)),)
        sizes = [tensor.groups for tensor in self.tensors]
        counts = [keep_count(k, size) for size in sizes]
        if scope == "erk":
            total = keep_count(k, self.groups)
            if total < len(sizes):
                raise UserError(f"k: {k} keeps {total} in {len(sizes)} layers; give a larger one")
            counts = erk([tensor.shape for tensor in self.tensors], sizes, total)
        return tuple(
            Segment(t.name, t.first_group, t.first_group + t.groups, count)
            for t, count in zip(self.tensors, counts, strict=True)
        )


def find_prunable(network: nn.Module, layer_type: LayerType, stem: bool = False) -> Layout:
    """The weights of conv and linear modules, tied weights once.

    Structured types prune convolutions only. `channel` leaves out the first convolution, whose
    inputs are the image's colours (`stem`: not, as published), and raises UserError for grouped
    convolutions. `filter` leaves out the last convolution of a network without linear layers (its
    outputs are the classes). A pattern n:m leaves out layers whose input channels, or inputs, do
    not divide by m, as the image's colours.
    """
    of = PATTERNS.get(layer_type, (1, 1))[1]
    tensors: list[PrunableTensor] = []
    seen: set[int] = set()
    start = first_group = convolutions = 0
    last = [m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))][-1:]
    if any(isinstance(module, nn.Linear) for module in network.modules()):
        last = []
    for module_name, module in network.named_modules():
        is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        convolutions += is_conv
        if not is_conv and not (isinstance(module, nn.Linear) and layer_type not in GROUP_AXIS):
            continue
        weight = module.weight
        if weight.shape[1] % of:
            continue
        if layer_type == "filter" and module in last:
            continue
        if id(weight) in seen or (
            layer_type == "channel" and is_conv and convolutions == 1 and not stem
        ):
            continue
        seen.add(id(weight))
        name = f"{module_name}.weight" if module_name else "weight"
        if layer_type == "channel" and getattr(module, "groups", 1) != 1:
            raise UserError(
                f"layer_type: channel cannot prune the grouped convolution {module_name}; "
                "use filter or unstructured"
            )
        axis = GROUP_AXIS.get(layer_type)
        tensor = PrunableTensor(name, weight.shape, start, weight[0].numel(), axis, first_group)
        tensors.append(tensor)
        start, first_group = tensor.stop, first_group + tensor.groups
    if not tensors:
        raise UserError(f"arch: the network has no weights that layer_type {layer_type} can prune")
    dense = tuple(
        name for name, p in network.named_parameters() if p.dim() > 1 and id(p) not in seen
    )
    return Layout(tuple(tensors), dense, layer_type)


@dataclass(frozen=True)
class Followers:
    """The per-filter parameters after a prunable convolution: bias, batch-norm affine pair."""

    tensor: PrunableTensor
    parameters: tuple[nn.Parameter, ...]


@torch.no_grad()
def find_followers(network: nn.Module, layout: Layout, sample: Tensor) -> tuple[Followers, ...]:
    """The batch-norm that takes each convolution's output, found by one forward of `sample`.

    Following the tensors works for any network and any module names. Only filter pruning has
    followers. The forward runs in eval mode and changes nothing.
    """
    if layout.layer_type != "filter":
        return ()
    producers: dict[int, nn.Module] = {}
    outputs: list[Tensor] = []  # kept alive, so that no id is used twice
    behind: dict[nn.Module, nn.Module] = {}

    def after_conv(module: nn.Module, _inputs: object, output: Tensor) -> None:
        producers[id(output)] = module
        outputs.append(output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (producer := producers.get(id(inputs[0]))) is not None:
            behind[producer] = module

    modules = dict(network.named_modules())
    handles = []
    for module in modules.values():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            handles.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_pre_hook(before_norm))
    modes = {module: module.training for module in modules.values()}
    try:
        network.eval()(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    followers = []
    for tensor in layout.tensors:
        conv = modules[tensor.name.removesuffix("weight").removesuffix(".")]
        norm = behind.get(conv)
        found = [conv.bias, *([norm.weight, norm.bias] if norm is not None else [])]
        kept = tuple(p for p in found if isinstance(p, nn.Parameter))
        if kept:
            followers.append(Followers(tensor, kept))
    return tuple(followers)
