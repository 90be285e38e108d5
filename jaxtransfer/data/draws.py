"""Epochs in which examples come as often as they are weighted: classes equally often, say."""

import functools
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError

_ORDER, _DRAWN = 0, 2  # of a seed: what the numbers are for


class Draws:
    """Rows of a data set by their place in an endless stream of epochs of N, a function of the seed.

    Of the N places of an epoch example i gets N p_i, p its share of the weights, rounded up or down so that it is right
    on average, and so does each class; their order is drawn. Where all weigh the same each comes once. A batch may hold
    an example twice.
    """

    def __init__(self, weights: np.ndarray, groups: np.ndarray, seed: int):
        self._groups, self._seed = groups, seed
        self._expected = len(weights) * weights / weights.sum()
        self.epoch = functools.lru_cache(maxsize=4)(self._drawn)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Returns the rows int64 [n] at places of the stream, int64 [n]."""
        epochs, places = np.divmod(places, len(self._expected))
        rows = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.epoch(int(epoch))[places[here]]
        return rows

    def _drawn(self, epoch: int) -> np.ndarray:
        size = len(self._expected)
        rng = np.random.default_rng([_ORDER, self._seed, epoch, _DRAWN])
        order = rng.permutation(size)
        order = order[np.argsort(self._groups[order], kind="stable")]
        until = np.cumsum(self._expected[order])  # systematic sampling: a comb of N teeth laid over the shares
        until *= size / until[-1]
        until[-1] = size
        counts = np.diff(np.floor(until + rng.random()).astype(np.int64), prepend=0)
        return rng.permutation(np.repeat(order, counts))


def draws_of(dataset: Any, balance: Any, seed: int) -> tuple[Draws, np.ndarray]:
    """Returns the draws that are asked for, and the weights of the examples.

    Args:
      dataset: a `jaxtransfer.data.Dataset`.
      balance: a column of classes, which then come equally often; or a weight for each example [N].
      seed: of the draws.

    Raises:
      InputError: for a column that holds no classes, and for what can be no weights.
    """
    if isinstance(balance, str):
        if not (entry := dataset.entry_of(balance)).is_label:
            raise InputError(f"{dataset.title}: balance= names a column of classes, and {balance!r} is {entry}")
        groups = dataset.labels if balance == "label" else dataset.column(balance)
        return Draws(weights := 1 / np.bincount(groups)[groups], groups, seed), weights
    try:
        weights = np.asarray(balance, float)
    except (TypeError, ValueError):
        weights = np.full(0, np.nan)
    with np.errstate(over="ignore"):
        finite = np.isfinite(weights.sum())
    if weights.shape != (len(dataset),) or not finite or weights.min() < 0 or not weights.any():
        raise InputError(
            f"balance= is the name of a column of classes, or a weight for each of the {len(dataset)} examples, "
            f"finite, not negative, not all 0; got {balance!r:.80}"
        )
    return Draws(weights, np.zeros(len(dataset), np.int64), seed), weights
