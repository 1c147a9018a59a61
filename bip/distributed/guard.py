"""Ranks that drift apart are a bug: their state is compared, and the first difference named."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from bip.distributed.group import Group
from bip.errors import RankError, UserError
from bip.pruning.parameters import PrunedParameters

CHUNK = 1 << 22


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> Tensor:
    """A 64-bit hash (int64, on the tensor's device) of a tensor's bits and their places.

    sum of bits_i · (2i + 1) mod 2^64: integer sums do not depend on the order of addition, and the
    factors are odd, so that a change of any single element always shows.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        place = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * place + 1)).sum()
    return total


def run_state(
    network: nn.Module,
    pruned: PrunedParameters | None,
    optimizers: dict[str, torch.optim.Optimizer],
    buffers: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Everything that must be the same on all ranks, by name. Buffers only once they are shared."""
    if pruned is not None:
        yield "weights", pruned.weights
        yield "scores", pruned.scores
        yield "mask", pruned.mask
    yield from network.named_parameters()
    if buffers:
        yield from network.named_buffers()
    for level, optimizer in optimizers.items():
        for number, state in enumerate(optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{level} optimizer {name} {number}", value


def compare_ranks(state: Iterable[tuple[str, Tensor]], group: Group) -> None:
    """Raise RankError, on every rank, naming the first tensor that differs and the ranks.

    One all-gather of eight bytes per tensor. Waits for the device.
    """
    if group.world == 1:
        return
    names, hashes = zip(*((name, hash_tensor(tensor)) for name, tensor in state), strict=True)
    rows = group.gather(torch.stack([h.to(group.device) for h in hashes])).cpu()
    usual = rows.mode(0).values
    for column, name in enumerate(names):
        odd = (rows[:, column] != usual[column]).nonzero().flatten().tolist()
        if odd:
            # Of two nobody can say which one is right.
            others = "the others" if group.world > 2 else "rank 0"
            who = f"rank {', '.join(map(str, odd))} against {others}"
            raise RankError(
                f"{name}: differs between ranks ({who}); the run stops before it is saved, the "
                "last checkpoint is good"
            )


def check_finite(state: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise UserError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in state:
        # A sum keeps them, in a single read pass.
        if tensor.is_floating_point() and not bool(tensor.detach().sum().isfinite()):
            raise UserError(
                f"{name}: not finite at step {step}; training diverged, lower lr or mask_lr (this "
                "step is not saved, the checkpoint before it is kept)"
            )
