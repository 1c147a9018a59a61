"""Batch-norm statistics of the final mask, estimated by all ranks together."""

import torch
from torch import nn

from bip.distributed.group import Group
from bip.training.evaluate import average_statistics
from tests.distributed.harness import run_ranks


def recalibrated(group: Group) -> list[list[float]]:
    """Each rank has its own part of two batches; what all hold afterwards."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    images = torch.randn(2, 8, 3, 6, 6)
    share = 8 // group.world
    mine = images[:, group.rank * share : (group.rank + 1) * share]
    torch.optim.swa_utils.update_bn(iter(mine), network)
    average_statistics(network, group)
    return [network[1].running_mean.tolist(), network[1].running_var.tolist()]


def test_every_ranks_images_count() -> None:
    (alone,) = run_ranks(1, recalibrated)
    two = run_ranks(2, recalibrated)
    assert two[0] == two[1]
    torch.testing.assert_close(torch.tensor(two[0][0]), torch.tensor(alone[0]))
    # Variances are of each rank's part of a batch, so they agree roughly.
    torch.testing.assert_close(torch.tensor(two[0][1]), torch.tensor(alone[1]), rtol=0.05, atol=0.0)
