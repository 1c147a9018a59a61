"""The methods side by side on real CIFAR-10, at equal cost; resumable, for hours or for minutes.

resnet20s on the first 1,000 training images of each class (BIP_SHARED_DATA's cifar10-jpeg.zip) at
16 pixels, tested on all 10,000 test images, the final epoch. Each seed has one dense network
(`--dense` forward-backwards); every method then gets `--budget` forward-backwards, its one-off
costs and any fine-tuning included, with the same learning rate, schedule and weight decay. The
settings were not tuned on these data. `--folder` keeps everything: what is done is not done again,
so `--minutes` may cut it anywhere. The table gives mean, deviation, and the paired difference to
one-shot magnitude over seeds with the p-value of a paired t-test.

    python -m tests.benchmarks.accuracy --folder DIR --seeds 3 --minutes 60 --json
"""

import io
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.stats import ttest_rel

from tests.benchmarks.common import arguments, machine, shared_data

PER_CLASS = 1000
SIDE = 16
SAME = ["--lr", "0.1", "--lr-schedule", "cosine", "--wd", "5e-4", "--image-dim", str(SIDE)]
CASES = [
    ("unstructured", "0.2"),
    ("unstructured", "0.05"),
    ("unstructured", "0.01"),
    ("filter", "0.5"),
]
ABLATED = ("unstructured", "0.01")


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method with its flags.

    `finetune` is the part of the budget for fine-tuning; `rounds` share the budget equally, their k
    falls in equal ratios.
    """

    name: str
    method: str
    flags: tuple[str, ...] = ()
    finetune: float = 0.0
    rounds: int = 1
    cases: list[tuple[str, str]] = field(default_factory=lambda: CASES)


def contenders() -> list[Contender]:
    both = ("--levels", "simultaneous")
    old = ("--dead-filters", "full")
    to_the_end = ("--mask-until", "1")
    whole = ("--scope", "global")
    drawn = ("--no-scaled-score-init", "--scores-init-type", "kaiming_uniform")
    filters = [("filter", "0.5")]
    rows = [
        Contender("omp", "omp"),
        Contender("omp, one ranking", "omp", whole, cases=filters),
        Contender("imp, 3 rounds", "imp", rounds=3),
        Contender("gmp", "gmp", ("--mask-every", "10")),
        Contender("acdc", "acdc"),
        Contender("acdc, k per layer", "acdc", ("--scope", "layer"), cases=[ABLATED]),
        Contender("feather", "feather"),
        Contender("bip", "bip"),
        Contender("bip simultaneous", "bip", both),
        Contender("bip simultaneous, one ranking", "bip", (*both, *whole), cases=filters),
        Contender("bip, mask frozen", "bip", ("--mask-lr", "0")),
        Contender("bip, mask drawn and frozen", "bip", (*drawn, "--mask-lr", "0"), cases=filters),
        Contender("bip, mask moves to the end", "bip", to_the_end),
        Contender("bip as in version 0.1", "bip", (*old, *to_the_end)),
        Contender("hydra + finetune", "hydra", (), 0.5),
        Contender("hydra as in version 0.1", "hydra", old, 0.5),
    ]
    sweeps = {
        "mask-lr": ("0.001", "0.01", "0.1", "1"),
        "lr2": ("0", "1e-4", "1e-2", "1", "100", "1e4"),
        "mask-until": ("0.25", "0.5", "0.75", "1"),
    }
    for key, values in sweeps.items():
        for value in values:
            flags = (*both, f"--{key}", value)
            rows.append(Contender(f"simultaneous, {key} {value}", "bip", flags, cases=[ABLATED]))
    for steps in ("2", "4"):
        flags = ("--lower-steps", steps)
        rows.append(Contender(f"bip, lower-steps {steps}", "bip", flags, cases=[ABLATED]))
    for how in ("hydra", "kaiming_uniform"):
        flags = (*both, *drawn[:-1], how)
        rows.append(Contender(f"simultaneous, scores {how}", "bip", flags, cases=[ABLATED]))
    return rows


def build_data(folder: Path) -> None:
    """The training subset and the whole test set, at 16 pixels, as LMDB stores in `folder`."""
    if (folder / "test.lmdb").exists():
        return
    subset = folder / "subset.zip"
    taken: dict[str, int] = {}
    images = zipfile.ZipFile(shared_data("cifar10-jpeg.zip"))
    with images as source, zipfile.ZipFile(subset, "w") as target:
        for name in sorted(n for n in source.namelist() if not n.endswith("/")):
            split, label = Path(name).parts[-3:-1]
            taken[label] = taken.get(label, 0) + (split == "train")
            if split == "train" and taken[label] > PER_CLASS:
                continue
            stream = io.BytesIO()
            image = Image.open(io.BytesIO(source.read(name))).convert("RGB")
            image.resize((SIDE, SIDE), Image.Resampling.BOX).save(stream, "png")
            target.writestr(str(Path(name).with_suffix(".png")), stream.getvalue())
    bip("data", "build-lmdb", str(subset), str(folder))


def bip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bip", *words], capture_output=True, text=True)
    if done.returncode:
        text = f"bip {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        print(text, flush=True)  # at once: the other seeds may go on for an hour
        raise RuntimeError(text)


def run(folder: Path, name: str, config: str, *flags: str) -> tuple[dict[str, Any], str]:
    """One run, unless it is done; (result.json, path of its model)."""
    where = folder / "runs" / name
    common = ["--data-dir", str(folder), "--result-dir", str(where), "--eval-every", "1000"]
    common += ["--exp-name", "accuracy", "--configs", f"configs/CIFAR10/{config}.yml", *SAME]
    bip("train", *common, *flags)
    (result,) = where.glob("accuracy/*/*/result.json")
    return json.loads(result.read_text()), str(result.parent / "checkpoint" / "model_best.pth.tar")


@dataclass(frozen=True)
class Job:
    contender: Contender
    layer_type: str
    k: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.contender.name}; {self.layer_type} {self.k}; seed {self.seed}"

    def do(self, folder: Path, dense: int, budget: int) -> dict[str, Any]:
        seed = ("--seed", str(self.seed))
        _, source = run(
            folder,
            f"dense-{self.seed}",
            "pretrain",
            "--epochs",
            "1000",
            "--max-steps",
            str(dense),
            *seed,
        )
        contender = self.contender
        tuned = int(budget * contender.finetune)
        share = (budget - tuned) // contender.rounds
        name = self.key.replace("; ", "-").replace(", ", "-").replace(" ", "_")
        for number in range(1, contender.rounds + 1):
            last = number == contender.rounds
            k = self.k if last else f"{float(self.k) ** (number / contender.rounds):.4f}"
            mask = ("--layer-type", self.layer_type, "--k", k, *seed, "--epochs", "1000")
            result, source = run(
                folder, f"{name}-{number}", contender.method, "--source-net", source, *mask,
                "--budget", str(share), *contender.flags,
            )  # fmt: skip
        if tuned:
            result, _ = run(
                folder, f"{name}-tuned", "finetune", "--source-net", source, *mask,
                "--budget", str(tuned),
            )  # fmt: skip
        # Of all since the dense network.
        cost = result["forward_backwards"]
        return {"key": self.key, "top1": result["top1"], "forward_backwards": cost}


def jobs(seeds: int) -> Iterator[Job]:
    """The rows of all cases first, seed by seed, so that each has its rivals beside it."""
    for last in (False, True):
        for seed in range(1, seeds + 1):
            for contender in contenders():
                if (contender.cases == [ABLATED]) == last:
                    for layer_type, k in contender.cases:
                        yield Job(contender, layer_type, k, seed)


def table(done: dict[str, dict[str, Any]], seeds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for layer_type, k in CASES:
        print(f"\n{layer_type}, k = {k}: top-1 %, mean ± deviation, difference to omp (p)")
        for contender in contenders():
            rows = [Job(contender, layer_type, k, seed) for seed in range(1, seeds + 1)]
            omp = [Job(contenders()[0], layer_type, k, row.seed) for row in rows]
            pairs = [
                (done[a.key]["top1"], done[b.key]["top1"])
                for a, b in zip(rows, omp, strict=True)
                if a.key in done and b.key in done
            ]
            if not pairs:
                continue
            own = [pair[0] for pair in pairs]
            spread = statistics.stdev(own) if len(own) > 1 else 0.0
            text = f"{contender.name:32} {statistics.mean(own):6.2f} ± {spread:4.2f}"
            entry: dict[str, Any] = {"values": own}
            if len(pairs) > 1 and contender.name != "omp":
                entry["difference"] = statistics.mean(a - b for a, b in pairs)
                entry["p"] = float(ttest_rel(own, [pair[1] for pair in pairs]).pvalue)
                text += f"  {entry['difference']:+6.2f} ({entry['p']:.3f})"
            print(f"{text}   {' '.join(f'{value:.2f}' for value in own)}")
            figures[f"{layer_type} {k} {contender.name}"] = entry
    return figures


def main() -> None:
    options = arguments(
        __doc__ or "", seeds=3, dense=1000, budget=300, minutes=600, processes=2, folder="accuracy"
    )
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    build_data(folder)
    print(f"{machine()}; dense {options.dense}, budget {options.budget} forward-backwards")
    record = folder / f"results-{options.dense}-{options.budget}.jsonl"
    done = {}
    if record.exists():
        done = {row["key"]: row for row in map(json.loads, record.read_text().splitlines())}
    end = time.monotonic() + 60 * options.minutes

    def do(job: Job) -> None:
        if job.key in done or time.monotonic() > end:
            return
        row = job.do(folder, options.dense, options.budget)
        with open(record, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        done[job.key] = row
        print(f"{job.key}: {row['top1']:.2f} ({row['forward_backwards']})", flush=True)

    for seed in range(1, options.seeds + 1):  # the dense networks, which the others share
        run(folder, f"dense-{seed}", "pretrain", "--epochs", "1000", "--max-steps",
            str(options.dense), "--seed", str(seed))  # fmt: skip
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(do, jobs(options.seeds)))
    figures = table(done, options.seeds)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
