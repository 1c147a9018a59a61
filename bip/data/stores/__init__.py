"""Images on disk: LMDB stores in two layouts, folders, archives; writing and copying stores."""

from bip.data.stores.lmdb import LmdbStore

__all__ = ["LmdbStore"]
