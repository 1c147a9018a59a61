"""What agreeing on the mask costs per step for W = 8 to 4,096 ranks, and sweeps of 10,000 runs.

A warm selection makes two all-gathers of 4,892 bytes a rank in all, whatever the number of weights
(`tests.benchmarks.threshold` counts them). Their time is modelled as 2 · rounds · a, plus the bytes
received over b: `a` is the latency of a round, `b` the bandwidth of a rank:

- gloo: measured here, between 2 and 4 processes of this machine, its ring of W − 1 rounds. There is
  no network in it; where 4 processes share fewer cores, waiting for them is in.
- NCCL: published figures, assumed and not measured here. A ring takes W − 1 rounds; NCCL chooses a
  PAT for small messages since 2.23 (one rank per node), with log2(W) rounds; both are shown.
  --nccl-us: 14 µs a round between nodes, `hwLat` of NCCL's src/graph/tuning.cc (network, ring,
  simple protocol; NVLink 3.4, low-latency protocol 2.7). --nccl-gbs: 50 GB/s, the 400 Gbit/s a GPU
  of NVIDIA's DGX H100 data sheet.

The forward-backwards that it is set against are not this machine's to measure: `share_at_100ms`
assumes an iteration of 100 ms. Then, for a simulated sweep: seconds of `launch status`,
`launch report` and of planning, at two sizes; `growth` is the time of the larger over that of the
smaller, over the ratio of their sizes (1: linear, more: quadratic).
"""

import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.plan import make_plan
from tests.benchmarks.common import arguments, finish, machine
from tests.benchmarks.status import CONFIGS, make_sweep

WORLDS = (8, 64, 512, 1024, 4096)
GATHERS, BYTES = 2, 4892  # of a warm selection


def gather_seconds(rank: int, world: int, file: str, rounds: int, answers: Any) -> None:
    """The least seconds of one all-gather of half a selection's bytes, on rank 0."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    own = torch.zeros(BYTES // GATHERS, dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(world)]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        dist.all_gather(every, own)
        times.append(time.perf_counter() - began)
    if rank == 0:
        answers.put(min(times))
    dist.destroy_process_group()


def measure_gloo(world: int, rounds: int) -> float:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (world, f"{folder}/store", rounds, answers)
        ranks = [
            context.Process(target=gather_seconds, args=(rank, *given)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        seconds = float(answers.get(timeout=120))
        for process in ranks:
            process.join()
    return seconds


def seconds_of(command: str, folder: Path) -> float:
    began = time.perf_counter()
    line = [sys.executable, "-m", "launch", command, str(folder)]
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - began


def measure_sweep(runs: int) -> dict[str, float]:
    """Seconds of each command for a sweep of so many runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep = make_sweep(folder, runs)
        seconds = {command: seconds_of(command, sweep.folder) for command in ("status", "report")}
        series = ",".join(f"0.{number:05d}" for number in range(10_001, 10_001 + runs))
        flags = {"configs": CONFIGS, "result_dir": folder, "exp_name": "plan", "series": series}
        began = time.perf_counter()
        plan = make_plan(flags | {"stages": "pretrain,prune"})
        assert len(plan.runs) == runs + 1
        seconds["plan"] = time.perf_counter() - began
    return seconds


def main() -> None:
    options = arguments(__doc__ or "", rounds=500, runs=10_000, nccl_us=14, nccl_gbs=50)
    print(machine())
    figures: dict[str, float] = {}
    two, four = (measure_gloo(world, options.rounds) for world in (2, 4))
    round_seconds = max(two, (four - two) / 2)
    figures["gloo_round_us"] = 1e6 * round_seconds
    print(f"gloo, one all-gather of {BYTES // GATHERS} bytes: {1e6 * two:.0f} us on 2 ranks, "
          f"{1e6 * four:.0f} us on 4")  # fmt: skip
    print(f"{'W':>6} {'received':>10} {'gloo ring':>11} {'NCCL ring':>11} {'NCCL log2':>11}  ms")
    for world in WORLDS:
        received = BYTES * (world - 1)
        moving = received / (options.nccl_gbs * 1e9)
        latency = options.nccl_us / 1e6
        gloo = GATHERS * (world - 1) * round_seconds
        ring = GATHERS * (world - 1) * latency + moving
        tree = GATHERS * math.ceil(math.log2(world)) * latency + moving
        print(
            f"{world:>6} {received:>10,} "
            + " ".join(f"{1e3 * t:>11.3f}" for t in (gloo, ring, tree))
        )
        for name, seconds in (("gloo", gloo), ("nccl_ring", ring), ("nccl_log2", tree)):
            figures[f"{name}_ms_{world}"] = 1e3 * seconds
    figures["share_at_100ms"] = figures[f"nccl_log2_ms_{WORLDS[-1]}"] / 100
    small, large = (measure_sweep(runs) for runs in (options.runs // 5, options.runs))
    for name, seconds in large.items():
        figures[f"{name}_s"] = seconds
        figures[f"{name}_growth"] = seconds / small[name] / 5
    finish(figures, options.json)


if __name__ == "__main__":
    main()
