"""Timing that a busy machine disturbs least: candidates take turns, medians are compared."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def arguments(description: str, **defaults: int | str) -> argparse.Namespace:
    """--json, and one option per keyword, of its default's type."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def shared_data(name: str) -> Path:
    """A file of real images; without it the benchmark ends with exit code 2.

    In the folder BIP_SHARED_DATA, else in shared/data beside the repository.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("BIP_SHARED_DATA", beside)) / name
    if not path.is_file():
        print(f"error: no such file: {path}; set BIP_SHARED_DATA to its folder", file=sys.stderr)
        sys.exit(2)
    return path


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, by name: every round calls each candidate once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, call in candidates.items():
            synchronize()
            began = time.perf_counter()
            call()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(top: list[float], bottom: list[float]) -> float:
    """Median of the ratios of calls made in the same round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def machine() -> str:
    """One line: processor or GPU, threads, torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def finish(figures: dict[str, Any], as_json: bool) -> None:
    """Print the figures; with --json, one JSON object as the last line."""
    for name, value in figures.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if as_json:
        print(json.dumps(figures))
