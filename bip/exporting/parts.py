"""What a smaller network has besides its layers. `load_state_dict` fills the buffers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Take(nn.Module):
    """(N, C, ...) -> (N, n, ...): the channels that the next layer uses."""

    index: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(size, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class Fill(nn.Module):
    """(N, C, ...) -> (N, n, ...): channels of the input, and constants between them."""

    index: Tensor
    constants: Tensor

    def __init__(self, size: int, constants: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("constants", torch.zeros(constants))

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        constants = self.constants.view(shape).expand(x.shape[0], -1, *x.shape[2:])
        return torch.cat([x, constants], 1).index_select(1, self.index)


class Ones(nn.Module):
    """(N, C, ...) -> (N, C + 1, ...): the last channel is 1 inside the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, 1], value=1.0)


class Sum(nn.Module):
    """Sum of one or two values (N, C1, ...), (N, C2, ...), each with a part of the `size` channels.

    `places` are the lengths of the values' indices, None for a value with all channels.
    """

    def __init__(self, size: int, places: Sequence[int | None], constant: bool) -> None:
        super().__init__()
        self.size, self.whole = size, [n is None for n in places]
        for i, n in enumerate(places):
            if n is not None:
                self.register_buffer(f"index{i}", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("constant", torch.zeros(size) if constant else None)

    def forward(self, *values: Tensor) -> Tensor:
        whole = [x for x, is_whole in zip(values, self.whole, strict=True) if is_whole]
        first = values[0]
        total = whole[0] if whole else first.new_zeros(first.shape[0], self.size, *first.shape[2:])
        for i, x in enumerate(values):
            if not self.whole[i]:
                total = total.index_add(1, self.get_buffer(f"index{i}"), x)
        if len(whole) == 2:
            total = total + whole[1]
        constant = self._buffers["constant"]
        if constant is None:  # never the value itself: the next operation may write in place
            return total.clone() if total is first else total
        return total + constant.view(-1, *[1] * (first.dim() - 2))
