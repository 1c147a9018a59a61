"""What a GPU day measures, item by item: each function returns the figures of one.

`mini` is the rehearsal: the same calls, as small as they go, on the CPU.
"""

import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from PIL import Image

from bip.distributed.group import all_gather_flat, wrap
from bip.methods.base import Method
from bip.training.forward import ForwardBackward
from tests.benchmarks import loaders
from tests.benchmarks.common import ratio, shared_data, synchronize, take_turns
from tests.benchmarks.step import iterate, make_method

ROOT = Path(__file__).parents[2]
Figures = dict[str, Any]
# Network -> batch, side, classes, data set whose settings apply
CASES = {
    "resnet18": (128, 32, 10, "CIFAR10"),
    "resnet20s": (128, 32, 10, "CIFAR10"),
    "ResNet50": (256, 224, 1000, "ImageNet"),
}
MODES = ("eager", "compile", "graphs")
KEEP_RATIOS = "0.2097,0.0550,0.0144"
TRAINERS = "bip,hydra,omp"
SAVE_SECONDS = 45


def correctness(name: str, mini: bool, folder: Path, seconds: float) -> Figures:
    """All tests of one file of tests/gpu. Without a GPU all of them are skipped."""
    report = folder / f"tests-{name}.xml"
    words = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"tests/gpu/test_{name}.py"]
    subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, check=False)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | ({"failed": ", ".join(map(str, failed))} if failed else {})


def step(arch: str, mode: str, mini: bool, folder: Path, seconds: float) -> Figures:
    """BiP over dense on synthetic data: medians of iterations, and the time outside of their
    forward-backwards, of which the device waits for each.
    """
    batch, side, classes, dataset = CASES[arch]
    rounds, warm_up = (2, 1) if mini else (30, 10)
    if mini:
        batch, side, classes, dataset = 2, 32, 10, "CIFAR10"
    settings: dict[str, Any] = {"dataset": dataset, "compile": mode != "eager"}
    if mode == "graphs":
        import torch._inductor.config as inductor

        inductor.triton.cudagraphs = True
    if mini:  # the CPU's compiler takes a minute
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    make = partial(make_method, arch, batch, side=side, classes=classes, **settings)
    methods = {name: make(name) for name in ("dense", "bip", "simultaneous")}
    if mode == "graphs":  # taking turns would record their graphs again and again
        times = {}
        for name, method in methods.items():
            times |= take_turns({name: iterate(method)}, rounds, warm_up)
    else:
        times = take_turns({n: iterate(m) for n, m in methods.items()}, rounds, warm_up)
    median = {name: statistics.median(found) for name, found in times.items()}
    precision = methods["bip"].parts.config.precision
    figures: Figures = {"case": f"{arch}, batch {batch}, {side} pixels, {precision}"}
    figures |= {f"{name}_ms": 1000 * value for name, value in median.items()}
    figures["bip_over_dense"] = ratio(times["bip"], times["dense"])
    figures["simultaneous_over_dense"] = ratio(times["simultaneous"], times["dense"])
    figures["outside_ms"] = 1000 * outside(methods["bip"], rounds)
    figures["dense_images_per_s"] = batch / median["dense"]
    figures["bip_images_per_s"] = 2 * batch / median["bip"]
    if torch.cuda.is_available():
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def outside(method: Method, rounds: int) -> float:
    """Seconds of an iteration that are not in its forward-backwards."""
    inside: list[float] = []
    forward_backward: Callable[..., Any] = method.parts.forward_backward

    def timed(*arguments: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        report = forward_backward(*arguments)
        synchronize()
        inside.append(time.perf_counter() - began)
        return report

    method.parts.forward_backward = timed  # type: ignore[assignment]
    found = []
    for iteration in range(100, 100 + rounds):
        inside.clear()
        synchronize()
        began = time.perf_counter()
        method.step(iteration)
        synchronize()
        found.append(time.perf_counter() - began - sum(inside))
    return statistics.median(found)


def one_rank(mini: bool, folder: Path, seconds: float) -> Figures:
    """The process group of one rank: what DDP and an all-gather cost, and that nothing waits."""
    arch, batch, rounds = ("resnet20s", 2, 2) if mini else ("resnet18", 128, 30)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, method = (make_method(arch, batch, "bip") for _ in range(2))
        parts = method.parts
        device = next(parts.network.parameters()).device
        ddp = wrap(parts.network, device)
        parts.forward_backward = ForwardBackward(parts.config, parts.network, ddp, 0, device)
        times = take_turns({"plain": iterate(plain), "ddp": iterate(method)}, rounds, 5)
        sent = torch.zeros(4096, dtype=torch.int32, device=device)
        got = torch.zeros_like(sent)
        gather = take_turns({"gather": lambda: all_gather_flat(got, sent)}, rounds)["gather"]
        figures: Figures = {
            "backend": backend,
            "ddp_over_plain": ratio(times["ddp"], times["plain"]),
        }
        figures["all_gather_16_kib_us"] = 1e6 * statistics.median(gather)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                method.step(1000)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            figures["iteration_waits"] = "never"
        return figures
    finally:
        dist.destroy_process_group()


def data(kind: str, mini: bool, folder: Path, seconds: float) -> Figures:
    """tests/benchmarks/loaders.py: "cifar" in memory, "imagenet" by DALI (mixed) and workers."""
    cores = len(os.sched_getaffinity(0))
    options = Namespace(rounds=3, batch=256, batches=24, workers=min(16, cores), records=8000)
    if mini:
        options = Namespace(rounds=1, batch=8, batches=2, workers=1, records=171)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as place, _zips(Path(place), mini):
        figures = dict(getattr(loaders, kind)(Path(place), options))
    return {"case": f"batch {options.batch}, {options.workers} workers"} | figures


@contextmanager
def _zips(folder: Path, mini: bool) -> Iterator[None]:
    """The sample images; in a rehearsal random ones of the same layout."""
    if not mini:
        yield
        return
    draw = random.Random(0)

    def photo(width: int, height: int) -> bytes:
        stream = io.BytesIO()
        noise = Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))
        noise.save(stream, "jpeg")
        return stream.getvalue()

    with zipfile.ZipFile(folder / "imagenet-jpeg-sample.zip", "w") as archive:
        for number in range(171):
            archive.writestr(f"val/n{number:08}/n{number:08}_x.JPEG", photo(60, 50))
    with zipfile.ZipFile(folder / "cifar10-jpeg.zip", "w") as archive:
        for number in range(10 * 40):
            split = "train" if number // 10 % 4 else "test"
            name = f"{number:04}.jpg"
            archive.writestr(f"{split}/class{number % 10}/{name}", photo(32, 32))
    before = os.environ.get("BIP_SHARED_DATA")
    os.environ["BIP_SHARED_DATA"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("BIP_SHARED_DATA")
        if before is not None:
            os.environ["BIP_SHARED_DATA"] = before


def accuracy(arch: str, mini: bool, folder: Path, seconds: float) -> Figures:
    """Dense, then each method at each k, fine-tuned, packed on the GPU: top-1 and cost.

    One sweep in `folder`, which continues where it was cut. Costs differ: an iteration of bip is
    two forward-backwards; `forward_backwards` are those of the run and its sources since dense.
    """
    deadline = time.monotonic() + seconds - SAVE_SECONDS - 15
    sweep = folder / "accuracy" / arch
    at_once = str(min(4, len(os.sched_getaffinity(0))))
    words = ["--result-dir", str(sweep.parent), "--exp-name", arch, "--runs-at-once", at_once]
    words += ["--stages", "pretrain,prune,finetune", "--trainers", TRAINERS]
    if mini:
        words += ["--configs", "configs/Digits/bip.yml", "--epochs", "1", "--series", "0.2097"]
    else:
        stores = folder / "cifar10"
        if not (stores / "test.lmdb").exists():
            _ran("bip", "data", "build-lmdb", str(shared_data("cifar10-jpeg.zip")), str(stores))
        words += ["--configs", "configs/CIFAR10/bip.yml", "--arch", arch, "--series", KEEP_RATIOS]
        words += ["--data-dir", str(stores), "--epochs", "10", "--eval-every", "10"]
        words += ["--precision", "bf16"]
    _ran("launch", "series", "--no-wait", *words)
    rows: list[dict[str, Any]] = []
    is_over = False
    try:
        while not is_over and time.monotonic() < deadline:
            time.sleep(1)
            rows = json.loads(_ran("launch", "status", str(sweep), "--json"))
            is_over = all(row["kind"] not in ("waiting", "running") for row in rows)
    finally:
        if not is_over:
            _ran("launch", "cancel", str(sweep), "--save-seconds", str(SAVE_SECONDS))
    case = "digits_net, Digits, 1 epoch" if mini else f"{arch}, CIFAR-10, 10 epochs each"
    figures: Figures = {"case": f"{case}, {at_once} runs at once"}
    for row in rows:
        name = f"{row['stage']} {row['method']} {row['k']}"
        if row["kind"] == "done":
            result = sweep / row["stage"] / row["run_id"] / "result.json"
            cost = json.loads(result.read_text())["forward_backwards"]
            figures[name] = f"{row['top1']:.2f}% ({cost} forward-backwards, {row['seconds']:.0f} s)"
        elif row["kind"] == "failed":
            figures[name] = f"failed: {row['reason']}"
    return figures | ({} if is_over else {"partial": True})


def _ran(package: str, *words: str) -> str:
    """What a command of the project prints; RuntimeError if it fails (1: runs are unfinished)."""
    command = [sys.executable, "-m", package, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package} {words[0]}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


ITEMS: dict[str, Callable[[bool, Path, float], Figures]] = {
    **{f"tests-{name}": partial(correctness, name) for name in ("training", "loaders", "dali")},
    **{f"step-{arch}-eager": partial(step, arch, "eager") for arch in CASES},
    "one-rank": one_rank,
    **{f"step-{arch}-{mode}": partial(step, arch, mode) for mode in MODES[1:] for arch in CASES},
    "data-cifar": partial(data, "cifar"),
    "data-imagenet": partial(data, "imagenet"),
    "accuracy-resnet20s": partial(accuracy, "resnet20s"),
    "accuracy-resnet18": partial(accuracy, "resnet18"),
}
