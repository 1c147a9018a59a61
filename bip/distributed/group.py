"""The ranks of one run and what they exchange."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bip.errors import RankError, UserError

T = TypeVar("T")
# Collectives may wait for long (a suspended job, a long save, slow data), so once the ranks have
# met only the heartbeat's time limit ends a run.
COLLECTIVE = timedelta(days=7)
# torch renamed it in 2.14 and warns about the old name at every rank's first call.
all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the run's processes."""

    rank: int
    world: int
    local_rank: int
    local_world: int


class Group:
    """The run's process group; with one rank there is none and every call is local."""

    def __init__(self, ranks: Ranks, device: torch.device, store_holder: str = "rank 0") -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self.device = device
        self.store_holder = store_holder
        # Collectives entered, in the same order on every rank. The lowest count is the rank that
        # the others wait for.
        self.passed = 0
        self.timed: Callable[[str], contextlib.AbstractContextManager[None]] = _untimed

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def holds_store(self) -> bool:
        return self.store_holder == f"rank {self.rank}"

    def counted(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, of which every rank takes the same number; each counts as a collective."""
        for batch in batches:
            self.passed += 1
            yield batch

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.passed += 1
        if self.world > 1:
            with self.timed("communication"):
                dist.all_reduce(values)
        return values

    def broadcast_(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        self.passed += 1
        if self.world > 1:
            dist.broadcast(values, 0)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` (m,), the same m on all, as (W, m)."""
        self.passed += 1
        if self.world == 1:
            return values[None]
        gathered = values.new_empty(self.world * len(values))
        with self.timed("communication"):
            all_gather_flat(gathered, values)
        return gathered.view(self.world, -1)

    def from_first(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        self.passed += 1
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def ask_first(self, call: Callable[[], T]) -> T:
        """Run `call` on rank 0 and return its result on every rank.

        Its exception is raised on rank 0. The other ranks raise a UserError for a UserError, and a
        RankError with the text for any other.
        """
        value: Any = None
        problem: Exception | None = None
        if self.is_first:
            try:
                value = call()
            except Exception as error:
                problem = error
        value, is_users, text = self.from_first((value, *_describe(problem)))
        if problem is not None:
            raise problem
        if text is not None:
            raise UserError(text) if is_users else RankError(f"{text} (rank 0)")
        return value  # type: ignore[no-any-return]

    def all_objects(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        self.passed += 1
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise a failure of the body, which has no collectives, on all ranks.

        A UserError of any rank is raised on every rank. Any other exception is raised on its own
        rank, and a RankError with its text on the others.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        for rank, (is_users, text) in enumerate(self.all_objects(_describe(problem))):
            if text is not None:
                if problem is not None and not isinstance(problem, UserError):
                    raise problem
                message = text if self.world == 1 else f"{text} (rank {rank})"
                raise UserError(message) if is_users else RankError(message)

    def barrier(self) -> None:
        self.passed += 1
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _untimed(_part: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _describe(problem: Exception | None) -> tuple[bool, str | None]:
    """(whether it is a UserError, the text for the other ranks)."""
    if problem is None or isinstance(problem, UserError):
        return True, None if problem is None else str(problem)
    return False, f"{type(problem).__name__}: {problem}"


def wrap(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network under DDP, which does not send buffers: `share_statistics` does when needed."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch renamed the option in 2.15 and warns about the old name.
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {no_sync: False}
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )


def pick_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU. Some schedulers let each rank see only its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible < ranks.local_world and visible != 1:
        raise UserError(
            f"{ranks.local_world} ranks on this node see {visible} GPUs; start one rank per GPU"
        )
    device = torch.device("cuda", ranks.local_rank if visible >= ranks.local_world else 0)
    torch.cuda.set_device(device)
    return device
