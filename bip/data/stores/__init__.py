"""Images on disk: LMDB stores in two layouts, folders, archives; writing and copying stores."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`LmdbStore`, imported when it is used: commands that read no store start without lmdb."""
    if name == "LmdbStore":
        from bip.data.stores.lmdb import LmdbStore

        return LmdbStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
