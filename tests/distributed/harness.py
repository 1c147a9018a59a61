"""Runs a function on W ranks: real processes joined by real gloo, as torchrun would start them.

    @world_size(1, 2, 3, 4)
    def test_sum(group: Group) -> None:
        assert group.sum_(torch.ones(1)) == group.world

The decorated body runs in every rank; the test fails if it fails on one. `run_ranks` is the
function beneath, for tests that compare what the ranks return. Processes are forked from a server
that has imported torch once, so a rank costs tens of milliseconds.
"""

import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "bip.run", "tests.runs"]


class RankError(AssertionError):
    """What went wrong on which rank."""


def _enter(
    called: tuple[str, str], args: tuple[Any, ...], join_group: bool, env: dict[str, str],
    answers: Any,
) -> None:  # fmt: skip
    """A rank's process. The function goes by name: a decorated one could not be pickled."""
    os.environ.update(env)
    import torch

    from bip.distributed.rendezvous import join

    torch.set_num_threads(1)
    rank = int(env["RANK"])
    try:
        module, name = called
        function = getattr(importlib.import_module(module), name)
        function = getattr(function, "__wrapped__", function)
        group = join(Path("rendezvous")) if join_group else None  # a folder that only srun needs
        try:
            result = function(group, *args) if group else function(*args)
        finally:
            if group is not None:
                group.close()
        # As bytes: tensors on a queue would travel as open files of a process that ends.
        answers.put((rank, True, pickle.dumps(result)))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, join: bool = True, timeout: float = 60
) -> list[Any]:
    """`function(group, *args)` on `world` ranks; what each returned, in rank order.

    `function` is a module's own; `args` and results are pickled. With `join=False` it is called
    as `function(*args)` and makes its own group from the environment. Raises RankError with the
    tracebacks of the ranks that failed, or naming those that gave no answer within `timeout`
    seconds; no process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # As under torchrun the store is ours, on a port that the system picked: no race for one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    processes = []
    for rank in range(world):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        called = (function.__module__, function.__name__)
        process = context.Process(target=_enter, args=(called, args, join, env, answers))
        process.start()
        processes.append(process)
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) + len(failures) < world and time.monotonic() < deadline:
            silent = {r: p for r, p in enumerate(processes) if r not in results | failures}
            dead = {r: p.exitcode for r, p in silent.items() if p.exitcode is not None}
            try:
                # The answer of a process that has ended may still be on the way.
                rank, fine, answer = answers.get(timeout=2 if dead else 0.1)
            except queue.Empty:
                if dead:
                    failures |= {r: f"ended with code {code}" for r, code in dead.items()}
                continue
            if fine:
                results[rank] = pickle.loads(answer)
            else:
                failures[rank] = answer
                # One rank's failure soon becomes the others': wait for theirs, but not for long.
                deadline = min(deadline, time.monotonic() + 2)
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join(10)
    if failures:
        texts = [f"rank {rank} of {world}: {failures[rank]}" for rank in sorted(failures)]
        raise RankError("\n".join(texts))
    if missing := sorted(set(range(world)) - set(results)):
        raise RankError(f"ranks {missing} of {world} gave no answer in {timeout} s")
    return [results[rank] for rank in range(world)]


def world_size(*worlds: int, timeout: float = 60) -> Callable[[Callable[..., None]], Any]:
    """Run the test's body on every rank of each of these worlds; its first argument is the Group.

    Further arguments are fixtures, made once in the parent and pickled.
    """

    def decorate(body: Callable[..., None]) -> Any:
        names = list(inspect.signature(body).parameters)[1:]

        @pytest.mark.parametrize("world", worlds)
        @functools.wraps(body)
        def test(world: int, **fixtures: Any) -> None:
            run_ranks(world, body, *(fixtures[name] for name in names), timeout=timeout)

        kinds = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kinds) for name in ("world", *names)]
        )
        return test

    return decorate
