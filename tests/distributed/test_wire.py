"""Bytes that really leave and reach a rank's sockets, as the kernel counts them.

What one selection adds to an iteration, on W ranks: each rank puts m bytes into gathers; gloo's
ring sends (W - 1) * m from each rank, and as many reach it. At most m is, for S segments (one in
the global scope, one per pruned layer in the layer scope, whatever the layer type):

    scope   state   sample         counts           digits              ties
    global  cold    32768 / W    + 24             + 3 * 4 * 2048      + 8
    global  warm    0            + 24             + 2 * 4 * 2048      + 8
    layer   cold    32768 / W    + 24 * S         + 4 * 4 * 256 * S   + 8 * S
    layer   warm    0            + 24 * S         + 3 * 4 * 256 * S   + 8 * S

(The sample has at least one key of each segment and rank: 4 * S where that is more.) Cold: the
first time. Warm: the threshold lies where the last ones let expect it. Where it does not, a global
selection puts 3 * 4 * 2048 + 4 * 512 bytes of digits, one of layers 5 * 4 * 256 * S. On a GPU
every selection puts 4 * (2 * 4096 + 128) + 12 (global) or (4 * (3 * 256 + 128) + 8) * S + 4. Of two
to four ranks each sends at most 64 KiB an iteration, cold and in the global scope.
"""

import os
import socket
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bip.distributed.group import Group, wrap
from bip.methods.base import Parts
from bip.training.forward import ForwardBackward
from bip.training.optim import Clock
from tests.distributed.harness import run_ranks
from tests.runs import LAYER_TYPES
from tests.unit.networks import make_config, prune, random_batch, small_net

# Layers of the network below that stay dense: the classifier, and the images' channels.
DENSE = {"unstructured": 0, "filter": 1, "channel": 2}


def most(scope: str, world: int, segments: int, cold: bool) -> float:
    """The table above."""
    digits = (2 + cold) * 4 * 2048 if scope == "global" else (3 + cold) * 4 * 256 * segments
    return cold * 32768 / world + 24 * segments + digits + 8 * segments


def bytes_moved() -> tuple[int, int]:
    """Payload that this process's TCP connections have (sent, received).

    Not tcpi_bytes_acked: on a busy machine the other side acknowledges later than it reads.
    """
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        except OSError:
            continue  # listening, or closed meanwhile
        # struct tcp_info, from Linux 4.19 on: u64 tcpi_bytes_received; _bytes_sent, _bytes_retrans.
        (arrived,) = struct.unpack_from("Q", info, 128)
        gone, again = struct.unpack_from("QQ", info, 200)
        sent, received = sent + gone - again, received + arrived
    return sent, received


def network_of(layers: int) -> nn.Module:
    """`layers` prunable ones; the smallest is small_net."""
    network = small_net().float()
    for _ in range(layers - 4):
        network.conv2 = nn.Sequential(network.conv2, nn.Conv2d(6, 6, 3, padding=1, bias=False))
    return network


def measure(group: Group, layer_type: str, scope: str, layers: int) -> dict[str, Any]:
    """Bytes (sent, received) of two plain DDP steps, and what a BiP iteration adds to them.

    `put`: what the selection put into gathers, and how many there were.
    """
    gather, put = group.gather, [0, 0]

    def counting(values: Tensor) -> Tensor:
        put[0] += values.numel() * values.element_size()
        put[1] += 1
        return gather(values)

    group.gather = counting  # type: ignore[method-assign]
    figures: dict[str, list[tuple[Tensor, list[int]]]] = {}
    for method in ("plain", "bip"):
        network = network_of(layers)
        pruned = (
            prune(network, layer_type, scope=scope, exchange=group)  # type: ignore[arg-type]
            if method == "bip"
            else None
        )
        mode = {"exp_mode": "prune", "trainer": "bilevel", "layer_type": layer_type}
        config = make_config(
            **(mode if pruned else {"exp_mode": "pretrain", "layer_type": "dense", "k": 1})
        )
        run = ForwardBackward(
            config, network, wrap(network, group.device), group.rank, group.device
        )
        batch = tuple(t.float() if t.is_floating_point() else t for t in random_batch(0, size=4))
        parts = Parts(
            config, network, pruned, run, lambda _l, _s, b=batch: iter(lambda: b, None),
            Clock(1000, 100),
        )  # fmt: skip
        step = config.method(parts).step
        step(0)  # DDP rebuilds its buckets
        if pruned is not None:
            pruned.selector.hints = [None] * len(pruned.segments)  # type: ignore[attr-defined]
            segments = len(pruned.segments)
        figures[method] = []
        for iteration in range(1, 8):
            group.barrier()
            put[:] = [0, 0]
            before = torch.tensor(bytes_moved())
            step(iteration)
            if method == "plain":
                step(iteration)
            group.barrier()
            figures[method].append((torch.tensor(bytes_moved()) - before, [*put]))
    plain = torch.stack([moved for moved, _ in figures["plain"]]).median(0).values
    (cold, cold_put), *_, (warm, warm_put) = figures["bip"]
    return {
        "parameters": sum(parameter.numel() for parameter in network_of(layers).parameters()),
        "plain": plain.tolist(),
        "segments": segments,
        "cold": ((cold - plain).tolist(), cold_put),
        "warm": ((warm - plain).tolist(), warm_put),
    }


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("layer_type", "scope", "layers"),
    [
        ("unstructured", "global", 4),
        ("unstructured", "global", 12),
        *((layer_type, "layer", layers) for layer_type in LAYER_TYPES for layers in (4, 12)),
    ],
)
def test_what_an_iteration_adds(world: int, layer_type: str, scope: str, layers: int) -> None:
    for cost in run_ranks(world, measure, layer_type, scope, layers):
        assert cost["segments"] == (1 if scope == "global" else layers - DENSE[layer_type])
        # A ring all-reduce of the gradients, twice.
        for plain in cost["plain"]:
            assert plain >= 2 * 2 * (world - 1) / world * 4 * cost["parameters"] * 0.99
        for state in ("cold", "warm"):
            moved, (put, gathers) = cost[state]
            assert 0 < put <= most(scope, world, cost["segments"], cold=state == "cold")
            if scope == "global":
                assert (world - 1) * put <= 65536
            for way, count in zip(("sent", "received"), moved, strict=True):
                beyond = count - (world - 1) * put  # gloo's headers
                assert -512 < beyond < 512 + 256 * world * gathers, (state, way, count, put)
        assert cost["warm"][1][0] < cost["cold"][1][0]


def test_counting_counts() -> None:
    """The oracle itself: a known payload over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            before = bytes_moved()
            sender.sendall(b"x" * 50_000)
            left = 50_000
            while left:
                left -= len(receiver.recv(left))
            receiver.sendall(b"y")
            sender.recv(1)
            for now, then in zip(bytes_moved(), before, strict=True):
                assert abs(now - then - 50_001) <= 1
