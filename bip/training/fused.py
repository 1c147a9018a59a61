"""Both levels' SGD steps, each in one compiled pass over memory, on the CPU.

The plain way passes over memory for the gradient, for torch's step and for z. Here a weight's g, m,
θ and momentum are read once, and its θ, momentum and z written once. The bits are those of torch's
fused SGD: `rounds_as_torch` compares them on this machine. Where they differ, or for another
optimizer or memory format, the two steps change nothing and return False.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Optimizer

from bip.pruning.passes import mask_out, upper_gradient
from bip.pruning.state import PrunedParameters, gradient_of

# torch steps vectors of up to so many values; those after the last whole one it steps one by one,
# which rounds otherwise. They are left to torch.
VECTOR = 16


@torch.no_grad()
def lower_step(optimizer: Optimizer, pruned: PrunedParameters) -> bool:
    """SGD's step of θ by m ⊙ g, and z = m ⊙ θ. Moves no other parameters."""
    step = _Step.of(optimizer, pruned.weights, pruned.z)
    if step is None:
        return False
    from bip.compiled import share
    from bip.pruning import kernels

    weights, mask = pruned.weights.detach(), pruned.mask
    kernels.lower_step(
        share(step.whole), step.whole, step.starts, step.gradients, _addresses(pruned.z),
        mask.numpy(), weights.numpy(), step.momentum.numpy(), step.sgd,
    )  # fmt: skip
    rest = [(tensor, z) for tensor, z in zip(pruned.layout.tensors, pruned.z, strict=True)
            if tensor.stop > step.whole]  # fmt: skip
    for tensor, z in rest:
        part = slice(tensor.start, tensor.stop)
        mask_out(gradient_of(z).view(-1), mask[part], pruned.gradient[part])
    step.leave_rest(pruned.gradient[step.whole :])
    for tensor, z in rest:
        part = slice(tensor.start, tensor.stop)
        mask_out(weights[part], mask[part], z.detach().view(-1))
    for changed in (pruned.weights, step.momentum, *pruned.z):
        increment_version(changed)  # autograd does not see writes through numpy
    pruned.weights.grad = None
    return True


@torch.no_grad()
def upper_step(
    optimizer: Optimizer, pruned: PrunedParameters, inv_gamma: float, scaled: bool
) -> bool:
    """SGD's step of the scores, by the gradient of `set_upper_gradient`. Moves nothing else.

    `scaled`: as after `scale_dead_filters`, which needs the gradient of a whole layer. So layers
    with such filters, and those that torch steps a part of, get theirs in `pruned.gradient` first.
    """
    step = _Step.of(optimizer, pruned.scores, pruned.z)
    if step is None:
        return False
    from bip.compiled import share
    from bip.pruning import kernels

    weights, scores, mask = pruned.weights.detach(), pruned.scores.detach(), pruned.mask
    given = step.starts[1:] > step.whole
    if scaled:
        given[pruned.layers_with_dead_filters()] = True
    for layer in np.flatnonzero(given):
        part = slice(*step.starts[layer : layer + 2].tolist())
        g, out = gradient_of(pruned.z[layer]).view(-1), pruned.gradient[part]
        upper_gradient(g, weights[part], mask[part], scores[part], inv_gamma, out)
        step.gradients[layer] = out.data_ptr()
    if scaled:
        pruned.scale_dead_filters(np.flatnonzero(given).tolist())
    kernels.upper_step(
        share(step.whole), step.whole, step.starts, step.gradients, given,
        np.float32(inv_gamma), weights.numpy(), mask.numpy(), scores.numpy(),
        step.momentum.numpy(), step.sgd,
    )  # fmt: skip
    step.leave_rest(pruned.gradient[step.whole :])
    for tensor in (pruned.scores, step.momentum):
        increment_version(tensor)
    pruned.scores.grad = None
    return True


class _Step:
    """What a step of the flat `tensor` needs. `whole`: how many values are stepped here."""

    def __init__(self, tensor: Tensor, momentum: Tensor, z: Sequence[Tensor], group: Any) -> None:
        self.tensor, self.momentum = tensor.detach(), momentum
        self.whole = tensor.numel() // VECTOR * VECTOR
        self.starts = np.cumsum([0, *(t.numel() for t in z)])
        self.gradients = _addresses([gradient_of(t) for t in z])
        self.rates = [group[name] for name in ("lr", "momentum", "weight_decay")]
        self.sgd: NDArray[np.float32] = np.array(self.rates, np.float32)

    @classmethod
    def of(cls, optimizer: Optimizer, tensor: Tensor, z: Sequence[Tensor]) -> Self | None:
        """None where torch has to step the tensor."""
        momentum = optimizer.state[tensor].get("momentum_buffer")  # none before the first step
        group = next(
            (g for g in optimizer.param_groups if any(p is tensor for p in g["params"])), {}
        )
        plain = isinstance(optimizer, SGD) and group.get("fused") and group["momentum"] != 0
        if momentum is None or not plain or group["dampening"] or group["nesterov"]:
            return None
        if group["maximize"] or not isinstance(group["lr"], float):
            return None
        tensors = (tensor, momentum, *z, *map(gradient_of, z))
        if not all(
            t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous()
            for t in tensors
        ):
            return None
        return cls(tensor, momentum, z, group) if rounds_as_torch() else None

    def leave_rest(self, gradient: Tensor) -> None:
        """Have torch step the rest."""
        if gradient.numel():
            rest = slice(self.whole, None)
            _torch_step(self.tensor[rest], gradient, self.momentum[rest], *self.rates)


@cache
def rounds_as_torch() -> bool:
    """Whether `kernels.lower_step` gives the bits of torch's fused SGD on this machine.

    torch's depend on its compiler and on the processor: on where it rounds once for a · b + c.
    """
    from bip.pruning import kernels

    size, draw = 4096, torch.Generator().manual_seed(0)
    g, weights, momentum = (torch.randn(size, generator=draw) for _ in range(3))
    ones, z = torch.ones(size, dtype=torch.uint8), torch.empty(size)
    starts = np.array([0, size])
    for values in ((0.1, 0.9, 5e-4), (0.0123, 0.95, 0.0)):
        expected = weights.clone(), momentum.clone()
        _torch_step(expected[0], g, expected[1], *values)
        kernels.lower_step(
            1, size, starts, _addresses([g]), _addresses([z]), ones.numpy(), weights.numpy(),
            momentum.numpy(), np.array(values, np.float32),
        )  # fmt: skip
        if not (torch.equal(weights, expected[0]) and torch.equal(momentum, expected[1])):
            text = "warning: SGD steps are torch's own, which are slower: this processor rounds"
            print(f"{text} otherwise", file=sys.stderr, flush=True)
            return False
    return True


def _torch_step(
    values: Tensor, gradient: Tensor, momentum: Tensor, lr: float, rate: float, decay: float
) -> None:
    torch._fused_sgd_(
        [values], [gradient], [momentum], weight_decay=decay, momentum=rate, lr=lr, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)
