"""The ranks' exchange of every iteration, read one iteration late, so that no rank waits.

In each iteration a rank posts four numbers to a separate gloo group, and reads what all ranks
posted in the iteration before. All ranks read the same numbers at the same iteration, so they make
the same decision.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bip.distributed.compare import describe_difference
from bip.distributed.group import COLLECTIVE, Group, all_gather_flat
from bip.errors import RankError

LAG = 4  # iterations that the host may run ahead of the GPU, the same on all ranks


@dataclass(frozen=True)
class Posted:
    """What all ranks posted: the highest stop signal, and whether rank 0 wants a checkpoint."""

    stop: int
    save: bool


class _Slot:
    """A proof on its way from the GPU to the host."""

    def __init__(self) -> None:
        self.proof = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self.copied = torch.cuda.Event()

    def read(self) -> tuple[int, int]:
        """The proof written last, or zeros. Waits until the GPU has reached that iteration."""
        self.copied.synchronize()
        return int(self.proof[0]), int(self.proof[1])

    def write(self, proof: Tensor) -> None:
        self.proof.copy_(proof, non_blocking=True)
        self.copied.record()


class Control:
    """The exchange of one rank. `post` every iteration, on every rank, in the same order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.channel = None
        if group.world > 1:
            self.channel = dist.new_group(backend="gloo", timeout=COLLECTIVE)
        self.pending: tuple[Tensor, dist.Work | None] | None = None
        self.slots: list[_Slot] = []
        self.proofs = 0

    def post(self, stop: int, save: bool, proof: Tensor | None) -> Posted:
        """Post this iteration's numbers; return those of the iteration before (alone: of this one).

        `proof` (2,) is the mask's count and checksum. If it is on the GPU, it is posted LAG
        iterations later. Raises RankError if two ranks' masks differed.
        """
        self.group.passed += 1
        posted = self._collect()
        kept, checksum = self._proof(proof)
        own = torch.tensor([stop, int(save), kept, checksum])
        rows = own[None]
        work = None
        if self.channel is not None:
            rows = own.new_empty(self.group.world, len(own))
            work = all_gather_flat(rows.view(-1), own, group=self.channel, async_op=True)
        self.pending = (rows, work)
        return posted if self.channel is not None else self._collect()

    def ask(self, stop: int) -> int:
        """The highest stop signal of all ranks, now. Waits for all; no post may be pending."""
        assert self.pending is None, "collect the pending exchange first"
        self.post(stop, False, None)
        return self._collect().stop

    def finish(self) -> Posted:
        """Read the last post, so that none is pending."""
        return self._collect()

    def _proof(self, proof: Tensor | None) -> tuple[int, int]:
        if proof is None:
            return 0, 0
        if not proof.is_cuda:
            return int(proof[0]), int(proof[1])
        if not self.slots:
            self.slots = [_Slot() for _ in range(LAG)]
        slot = self.slots[self.proofs % LAG]
        self.proofs += 1
        before = slot.read()
        slot.write(proof)
        return before

    def _collect(self) -> Posted:
        if self.pending is None:
            return Posted(0, False)
        rows, work = self.pending
        self.pending = None
        if work is not None:
            work.wait()
        proofs = [f"{kept} with checksum {checksum}" for kept, checksum in rows[:, 2:].tolist()]
        if who := describe_difference(proofs):
            raise RankError(
                f"mask: what is kept differs between ranks ({who}); the last checkpoint is good"
            )
        return Posted(int(rows[:, 0].max()), bool(rows[0, 1]))
