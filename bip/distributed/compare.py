"""Compare the state of all ranks, which must be equal, and name the first difference."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bip.distributed.group import Group
from bip.errors import RankError, UserError
from bip.pruning.state import PrunedParameters

CHUNK = 1 << 18  # 8-byte words hashed at once, so that they stay in a CPU's cache


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> Tensor:
    """A 64-bit hash (int64, on the tensor's device) of a tensor's bits and their places.

    Each 8-byte word is mixed with its place (by the finaliser of splitmix64, a bijection), and the
    results are added: an integer sum does not depend on the order of addition. A change of one
    word always changes the hash; changes of several cancel out with probability 2^-64.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.full((), len(flat), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), 8 * CHUNK):
        part = flat[start : start + 8 * CHUNK]
        words = torch.zeros(-(-len(part) // 8), dtype=torch.int64, device=tensor.device)
        words.view(torch.uint8)[: len(part)] = part
        place = torch.arange(start // 8, start // 8 + len(words), device=tensor.device)
        words += place.mul_(_signed(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            # A right shift of int64 repeats the sign bit; the mask removes the copies.
            words ^= (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
            if factor != 1:
                words *= _signed(factor)
        total += words.sum()
    return total


def _signed(bits: int) -> int:
    return bits - (1 << 64)


def describe_difference(values: Sequence[str]) -> str | None:
    """The ranks by value: "rank 2 has a, the others have b"; None if all have the same.

    "The others" are more than half of all ranks. Of two ranks either may be right, so both are
    named.
    """
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return None
    odd, others = [], []
    for value, ranks in holders.items():
        if 2 * len(ranks) > len(values):
            others.append(f"the others have {value}")
        elif len(ranks) == 1:
            odd.append(f"rank {ranks[0]} has {value}")
        else:
            odd.append(f"ranks {', '.join(map(str, ranks))} have {value}")
    return ", ".join(odd + others)


def run_state(
    network: nn.Module,
    pruned: PrunedParameters | None,
    optimizers: dict[str, torch.optim.Optimizer],
    buffers: bool,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all state that must be equal on all ranks; `buffers`: after a broadcast."""
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
    for name, column in zip(names, rows.T.tolist(), strict=True):
        checksums = [f"checksum {value & (1 << 64) - 1:016x}" for value in column]
        if who := describe_difference(checksums):
            raise RankError(
                f"{name}: differs between ranks ({who}); the run stops before it is saved, the "
                "last checkpoint is good"
            )


def check_finite(state: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise UserError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in state:
        # The sum of a tensor with a NaN or an infinity is not finite.
        if tensor.is_floating_point() and not bool(tensor.detach().sum().isfinite()):
            raise UserError(
                f"{name}: not finite at step {step}; training diverged, lower lr or mask_lr (this "
                "step is not saved, the checkpoint before it is kept)"
            )
