"""What a run needs of a machine, tried on it; each check is one function.

`launch doctor` starts `python -m launch.checks SETTINGS` as a process of its own, with --probe on a
compute node: broken drivers crash or hang the process that calls them.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bip.config import RunConfig, build_config
from bip.errors import UserError
from bip.files import existing
from bip.shipped import given_or_shipped
from bip.slurm import without_options
from bip.yaml_file import read_yaml
from launch.inputs import check_inputs
from launch.printed import tail
from launch.profile import Finding

if TYPE_CHECKING:
    from torch import Tensor

MARK = "finding "  # begins each line of the output that is one; libraries may print others
RANK_SECONDS = 90.0  # for two ranks to start and meet
RANK = "rank"  # the argument of a process that is one of the two ranks


@dataclass(frozen=True)
class Settings:
    """What to check. `seconds`: the fewest that a run has to save; None: not known."""

    folder: str  # of the results
    ranks: int = 1  # of one run
    seconds: float | None = None
    configs: str | None = None
    arch: str | None = None
    data_dir: str | None = None

    @cached_property
    def config(self) -> RunConfig | None:
        """That of a run of `configs`, in a sweep below `folder` that has its dense network."""
        if self.configs is None:
            return None
        path = given_or_shipped(Path(self.configs))
        if not path.is_file():
            raise UserError(f"configs: no such file: {self.configs}")
        given = {"arch": self.arch, "data_dir": self.data_dir}
        own = {"exp_name": "doctor", "result_dir": self.folder}
        values = {"k": "0.5"} | read_yaml(path) | {n: v for n, v in given.items() if v} | own
        if values.get("exp_mode", "pretrain") != "pretrain":
            values["source_net"] = Path(self.folder, "doctor", "dense.pth.tar")
        else:
            values.pop("k")
        return build_config(values, str(path))


def check_ranks(_settings: Settings) -> Iterator[Finding]:
    """Two processes meet and add numbers: by gloo, and by NCCL where there are two GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if gpus < 2:
        env["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        processes = []
        for rank, log in enumerate(logs):
            stream = stack.enter_context(open(log, "wb"))
            words = [sys.executable, "-m", "launch.checks", RANK]
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(words, env=own, stdout=stream, stderr=stream))
            stack.callback(processes[-1].kill)
        how = ""
        deadline = time.monotonic() + RANK_SECONDS
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                how = how or f"no answer within {RANK_SECONDS:.0f} s"
        if any(process.returncode for process in processes):
            printed = next((lines[-1] for log in logs if (lines := tail(log))), "")
            how = how or printed or "a rank ended without a message"
    if how:
        remedy = "name an interface of `ip -br addr` in the profile, env: {GLOO_SOCKET_IFNAME: X, "
        yield Finding("error", f"ranks: two cannot meet: {how}; {remedy}NCCL_SOCKET_IFNAME: X}}")
    elif gpus >= 2:
        yield Finding("ok", "ranks: two met by gloo and NCCL")
    else:
        why = "there is one GPU" if gpus else "there is no GPU"
        yield Finding("ok", f"ranks: two met by gloo; {why} here, so NCCL was not tried")


def rank() -> None:
    """One of the two ranks: meet as a run does, and add numbers on the CPU and on the device."""
    import torch

    from bip.distributed.rendezvous import join

    group = join(Path(tempfile.gettempdir()))
    if group.sum_(torch.ones(1, device=group.device)).item() != group.world:
        raise UserError("ranks: the sum of two ones is not two")
    group.barrier()
    group.close()


def check_dali(settings: Settings) -> Iterator[Finding]:
    """DALI decodes a JPEG as a run does."""
    from bip.data.loaders.dali import DaliLoader, is_installed

    asked = settings.config.loader if settings.config else "auto"
    if not is_installed():
        if asked == "dali":
            text = "not installed; pip install 'bip-hpc[dali-cuda12]' (or 13), or --loader auto"
            yield Finding("error", f"DALI: {text}")
        elif asked == "auto":
            yield Finding("ok", "DALI: not installed; worker processes decode images")
        return
    if asked not in ("dali", "auto"):
        return
    import numpy as np
    import torch
    from PIL import Image

    from bip.data.options import DataOptions
    from bip.data.reader import Request
    from bip.data.stores.folder import FolderStore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = DataOptions(
        dataset="ImageNet", data_dir=Path(), batch_size=1, test_batch_size=1, num_workers=1, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "red").mkdir()
        Image.new("RGB", (300, 260), (255, 0, 0)).save(Path(folder, "red", "one.jpg"))
        loader = DaliLoader(FolderStore(Path(folder)), options, device)
        images, _ = next(iter(loader.fetch([Request(np.arange(1))])))
        red, green, _ = images[0].float().mean((1, 2)).tolist()
    if red < 200 or green > 50:
        raise UserError("a red JPEG was not decoded to red; install DALI for your CUDA version")
    yield Finding("ok", f"DALI: decodes on the {device.type.replace('cuda', 'gpu').upper()}")


def check_images(settings: Settings) -> Iterator[Finding]:
    """The images open, suit the network, and one training batch is read."""
    if (config := settings.config) is None:
        return
    import torch

    from bip.data.batches import open_data
    from bip.data.options import DataOptions

    check_inputs([config], settings.ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = open_data(DataOptions.of(config), 0, settings.ranks, device)
    began = time.perf_counter()
    images, _ = next(data.train())
    took = time.perf_counter() - began
    data.close()
    what = f"{len(images)} of {config.dataset} read by the loader {data.loader} in {took:.1f} s"
    yield Finding("ok", f"images: {what}")


def check_save(settings: Settings) -> Iterator[Finding]:
    """The seconds of a checkpoint of the network's real size, in the result folder."""
    if (config := settings.config) is None:
        return
    from bip.training.checkpoint import CheckpointFolder

    state = _state(config)
    place = existing(Path(settings.folder))
    with tempfile.TemporaryDirectory(dir=place, prefix=".bip-doctor-") as folder:
        began = time.perf_counter()
        size = CheckpointFolder(Path(folder)).save(state, 0).stat().st_size
        took = time.perf_counter() - began
    text = f"save: {size / 1e6:,.0f} MB in {took:.1f} s on {place}"
    if settings.seconds is None:
        yield Finding("ok", text)
        return
    have = f"a run has {settings.seconds:.0f} s"
    remedy = "ask for a longer GraceTime or KillWait, raise signal_lead, or take a faster disk"
    if took >= settings.seconds:
        yield Finding("error", f"{text}, but {have}; {remedy}")
    elif 2 * took >= settings.seconds:
        # The step at the signal comes first, and other runs may save at the same time.
        yield Finding("warning", f"{text}; {have}, which is short; {remedy}")
    else:
        yield Finding("ok", f"{text}; {have}")


def _state(config: RunConfig) -> dict[str, Any]:
    """Tensors as many and large as in a checkpoint of this run: weights, momentum, scores, mask.

    Random, as a file system may compress.
    """
    import torch

    from bip import models
    from bip.data.options import DataOptions
    from bip.pruning.layout import find_prunable
    from bip.training.checkpoint import FORMAT

    options = DataOptions.of(config)
    outline = models.outline(config.arch, options.classes, options.spec.channels)

    def like(names: str, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return {f"{names}{name}": torch.rand(value.shape) for name, value in tensors.items()}

    state = like("", dict(outline.state_dict()))
    momentum = like("momentum.", dict(outline.named_parameters()))
    mask = None
    if config.layer_type != "dense" and config.method.has_mask:
        size = find_prunable(outline, config.layer_type).size
        state["scores"], momentum["scores"] = torch.rand(size), torch.rand(size)
        mask = torch.randint(0, 256, (-(-size // 8),), dtype=torch.uint8)
    return {"format": FORMAT, "state_dict": state, "optimizers": momentum, "mask": mask}


CHECKS: dict[str, Callable[[Settings], Iterator[Finding]]] = {
    "ranks": check_ranks,
    "DALI": check_dali,
    "images": check_images,
    "save": check_save,
}


def findings(settings: Settings, python: list[str]) -> Iterator[Finding]:
    """Those of all checks, by a process that the words of `python` start."""
    words = [*python, "-m", "launch.checks", json.dumps(asdict(settings))]
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=400,
            env=without_options(os.environ), check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("error", f"checks: {words[0]}: {error}; start it by hand to see why")
        return
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if MARK in line[:9]]
    records = [json.loads(line) for line in lines]
    for record in records:
        if "begins" not in record:
            yield Finding(**record)
    if done.returncode:
        last = next((r["begins"] for r in reversed(records) if "begins" in r), "checks")
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else said
        yield Finding("error", f"{last}: the check did not end: {how}")


def main(text: str) -> None:
    """Print the findings of all checks."""

    def show(record: dict[str, Any]) -> None:
        print(f"{MARK}{json.dumps(record)}", flush=True)

    settings = Settings(**json.loads(text))
    for name, check in CHECKS.items():
        show({"begins": name})
        try:
            for finding in check(settings):
                show(asdict(finding))
        except Exception as error:  # whatever a driver raises is what the check finds
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            show(asdict(Finding("error", f"{name}: {kind}{str(error) or 'no message'}")))


if __name__ == "__main__":
    rank() if sys.argv[1] == RANK else main(sys.argv[1])
