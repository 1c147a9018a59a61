"""Selecting the threshold and writing the mask, against sorting and against reading.

At each size the candidates take turns. Selection and writing are timed apart; "warm" selects on
scores that moved by a small step since the last selection, as in training. `warm_over_read`,
`sort_over_ours` and `two_ranks_over_one` speak of selection at 11.2 M scores; `growth` is
`warm_over_read` at 138 M over that at 11.2 M (1: as linear as reading). `outside_share` is the
share of a ResNet-18 batch 32 BiP iteration spent outside its two forward-backwards, and
`outside_over_least` sets that time against moving the least bytes it could: with everything fused
that can be, the lower step reads g, m, θ and its momentum and writes θ, momentum and z; the upper
one reads g, m, θ, s and its momentum and writes s and momentum; then s and θ are read, m and z
written: 63 bytes a weight, at the speed of a fused pass over tensors of that size. (Ours move 59:
lower step 25, upper step 25, selection 4, and to write what changes of m and z 5; in layers with
filters that are pruned whole the upper step's gradient is written and scaled before.)
Each `_gbs` is the bytes that must move over the least time: read and warm 4 a score, write 5,
write_all and the fused pass 13. `read_gbs` and `fused_gbs` are this machine's bounds, in the same
run.
"""

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from bip.compiled import share, threaded
from bip.distributed.rendezvous import join
from bip.methods.bip import Bip
from bip.pruning.layout import Segment
from bip.pruning.select import LARGEST, Alone
from bip.pruning.select_cpu import SAMPLE, CpuSelector, Cut
from tests.benchmarks.common import arguments, finish, machine, ratio, take_turns
from tests.benchmarks.step import make_method
from tests.unit.ranks_in_threads import ThreadRank, on_threads

SIZES = (270_000, 11_200_000, 25_500_000, 138_000_000)
HEADLINE = 11_200_000
LEAST_BYTES = (13 + 12) + (17 + 8) + (8 + 5)  # of an iteration beside the passes, a weight
FUSED_BYTES = 4 * (2 + 2)  # of `fused_pass`, an element


class Scores:
    """Scores that take a small step before each selection, and what selects among them."""

    def __init__(self, n: int, exchange: Any = None) -> None:
        torch.manual_seed(0)
        self.values = torch.randn(n) * 0.05
        self.step = torch.randn(n) * 1e-5
        self.segments = (Segment("network", 0, n, n // 10),)
        self.exchange = exchange or Alone()
        self.selector = CpuSelector(self.segments, self.exchange)

    def move(self) -> None:
        self.values += self.step

    def warm(self) -> list[Cut]:
        return self.selector.select(self.values)

    def cold(self) -> list[Cut]:
        return CpuSelector(self.segments, self.exchange).select(self.values)


def measure_size(n: int, rounds: int) -> dict[str, float]:
    """Ratios at one size; every candidate sees the same scores."""
    scores = Scores(n)
    values, keep = scores.values, n // 10
    mask, z, weights = torch.zeros(n, dtype=torch.uint8), torch.zeros(n), torch.randn(n)
    magnitudes = values.abs()
    # Masks in turn: of which 2% of the ones differ, as after a large step, or each weight.
    large_step = values + 0.001 * torch.randn(n)
    cuts = [CpuSelector(scores.segments, Alone()).select(s) for s in (values, large_step)]
    steps = itertools.cycle(zip((values, large_step), cuts, strict=True))
    all_or_none = itertools.cycle(([Cut(0, n)], [Cut(LARGEST, -1)]))

    def write(values: Tensor, cuts: list[Cut]) -> None:
        """The mask of a cut, and z, where those of another were."""
        scores.selector.write(cuts, values, mask, weights, [z])

    for _ in range(2):
        write(*next(steps))
    fast = {
        "read": lambda: values.sum(),
        "warm": scores.warm,
        "cold": scores.cold,
        "write": lambda: write(*next(steps)),
        # The same tensors in one fused pass: two read, two written.
        "fused": lambda: fused_write(values, weights, mask, z),
        "move": scores.move,
    }
    seconds = take_turns(fast, rounds)
    whole = {
        "write_all": lambda: write(values, next(all_or_none)),
        "fused": lambda: fused_write(values, weights, mask, z),
    }
    seconds_whole = take_turns(whole, rounds)
    slow = {
        "sort": lambda: torch.sort(magnitudes),
        "topk": lambda: torch.topk(magnitudes, keep),
        "kthvalue": lambda: torch.kthvalue(magnitudes, n - keep + 1),
        "partition": lambda: np.partition(magnitudes.numpy(), n - keep),
    }
    seconds |= take_turns(slow, 1 if n > HEADLINE else 3, warm_up=0)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    row = {
        "read_ms": 1e3 * medians["read"],
        "warm_ms": 1e3 * medians["warm"],
        "warm_over_read": ratio(seconds["warm"], seconds["read"]),
        "cold_over_read": ratio(seconds["cold"], seconds["read"]),
        "write_over_fused": ratio(seconds["write"], seconds["fused"]),
        "write_all_over_fused": ratio(seconds_whole["write_all"], seconds_whole["fused"]),
    }
    best = {"read": 4, "warm": 4, "write": 5, "fused": 13}
    row |= {f"{name}_gbs": size * n / min(seconds[name]) / 1e9 for name, size in best.items()}
    row["write_all_gbs"] = 13 * n / min(seconds_whole["write_all"]) / 1e9
    row |= {f"{name}_over_ours": medians[name] / medians["warm"] for name in slow}
    return row


@threaded
def _fused(a, b, c, d):  # type: ignore[no-untyped-def]
    for i in numba.prange(a.size):
        c[i] = a[i]
        d[i] = a[i] * b[i]


def fused_pass(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """One pass that reads a and b and writes c and d, compiled like our own kernels."""
    share(a.numel())
    _fused(a.numpy(), b.numpy(), c.numpy(), d.numpy())


@threaded
def _fused_write(a, b, c, d):  # type: ignore[no-untyped-def]
    for i in numba.prange(a.size):
        keep = a[i] > 0
        c[i] = np.uint8(keep)
        d[i] = np.float32(keep) * b[i]


def fused_write(scores: Tensor, weights: Tensor, mask: Tensor, z: Tensor) -> None:
    """The simplest pass that reads scores and weights and writes a mask and z."""
    share(scores.numel())
    _fused_write(scores.numpy(), weights.numpy(), mask.numpy(), z.numpy())


def rank_seconds(rank: int, world: int, port: int, rounds: int, answers: Any) -> None:
    """Median seconds of a warm selection at 11.2 M on one of `world` ranks, one thread each."""
    torch.set_num_threads(1)
    env = {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.environ.update(env)
    group = join(Path("unused"))
    scores = Scores(HEADLINE, group)
    times = []
    for turn in range(rounds + 40):  # 40: until the bracket is as narrow as it gets
        scores.move()
        group.barrier()
        began = time.perf_counter()
        scores.warm()
        if turn >= 40:
            times.append(time.perf_counter() - began)
    answers.put(statistics.median(times))
    group.close()


def measure_ranks(world: int, rounds: int) -> float:
    """Seconds of a warm selection on `world` processes, the slowest of them."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    ranks = [
        context.Process(target=rank_seconds, args=(rank, world, store.port, rounds, answers))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    seconds = [answers.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    return float(max(seconds))


def reading_scales(rounds: int) -> float:
    """Two threads' read pass over one thread's: what memory leaves two ranks on one machine."""
    values = torch.randn(HEADLINE)

    def read(threads: int) -> None:
        torch.set_num_threads(threads)
        values.sum()

    before = torch.get_num_threads()
    seconds = take_turns({"one": lambda: read(1), "two": lambda: read(2)}, rounds)
    torch.set_num_threads(before)
    return ratio(seconds["two"], seconds["one"])


def measure_outside(rounds: int) -> tuple[float, float]:
    """Of a BiP iteration (ResNet-18, batch 32), the time outside its two forward-backwards: its
    share, and how many times that of moving the least bytes.
    """
    method = make_method("resnet18", 32, "bip")
    assert isinstance(method, Bip)
    inside: list[float] = []
    parts = method.parts
    parts.forward_backward = _timed(parts.forward_backward, inside)  # type: ignore[assignment]
    sizes = [torch.randn(method.upper.pruned.layout.size) for _ in range(4)]
    shares, times = [], []
    for iteration in range(rounds + 2):
        inside.clear()
        began = time.perf_counter()
        method.step(iteration)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        fused_pass(*sizes)
        least = (time.perf_counter() - began) * LEAST_BYTES / FUSED_BYTES
        shares.append(1 - sum(inside) / whole)
        times.append((whole - sum(inside)) / least)
    return statistics.median(shares[2:]), statistics.median(times[2:])


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    return timed


TABLE = 4 * 2048  # bytes of one digit's counts; the last of 31 bits takes 512


def most_sent(case: str, world: int) -> tuple[int, int]:
    """(bytes, gathers) that a rank contributes at most to a selection over the whole network.

    A hit finds the threshold in the bracket where it was expected: a digit of 11 bits with the
    pass's totals (in calm that is all), perhaps the rest, perhaps the place of a tie. A miss has
    spent that digit and searches all 31 bits. Cold, there is a sample before.
    """
    heads, tie, sample = 24, 8, 4 * max(1, SAMPLE // world)
    return {
        "hit": (heads + 2 * TABLE + 4 * 512 + tie, 4),
        "miss": (heads + 3 * TABLE + 4 * 512 + tie, 5),
        "cold": (sample + heads + 3 * TABLE + 4 * 512 + tie, 6),
    }[case]


def model(world: int, n: int) -> str:
    """What a selection over the whole network costs a rank, at most."""
    kib = {c: f"{most_sent(c, world)[0] / 1024:.1f} KiB" for c in ("hit", "miss", "cold")}
    rounds = {c: most_sent(c, world)[1] for c in kib}
    text = ", ".join(f"{c} {kib[c]} in {rounds[c]} gathers" for c in kib)
    return (
        f"W = {world}, n = {n:,}: at most {text}; received {world} times that; a hit reads "
        f"{n // world:,} scores once, up to five times where many are equal, as a miss does; mask "
        f"and z: one pass over all {n:,}"
    )


def check_model(world: int, n: int = 2_000_000) -> str:
    """Bytes and gathers of selections on `world` in-process ranks, which may not exceed the model:
    cold, warm, among ties, and when all scores jump.
    """

    def select(ranks: ThreadRank) -> dict[str, tuple[int, int]]:
        scores, costs = Scores(n, ranks), {}

        def cost(name: str, prepare: Callable[[], Any]) -> None:
            prepare()
            before = ranks.sent, ranks.rounds
            scores.warm()
            costs[name] = (ranks.sent - before[0], ranks.rounds - before[1])

        cost("cold", scores.move)
        for _ in range(3):
            cost("hit in calm", scores.move)
        cost("miss", lambda: scores.values.mul_(100))
        cost("hit after it", lambda: None)
        cost("miss of ties", lambda: scores.values.fill_(0.25))
        cost("hit of ties after it", lambda: None)
        return costs

    costs = on_threads(world, select)
    assert all(cost == costs[0] for cost in costs)
    for name, (sent, rounds) in costs[0].items():
        most = most_sent(name.split()[0], world)
        assert (sent <= most[0], rounds <= most[1]) == (True, True), (name, sent, rounds, most)
    text = (f"{name} {sent:,} bytes in {rounds}" for name, (sent, rounds) in costs[0].items())
    return f"W = {world} simulated, gathers: {', '.join(text)}"


def main() -> None:
    options = arguments(__doc__ or "", rounds=15, largest=138_000_000)
    print(machine())
    figures: dict[str, float] = {}
    warm: dict[int, float] = {}
    for n in (size for size in SIZES if size <= options.largest):
        row = measure_size(n, options.rounds)
        print(f"n = {n:>11,}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
        warm[n] = row["warm_over_read"]
        if n == HEADLINE:
            figures["warm_over_read"] = row["warm_over_read"]
            figures["cold_over_read"] = row["cold_over_read"]
            figures["write_over_fused"] = row["write_over_fused"]
            figures["write_all_over_fused"] = row["write_all_over_fused"]
            figures["sort_over_ours"] = row["sort_over_ours"]
    if options.largest > HEADLINE:
        largest = max(warm)
        figures["growth"] = warm[largest] / warm[HEADLINE]
    one, two = (measure_ranks(world, 4 * options.rounds) for world in (1, 2))
    print(f"one rank {1e3 * one:.2f} ms, two ranks {1e3 * two:.2f} ms")
    figures["two_ranks_over_one"] = two / one
    figures["two_readers_over_one"] = reading_scales(4 * options.rounds)
    figures["outside_share"], figures["outside_over_least"] = measure_outside(
        max(5, options.rounds // 2)
    )
    for world in (16, 64):
        print(check_model(world))
    print(model(1024, 1_000_000_000))
    finish(figures, options.json)


if __name__ == "__main__":
    main()
