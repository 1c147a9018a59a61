"""A copy of the code at submission, for tasks that start hours later."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from bip.commit import git_commit
from bip.shipped import shipped

ROOT = Path(__file__).parents[2]
_CODE = ("bip/**/*.py", "launch/**/*.py")
_SHIPPED = ("slurm/task.sh", "slurm/profiles/local.yml")


def snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy the code under `root` to FOLDER/HASH, unless that exists, and return that folder.

    HASH is of the files' names and contents, so the same code is stored once.
    """
    files = {str(path.relative_to(root)): path for part in _CODE for path in root.glob(part)}
    files |= {name: shipped(name, root) for name in _SHIPPED}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    target = folder / digest.hexdigest()[:16]
    if target.exists():
        return target
    building = folder / f".{target.name}.{uuid.uuid4().hex}"
    for name, path in files.items():
        copy = building / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (building / "COMMIT").write_text(f"{git_commit(root) or ''}\n")
    try:
        os.rename(building, target)
    except OSError:  # another launcher was faster
        shutil.rmtree(building)
    return target
