"""The settings of the data, as one object. Imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bip.data.sets import DatasetSpec, dataset_spec

if TYPE_CHECKING:
    from bip.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What `open_data` opens, and how. Names are those of `RunConfig`.

    Attributes:
        dataset: a name or alias of `bip.data.sets.names`.
        data_dir: its folder (`bip.data.splits.open_split`).
        batch_size: training images per step over all ranks; must divide by their number.
        test_batch_size: likewise for evaluation; need not divide.
        image_dim: input height and width in pixels; None for the set's own (`side`).
        normalize: subtract the set's mean and divide by its deviation; else pixels in [0, 1].
        num_classes: the network's, which must be the set's; None for the set's own (`classes`).
        holdout: training images to hold out, the same for every seed.
        loader: a name of `bip.data.loaders.names`.
        num_workers: processes of each iterator of "lmdb" and "folder" (so twice as many in BiP,
            with its two levels); 0 reads in this process. Of "dali", threads.
        stage_to: a folder on the node's own disk; LMDB stores are copied there first, once for
            all processes of the node (`bip.data.stores.staging`).
        skip_bad: replace unreadable training images by others of their batch, with a warning,
            instead of failing. With "memory", and in evaluation, they are still an error.
        seed: of the order, the crops and the flips.
    """

    dataset: str
    data_dir: Path
    batch_size: int
    test_batch_size: int
    num_workers: int
    seed: int
    image_dim: int | None = None
    normalize: bool = False
    num_classes: int | None = None
    holdout: int = 0
    loader: str = "auto"
    stage_to: Path | None = None
    skip_bad: bool = False

    @classmethod
    def of(cls, config: "RunConfig") -> Self:
        """The data's part of a run's configuration."""
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        return cls(**values | {"seed": config.order_seed})

    @property
    def spec(self) -> DatasetSpec:
        """The data set. Raises UserError for an unknown one."""
        return dataset_spec(self.dataset)

    @property
    def classes(self) -> int:
        """Output classes of the network."""
        return self.num_classes or self.spec.classes

    @property
    def side(self) -> int:
        """Height and width of the network's input, pixels."""
        return self.image_dim or self.spec.image_dim
