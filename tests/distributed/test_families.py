"""A small network of each published family under DistributedDataParallel."""

from collections.abc import Iterator

import torch

from bip import models
from bip.distributed.compare import hash_tensor
from bip.distributed.group import Group, wrap
from bip.methods.base import Parts
from bip.training.forward import ForwardBackward
from bip.training.optim import Clock
from tests.distributed.harness import world_size
from tests.unit.networks import CLASSES, METHODS, Batch, make_config, prune, random_batch

SMALL = ("vgg4_bn", "wrn_28_1", "resnet20s")


@world_size(2)
def test_two_steps_of_each_family_keep_the_ranks_together(group: Group) -> None:
    def batches(level: str, start: int) -> Iterator[Batch]:
        while True:  # every rank has its own
            yield random_batch(start + 10 * group.rank + 100 * (level == "upper"), 4)
            start += 1

    for arch in SMALL:
        torch.manual_seed(0)
        network = models.build(arch, CLASSES).train()
        pruned = prune(network, "unstructured", "0.3", exchange=group)
        before = pruned.mask.clone()
        config = make_config(**METHODS["bip"], k="0.3")
        run = ForwardBackward(
            config, network, wrap(network, group.device), group.rank, group.device
        )
        parts = Parts(config, network, pruned, run, batches, Clock(2, 2))
        method = config.method(parts)
        for iteration in range(2):
            method.step(iteration)
        tensors = (
            pruned.weights.detach(),
            pruned.mask,
            *(p.detach() for p in network.parameters()),
        )
        first, second = group.all_objects([hash_tensor(tensor) for tensor in tensors])
        assert first == second, arch
        assert not torch.equal(pruned.mask, before)
