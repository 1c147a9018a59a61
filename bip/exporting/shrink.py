"""A smaller network with the same outputs: without the channels that a mask has emptied.

Every channel (dimension 1) of every value in the network is followed. Forward: it is *fixed* if it
is one constant for all images and positions, as is a pruned filter's output. Backward: it is
*needed* if a result depends on it. Channels that are needed and not fixed are kept; all others
leave the weights. A fixed channel acts on through the constant that it is:

- in the next layer's bias; where that layer pads by zeros, by one more input channel, of ones;
- in a sum, as a vector that is added. So the two sides of a shortcut may keep different channels;
- an operation that is not known here gets its inputs whole, and keeps its output whole.

A layer takes exactly the channels that it uses, by an index where the value before has more. Only
the network's evaluation mode stays the same.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bip.errors import UserError
from bip.exporting.channels import (
    CONVS,
    NORMS,
    POINTWISE_MODULES,
    POOL_MODULES,
    Channels,
    Nothing,
    Whole,
    rule_of,
)  # fmt: skip
from bip.exporting.parts import Fill, Ones, Sum, Take

Spec = dict[str, dict[str, Any]]  # what changes, by node; of plain types, for JSON


@dataclass(frozen=True)
class Shrunk:
    """A smaller network: what changes by node, its state_dict, and what had to stay whole."""

    spec: Spec
    state: dict[str, Tensor]
    whole: list[str]


class Tracer(fx.Tracer):
    """Follows the operations of a forward; a part that it cannot follow is one of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*POINTWISE_MODULES, *POOL_MODULES))
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # it runs the part's own code; what was followed so far is dead code
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def trace(network: nn.Module) -> fx.GraphModule:
    """The network's operations as a graph. Raises UserError for one that cannot be traced."""
    try:
        traced = fx.GraphModule(network, Tracer().trace(network.eval()))
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced
    except Exception as error:  # tracing runs the network's own code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"format: compact cannot follow this network's forward ({reason}); export it as dense"
        ) from None


@torch.no_grad()
def shrink(network: nn.Module, sample: Tensor) -> Shrunk:
    """Find the smaller network with the outputs of `network` (weights masked) in evaluation mode.

    `sample`: images (n, channels, height, width); only their shape matters.
    """
    own = network.state_dict()
    graph = trace(copy.deepcopy(network).double())
    ShapeProp(graph).propagate(sample.double())
    modules = dict(graph.named_modules())
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    values: dict[fx.Node, Channels] = {}
    rules: dict[fx.Node, Whole] = {}
    for node in graph.graph.nodes:
        meta = node.meta.get("tensor_meta")
        shape = getattr(meta, "shape", torch.Size())
        inputs = [values[n] for n in node.all_input_nodes if n in values]
        module = modules[str(node.target)] if node.op == "call_module" else None
        rules[node] = rule_of(node, module, inputs, shape, calls.count(str(node.target)))
        if len(shape) >= 2:
            values[node] = Channels(shape, *rules[node].fixed(shape[1]))
    for node in reversed(graph.graph.nodes):
        rule, kept = rules[node], torch.zeros(0, dtype=torch.int64)
        if node in values:
            value = values[node]
            value.kept = kept = rule.keep(value.needed & value.live).nonzero().flatten()
        if isinstance(rule, Nothing):
            continue
        for value, places in zip(rule.inputs, rule.request(kept), strict=True):
            value.needed[places] = True
    spec: Spec = {}
    tensors: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        rule = rules[node]
        kept = values[node].kept if node in values else torch.zeros(0, dtype=torch.int64)
        entry, new = rule.change(kept)
        prefix = str(node.target) if "layer" in entry or rule.module is not None else f"{node}_sum"
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in new.items()}
        at = [i for i, n in enumerate(node.all_input_nodes) if n in values]
        for i, value, places in zip(at, rule.inputs, rule.request(kept), strict=True):
            if len(places) and not torch.equal(places, value.kept):
                fits, new = _fit(value, places)
                entry.setdefault("fit", {})[str(i)] = fits
                tensors |= {f"{node}_fit{i}.{name}": tensor for name, tensor in new.items()}
        if entry:
            spec[node.name] = entry
    small = rebuild(network, spec)
    state = {}
    for name, place in small.state_dict().items():
        found = tensors.get(name, own.get(name, place))
        state[name] = found.to(place.dtype).contiguous().clone()
    plain = (Whole, Nothing)
    names = {
        f"{n.target if n.op == 'call_module' else getattr(n.target, '__name__', n.target)}"
        for n, rule in rules.items()
        if type(rule) in plain and n.op.startswith("call") and n in values
    }
    return Shrunk(spec, state, sorted(names))


def _fit(value: Channels, places: Tensor) -> tuple[dict[str, int], dict[str, Tensor]]:
    """How a value that keeps `value.kept` becomes one with the channels `places`."""
    position = torch.zeros(len(value.fixed), dtype=torch.int64)
    position[value.kept] = torch.arange(len(value.kept))
    missing = ~torch.isin(places, value.kept)
    index, count = position[places], int(missing.sum())
    index[missing] = len(value.kept) + torch.arange(count)
    tensors = {"index": index}
    if count:
        tensors["constants"] = value.value[places[missing]]
    return {"size": len(places), "constants": count}, tensors


def rebuild(network: nn.Module, spec: Spec) -> fx.GraphModule:
    """The smaller network of `spec`, its tensors yet to be loaded; `network` is left as it is.

    Raises ValueError if the network is not the one that `spec` was made for.
    """
    small = trace(copy.deepcopy(network))
    dtype = next((p.dtype for p in small.parameters()), torch.float32)
    nodes = {node.name: node for node in small.graph.nodes}
    for name, entry in spec.items():
        if name not in nodes:
            raise ValueError(f"it has no {name}")
        node = nodes[name]
        inputs = list(node.all_input_nodes)
        for i, fit in entry.get("fit", {}).items():
            part = Fill(fit["size"], fit["constants"]) if fit["constants"] else Take(fit["size"])
            new = _call(small, node, f"{name}_fit{i}", part.to(dtype), [inputs[int(i)]])
            node.replace_input_with(inputs[int(i)], new)
        if "ones" in entry:
            (value,) = node.all_input_nodes
            node.replace_input_with(value, _call(small, node, f"{name}_ones", Ones(), [value]))
        if "layer" in entry:
            layer = small.get_submodule(str(node.target))
            small.set_submodule(str(node.target), _resized(layer, entry["layer"]).to(dtype))
        if "pad" in entry:
            node.args = (node.args[0], entry["pad"], *node.args[2:])
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "pad"}
        if (total := entry.get("sum")) is not None:
            terms = [list(node.all_input_nodes)[i] for i in total["used"]]
            summed = Sum(total["size"], total["places"], total["constant"])
            node.replace_all_uses_with(_call(small, node, f"{name}_sum", summed.to(dtype), terms))
    small.graph.eliminate_dead_code()
    small.delete_all_unused_submodules()
    small.graph.lint()
    small.recompile()
    return small.eval()


def _call(
    graph: fx.GraphModule, before: fx.Node, name: str, module: nn.Module, inputs: list[fx.Node]
) -> fx.Node:
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(before):
        return graph.graph.call_module(name, tuple(inputs))


def _resized(layer: nn.Module, sizes: dict[str, Any]) -> nn.Module:
    """A layer like this one, with other sizes."""
    if isinstance(layer, CONVS):
        same: tuple[str, ...] = (
            "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        )  # fmt: skip
    else:
        same = ("eps", "momentum", "affine") if isinstance(layer, NORMS) else ()
    options = {name: getattr(layer, name) for name in same} | sizes
    return type(layer)(**options)
