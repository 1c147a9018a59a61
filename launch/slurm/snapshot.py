"""The code as it is at submission, kept for tasks that start hours later."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PARTS = ("bip/**/*.py", "launch/**/*.py", "slurm/task.sh", "slurm/profiles/local.yml")


def snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy the code under `root` to FOLDER/HASH, unless it is there, and return that folder.

    HASH is of the files' names and contents, so equal code is kept once.
    """
    files = sorted(path for pattern in _PARTS for path in root.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    target = folder / digest.hexdigest()[:16]
    if target.exists():
        return target
    building = folder / f".{target.name}.{uuid.uuid4().hex}"
    for path in files:
        copy = building / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    try:
        os.rename(building, target)
    except OSError:  # another launcher was faster
        shutil.rmtree(building)
    return target
