"""Filter and channel pruning from end to end: pruned, fine-tuned, compacted, and timed.

The data and settings of `tests.benchmarks.accuracy` (CIFAR-10 as JPEG at 16 pixels, 10,000 training
images), one seed. Each k of the series is pruned by BiP from one dense network and fine-tuned, and
the result exported as compact. `--folder` keeps everything: what is done is not done again, so
`--minutes` may cut the series anywhere.

    python -m tests.benchmarks.structured --folder DIR --archs resnet20s,resnet18,vgg16_bn --json
"""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

from bip.exporting.export import export
from tests.benchmarks.accuracy import build_data, run
from tests.benchmarks.common import arguments, finish, machine

RATIOS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1"


def exported(model: str, out: Path, batch: int) -> dict[str, float]:
    """Ratios of the compact network to the masked one, from what `bip export` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export(Path(model), out, format="compact", batch=batch)
    rows = {line[:18].strip(): line.split() for line in printed.getvalue().splitlines()}
    names = {"bytes": "bytes", "MACs of an image": "macs", "ms of a batch": "time"}
    return {short: float(rows[name][-1]) for name, short in names.items()}


def main() -> None:
    options = arguments(
        __doc__ or "", folder="structured", archs="resnet20s,resnet18,vgg16_bn", k=RATIOS,
        dense=600, prune=200, finetune=200, batch=64, minutes=600,
    )  # fmt: skip
    print(machine())
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    build_data(folder)
    figures: dict[str, float] = {}
    end = time.monotonic() + 60 * options.minutes
    for arch in options.archs.split(","):
        same = ["--arch", arch]
        result, dense = run(
            folder, f"{arch}-dense", "pretrain", *same, "--budget", str(options.dense)
        )
        figures[f"{arch}_dense_top1"] = result["top1"]
        for layer_type in ("filter", "channel"):
            for k in options.k.split(","):
                if time.monotonic() > end:
                    continue
                name = f"{arch}-{layer_type}-{k}"
                pruning = [*same, "--layer-type", layer_type, "--k", k]
                pruned, model = run(
                    folder, name, "bip", *pruning, "--source-net", dense,
                    "--budget", str(options.prune),
                )  # fmt: skip
                tuned, model = run(
                    folder, f"{name}-finetune", "finetune", *pruning, "--source-net", model,
                    "--budget", str(options.finetune),
                )  # fmt: skip
                row: dict[str, Any] = {"top1_pruned": pruned["top1"], "top1": tuned["top1"]}
                row |= exported(model, folder / f"{name}.safetensors", options.batch)
                print(f"{name:26} " + "  ".join(f"{n} {v:.4g}" for n, v in row.items()), flush=True)
                figures |= {f"{name}_{key}": value for key, value in row.items()}
    finish(figures, options.json)


if __name__ == "__main__":
    main()
