"""A day on a GPU in one command: all that only a GPU can show, in order of worth.

    python -m tests.gpu.day --minutes 40 --out DIR

It stops in time, and the same command goes on where it stopped: an item whose result is in
DIR/ITEM.json is not run again, one that failed or was cut is. DIR/RESULTS.md is a section for
tests/benchmarks/RESULTS.md, up to date after every item; DIR/ITEM.log has what an item printed.
`--only a,b` runs these items alone; `--rehearse` runs all of them in miniature on the CPU, and says
so in every result. Without CUDA and without `--rehearse` the exit code is 2; it is 1 if an item
failed.

(a) correctness: tests/gpu. (b) step: BiP over dense, eager, compiled, and with CUDA graphs; one
rank of NCCL. (c) data: loaders, with DALI's decoding on the GPU. (d) accuracy on CIFAR-10, several
runs at once on the GPU.

A bare machine with torch and torchvision (these bring numpy and Pillow) needs these wheels; sizes
in MiB, about. Over a link that carries 64 MiB at a time, each paragraph is one load.

    llvmlite 57, numba 4: the tests compare with the CPU's kernels

    pydantic, pydantic-core, annotated-types, typing-inspection, tyro, docstring-parser, typeguard,
    pyyaml, lmdb, simplejpeg, submitit, cloudpickle, rich, markdown-it-py, mdurl, pygments,
    safetensors: 7
    tensorboard 5, tensorboard-data-server 6, grpcio 7, absl-py, markdown, protobuf, werkzeug: 20
    pytest, pluggy, iniconfig, hypothesis, sortedcontainers: 2
    scikit-learn 9 (pip install --no-deps: only Digits' table in it is read)

    cifar10-jpeg.zip 59

    imagenet-jpeg-sample.zip 17; both in the folder that BIP_SHARED_DATA names

    nvidia-dali-cuda130, or cuda120 by torch's CUDA, with what it needs: 500 unpacked, so
    `split -b 60M` its wheels. Without it tests-dali is skipped, and data-imagenet leaves DALI out

Install them with `pip install --no-index --find-links FOLDER NAMES`.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.common import shared_data
from tests.gpu.items import ITEMS, ROOT, SAVE_SECONDS

REHEARSAL = "rehearsal on CPU"
ARCHIVES = {
    "data-imagenet": "imagenet-jpeg-sample.zip",
    "data-cifar": "cifar10-jpeg.zip",
    "accuracy-resnet20s": "cifar10-jpeg.zip",
    "accuracy-resnet18": "cifar10-jpeg.zip",
}
LEAST_SECONDS = 30.0  # with less time left no further item starts


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.day", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help=f"items: {', '.join(ITEMS)}")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # run it in this process
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.wanted = [name for name in options.only.split(",") if name] or [*ITEMS]
    return options


def problem(options: argparse.Namespace) -> str:
    """Why the day cannot start; "" if it can."""
    if unknown := {*options.wanted} - {*ITEMS}:
        return f"--only: no item {', '.join(sorted(unknown))}; one of {', '.join(ITEMS)}"
    if not (options.rehearse or torch.cuda.is_available()):
        return "torch finds no CUDA device; --rehearse runs all in miniature on the CPU"
    here = device(options.rehearse)
    for name in ITEMS:
        if (record := read(options.out, name)) and record["device"] != here:
            return f"--out: has results of {record['device']}; give another folder"
    return ""


def device(rehearse: bool) -> str:
    """The device's name, with the versions that the figures depend on."""
    name = f"{REHEARSAL}, {platform.machine()}" if rehearse else torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def read(out: Path, name: str) -> dict[str, Any]:
    """An item's record; {} if there is none."""
    path = out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def is_done(record: dict[str, Any]) -> bool:
    return "figures" in record and not record["figures"].get("partial")


def run_item(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run an item in a process of its own, for at most `seconds`; the record to keep."""
    words = ["--out", str(options.out), "--item", name, "--seconds", f"{seconds:.0f}"]
    words += ["--rehearse"] if options.rehearse else []
    answer = options.out / f"{name}.answer"
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    with open(options.out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.day", *words],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        patience = SAVE_SECONDS + 15.0  # after Ctrl-C, for runs to save
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, patience = None, 5.0
        finally:
            _end(process, patience)
    record: dict[str, Any] = {"item": name, "seconds": round(time.monotonic() - began, 1)}
    if code == 0 and answer.exists():
        record["figures"] = json.loads(answer.read_text())
        answer.unlink()
    elif code is None:
        record["error"] = f"cut after {seconds:.0f} s; the same command runs it again"
    else:
        last = (options.out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        record["error"] = f"exit code {code}: {(last or ['it printed nothing'])[-1][:300]}"
    return record


def _end(process: "subprocess.Popen[bytes]", patience: float) -> None:
    """Interrupt an item that still runs, then kill it and its children."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def keep(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


def section(out: Path, command: str) -> str:
    """All records, as a section of RESULTS.md."""
    records = [record for name in ITEMS if (record := read(out, name))]
    lines = [f"## {records[-1]['date'][:10]}, {records[-1]['device']}", "", f"`{command}`", ""]
    if records[-1]["rehearsal"]:
        lines += [f"A {REHEARSAL}: it shows that the items run. Its figures mean nothing.", ""]
    lines += ["| item | figure | |", "|---|---|---|"]
    for record in records:
        name = f"{record['item']} ({REHEARSAL})" if record["rehearsal"] else record["item"]
        figures = record.get("figures", {}) | ({"error": e} if (e := record.get("error")) else {})
        for key, value in figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
            lines.append(f"| {name} | {key} | {shown} |")
        lines.append(f"| {name} | seconds | {record['seconds']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    options = parse(argv)
    options.out = options.out.absolute()
    if options.item:
        seconds = options.seconds
        figures = ITEMS[options.item](options.rehearse, options.out, seconds)
        keep(options.out / f"{options.item}.answer", json.dumps(figures))
        return 0
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    if text := problem(options):
        print(f"error: {text}", file=sys.stderr)
        return 2
    if not options.rehearse:
        for name, archive in ARCHIVES.items():
            if name in options.wanted:
                shared_data(archive)  # exits with 2, and not after half an hour
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    here = device(options.rehearse)
    command = shlex.join(["python", "-m", "tests.gpu.day", *argv])
    print(here, flush=True)
    failed = 0
    for name in options.wanted:
        if is_done(read(options.out, name)):
            print(f"{name}: done before", flush=True)
            continue
        if (left := end - time.monotonic()) < LEAST_SECONDS:
            print(f"{name} and what follows: no time left; the same command goes on", flush=True)
            break
        record = run_item(name, options, left) | {
            "device": here,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "rehearsal": options.rehearse,
        }
        keep(options.out / f"{name}.json", json.dumps(record, indent=2) + "\n")
        keep(options.out / "RESULTS.md", section(options.out, command))
        print(f"{name}: {record.get('error') or record['figures']}", flush=True)
        failed += "error" in record
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
