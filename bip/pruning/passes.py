"""Passes over elements: z = m ⊙ θ and both levels' gradients.

On the CPU each is a compiled single pass over memory (`kernels`); elsewhere, and for other dtypes
or memory formats, they are torch operations. numba is imported when first needed.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


def is_compiled(*tensors: Tensor) -> bool:
    """Whether the compiled passes can take these tensors of floats."""
    return all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and t.is_contiguous()
        for t in tensors
    )


def spans(tensors: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """The part of a flat buffer of each of `tensors`, which follow one another."""
    start = 0
    for tensor in tensors:
        yield slice(start, start + tensor.numel()), tensor
        start += tensor.numel()


def mask_out(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """out = m ⊙ values, all of one shape. `out` may be `values`."""
    if not is_compiled(values, out):
        torch.mul(values, mask, out=out)
        return
    from bip.compiled import share
    from bip.pruning import kernels

    arrays = [tensor.view(-1).numpy() for tensor in (values, mask, out)]
    kernels.mask_out(share(values.numel()), *arrays)
    increment_version(out)  # autograd does not see writes through numpy


def write_products(weights: Tensor, mask: Tensor, z: Iterable[Tensor]) -> None:
    """z = m ⊙ θ, in place, for tensors one after the other in the flat `weights` and `mask`."""
    for span, tensor in spans(z):
        mask_out(weights[span].view(tensor.shape), mask[span].view(tensor.shape), tensor.detach())


def upper_gradient(
    g: Tensor, weights: Tensor, mask: Tensor, scores: Tensor, inv_gamma: float, out: Tensor
) -> None:
    """out = sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g, with +1 at s = 0; all flat. `out` may be `g`."""
    if not is_compiled(g, weights, scores, out):
        slope = torch.addcmul(weights, mask, g, value=-inv_gamma).mul_(g)
        torch.where(scores < 0, -slope, slope, out=out)
        return
    from bip.compiled import share
    from bip.pruning import kernels

    arrays = [tensor.numpy() for tensor in (g, weights, mask, scores, out)]
    kernels.upper_gradient(share(g.numel()), arrays[0].dtype.type(inv_gamma), *arrays)
    increment_version(out)
