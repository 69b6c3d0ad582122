"""Define the order of samples as a pure function of the seed, so that a loader's whole state is one number.

The global stream is the concatenation of the epochs' permutations. Position `p` counts samples over all
ranks: it belongs to epoch `p // n` and shows sample `permutation(seed, epoch)[p % n]`. Batches may span an
epoch border, so each sample comes exactly once an epoch whatever the batch, and no rank ever runs short.

A resumed run must not change its order after an upgrade of numpy. So only numpy's bit streams (`SeedSequence`,
`Philox`) are used, which numpy keeps the same in all its versions. It does not promise that for `permutation`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_EPOCHS = 0  # spawn key of the order of epochs


@dataclass(frozen=True)
class Request:
    """Ask for one rank's batch.

    Args:
        position: the position of its first sample in the global stream.
        ids: the ids of the samples, (b,) int64.
        flips: whether each sample is mirrored, (b,) bool.
    """

    position: int
    ids: np.ndarray
    flips: np.ndarray

    def split(self, batch: int) -> list["Request"]:
        """Return requests of `batch` samples each, one after the other."""
        starts = range(0, len(self.ids), batch)
        return [Request(self.position + k, self.ids[k : k + batch], self.flips[k : k + batch]) for k in starts]


class BatchFailed(RuntimeError):
    """Report that the batch of `request` cannot be prepared. The reader can still prepare the batches after it.

    corrupt: ids of the batch's images that cannot be decoded; None if no image is to blame.
    """

    def __init__(self, request: Request, corrupt: list[int] | None = None):
        super().__init__(f"the batch at position {request.position} failed")
        self.request, self.corrupt = request, corrupt


@dataclass(frozen=True)
class Order:
    """Define the order in which rank `rank` of `world` shows `n` samples, `batch` at a time.

    A global micro-batch is `world * batch` consecutive positions, and the ranks take consecutive runs of it. So worlds
    of different sizes with the same global batch see the same global batches.
    """

    n: int
    batch: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    flip: bool = True

    @property
    def stride(self) -> int:
        """Return the number of samples in a global micro-batch."""
        return self.world * self.batch

    def request(self, position: int, excluded: Collection[int] = ()) -> Request:
        """Return this rank's part of the global micro-batch that starts at `position`.

        Each sample in `excluded` is replaced by the next id that is not in it. At least one id must not be in it.
        """
        start = position + self.rank * self.batch
        epochs, places = np.divmod(np.arange(start, start + self.batch, dtype=np.int64), self.n)
        ids, flips = places.copy(), np.zeros(self.batch, dtype=bool)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, flipped = epoch_order(self.seed, int(epoch), self.n)
            if self.shuffle:
                ids[here] = order[places[here]]
            if excluded:
                ids[here] = [_next_good(i, excluded, self.n) for i in ids[here].tolist()]
            if self.flip:
                flips[here] = flipped[ids[here]]
        return Request(start, ids, flips)


@dataclass(frozen=True)
class FixedOrder(Order):
    """Show the samples `ids` in each batch, on one rank and not mirrored."""

    ids: tuple[int, ...] = ()

    def request(self, position: int, excluded: Collection[int] = ()) -> Request:
        """Return the batch. Each sample in `excluded` is replaced by the next id that is not in it."""
        ids = np.array([_next_good(i, excluded, self.n) for i in self.ids], dtype=np.int64)
        return Request(position, ids, np.zeros(len(ids), dtype=bool))


def _next_good(i: int, excluded: Collection[int], n: int) -> int:
    """Return the first id from `i` on, cyclically, that is not in `excluded`."""
    while i in excluded:
        i = (i + 1) % n
    return i


@lru_cache(maxsize=3)  # the running epoch, the next (prefetch), one more for a second loader
def epoch_order(seed: int, epoch: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an epoch's permutation of the ids, (n,) int64, and whether each id is mirrored in it, (n,) bool."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_EPOCHS, epoch)))
    ids = np.argsort(bits.random_raw(n), kind="stable")
    flips = (bits.random_raw(n) >> np.uint64(63)).astype(bool)
    ids.flags.writeable = flips.flags.writeable = False
    return ids, flips
