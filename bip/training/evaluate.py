"""Accuracy over a whole split: every image counted exactly once, for any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip.distributed.group import Group


@dataclass(frozen=True)
class Accuracy:
    """Percent correct (top-1, top-5) and mean loss over `count` images."""

    top1: float
    top5: float
    loss: float
    count: int

    @property
    def line(self) -> str:
        """What `bip evaluate` prints."""
        return (
            f"top1 {self.top1:.2f}% top5 {self.top5:.2f}% loss {self.loss:.4f} "
            f"on {self.count} test images"
        )


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    size: int,
    group: Group,
    bf16: bool = False,
    poll: Callable[[], None] | None = None,
) -> Accuracy:
    """Evaluate the plain module (a DDP module would hang on uneven shards).

    `batches` is this rank's shard of `size` images. `poll` is called after each batch and may
    raise to end the evaluation. Raises RuntimeError if the ranks together did not evaluate each
    image once.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=group.device)
    try:
        for images, labels in batches:
            with torch.autocast(group.device.type, torch.bfloat16, enabled=bf16):
                output = network(images)
            output = output.float()
            best = output.topk(min(5, output.shape[1])).indices
            hits = best == labels[:, None]
            loss = F.cross_entropy(output, labels, reduction="sum")
            sums[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
            sums[3] += len(labels)
            if poll is not None:
                poll()
    finally:
        for module, training in modes:
            module.training = training
    top1, top5, total_loss, count = group.sum_(sums).tolist()
    if count != size:
        raise RuntimeError(f"evaluation saw {int(count)} images, the split has {size}")
    return Accuracy(100 * top1 / count, 100 * top5 / count, total_loss / count, int(count))


def share_statistics(network: nn.Module, group: Group) -> None:
    """Give every rank rank 0's running statistics; each rank has its own from training."""
    if group.world > 1:
        for buffer in _statistics(network):
            group.broadcast_(buffer)


def average_statistics(network: nn.Module, group: Group) -> None:
    """Give every rank the mean of all ranks' running statistics."""
    if group.world > 1:
        for buffer in _statistics(network):
            if buffer.is_floating_point():
                group.sum_(buffer).div_(group.world)
        share_statistics(network, group)


def _statistics(network: nn.Module) -> Iterator[Tensor]:
    """The running statistics of batch-norm, and of other norms that track them."""
    for module in network.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            yield from module.buffers(recurse=False)
