"""The `lmdb` loader: an LMDB store, read and decoded by worker processes."""

from bip.data.workers import WorkerLoader


class LmdbLoader(WorkerLoader):
    """Reads an LMDB store."""

    layout = "lmdb"
