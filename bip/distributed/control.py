"""What the ranks tell each other every iteration, one iteration late, so that none waits.

Each iteration a rank posts four numbers to a small gloo group of its own, and reads what all
posted in the iteration before. Everyone reads the same rows at the same iteration, so any
decision made from them is made by all.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bip.distributed.group import COLLECTIVE, Group
from bip.errors import RankError


@dataclass(frozen=True)
class News:
    """What all ranks posted: the strongest stop signal, whether rank 0 wants a checkpoint."""

    stop: int
    save: bool


class Control:
    """The exchange of one rank. `post` every iteration, on every rank, in the same order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.channel = None
        if group.world > 1:
            self.channel = dist.new_group(backend="gloo", timeout=COLLECTIVE)
        self.pending: tuple[Tensor, dist.Work | None] | None = None
        self.proof_on_host: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def post(self, stop: int, save: bool, proof: Tensor | None) -> News:
        """Post this iteration's numbers; return the news of the iteration before (alone: now).

        `proof` (2,) is the mask's count and checksum, perhaps still on the GPU: then it travels
        one iteration later. Raises RankError if two ranks' masks differed.
        """
        news = self._collect()
        kept, checksum = self._proof(proof)
        own = torch.tensor([stop, int(save), kept, checksum])
        rows = own[None]
        work = None
        if self.channel is not None:
            rows = own.new_empty(self.group.world, len(own))
            work = dist.all_gather_into_tensor(
                rows.view(-1),
                own,
                group=self.channel,  # type: ignore[arg-type]
                async_op=True,
            )
        self.pending = (rows, work)
        return news if self.channel is not None else self._collect()

    def ask(self, stop: int) -> int:
        """The strongest stop signal of all ranks, now. Waits for them; nothing may be pending."""
        assert self.pending is None, "collect the pending exchange first"
        self.post(stop, False, None)
        return self._collect().stop

    def finish(self) -> News:
        """The last news; nothing is pending afterwards."""
        return self._collect()

    def _proof(self, proof: Tensor | None) -> tuple[int, int]:
        if proof is None:
            return 0, 0
        if not proof.is_cuda:
            return int(proof[0]), int(proof[1])
        before = (0, 0)
        if self.proof_on_host is None:
            self.proof_on_host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
            self.copied = torch.cuda.Event()
        elif self.copied is not None:
            self.copied.synchronize()  # of the iteration before: long done
            before = (int(self.proof_on_host[0]), int(self.proof_on_host[1]))
        self.proof_on_host.copy_(proof, non_blocking=True)
        assert self.copied is not None
        self.copied.record()
        return before

    def _collect(self) -> News:
        if self.pending is None:
            return News(0, False)
        rows, work = self.pending
        self.pending = None
        if work is not None:
            work.wait()
        masks = [tuple(row) for row in rows[:, 2:].tolist()]
        if len(set(masks)) > 1:
            usual = max(set(masks), key=masks.count)
            odd = [rank for rank, mask in enumerate(masks) if mask != usual]
            raise RankError(
                f"mask: rank {', '.join(map(str, odd))} keeps other weights than the others "
                f"({masks[odd[0]][0]} kept, the others {usual[0]}); the last checkpoint is good"
            )
        return News(int(rows[:, 0].max()), bool(rows[0, 1]))
