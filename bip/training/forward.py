"""One forward-backward over this rank's part of a batch: the unit of cost of every method."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bip.config import RunConfig
from bip.training.stopwatch import Stopwatch

Batch = tuple[Tensor, Tensor]
LEVELS = {"lower": 0, "upper": 1}


@dataclass(frozen=True)
class Report:
    """One forward-backward's sums on this rank, on the device: loss, hits, images."""

    loss: Tensor
    correct: Tensor
    count: int


class ForwardBackward:
    """One forward-backward over this rank's part of a global batch, on the plain network.

    Leaves the gradient of the global mean loss in the parameters' .grad, on every rank.
    `ddp` is the network in DistributedDataParallel where there are several ranks.
    """

    def __init__(
        self, config: RunConfig, network: nn.Module, ddp: DistributedDataParallel | None,
        rank: int, device: torch.device, stopwatch: Stopwatch | None = None,
    ) -> None:  # fmt: skip
        self.calls = 0
        self.timed = (stopwatch or Stopwatch(device)).part
        self.config, self.network, self.ddp, self.rank, self.device = (
            config, network, ddp, rank, device,
        )  # fmt: skip
        forward = ddp or network
        self.forward = torch.compile(forward) if config.compile else forward

    def __call__(self, batch: Batch, level: str, step: int) -> Report:
        """Run on `batch` = (images (b, C, H, W), labels (b,)), in `accumulate` micro-batches."""
        self.calls += 1
        parts = self.config.accumulate
        reseed(self.config.order_seed, step, level, self.rank)
        self.network.zero_grad(set_to_none=True)
        images, labels = batch[0].chunk(parts), batch[1].chunk(parts)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for part, (x, y) in enumerate(zip(images, labels, strict=True)):
            with self._sync_only(last=part == parts - 1):
                # A context per forward: autocast caches the bf16 cast of z, and z changes.
                with (
                    self.timed("forward"),
                    torch.autocast(
                        self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
                    ),
                ):
                    output = self.forward(x)
                    loss = F.cross_entropy(output, y, label_smoothing=self.config.label_smoothing)
                with self.timed("backward"):
                    (loss / parts).backward()
            loss_sum += loss.detach() * len(y)
            correct += (output.detach().argmax(1) == y).sum()
        return Report(loss_sum, correct, len(batch[1]))

    def exchange_seconds(self) -> dict[str, float]:
        """How long the ranks' exchange of gradients took since the last call, by torch's sampling.

        `gradients_hidden`: of that, beside the backward pass. {} for one rank.
        """
        calls, self.calls = self.calls, 0
        if self.ddp is None:
            return {}
        facts = self.ddp._get_ddp_logging_data()
        total = facts.get("avg_backward_comm_time", 0) * calls / 1e9
        hidden = facts.get("avg_backward_compute_comm_overlap_time", 0) * calls / 1e9
        return {"gradients": total, "gradients_hidden": hidden}

    def _sync_only(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()


def reseed(seed: int, step: int, level: str, rank: int) -> None:
    """Make dropout a function of these four, so that no generator state needs saving."""
    key = np.random.SeedSequence([seed, step, LEVELS[level], rank])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
