"""Batches for exact evaluation: padded, masked, each example counted once."""

import functools
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.fingerprint import fingerprint
from jaxtransfer.data.pipeline import augmented, check_augment, held, host_rows
from jaxtransfer.data.stream import Stream
from jaxtransfer.data.transform import Rows
from jaxtransfer.errors import InputError

_EVALUATE = 2  # first word of a seed, beside those of the training pipeline


def eval_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    shard: tuple[int, int] | None = None,
    augment=None,
    threads: int = 2,
    prefetch: int = 4,
    cache: str | None = "auto",
) -> "EvalBatches":
    """Makes batches in which every example counts exactly once and all shapes are the same.

    The last batch is filled with zeros whose mask is 0. Every host gets the same number of batches.

    Args:
      dataset: the examples, in their order.
      batch_size: examples of the global batch, over all hosts.
      shard: (index, count) of this host; by default JAX's process index and count.
      augment: a transform such as `normalize`; drawn the same each time.
      threads: threads that make batches; 0 makes each when it is asked for.
      prefetch: batches made ahead.
      cache: as in `pipeline`, without "device".

    Returns:
      A collection with a length that can be iterated again and again. Batches are the data set's columns [b, ...],
      such as `image` uint8 [b, H, W, C] and `label` int32 [b], and `mask` float32 [b], 1 for an example and 0 for
      padding, where all is zero; b = batch_size / count.

    Raises:
      InputError: for an empty data set, a batch size below 1 or not divisible by the hosts, a transform of images of
        which a column is a function.
    """
    check_dataset(dataset, "eval_batches")
    host_rows(batch_size, shard or (0, 1))  # raises
    if not len(dataset):
        raise InputError(f"the data set {dataset.name} ({dataset.split}) has no examples to evaluate on")
    if threads < 0 or prefetch < 1:
        raise InputError(f"needs threads >= 0 and prefetch >= 1, got {threads} and {prefetch}")
    check_augment(dataset, augment)
    if cache == "device":
        raise InputError('eval_batches has no cache="device"; leave it out')
    return EvalBatches(held(dataset, cache), int(batch_size), shard, augment, threads, prefetch)


class EvalBatches:
    """Padded batches; made by `eval_batches`.

    Attributes:
      dataset: the examples, decoded when they are cached.
      batch_size: examples of the global batch.
    """

    def __init__(self, dataset, batch_size, shard, augment, threads, prefetch):
        self.dataset, self.batch_size = dataset, batch_size
        self._shard, self._augment, self._threads, self._prefetch = shard, augment, threads, prefetch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Stream:
        part = functools.partial(self._part, host_rows(self.batch_size, self._shard))  # of who iterates, in all threads
        return Stream(part, 0, len(self), self._threads, self._prefetch)

    def fingerprint(self) -> dict[str, Any]:
        """What is evaluated, to be compared with what it was: the data set's fingerprint."""
        return fingerprint(self.dataset)

    def batch(self, i: int) -> dict[str, np.ndarray]:
        """This host's part of batch `i`, with its mask."""
        return self._part(host_rows(self.batch_size, self._shard), i)

    def _part(self, own: Rows, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([_EVALUATE, 0, i])
        return augmented(self._augment, lambda rows: self._read(i, rows), rng, own)

    def _read(self, i: int, rows: Rows):
        size = rows.stop - rows.start
        first = i * rows.total + rows.start
        examples = np.arange(min(first, len(self.dataset)), min(first + size, len(self.dataset)))
        batch = self.dataset.read(examples)
        mask = np.zeros(size, np.float32)
        mask[: len(examples)] = 1
        missing = size - len(examples)
        if missing:
            batch = {
                key: np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)])
                for key, value in batch.items()
            }
        return {**batch, "mask": mask}
