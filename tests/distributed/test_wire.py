"""Bytes that really leave a rank's sockets, as the kernel counts them."""

import os
import socket
import struct
from typing import Any

import pytest
import torch

from bip.distributed.group import Group, wrap
from bip.training.optim import Clock
from bip.training.steps import ForwardBackward, build_step
from tests.distributed.harness import run_ranks
from tests.unit.networks import make_config, prune, random_batch, small_net


def bytes_sent() -> int:
    """Payload that this process's TCP connections have sent: tcp_info.tcpi_bytes_acked and what
    is not acknowledged yet is small."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except OSError:
            continue  # listening, or closed meanwhile
        # struct tcp_info: 8 bytes, 24 u32, two u64 rates, then u64 tcpi_bytes_acked.
        total += struct.unpack_from("Q", info, 8 + 24 * 4 + 16)[0]
    return total


def measure(group: Group, layer_type: str, scope: str | None) -> dict[str, Any]:
    """Bytes per iteration: of two plain DDP steps, and of a BiP iteration, cold and warm."""
    figures = {}
    for method in ("plain", "bip"):
        network = small_net().float()
        pruned = (
            prune(network, layer_type, scope=scope, exchange=group) if method == "bip" else None
        )  # type: ignore[arg-type]
        mode = {"exp_mode": "prune", "trainer": "bilevel", "layer_type": layer_type}
        config = make_config(**(mode if pruned else {"exp_mode": "pretrain"}))
        run = ForwardBackward(
            config, network, wrap(network, group.device), group.rank, group.device
        )
        batch = tuple(t.float() if t.is_floating_point() else t for t in random_batch(0, size=4))
        step = build_step(
            config, network, pruned, run, lambda _l, _s, b=batch: iter(lambda: b, None),
            Clock(1000, 100),
        )  # fmt: skip
        step(0)  # DDP rebuilds its buckets
        if pruned is not None:
            pruned.threshold.hints = [None] * len(pruned.segments)  # type: ignore[union-attr]
        costs = []
        for iteration in range(1, 8):
            group.barrier()
            before = bytes_sent()
            step(iteration)
            if method == "plain":
                step(iteration)
            group.barrier()
            costs.append(bytes_sent() - before)
        figures[method] = costs
    plain = sorted(figures["plain"])[3]
    parameters = sum(parameter.numel() for parameter in small_net().parameters())
    return {
        "parameters": parameters,
        "plain": plain,
        "cold": figures["bip"][0] - plain,
        "warm": figures["bip"][-1] - plain,
    }


@pytest.mark.parametrize("world", [2, 3])
def test_a_global_iteration_adds_at_most_64_kib(world: int) -> None:
    """Cold: a sample of 64 KiB / W per rank and a few counts; warm: the counts alone.

    A gather of m bytes sends (W − 1) · m per rank in gloo's ring.
    """
    for cost in run_ranks(world, measure, "unstructured", "global"):
        # A ring all-reduce of the gradients, twice.
        assert cost["plain"] >= 2 * 2 * (world - 1) / world * 4 * cost["parameters"]
        assert 0 < cost["warm"] < 16 * 1024 * (world - 1)
        assert 0 < cost["cold"] < 64 * 1024 * (world - 1)
        assert cost["warm"] < cost["cold"]


def test_a_layer_iteration_adds_kilobytes_per_layer() -> None:
    layers = 4
    for cost in run_ranks(2, measure, "unstructured", "layer"):
        assert 0 < cost["warm"] < layers * 4096
        assert 0 < cost["cold"] < 64 * 1024 + layers * 8192


def test_counting_counts() -> None:
    """The oracle itself: a known payload over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            before = bytes_sent()
            sender.sendall(b"x" * 50_000)
            left = 50_000
            while left:
                left -= len(receiver.recv(left))
            receiver.sendall(b"y")
            sender.recv(1)
            assert abs(bytes_sent() - before - 50_001) <= 1


@pytest.mark.parametrize("elements", [1000, 100_000])
def test_what_a_gather_sends_grows_with_ranks_only(elements: int) -> None:
    for sent in run_ranks(3, gather_once, elements):
        assert 2 * 4 * elements <= sent < 2 * 4 * elements + 4096


def gather_once(group: Group, elements: int) -> int:
    values = torch.zeros(elements, dtype=torch.int32)
    group.gather(values)
    group.barrier()
    before = bytes_sent()
    group.gather(values)
    group.barrier()
    return bytes_sent() - before
