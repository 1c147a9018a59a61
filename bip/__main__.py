"""python -m bip train | evaluate | profile | export | inspect | compare | archs | data"""

import os
import sys
import traceback
from typing import Any

from bip import cli
from bip.errors import ExitCode

NAMES = ("bip", "bip")  # of the package, and of the console script


def train(*argv: str) -> None:
    """pretrain, prune or fine-tune one network"""
    from bip.distributed.signals import StopRequest

    stop = StopRequest().install()  # before the slow imports, so that no signal is lost
    from bip import run
    from bip.config import load_config

    run.train(load_config([*argv], f"{cli.program(*NAMES)} train"), stop)


def evaluate(*argv: str) -> None:
    """test accuracy of a checkpoint"""
    from bip.evaluation import evaluate

    evaluate([*argv], f"{cli.program(*NAMES)} evaluate")


def profile(*argv: str) -> None:
    """where an iteration's time goes, beside dense steps"""
    from bip.config import RunConfig, build_config, merge
    from bip.profiling import ProfileOptions, profile_run

    name = f"{cli.program(*NAMES)} profile"
    flags = cli.parse_flags([ProfileOptions, RunConfig], [*argv], name, "Time iterations of a run.")
    options = ProfileOptions.of(flags)
    flags = {key: value for key, value in flags.items() if key in RunConfig.model_fields}
    where = str(flags.get("configs") or "")
    profile_run(build_config(merge(flags), where, flags), options)


def export(*argv: str) -> int:
    """a checkpoint's network as dense, compact, reference, onnx or sparse file"""
    from bip.exporting.export import export

    return cli.call({"export": export}, ["export", *argv], cli.program(*NAMES))


def compare(*argv: str) -> int:
    """how far two masks agree (IoU)"""
    from bip.exporting.compare import compare

    return cli.call({"compare": compare}, ["compare", *argv], cli.program(*NAMES))


def inspect(*argv: str) -> int:
    """what a checkpoint keeps, layer by layer"""
    from bip.exporting.inspect import inspect

    return cli.call({"inspect": inspect}, ["inspect", *argv], cli.program(*NAMES))


def archs(*argv: str) -> int:
    """the networks: parameters, prunable weights, input size, source"""
    from bip.models.catalogue import archs

    return cli.call({"archs": archs}, ["archs", *argv], cli.program(*NAMES))


def data(*argv: str) -> int:
    """build and inspect image stores"""
    from bip.data.tools import build, check, prepare

    commands: dict[str, cli.Command] = {
        "build-lmdb": build.build_lmdb,
        "convert": build.convert,
        "info": check.info,
        "verify": check.verify,
        "prepare-imagenet": prepare.prepare_imagenet,
    }
    return cli.call(commands, [*argv], f"{cli.program(*NAMES)} data")


COMMANDS: dict[str, cli.Command] = {
    command.__name__: command
    for command in (train, evaluate, profile, export, inspect, compare, archs, data)
}


def main(argv: list[str]) -> int:
    """Run one command; its exit code, by the table in `bip.errors`."""
    return cli.run(*NAMES, COMMANDS, argv)


def console() -> None:
    """The console script `bip`: run the command of this process and exit with its code."""
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = ExitCode.FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(code)  # closing the group may wait for days for a rank that has ended
    sys.exit(code)


if __name__ == "__main__":
    console()
