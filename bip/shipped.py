"""Files that are shipped with the code: configs/ and slurm/.

cp "$(python -m bip.shipped slurm/profiles/gpu.yml)" mine.yml
"""

import sys
from pathlib import Path

_TREE = Path(__file__).parents[1]


def shipped(name: str, tree: Path = _TREE) -> Path:
    """The path of a shipped file or folder, such as slurm/task.sh.

    `tree` is the folder that holds the package `bip`. A wheel has the files inside the package
    (setup.py), a clone of the repository and a snapshot have them beside it.
    """
    installed = tree / "bip" / "_files"
    return (installed if installed.is_dir() else tree) / name


def given_or_shipped(path: Path) -> Path:
    """`path`; if there is no such file, the shipped one of that name, which is then printed."""
    if path.parts[:1] not in (("configs",), ("slurm",)):
        return path
    try:
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        found = shipped(str(path))
    except OSError:  # it may exist on an unreachable file system: use no other file
        return path
    if not found.is_file():
        return path
    print(f"{path}: not in this folder; using {found}", file=sys.stderr)
    return found


if __name__ == "__main__":
    print(shipped("/".join(sys.argv[1:])))
