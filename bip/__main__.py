"""python -m bip train | evaluate | export | compare | data"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from bip.errors import RankError, Stopped, UserError
from bip.files import may_pass


def _train(argv: list[str]) -> None:
    from bip.distributed.signals import StopRequest

    stop = StopRequest().install()  # before the slow imports: a signal there must not be lost
    from bip.config import load_config
    from bip.run import train

    train(load_config(argv), stop)


def _evaluate(argv: list[str]) -> None:
    from bip.config import load_config
    from bip.run import train

    train(load_config(["--evaluate", *argv], "python -m bip evaluate"))


def _export(argv: list[str]) -> None:
    from bip.cli import call
    from bip.export import export

    call({"export": export}, ["export", *argv], "python -m bip")


def _compare(argv: list[str]) -> None:
    from bip.cli import call
    from bip.export import compare

    call({"compare": compare}, ["compare", *argv], "python -m bip")


def _data(argv: list[str]) -> None:
    from bip.cli import call
    from bip.data.tools import build, check, prepare

    commands: dict[str, Callable[..., None]] = {
        "build-lmdb": build.build_lmdb,
        "convert": build.convert,
        "info": check.info,
        "verify": check.verify,
        "prepare-imagenet": prepare.prepare_imagenet,
    }
    call(commands, argv, "python -m bip data")


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (_train, "pretrain, prune or fine-tune one network"),
    "evaluate": (_evaluate, "test accuracy of a checkpoint"),
    "export": (_export, "a checkpoint's masked weights as a safetensors file"),
    "compare": (_compare, "how far two masks agree (IoU)"),
    "data": (_data, "build and inspect image stores"),
}


def main(argv: list[str]) -> int:
    """Run one command.

    Exit code 0; 2 for input the user can mend; 75 (EX_TEMPFAIL) of a run that was told to stop; 74
    (EX_IOERR) for a file system that is away.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m bip COMMAND [OPTIONS]; COMMAND --help tells its options\n")
        print("\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()))
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}")
        COMMANDS[argv[0]][0](argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the process group may wait for a dead rank for ever
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return os.EX_TEMPFAIL
    except OSError as error:
        if not may_pass(error):
            raise
        print(f"error: {error}; try again", file=sys.stderr)
        return os.EX_IOERR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _exit(code: int) -> None:
    """A process group that was not closed may wait for a rank that is gone, for days."""
    sys.stdout.flush()
    sys.stderr.flush()
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def console() -> None:
    """The script `bip`."""
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    _exit(code)


if __name__ == "__main__":
    console()
