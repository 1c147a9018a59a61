"""`bip profile`: where an iteration's time goes, and how far it is from as many dense steps."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, Field, ValidationError
from torch.profiler import ProfilerActivity, profile, record_function

from bip.cli import one_line
from bip.config import RunConfig
from bip.distributed.group import wrap
from bip.distributed.rendezvous import join
from bip.errors import UserError
from bip.methods import methods
from bip.methods.base import Method, Parts
from bip.run import Run
from bip.run_folder import Progress
from bip.training.forward import Batch, ForwardBackward
from bip.training.loop import Loop, train_mode
from bip.training.metrics import RunLog
from bip.training.optim import Clock

WARM_UP = 3  # iterations before any is timed
TRACED = 5  # iterations in a trace
REST = "update"  # what is in no section of its own: optimizers, gradients of levels, z


class ProfileOptions(BaseModel):
    """The flags of `bip profile` in addition to those of `bip train`."""

    iterations: int = Field(20, ge=1, description="iterations that are timed")
    trace: Path | None = Field(
        None, description=f"also write torch profiler's trace of {TRACED} iterations to this file"
    )

    @classmethod
    def of(cls, flags: dict[str, Any]) -> Self:
        """The options among flags. Raises UserError."""
        try:
            return cls(**{name: flags[name] for name in cls.model_fields if name in flags})
        except ValidationError as error:
            raise one_line(error, cls.model_fields) from None


class Sections:
    """Seconds by section; time in an inner section does not count in the outer one.

    Nothing is timed before `restart`. The device is waited for at every border, so the sum is a
    little more than without sections.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open = [REST]
        self._since = 0.0
        self.active = False

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        if not self.active:
            yield
            return
        self._mark()
        self._open.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def restart(self) -> None:
        self._mark()
        self.seconds, self.active = {}, True

    def take(self) -> dict[str, float]:
        self._mark()
        return self.seconds

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed as a section."""

        def timed(*args: Any, **options: Any) -> Any:
            with self.section(name):
                return call(*args, **options)

        return timed


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile_run(config: RunConfig, options: ProfileOptions) -> None:
    """Time iterations of the run that `config` describes; print where the time goes.

    Trains on real batches and writes nothing but the trace. Under torchrun all ranks take part.
    The source network may be left out: weights do not change the time. Raises UserError.
    """
    trace = options.trace
    if trace is not None and not trace.parent.is_dir():
        raise UserError(f"trace: no such folder: {trace.parent}")
    group = join(config.result_dir / ".rendezvous")
    run = Run(config, group)
    device = group.device
    dense_network = copy.deepcopy(run.network)
    if run.pruned is not None:  # the network holds z; a dense step is one of all weights
        for own, weights in zip(run.pruned.z, run.pruned.views(run.pruned.weights), strict=True):
            name = next(n for n, p in run.network.named_parameters() if p is own)
            dense_network.get_parameter(name).data.copy_(weights)
    batch = next(run.data.train())
    batch = (batch[0].clone(), batch[1])
    train_mode(run.network, config.freeze_bn)
    train_mode(dense_network, config.freeze_bn)

    sections = Sections(device)
    loop = _loop(run, sections, batch)
    method, dense = loop.method, _dense(loop, dense_network, batch)
    method.prepare()
    numbers = cycle(range(loop.clock.iterations))
    # A compiled network or kernel is ready after the first iterations.
    for _ in range(WARM_UP):
        _timed(method, next(numbers), device), _timed(dense, 0, device)
    seconds: dict[str, list[float]] = {"iteration": [], "dense": []}
    for _ in range(options.iterations):
        seconds["iteration"].append(_timed(method, next(numbers), device))
        seconds["dense"].append(_timed(dense, 0, device))
    sections.active = True
    for _ in range(WARM_UP):
        method.step(next(numbers))
    sections.restart()
    for _ in range(options.iterations):
        method.step(next(numbers))
    shares = {name: value / options.iterations for name, value in sections.take().items()}
    with _traced(trace if group.is_first else None, device):
        for _ in range(TRACED if trace is not None else 0):
            method.step(next(numbers))
    run.data.close()
    if group.is_first:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        for line in _lines(loop, seconds, shares, peak):
            print(line)
        if trace is not None:
            print(f"wrote {trace}: open it in https://ui.perfetto.dev or chrome://tracing")
    group.close()


def _loop(run: Run, sections: Sections, batch: Batch) -> Loop:
    """The run's step loop, by `batch` alone until sections are timed."""
    train = run.data.train

    def batches(level: str = "lower", start: int = 0) -> Iterator[Batch]:
        take = sections.around("data", partial(next, train(level, start)))
        while True:
            yield take() if sections.active else batch

    setattr(run.data, "train", batches)  # noqa: B010
    loop = run.loop(Progress(), RunLog(run.folder.path, active=False))
    step = loop.parts.forward_backward
    step.forward = sections.around("forward", step.forward)
    # What it does besides the forward pass: the loss and the backward pass with its all-reduce.
    loop.parts.forward_backward = sections.around("backward", step)  # type: ignore[assignment]
    if loop.pruned is not None:
        for name in ("update_mask", "update_mask_and_z"):
            setattr(loop.pruned, name, sections.around("threshold", getattr(loop.pruned, name)))
    return loop


def _dense(loop: Loop, network: torch.nn.Module, batch: Batch) -> Method:
    """Dense training of the same network, with the same settings and batch."""
    group, config = loop.group, loop.config
    ddp = wrap(network, group.device) if group.world > 1 else None
    step = ForwardBackward(config, network, ddp, group.rank, group.device)
    clock = Clock(loop.clock.iterations, loop.clock.per_epoch)
    return methods()["dense"](
        Parts(config, network, None, step, lambda level, start: repeat(batch), clock)
    )


def _timed(method: Method, number: int, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    method.step(number)
    wait(device)
    return time.perf_counter() - began


@contextmanager
def _traced(path: Path | None, device: torch.device) -> Iterator[None]:
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    context: AbstractContextManager[Any] = profile(activities=kinds) if path else nullcontext()
    with context as found:
        yield
    if path is not None:
        try:
            path.touch()  # torch only logs that it cannot write
        except OSError as error:
            raise UserError(f"trace: {path}: {error.strerror}") from None
        found.export_chrome_trace(str(path))


def _lines(
    loop: Loop, seconds: dict[str, list[float]], shares: dict[str, float], peak: int | None
) -> Iterator[str]:
    config, group = loop.config, loop.group
    iteration, dense = (statistics.median(seconds[name]) for name in ("iteration", "dense"))
    cost = config.method.forward_backwards(config)
    ratios = [a / b for a, b in zip(seconds["iteration"], seconds["dense"], strict=True)]
    ratio = statistics.median(ratios)
    yield (
        f"{config.method.name} on {config.arch}, batch {config.batch_size}, {group.world} x "
        f"{group.device.type}, {torch.get_num_threads()} threads, {config.precision}"
    )
    yield (
        f"an iteration takes {1000 * iteration:.2f} ms, a dense step {1000 * dense:.2f} ms: "
        f"{ratio:.2f} dense steps"
    )
    steps = "step" if cost == 1 else "steps"
    yield (
        f"its {cost} forward-backwards cost {cost} dense {steps} at least: "
        f"{100 * (ratio / cost - 1):+.1f}%"
    )
    yield "with real batches, ms of an iteration:"
    total = sum(shares.values())
    for name in ("data", "forward", "backward", REST, "threshold"):
        if name in shares:
            yield f"  {name:10} {1000 * shares[name]:9.2f} {100 * shares[name] / total:6.1f}%"
    yield f"  {'all':10} {1000 * total:9.2f}"
    if group.world > 1:
        yield "communication is in backward (all-reduce) and threshold (counts)"
    if peak is not None:
        yield f"peak memory {peak / 2**20:.0f} MiB, the dense network beside it included"
