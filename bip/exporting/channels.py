"""What each operation does to channels: which it fixes, which it keeps, which it takes.

To have an operation followed that is not known here, add it to one of the sets below, or a class
and its case in `rule_of`.
"""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POINTWISE = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.dropout, torch.relu, torch.sigmoid, torch.tanh,
    torch.clamp, "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone",
}  # fmt: skip
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
AVERAGES = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
POOLS = AVERAGES | {
    F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # fmt: skip
MEANS = {torch.mean, "mean"}
FLATTENS = {torch.flatten, "flatten", "view", "reshape", torch.reshape}
CATS = {torch.cat, torch.concat}


@dataclass
class Channels:
    """Of a value's C channels: which are fixed, at what, which are kept. `shape` is the value's."""

    shape: torch.Size
    fixed: Tensor
    value: Tensor
    needed: Tensor = field(init=False)
    kept: Tensor = field(init=False)  # places, ascending; never empty

    def __post_init__(self) -> None:
        self.needed = torch.zeros_like(self.fixed)

    @property
    def live(self) -> Tensor:
        return ~self.fixed

    def constants(self) -> Tensor:
        """The fixed channels as a value of one image and one position."""
        return self.value.view(1, -1, *[1] * (len(self.shape) - 2)).clone()


class Whole:
    """Any operation: takes its inputs whole and keeps its output whole."""

    def __init__(self, node: fx.Node, module: nn.Module | None, inputs: list[Channels]) -> None:
        self.node, self.module, self.inputs = node, module, inputs

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        """Which of the output's `size` channels are fixed, and their values."""
        return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)

    def keep(self, wanted: Tensor) -> Tensor:
        """Which output channels (bool) are kept, if these are wanted."""
        return torch.ones_like(wanted)

    def request(self, kept: Tensor) -> list[Tensor]:
        """The places of each input that the operation takes, for the output's places `kept`."""
        return [torch.arange(len(value.fixed)) for value in self.inputs]

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What of the operation changes (for JSON), and its new tensors by their names in it."""
        return {}, {}


class Nothing(Whole):
    """An operation that takes nothing from the channels, such as the size of the batch."""

    def request(self, kept: Tensor) -> list[Tensor]:
        return [value.kept for value in self.inputs]


class Channelwise(Whole):
    """Output channel c depends on channel c of the inputs alone."""

    def __init__(self, *args: Any, at: Callable[..., Tensor], zeros: bool = False) -> None:
        """`at`: the operation on constants. `zeros`: only a constant of 0 stays one constant."""
        super().__init__(*args)
        self.at, self.zeros = at, zeros

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        both = torch.stack([value.fixed for value in self.inputs]).all(0)
        if self.zeros:
            both &= self.inputs[0].value == 0
        found = self.at(*[value.constants() for value in self.inputs]).flatten()
        return both, torch.where(both, found, 0.0)

    def keep(self, wanted: Tensor) -> Tensor:
        return wanted if bool(wanted.any()) else _only(0, len(wanted))

    def request(self, kept: Tensor) -> list[Tensor]:
        return [kept for _ in self.inputs]


class Product(Channelwise):
    """The product of two values: zero where one of them is."""

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        both, found = super().fixed(size)
        for value in self.inputs:
            zero = value.fixed & (value.value == 0)
            both, found = both | zero, torch.where(zero, 0.0, found)
        return both, found


class Addition(Channelwise):
    """The sum of two values, each of which may lack channels: the constants are added once."""

    def request(self, kept: Tensor) -> list[Tensor]:
        parts = [kept[value.live[kept]] for value in self.inputs]
        # A value without living channels is left out, unless there is no other.
        return parts if any(map(len, parts)) else [kept[:0], kept]

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        requests = self.request(kept)
        used = [i for i, part in enumerate(requests) if len(part)]
        constant = torch.zeros(len(kept), dtype=torch.float64)
        tensors, places = {}, []
        for i, (value, part) in enumerate(zip(self.inputs, requests, strict=True)):
            missing = ~torch.isin(kept, part)
            constant[missing] += value.value[kept[missing]]
            if i in used:
                places.append(len(part) if bool(missing.any()) else None)
                if places[-1] is not None:
                    tensors[f"index{len(places) - 1}"] = (~missing).nonzero().flatten()
        has_constant = bool(constant.any())
        if len(used) == 2 and places == [None, None] and not has_constant:
            return {}, {}
        if has_constant:
            tensors["constant"] = constant
        summed = {"size": len(kept), "places": places, "constant": has_constant, "used": used}
        return {"sum": summed}, tensors


class Norm(Channelwise):
    """Batch-norm, by its running statistics. A channel with a slope of 0 is fixed at its bias."""

    module: nn.BatchNorm2d

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        both, found = super().fixed(size)
        if self.module.affine:
            flat = self.module.weight == 0
            both, found = both | flat, torch.where(flat, self.module.bias, found)
        return both, found

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if len(kept) == self.module.num_features:
            return {}, {}
        names = ["running_mean", "running_var", *(["weight", "bias"] if self.module.affine else [])]
        tensors = {name: getattr(self.module, name)[kept] for name in names}
        return {"layer": {"num_features": len(kept)}}, tensors


class Depthwise(Channelwise):
    """A convolution of each channel by itself."""

    module: nn.Conv2d

    def __init__(self, *args: Any) -> None:
        module = args[1]
        weight = module.weight.detach().flatten(1)
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()

        def at(value: Tensor) -> Tensor:
            out: Tensor = value * weight.sum(1).view_as(value) + bias.view_as(value)
            return out

        super().__init__(*args, at=at, zeros=_pads(module))
        self.dead, self.bias = ~(weight != 0).any(1), bias

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        fixed, found = super().fixed(size)
        return fixed | self.dead, torch.where(self.dead, self.bias, found)

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        n, bias = len(kept), self.module.bias
        if n == self.module.out_channels:
            return {}, {}
        tensors = {"weight": self.module.weight[kept]}
        if bias is not None:
            tensors["bias"] = bias[kept]
        sizes = {"in_channels": n, "out_channels": n, "groups": n, "bias": bias is not None}
        return {"layer": sizes}, tensors


class Layer(Whole):
    """A convolution or a linear layer."""

    module: nn.Conv2d | nn.Linear

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        (value,) = self.inputs
        self.weight = self.module.weight.detach()
        kernel = list(range(2, self.weight.dim()))
        self.uses = (self.weight != 0).sum(kernel) > 0 if kernel else self.weight != 0
        self.uses = self.uses & value.live
        # What the fixed channels give each output together: a kernel on an image of ones.
        fixed = torch.where(value.fixed, value.value, 0.0)
        self.of_fixed = torch.tensordot(self.weight, fixed, dims=([1], [0]))
        # By a padding of zeros it depends on the position.
        self.pads = isinstance(self.module, CONVS) and _pads(self.module)

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        fixed = ~self.uses.any(1)
        if self.pads:
            fixed &= ~(self.of_fixed != 0).flatten(1).any(1)
        value = self.of_fixed.flatten(1).sum(1) if self.of_fixed.dim() > 1 else self.of_fixed
        if self.module.bias is not None:
            value = value + self.module.bias
        return fixed, torch.where(fixed, value, 0.0)

    def keep(self, wanted: Tensor) -> Tensor:
        return wanted if bool(wanted.any()) else _only(0, len(wanted))

    def request(self, kept: Tensor) -> list[Tensor]:
        used = self.uses[kept].any(0)
        return [(used if bool(used.any()) else _only(0, len(used))).nonzero().flatten()]

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        (taken,) = self.request(kept)
        (value,) = self.inputs
        is_conv = isinstance(self.module, CONVS)
        # What is taken though it is fixed, as a layer has one input at least, counts once.
        weight = torch.where(value.fixed[taken].view(1, -1, *[1] * (self.weight.dim() - 2)),
                             0.0, self.weight[kept][:, taken])  # fmt: skip
        of_fixed = self.of_fixed[kept]
        ones = self.pads and bool((of_fixed != 0).any())
        bias = self.module.bias[kept] if self.module.bias is not None else None
        if ones:
            weight = torch.cat([weight, of_fixed[:, None]], 1)
        elif bool((of_fixed != 0).any()):
            added = of_fixed.flatten(1).sum(1) if of_fixed.dim() > 1 else of_fixed
            bias = added if bias is None else bias + added
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        same_bias = (bias is None) == (self.module.bias is None)
        if weight.shape == self.weight.shape and same_bias and not ones:
            return {}, tensors
        names = ("in_channels", "out_channels") if is_conv else ("in_features", "out_features")
        sizes = {names[0]: weight.shape[1], names[1]: len(kept), "bias": bias is not None}
        return {"layer": sizes, **({"ones": True} if ones else {})}, tensors


class Cat(Whole):
    """Values behind one another in the channels; one of each is kept at least."""

    def _starts(self) -> list[int]:
        sizes = [len(value.fixed) for value in self.inputs]
        return [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat([getattr(v, n) for v in self.inputs]) for n in ("fixed", "value"))  # type: ignore[return-value]

    def keep(self, wanted: Tensor) -> Tensor:
        kept = wanted.clone()
        starts = self._starts()
        for start, stop in itertools.pairwise(starts):
            kept[start] |= not bool(wanted[start:stop].any())
        return kept

    def request(self, kept: Tensor) -> list[Tensor]:
        starts = self._starts()
        return [
            kept[(kept >= start) & (kept < stop)] - start
            for start, stop in itertools.pairwise(starts)
        ]


class Pad(Whole):
    """A padding by a constant, of the channels too, which leaves with them."""

    def __init__(self, *args: Any, pads: list[int], value: float) -> None:
        super().__init__(*args)
        spatial = 2 * (len(self.inputs[0].shape) - 2)
        self.spatial, (self.left, self.right) = pads[:spatial], [*pads[spatial:], 0, 0][:2]
        self.by = value

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        (value,) = self.inputs
        inner = value.fixed & ((value.value == self.by) | (not any(self.spatial)))
        fixed = F.pad(inner, (self.left, self.right), value=True)
        return fixed, F.pad(
            torch.where(inner, value.value, 0.0), (self.left, self.right), value=self.by
        )

    def keep(self, wanted: Tensor) -> Tensor:
        return wanted if bool(wanted.any()) else _only(self.left, len(wanted))

    def request(self, kept: Tensor) -> list[Tensor]:
        return [kept - self.left]

    def change(self, kept: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ({"pad": [*self.spatial, 0, 0]} if self.left or self.right else {}), {}


class Flatten(Whole):
    """(N, C, ...) -> (N, C · positions): whole channels are kept."""

    @property
    def positions(self) -> int:
        return self.inputs[0].shape[2:].numel()

    def fixed(self, size: int) -> tuple[Tensor, Tensor]:
        (value,) = self.inputs
        return tuple(t.repeat_interleave(self.positions) for t in (value.fixed, value.value))  # type: ignore[return-value]

    def keep(self, wanted: Tensor) -> Tensor:
        channels = wanted.view(-1, self.positions).any(1)
        channels = channels if bool(channels.any()) else _only(0, len(channels))
        return channels.repeat_interleave(self.positions)

    def request(self, kept: Tensor) -> list[Tensor]:
        return [kept[:: self.positions] // self.positions]


def _only(place: int, size: int) -> Tensor:
    return torch.arange(size) == place


def _pads(conv: nn.Module) -> bool:
    """Whether a convolution adds zeros around the image."""
    assert isinstance(conv, CONVS)
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    return isinstance(conv.padding, str) or any(conv.padding)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def rule_of(
    node: fx.Node, module: nn.Module | None, inputs: list[Channels], shape: torch.Size, uses: int
) -> Whole:
    """What the node does to channels. `uses`: how many nodes call its module."""
    basic: Any = (node, module, inputs)
    target, first = node.target, inputs[0] if inputs else None
    if target == "size" and node.args[1:] == (0,):
        return Nothing(*basic)
    if first is None or len(inputs) != len(node.all_input_nodes) or len(shape) < 2:
        return Whole(*basic)
    same = all(v.shape[:2] == first.shape[:2] and len(v.shape) == len(shape) for v in inputs)

    def at(*constants: Tensor) -> Tensor:
        of = dict(zip(node.all_input_nodes, constants, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: of[n])
        if module is not None:
            return cast(Tensor, module(*args))
        if node.op == "call_method":
            return cast(Tensor, getattr(args[0], str(target))(*args[1:], **kwargs))
        return cast(Tensor, cast(Any, target)(*args, **kwargs))

    def identity(value: Tensor) -> Tensor:
        return value

    if isinstance(module, (*CONVS, nn.Linear, *NORMS)) and (uses > 1 or len(inputs) != 1):
        return Whole(*basic)
    if isinstance(module, nn.Linear):
        return Layer(*basic) if len(first.shape) == 2 else Whole(*basic)
    if isinstance(module, CONVS):
        if module.groups == 1:
            return Layer(*basic)
        if module.groups == module.in_channels == module.out_channels:
            return Depthwise(*basic)
        return Whole(*basic)
    if isinstance(module, NORMS) and module.track_running_stats:
        return Norm(*basic, at=at)
    if isinstance(module, POOL_MODULES):
        padded = isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
        has_padding = padded and any(torch.tensor(module.padding).flatten().tolist())
        return Channelwise(*basic, at=identity, zeros=has_padding)
    if isinstance(module, POINTWISE_MODULES):
        return Channelwise(*basic, at=at)
    if isinstance(module, nn.Flatten):
        flat = (module.start_dim, module.end_dim) in ((1, -1), (1, len(first.shape) - 1))
        return Flatten(*basic) if flat and len(shape) == 2 else Whole(*basic)
    if module is not None or node.op not in ("call_function", "call_method"):
        return Whole(*basic)
    if target in POINTWISE and len(inputs) == 1:
        return Channelwise(*basic, at=at)
    if target in SUMS and not node.kwargs and same:
        plain = len(inputs) == 2 and inputs[0].shape == inputs[1].shape
        return (Addition if plain else Channelwise)(*basic, at=at)
    if target in PRODUCTS and same:
        return Product(*basic, at=at)
    if target in POOLS and len(inputs) == 1:
        padding = _argument(node, 3, "padding", 0) if target in AVERAGES else 0
        return Channelwise(*basic, at=identity, zeros=padding not in (0, (0,), (0, 0), (0, 0, 0)))
    if target in MEANS and len(inputs) == 1 and len(first.shape) > 2:
        dims = _argument(node, 1, "dim", None)
        dims = [dims] if isinstance(dims, int) else dims
        if dims and all(d % len(first.shape) > 1 for d in dims):
            return Channelwise(*basic, at=identity)
    if target is operator.getitem and isinstance(node.args[1], tuple):
        before = node.args[1][:2]
        slices = all(isinstance(part, slice) for part in node.args[1])
        if slices and all(part == slice(None) for part in before):
            return Channelwise(*basic, at=identity)
    if target is F.pad and _argument(node, 2, "mode", "constant") == "constant":
        pads = [*_argument(node, 1, "pad", ())]
        numbers = all(isinstance(p, int) and p >= 0 for p in pads)
        if numbers and not any(pads[2 * (len(first.shape) - 1) :]):
            return Pad(*basic, pads=pads, value=float(_argument(node, 3, "value", 0) or 0))
    if target in CATS and _argument(node, 1, "dim", 0) in (1, 1 - len(shape)):
        values = node.args[0]
        if isinstance(values, (list, tuple)) and len(values) == len(inputs):
            return Cat(*basic)
    flattens = target in FLATTENS and len(inputs) >= 1 and len(first.shape) > 2 and len(shape) == 2
    if flattens and shape[1] == first.shape[1:].numel() and shape[0] == first.shape[0]:
        by_size = target in (torch.flatten, "flatten") or node.args[-1] in (-1, (-1,))
        return Flatten(*basic) if by_size and len(inputs) == 1 else Whole(*basic)
    return Whole(*basic)
