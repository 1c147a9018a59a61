"""The `folder` loader: an ImageFolder tree, read and decoded by worker processes."""

from bip.data.workers import WorkerLoader


class FolderLoader(WorkerLoader):
    """Reads an ImageFolder tree."""

    layout = "folder"
