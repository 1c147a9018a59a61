"""Fine-tuning without a mask: a dense network trains on, also for other classes or data."""

from __future__ import annotations

from typing import ClassVar

from bip.methods.base import Mode, Start
from bip.methods.dense import Dense


class Transfer(Dense):
    name = "transfer"
    trainer = "transfer"
    summary = "trains a dense network on (finetune with --layer-type dense)"
    mode: ClassVar[Mode] = "finetune"
    starts_from: ClassVar[Start] = "dense"
    keys = frozenset()
