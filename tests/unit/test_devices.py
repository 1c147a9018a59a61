"""Which GPU a rank takes, whether or not the scheduler shows it only its own."""

import pytest
import torch

from bip.distributed.group import Ranks, pick_device
from bip.errors import UserError


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world", "index"),
    [
        (4, 3, 4, 3),  # all GPUs of the node are seen: --gpus-per-node, or no isolation at all
        (8, 1, 2, 1),  # fewer ranks than GPUs
        (1, 3, 4, 0),  # isolated: --gpus-per-task, each rank sees its own as number 0
        (1, 0, 1, 0),
    ],
)
def test_a_rank_takes_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, local_world: int, index: int
) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device = pick_device(Ranks(local_rank, local_world, local_rank, local_world))
    assert device == torch.device("cuda", index)
    assert taken == [device]


def test_too_few_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 ranks on this node see 2 GPUs"):
        pick_device(Ranks(0, 4, 0, 4))
