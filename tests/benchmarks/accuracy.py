"""BiP against HYDRA and one-shot magnitude pruning on real CIFAR-10, in a small fixed budget.

resnet20s on the first 1,000 training images of each class (BIP_SHARED_DATA's cifar10-jpeg.zip),
tested on all 10,000 test images. Every method starts from the same pretrained network of its
seed and gets the same fine-tuning; BiP and HYDRA prune for `--prune-epochs` before it, one-shot
magnitude keeps the largest weights. The settings are the published ones; none was tuned here.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.common import arguments, machine, shared_data

IMAGES = "cifar10-jpeg.zip"
PER_CLASS = 1000
METHODS = {
    "BiP": ["--configs", "configs/CIFAR10/bip.yml"],
    "HYDRA": ["--configs", "configs/CIFAR10/hydra.yml"],
    # One-shot: the scores start as the weights, and neither they nor batch-norm move.
    "magnitude": ["--configs", "configs/CIFAR10/hydra.yml", "--lr", "0", "--max-steps", "1",
                  "--freeze-bn"],
}  # fmt: skip


def build_data(folder: Path) -> None:
    """The training subset and the whole test set as LMDB stores in `folder`."""
    subset = folder / "subset.zip"
    taken: dict[str, int] = {}
    with zipfile.ZipFile(shared_data(IMAGES)) as source, zipfile.ZipFile(subset, "w") as target:
        for name in sorted(n for n in source.namelist() if not n.endswith("/")):
            split, label = Path(name).parts[-3:-1]
            taken[label] = taken.get(label, 0) + (split == "train")
            if split == "test" or taken[label] <= PER_CLASS:
                target.writestr(name, source.read(name))
    bip("data", "build-lmdb", str(subset), str(folder))


def bip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bip", *arguments], capture_output=True, text=True)
    if done.returncode:
        text = f"bip {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        print(text, flush=True)  # at once: the other seeds may go on for an hour
        raise RuntimeError(text)


def run(folder: Path, name: str, *flags: str) -> tuple[dict[str, Any], str]:
    """One training run; (result.json, path of its model)."""
    where = folder / "runs" / name
    common = ["--data-dir", str(folder), "--result-dir", str(where), "--eval-every", "100"]
    bip("train", *flags, *common, "--exp-name", "accuracy")
    (result,) = where.glob("accuracy/*/*/result.json")
    model = result.parent / "checkpoint" / "model_best.pth.tar"
    return json.loads(result.read_text()), str(model)


def run_seed(folder: Path, seed: int, k: str, epochs: tuple[int, int, int]) -> dict[str, Any]:
    """Top-1 of the dense network and of each method, before and after fine-tuning."""
    pretrain, prune, finetune = (str(number) for number in epochs)
    common = ["--seed", str(seed)]
    dense, source = run(
        folder, f"dense-{seed}", "--configs", "configs/CIFAR10/pretrain.yml", "--epochs", pretrain,
        *common,
    )  # fmt: skip
    row: dict[str, Any] = {"seed": seed, "dense": dense["top1"]}
    for method, flags in METHODS.items():
        pruned, model = run(
            folder, f"{method}-{seed}", *flags, "--epochs", prune, "--k", k, "--source-net", source,
            *common,
        )  # fmt: skip
        tuned, _ = run(
            folder, f"{method}-tuned-{seed}", "--configs", "configs/CIFAR10/finetune.yml",
            "--epochs", finetune, "--k", k, "--source-net", model, *common,
        )  # fmt: skip
        row[method], row[f"{method} + finetune"] = pruned["top1"], tuned["top1"]
        print(f"seed {seed} {method}: {pruned['top1']:.2f} -> {tuned['top1']:.2f}", flush=True)
    return row


def main() -> None:
    options = arguments(
        __doc__ or "", seeds=3, pretrain_epochs=8, prune_epochs=2, finetune_epochs=3, processes=2
    )
    k = "0.05"
    epochs = (options.pretrain_epochs, options.prune_epochs, options.finetune_epochs)
    print(f"{machine()}; k = {k}, epochs {epochs} (pretrain, prune, finetune)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_data(folder)
        with ThreadPoolExecutor(options.processes) as pool:
            seeds = range(1, options.seeds + 1)
            rows = list(pool.map(lambda seed: run_seed(folder, seed, k, epochs), seeds))
    names = [name for name in rows[0] if name != "seed"]
    figures = {}
    for name in names:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        figures[name] = {"mean": statistics.mean(values), "stdev": spread, "values": values}
        shown = " ".join(f"{value:6.2f}" for value in values)
        print(f"{name:24} {statistics.mean(values):6.2f} ± {spread:4.2f}   {shown}")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
