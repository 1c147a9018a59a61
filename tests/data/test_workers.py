"""Loader processes on machines with limits."""

import errno
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import opened, refused, take


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE])
def test_a_later_worker_that_cannot_start_ends_the_first(
    small_cifar: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fork, forks = os.fork, iter([True])

    def few() -> int:
        if next(forks, False):
            return fork()
        raise OSError(number, os.strerror(number))

    data = opened(dataset="CIFAR10", data_dir=small_cifar, num_workers=2, loader="lmdb")
    monkeypatch.setattr(os, "fork", few)
    with refused("num_workers: loader process 2 of 2 .*ulimit"):
        next(data.train())
    assert not multiprocessing.active_children()


def test_workers_send_batches_where_tmpdir_is_long(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    current: Any = multiprocessing.current_process()
    monkeypatch.delitem(current._config, "tempdir", raising=False)
    data = opened(dataset="CIFAR10", data_dir=small_cifar, num_workers=1, loader="lmdb")
    assert len(take(data.train(), 2)) == 2
    data.close()
