"""The image at each position, as a pure function of (seed, epoch, level, position).

Nothing here depends on the number of ranks or workers, or on earlier batches, so that any batch can
be drawn alone and a run resumes from its position. The random streams are NumPy's `SeedSequence`
and `Philox`, whose outputs NumPy guarantees never to change (NEP 19).
"""

import numpy as np
from numpy.typing import NDArray

from bip.errors import UserError

LEVELS = ("lower", "upper")

_PERMUTATION, _AUGMENTATION, _HOLDOUT = range(3)  # a stream's purpose: the first number of its key


def _key(*words: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence(words).generate_state(2, np.uint64).astype(np.uint64, copy=False)


def _permutation(key: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    draws = np.random.Philox(key=key).random_raw(size)
    return np.argsort(draws, kind="stable")


class Order:
    """The endless sequence of global batches that one level draws from a training set.

    Each epoch is a fresh permutation; its ragged tail (fewer than `batch_size` images) is dropped.

    Args:
        size: images in the training set.
        batch_size: images of a global batch, over all ranks.
        seed: the run's seed, not negative.
        level: "lower" or "upper"; the two draw different permutations. Plain training is "lower".

    Raises:
        UserError: the set holds less than one batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, level: str = "lower") -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be one of {LEVELS}, not {level!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if size < batch_size:
            raise UserError(
                f"batch_size: {batch_size} is more than the {size} images of the training set; "
                f"use at most {size}"
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.level = level
        self.batches_per_epoch = size // batch_size
        self._epoch = -1
        self._indices: NDArray[np.int64] = np.empty(0, np.int64)
        self._augmentation_key: NDArray[np.uint64] = np.empty(0, np.uint64)

    def batch(self, number: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Global batch `number` = 0, 1, 2 ...: (epoch, positions within the epoch, indices).

        Positions and indices have shape (batch_size,); positions are consecutive.
        """
        epoch, batch = divmod(number, self.batches_per_epoch)
        self._enter(epoch)
        first = batch * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        return epoch, positions, self._indices[positions]

    def uniforms(self, epoch: int, first: int, count: int, draws: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1) for positions first ... first + count - 1 of an epoch.

        Shape (count, draws). Each position has its own `draws` numbers in the epoch's stream,
        wherever the draw starts. `draws` is a multiple of 4, Philox's block.
        """
        if draws % 4:
            raise ValueError(f"draws must be a multiple of 4, not {draws}")
        self._enter(epoch)
        generator = np.random.Philox(key=self._augmentation_key, counter=first * (draws // 4))
        raw = generator.random_raw(count * draws).reshape(count, draws)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        level = LEVELS.index(self.level)
        # The seed is last: it is the only number that may need more than 32 bits.
        self._indices = _permutation(_key(_PERMUTATION, level, epoch, self.seed), self.size)
        self._augmentation_key = _key(_AUGMENTATION, level, epoch, self.seed)
        self._epoch = epoch


def rank_slice(size: int, rank: int, world: int) -> slice:
    """The contiguous share of `size` items that `rank` of `world` owns; shares differ by at most 1.

    The shares of all ranks, in rank order, are the whole. A global batch divides evenly.
    """
    return slice(rank * size // world, (rank + 1) * size // world)


def holdout_split(size: int, holdout: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a training set into (train indices, holdout indices), both ascending.

    It does not depend on the seed, and a smaller holdout is a part of a larger one. So a network
    pretrained with a holdout was not trained on the images of an equal or smaller one.

    Raises:
        UserError: the holdout would take the whole training set.
    """
    if not 0 <= holdout < size:
        raise UserError(
            f"holdout: {holdout} of the {size} training images cannot be held out; "
            f"use 0 to {size - 1}"
        )
    if holdout == 0:  # save sorting a million images
        return np.arange(size), np.empty(0, np.int64)
    order = _permutation(_key(_HOLDOUT, size), size)
    return np.sort(order[holdout:]), np.sort(order[:holdout])
