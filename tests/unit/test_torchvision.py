"""Networks that were not written for this: they prune as they are."""

import pytest
import torch

from bip import models
from bip.methods.base import Parts
from bip.pruning.layout import keep_count
from bip.training.forward import ForwardBackward
from bip.training.optim import Clock
from tests.runs import LAYER_TYPES
from tests.unit.networks import METHODS, make_config, prune

CASES = [
    *(
        (name, kind)
        for name in ("resnet18", "squeezenet1_1", "densenet121")
        for kind in LAYER_TYPES
    ),
    *(
        ("mobilenet_v3_small", kind) for kind in LAYER_TYPES[:2]
    ),  # grouped: no channels, see test_masks
]


@pytest.mark.parametrize(("name", "layer_type"), CASES)
def test_two_iterations_prune_a_torchvision_network(name: str, layer_type: str) -> None:
    torch.manual_seed(0)
    network = models.build(f"torchvision/{name}", 5).train()
    pruned = prune(network, layer_type, "0.2")
    before = pruned.mask.clone(), pruned.weights.detach().clone()
    config = make_config(**METHODS["bip"], layer_type=layer_type, k="0.2", mask_lr=0.1, lr=0.01)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(0, 5, (4,))) for _ in range(4)]
    parts = Parts(
        config, network, pruned, ForwardBackward(config, network, None, 0, torch.device("cpu")),
        lambda level, start: iter(batches[:2] if level == "lower" else batches[2:]), Clock(2, 2),
    )  # fmt: skip
    method = config.method(parts)
    for iteration in range(2):
        reports = method.step(iteration)
        assert all(torch.isfinite(report.loss) for report in reports)
    assert not torch.equal(pruned.weights.detach(), before[1])
    for z, weights, mask in zip(
        pruned.z, pruned.views(pruned.weights), pruned.views(pruned.mask), strict=True
    ):
        assert torch.equal(z, weights * mask)
    if layer_type == "unstructured":
        assert pruned.kept() == keep_count("0.2", pruned.layout.size)
    elif layer_type == "filter":
        for tensor, mask in zip(pruned.layout.tensors, pruned.views(pruned.mask), strict=True):
            assert int(mask.flatten(1).amax(1).sum()) == keep_count("0.2", tensor.groups)
