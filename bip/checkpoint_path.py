"""What a path to a checkpoint says: the file that it means, and the k in its name."""

import re
from decimal import Decimal
from pathlib import Path

from bip.errors import UserError

BEST = Path("checkpoint", "model_best.pth.tar")  # in a run folder: what other runs start from
NEWEST = Path("checkpoint", "checkpoint.pth.tar")
LATEST = "latest_exp"  # in an experiment's folder: a link to the run that started last
LIBRARIES = ("torchvision:", "timm:")  # of weights that a library downloads


def checkpoint_of(path: Path, within: Path = BEST) -> Path:
    """`path`, or the checkpoint `within` it if it is a run folder, or a folder of one run.

    Raises UserError for a folder of several runs, which names them, and of none.
    """
    if LATEST in path.parts:
        path = path.resolve()  # the run's folder has its RUN_ID
    if not path.is_dir():
        return path
    if (path / within).exists():
        return path / within
    found = sorted({run.resolve() for run in path.glob("*") if (run / within).exists()})
    if len(found) == 1:
        return path / found[0].name / within
    if not found:
        raise UserError(f"{path}: is a folder without {within}; give a checkpoint or a run folder")
    names = ", ".join(run.name for run in found[:3]) + (", ..." if len(found) > 3 else "")
    raise UserError(f"{path}: holds {len(found)} runs; give one of them: {names}")


def k_in_name(path: Path) -> Decimal | None:
    """k by the name of a checkpoint or of its folders, the nearest first; None if none names it.

    The published folders have "--k-0.1000_" (four decimals), or names such as "BiP_K0.1".
    """
    for part in [path.name, *(parent.name for parent in path.parents[:4])]:
        if found := re.search(r"(?<![A-Za-z0-9])[kK][-_=]?(\d*\.\d+|1(?=-s\d))(?!\d)", part):
            return Decimal(found[1].rstrip(".")).normalize()
    return None


def agrees(k: Decimal, named: Decimal) -> bool:
    """Whether k may stand as `named` in a file name, which may be rounded to four decimals."""
    return k == named or round(k, 4) == named
