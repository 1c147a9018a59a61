"""The selector of n:m patterns: of every m weights along the input dimension it keeps n.

The m of a convolution's group are neighbours among the input channels, at one output channel and
one place of the kernel: the groups of NVIDIA's tool (apex, contrib/sparsity/sparse_masklib.py),
and m neighbours in a row of the matrix (out, kernel · in) of a channels-last weight, as torch's
semi-structured tensors want. The choice is local to a group, so ranks need not exchange anything.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bip.pruning.layout import PrunableTensor, Segment, with_counts
from bip.pruning.passes import write_products
from bip.pruning.select import INFINITY, MAGNITUDE, NanError
from bip.pruning.select_cuda import proof_of


def in_groups(flat: Tensor, tensor: PrunableTensor, of: int) -> Tensor:
    """A tensor's part of a flat buffer as (out, in / m, m, kernel): dimension 2 is the group."""
    shape = tensor.shape
    part = flat[tensor.start : tensor.stop]
    return part.view(shape[0], shape[1] // of, of, math.prod(shape[2:]))


class PatternSelector:
    """See `Selector`. Its one segment, of m values, stands for every group.

    Torch operations that never wait for the device, but for the check for NaN on the CPU.
    """

    def __init__(
        self,
        tensors: tuple[PrunableTensor, ...],
        segments: tuple[Segment, ...],
        device: torch.device,
    ) -> None:
        self.tensors, self.segments = tensors, segments
        self.nan = torch.zeros((), dtype=torch.bool, device=device)

    def keep(self, counts: Sequence[int]) -> None:
        self.segments = with_counts(self.segments, counts)

    @torch.no_grad()
    def update(
        self,
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        keys = values.view(torch.int32) & int(MAGNITUDE)
        self.nan |= (keys > int(INFINITY)).any()
        if values.device.type == "cpu":
            self.check()
        (segment,) = self.segments
        for tensor in self.tensors:
            key = in_groups(keys, tensor, segment.size)
            place = torch.zeros_like(key, dtype=torch.uint8)  # the number that come before it
            for later in range(1, segment.size):
                for earlier in range(later):
                    wins = key[:, :, earlier] >= key[:, :, later]  # ties go to the lower index
                    place[:, :, later] += wins
                    place[:, :, earlier] += ~wins
            in_groups(mask, tensor, segment.size).copy_(place < segment.keep)
        if weights is not None:
            write_products(weights, mask, z)
        return proof_of(mask)

    def check(self) -> None:
        if self.nan.any():
            raise NanError("NaN")
