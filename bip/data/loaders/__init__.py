"""The data loaders, one per file; to add a loader, add a file here.

Every file defines a subclass of `bip.data.reader.Loader`. The loader's name is the file's, so that
`bip.config` can list them without importing torch or DALI.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bip.data.reader import Loader, Split
    from bip.data.sets import DatasetSpec


def names() -> tuple[str, ...]:
    """All names that --loader takes."""
    return ("auto", *(module.name for module in pkgutil.iter_modules(__path__)))


def loader_class(name: str) -> "type[Loader]":
    """The loader of that name (not "auto")."""
    from bip.data.reader import Loader

    module = importlib.import_module(f"{__name__}.{name}")
    classes = (item for item in vars(module).values() if isinstance(item, type))
    own = (found for found in classes if found.__module__ == module.__name__)
    return next(found for found in own if issubclass(found, Loader))


def choose(spec: "DatasetSpec", split: "Split", device: "torch.device") -> str:
    """The choice of "auto": "memory" for small sets; for others "dali" if it is installed and
    there is a GPU, else worker processes for the layout on disk.
    """
    from bip.data.loaders.dali import is_installed
    from bip.data.stores.base import ArraySplit
    from bip.data.stores.folder import FolderStore

    if spec.small or isinstance(split, ArraySplit):
        return "memory"
    if device.type == "cuda" and is_installed():
        return "dali"
    return "folder" if isinstance(split, FolderStore) else "lmdb"
