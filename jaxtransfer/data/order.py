"""The order of examples: permuted epochs, joined so that no batch holds an example twice."""

import functools

import numpy as np

_ORDER = 0  # first word of a seed, beside those of augmentation and evaluation


class Order:
    """Rows of a data set by their place in an endless stream of epochs, cut into batches of B; a function of the seed.

    An epoch is a permutation of the N rows. A batch that ends one epoch and begins the next would hold a row twice
    where both parts drew it: such rows of the later part change places with others of the same epoch, drawn at random,
    which come after this batch. Every epoch still has each row once; an epoch that begins with a batch is the plain
    permutation. Batches larger than the data hold rows several times.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self._size, self._batch, self._seed = size, batch_size, seed
        self._drawn = functools.lru_cache(maxsize=2)(self._permutation)
        self.epoch = functools.lru_cache(maxsize=4)(self._joined)
        self._last: tuple[int, np.ndarray] | None = None  # of epochs that depend on all before

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the rows int64 [n] at rising places of the stream, int64 [n]."""
        epochs, places = np.divmod(places, self._size)
        rows = np.empty(len(places), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = self.epoch(epoch)[places[here]]
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([_ORDER, self._seed, epoch]).permutation(self._size)

    def _begun(self, epoch: int) -> int:
        """Rows of the batch in which an epoch begins that are of the epoch before."""
        return epoch * self._size % self._batch

    def _joined(self, epoch: int) -> np.ndarray:
        if self._batch > self._size or not self._begun(epoch):
            return self._drawn(epoch)
        if self._size >= 2 * self._batch:  # rows change places with those between the first batch and the last alone
            return self._apart(epoch, self._drawn(epoch - 1))
        first = epoch  # else the end of an epoch may be among them: from the last one on that begins with a batch
        known = self._last
        while self._begun(first) and not (known is not None and known[0] == first):
            first -= 1
        order = known[1] if known is not None and known[0] == first else self._drawn(first)
        for number in range(first + 1, epoch + 1):
            order = self._apart(number, order)
        self._last = epoch, order
        return order

    def _apart(self, epoch: int, before: np.ndarray) -> np.ndarray:
        """Returns the order of an epoch, in which the rest of the batch that `before` ends has none of its rows."""
        begun, ends = self._begun(epoch), self._size - self._begun(epoch + 1)
        head = self._batch - begun
        taken = np.zeros(self._size, bool)
        taken[before[self._size - begun :]] = True
        order = self._drawn(epoch).copy()
        twice = np.flatnonzero(taken[order[:head]])
        if not len(twice):
            return order
        free = head + np.flatnonzero(~taken[order[head:]])
        middle = free[: np.searchsorted(free, ends)]
        if len(middle) >= len(twice):
            free = middle
        other = np.random.default_rng([_ORDER, self._seed, epoch, 1]).choice(free, len(twice), replace=False)
        order[twice], order[other] = order[other], order[twice]
        return order
