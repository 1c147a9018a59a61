"""Small networks with real convolutions, and one step of each method on random images."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from bip.config import RunConfig
from bip.methods.base import Method, Parts
from bip.pruning.choices import LayerType, Scope
from bip.pruning.layout import find_followers, find_prunable
from bip.pruning.select import Exchange
from bip.pruning.state import PrunedParameters
from bip.training.forward import ForwardBackward
from bip.training.loop import train_mode
from bip.training.optim import Clock

Batch = tuple[Tensor, Tensor]
CLASSES = 5
METHODS = {  # settings of each kind of training step
    "bip": {"exp_mode": "prune", "trainer": "bilevel"},
    "accelerate": {"exp_mode": "prune", "trainer": "bilevel", "accelerate": True},
    "hydra": {"exp_mode": "prune", "trainer": "base"},
    "finetune": {"exp_mode": "finetune", "trainer": "base"},
}


class SmallNet(nn.Module):
    """Two convolutions with batch-norm, one of them with a bias; a strided one; a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2, bias=True)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.linear(torch.tanh(self.conv3(x)).mean((2, 3)))
        return out


def small_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> SmallNet:
    """Batch-norm affine and statistics are not at their neutral start."""
    torch.manual_seed(seed)
    network = SmallNet()
    with torch.no_grad():
        for norm in (network.bn1, network.bn2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return network.to(dtype)


def random_batch(seed: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def random_batches(seed: int, size: int = 8) -> Iterator[Batch]:
    while True:
        yield random_batch(seed, size)
        seed += 1


def prune(
    network: nn.Module,
    layer_type: LayerType,
    k: str = "0.5",
    seed: int = 0,
    scope: Scope | None = None,
    exchange: Exchange | None = None,
) -> PrunedParameters:
    """θ is the network; scores random of both signs; the mask random, whole groups of it."""
    layout = find_prunable(network, layer_type)
    scope = scope or ("global" if layer_type == "unstructured" else "layer")
    pruned = PrunedParameters(network, layout, Decimal(k), scope, exchange)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pruned.scores.copy_(torch.randn(layout.size, generator=generator))
        for tensor, mask in zip(layout.tensors, pruned.views(pruned.mask), strict=True):
            shape = [n if tensor.axis in (None, d) else 1 for d, n in enumerate(tensor.shape)]
            mask.copy_((torch.rand(shape, generator=generator) < 0.6).expand(tensor.shape))
    pruned.write_z()
    return pruned


def make_config(**settings: Any) -> RunConfig:
    base = {
        "exp_name": "test", "exp_mode": "prune", "arch": "digits_net", "dataset": "Digits",
        "layer_type": "unstructured", "k": "0.5", "lr": 0.05, "mask_lr": 0.05, "batch_size": 8,
    }  # fmt: skip
    return RunConfig(**base | settings)


@dataclass
class Setup:
    """A network under one method, ready for its steps."""

    config: RunConfig
    network: Any
    pruned: PrunedParameters | None
    run: ForwardBackward
    method: Method


def make_setup(
    method: str,
    layer_type: LayerType = "unstructured",
    clock: Clock = Clock(100, 10),  # noqa: B008
    network: nn.Module | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Setup:
    """`method` is a key of METHODS, the name of a method, or "pretrain"."""
    network = (small_net() if network is None else network).to(device)
    if method == "pretrain":
        config = make_config(exp_mode="pretrain", layer_type="dense", **settings)
        pruned = None
    else:
        how = METHODS.get(method, {"exp_mode": "prune", "trainer": method})
        config = make_config(layer_type=layer_type, **how, **settings)
        pruned = prune(network, layer_type, str(config.k), scope=config.ranking_scope)
        pruned.followers = find_followers(network, pruned.layout, random_batch(0)[0].to(device))
        pruned.update_mask()
        pruned.write_z()
        if method == "finetune":
            pruned.write_followers()
    train_mode(network, config.freeze_bn)
    run = ForwardBackward(config, network, None, 0, torch.device(device))
    images, labels = random_batch(0, config.batch_size)
    there = images.to(device), labels.to(device)

    def batches(level: str, start: int) -> Iterator[Batch]:
        if device != "cpu":  # no copies in a step
            return repeat(there)
        return random_batches(start + (1000 if level == "upper" else 0), config.batch_size)

    parts = Parts(config, network, pruned, run, batches, clock)
    setup = Setup(config, network, pruned, run, config.method(parts))
    setup.method.prepare()
    return setup
