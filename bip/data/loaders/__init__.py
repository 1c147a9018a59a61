"""The data loaders, one file each, named like the file; adding a loader is adding a file here.

Every file defines one subclass of `bip.data.reader.Loader`. The names are those of the files, so
that `bip.config` can list them without importing torch or DALI.
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
    """The loader of that name, which is not "auto"."""
    from bip.data.reader import Loader

    module = importlib.import_module(f"{__name__}.{name}")
    classes = (item for item in vars(module).values() if isinstance(item, type))
    own = (found for found in classes if found.__module__ == module.__name__)
    return next(found for found in own if issubclass(found, Loader))


def choose(spec: "DatasetSpec", split: "Split", device: "torch.device") -> str:
    """What "auto" takes: memory for small sets; for others DALI where a GPU can decode and it is
    installed, else worker processes over what is there.
    """
    from bip.data.loaders.dali import is_installed
    from bip.data.stores.base import ArraySplit
    from bip.data.stores.folder import FolderStore

    if spec.small or isinstance(split, ArraySplit):
        return "memory"
    if device.type == "cuda" and is_installed():
        return "dali"
    return "folder" if isinstance(split, FolderStore) else "lmdb"
