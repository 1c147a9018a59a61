"""Real training runs on Digits, in this process: a fraction of a second each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bip import run
from bip.config import load_config
from bip.distributed.group import Group, Ranks
from bip.files import read_jsonl
from bip.identity import with_source_of_resume
from bip.methods import methods
from bip.training.checkpoint import CheckpointFolder, State, layer_masks, read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs" / "Digits"
LAYER_TYPES = ("unstructured", "filter", "channel")
ALONE = Group(Ranks(0, 1, 0, 1), torch.device("cpu"))
# By these the masks of methods that prune while training change in a run of a few steps.
OFTEN = {"mask_every": 2, "acdc_warmup": 0.1, "acdc_phase": 0.1}


class Killed(BaseException):
    """Stands for a process that dies just after a checkpoint."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    result: dict[str, Any]

    @property
    def newest(self) -> Path:
        return self.folder / "checkpoint" / "checkpoint.pth.tar"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoint" / "model_best.pth.tar"

    @property
    def state(self) -> State:
        return read_checkpoint(self.newest)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The final state_dict (θ, not z), without scores."""
        return {n: t for n, t in self.state["state_dict"].items() if "popup_scores" not in n}

    @property
    def masks(self) -> dict[str, Tensor]:
        return layer_masks(self.state)

    def records(self, event: str = "step") -> list[dict[str, Any]]:
        """The records of metrics.jsonl of one kind."""
        return [r for r in read_jsonl(self.folder / "metrics.jsonl") if r["event"] == event]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records()]


def flags(**settings: Any) -> list[str]:
    """Settings as command-line flags: `bn_wd=False` is `--no-bn-wd`."""
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def often(kind: str) -> dict[str, Any]:
    """Those of OFTEN that act in a method."""
    return {key: value for key, value in OFTEN.items() if key in methods()[kind].keys}


def cases_of_rivals() -> dict[str, tuple[str, dict[str, Any]]]:
    """(method, settings) of every method to prune with but BiP and HYDRA, by a name."""
    return {
        name if layer_type == "unstructured" else f"{name}-{layer_type}": (
            name, {"layer_type": layer_type} | often(name),
        )
        for name, method in methods().items()
        if method.mode == "prune" and name not in ("bip", "hydra")
        for layer_type in ("unstructured", "filter")
    }  # fmt: skip


def source_for(kind: str, dense: Path, pruned: Path) -> dict[str, Path]:
    """The setting source_net of a run by configs/Digits/KIND.yml: one of the two files, or none."""
    start = "fresh" if kind == "pretrain" else methods()[kind].starts_from
    return {} if start == "fresh" else {"source_net": pruned if start == "pruned" else dense}


def arguments(kind: str, result_dir: Path, **settings: Any) -> list[str]:
    """Flags of a short run by configs/Digits/KIND.yml that logs every step."""
    short = {"epochs": 1, "print_freq": 1, "result_dir": result_dir}
    return ["--configs", str(CONFIGS / f"{kind}.yml"), *flags(**short | settings)]


def train(kind: str, result_dir: Path, **settings: Any) -> Finished:
    """Run it to its end."""
    config = with_source_of_resume(load_config(arguments(kind, result_dir, **settings)))
    run.train(config)
    return Finished(config.run_folder, json.loads((config.run_folder / "result.json").read_text()))


def train_until(
    saves: int, kind: str, result_dir: Path, by: Exception | None = None, **settings: Any
) -> Path:
    """Train, with a checkpoint after every step, until so many are saved, when the run is ended
    (by an exception: that of an agreed stop, say). Returns the newest."""
    end = Killed() if by is None else by
    save, left = CheckpointFolder.save, saves

    def last_save(self: CheckpointFolder, *args: Any, **kwargs: Any) -> Path:
        nonlocal left
        path = save(self, *args, **kwargs)
        left -= 1
        if left == 0:
            raise end
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", last_save)
        with pytest.raises(type(end)):
            train(kind, result_dir, **settings, checkpoint_minutes=1e-9)
    (newest,) = result_dir.glob("*/*/*/checkpoint/checkpoint.pth.tar")
    return newest


def make_run(kind: str, result_dir: Path, group: Group = ALONE, **settings: Any) -> run.Run:
    """The parts of a run on one rank, before it starts."""
    return run.Run(load_config(arguments(kind, result_dir, **settings)), group)
