"""Stores on network filesystems, and their copies on a node's local disk."""

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bip.data.stores.environment import data_file
from bip.errors import UserError
from bip.files import fsync_folder, raise_passing, sha256_file

# Names as in /proc/self/mountinfo. FUSE filesystems are "fuse.NAME" and count as network
# filesystems, except those that containers use.
_NETWORK = frozenset(
    [
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "smbfs", "glusterfs"),
        *("afs", "9p", "panfs", "wekafs", "orangefs", "pvfs2", "virtiofs", "ocfs2", "gfs2"),
        "fhgfs",
    ]
)
_LOCAL_FUSE = frozenset(["fuse.fuse-overlayfs", "fuse.squashfuse", "fuse.squashfuse_ll"])
_CHUNK = 16 << 20


def network_filesystem(path: Path, mountinfo: str | None = None) -> str | None:
    """The kind of network filesystem that `path` is on; None for a local one.

    Args:
        mountinfo: Linux's table of mounts; None reads this process's. Without
            one (other systems) the answer is None.
    """
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return None
    place, kind = Path("/"), ""
    for line in mountinfo.splitlines():
        front, _, back = line.partition(" - ")
        if not back:
            continue
        point = Path(front.split()[4].encode().decode("unicode_escape"))
        # A later mount at the same place hides an earlier one.
        if path.resolve().is_relative_to(point) and point.is_relative_to(place):
            place, kind = point, back.split()[0]
    remote = kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
    return kind if remote else None


def stage(store: Path, folder: Path, give_up: Callable[[], None] = lambda: None) -> Path:
    """A copy of an LMDB store in `folder`, made once for all processes that call this.

    One process copies while the others wait. If it is killed, its lock ends and another copies. The
    copy gets its name when it is on disk and its SHA-256, read back, is that of the bytes read from
    `store`. The name contains a hash of the store's path, size and time of change, so a store that
    was built again is copied again. `give_up` is called often; an exception from it ends the
    copying or the waiting.

    Returns:
        Path of the copy, a single file that ends in .lmdb.

    Raises:
        UserError: it cannot be copied; not enough space; the store changed meanwhile.
        OSError: a file system is unreachable.
    """
    source = data_file(store)
    try:
        status = source.stat()
        key = f"{source.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        name = f"{store.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.lmdb"
        target = folder / name
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock", give_up, f"another process makes {target}"):
            if not target.exists():
                _copy(source, target, status, give_up)
    except OSError as error:
        raise_passing(error, f"{store}, being copied to {folder}")
        raise UserError(
            f"stage_to: {store} cannot be copied to {folder} ({error.strerror}); "
            "choose another folder or leave --stage-to out"
        ) from error
    return target


def _copy(source: Path, target: Path, status: os.stat_result, give_up: Callable[[], None]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)  # of a killed copy; it may fill the disk
    free = shutil.disk_usage(target.parent).free
    if free < status.st_size:
        raise UserError(
            f"stage_to: {source} takes {status.st_size / 1e9:.2f} GB, {target.parent} has "
            f"{free / 1e9:.2f} GB free; choose another folder or leave --stage-to out"
        )
    if (kind := network_filesystem(target.parent)) is not None:
        print(f"warning: stage_to: {target.parent} lies on {kind}, not on the node's own disk")
    print(f"staging {source} to {target.parent}: {status.st_size / 1e6:.0f} MB", flush=True)
    started = time.monotonic()
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as reader, open(partial, "wb") as writer:
            while chunk := reader.read(_CHUNK):
                give_up()
                digest.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
            # Otherwise the check below would read the page cache, not the disk.
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        after = source.stat()
        if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise UserError(f"stage_to: {source} changed while it was copied; start again")
        give_up()
        if sha256_file(partial) != digest.hexdigest():
            raise UserError(
                f"stage_to: the copy of {source} in {target.parent} differs from it (SHA-256); "
                "that disk is faulty, choose another folder"
            )
        os.replace(partial, target)
        fsync_folder(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    seconds = time.monotonic() - started
    print(
        f"staged {source} to {target}: {status.st_size / 1e6:.0f} MB in {seconds:.1f} s, "
        "SHA-256 confirmed",
        flush=True,
    )


@contextlib.contextmanager
def _locked(path: Path, give_up: Callable[[], None], waiting: str) -> Iterator[None]:
    for turn in itertools.count():
        with open(path, "w") as stream:
            if claims(stream.fileno(), path):
                yield
                return
        if turn == 10:
            print(f"waiting: {waiting}", flush=True)
        give_up()
        time.sleep(0.1)


def claims(file: int, path: Path) -> bool:
    """Lock an open file that was found at `path`. False: another process has it, or moved it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been removed or renamed between open and lock.
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
