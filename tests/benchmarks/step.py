"""A BiP iteration over a dense training step: the limit is 2.0, two forward-backwards.

With simultaneous levels it is one forward-backward, so the limit is 1.0.

Both run the project's own methods on fixed random batches in memory, in turns. The dense
step is the pretraining step: zero_grad, forward, backward, SGD. Peak memory is measured in a
fresh process each (maximum resident set on the CPU, allocator peak on the GPU).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from bip import models
from bip.config import RunConfig, build_config
from bip.methods.base import Method, Parts
from bip.pruning.layout import find_prunable
from bip.pruning.state import PrunedParameters
from bip.training.forward import Batch, ForwardBackward
from bip.training.optim import Clock
from tests.benchmarks.common import arguments, finish, machine, ratio, take_turns

CASES = {"resnet18_b32": ("resnet18", 32), "resnet20s_b128": ("resnet20s", 128)}


def make_method(
    arch: str, batch_size: int, method: str, side: int = 32, classes: int = 10, **settings: Any
) -> Method:
    """The method "dense", "bip" or "simultaneous", ready for its steps on random square images."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = models.build(arch, classes).to(device).train()
    bip = {"exp_mode": "prune", "layer_type": "unstructured", "trainer": "bilevel"}
    bip |= {"levels": "simultaneous" if method == "simultaneous" else "alternate"}
    config: RunConfig = build_config(
        {"arch": arch, "dataset": "CIFAR10", "exp_name": "benchmark", "k": 0.1, "lr": 0.01}
        | ({"exp_mode": "pretrain"} if method == "dense" else bip)
        | {"print_freq": 10**9, "precision": "bf16" if device.type == "cuda" else "fp32"}
        | settings
    )
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    pruned = None
    if method != "dense":
        layout = find_prunable(network, "unstructured")
        pruned = PrunedParameters(network, layout, config.k, "global")
        with torch.no_grad():
            pruned.scores.copy_(pruned.weights)
        pruned.update_mask()
        pruned.write_z()
    images = torch.randn(batch_size, 3, side, side, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)
    batch: Batch = (images, labels)

    def batches(_level: str, _start: int) -> Iterator[Batch]:
        return repeat(batch)

    run = ForwardBackward(config, network, None, 0, device)
    return config.method(Parts(config, network, pruned, run, batches, Clock(10**9, 10**6)))


def iterate(method: Method) -> Callable[[], None]:
    numbers = iter(range(10**9))
    return lambda: method.step(next(numbers)) and None


def peak_memory(case: str, method: str) -> int:
    """Bytes at the peak of five steps, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.step", "--peak", case, method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def print_peak(case: str, method: str) -> None:
    step = iterate(make_method(*CASES[case], method))
    for _ in range(5):
        step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        # Not getrusage: a child inherits its parent's maximum there.
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def main() -> None:
    options = arguments(__doc__ or "", rounds=15)
    print(machine())
    figures: dict[str, float] = {}
    for name, (arch, batch_size) in CASES.items():
        methods = ("dense", "bip", "simultaneous")
        steps = {m: iterate(make_method(arch, batch_size, m)) for m in methods}
        seconds = take_turns(steps, options.rounds)
        figures[name] = ratio(seconds["bip"], seconds["dense"])
        figures[f"{name}_simultaneous"] = ratio(seconds["simultaneous"], seconds["dense"])
        print(f"{name}: {', '.join(f'{m} {min(seconds[m]):.3f} s' for m in methods)}")
    dense, bip = (peak_memory("resnet18_b32", method) for method in ("dense", "bip"))
    print(f"peak memory resnet18_b32: dense {dense >> 20} MiB, BiP {bip >> 20} MiB")
    figures["peak_memory"] = bip / dense
    finish(figures, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], sys.argv[3])
    else:
        main()
