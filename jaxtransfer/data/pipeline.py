"""The training pipeline: batch i is a pure function of (seed, i)."""

import copy
import functools
import hashlib
import json
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.draws import draws_of
from jaxtransfer.data.fingerprint import fingerprint, of_array
from jaxtransfer.data.order import Order
from jaxtransfer.data.stream import ENDLESS, Stream
from jaxtransfer.data.transform import Rows
from jaxtransfer.errors import InputError, unknown

_MEMORY_LIMIT = 2 * 2**30  # bytes; larger data sets are read from their files each time
_AUGMENT = 1  # first word of a seed: what the numbers are for


def pipeline(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    augment=None,
    shuffle: bool = True,
    threads: int = 2,
    prefetch: int = 4,
    shard: tuple[int, int] | None = None,
    cache: str | None = "auto",
    balance: Any = None,
) -> "Pipeline":
    """Makes an endless, deterministic stream of training batches.

    Example j of the stream is row `permutation(seed, j // N)[j % N]` of the data set, and batch i holds the
    examples i B to (i + 1) B - 1: every epoch has each example once, and a batch may end one epoch and begin
    the next. None holds an example twice, as losses that tell examples apart would take it for another one: where
    the parts of a batch share some, they change places with later ones of their epoch. Augmentation is seeded by
    (seed, i). The position is the number of the next batch, which is the training step.

    Args:
      dataset: the examples.
      batch_size: examples of the global batch, over all hosts; it may exceed the data set, whose examples a batch
        then holds several times.
      seed: non-negative integer.
      augment: a transform from `jaxtransfer.data.augment`, or `(batch, rng) -> batch`.
      shuffle: whether epochs are permuted; otherwise the order of the data set.
      threads: threads that make batches; 0 makes each when it is asked for.
      prefetch: batches made ahead.
      shard: (index, count) of this host; by default JAX's process index and count. It gets the contiguous
        rows index B / count to (index + 1) B / count - 1 of each global batch.
      cache: "memory" decodes all images once and holds them; "device" holds them on the accelerator and
        gathers batches there; None reads files each time; "auto" is "memory" below 2 GiB. Where `augment` cuts parts
        out of images of any sizes (`random_resized_crop` first), and the data set resizes them, files are read each
        time.
      balance: the name of a column of classes, "label", which then come equally often; or a weight for each example
        [N]: of the N places of an epoch it gets its share, rounded up or down. Batches may then hold one twice.

    Returns:
      The pipeline. Batches are the data set's columns [b, ...], such as `image` uint8 [b, H, W, C] and `label` int32
      [b], unless `augment` changes them, b = B / count.

    Raises:
      InputError: for an empty data set or what is none, a batch size below 1 or not divisible by the hosts, unusable
        options, augmentation of images of which a column is a function.

    Example:
      >>> batches = pipeline(load("digits/upright", "train"), 128, seed=0).iterate(start=0)
      >>> next(batches)["image"].shape
      (128, 8, 8, 1)
    """
    check_dataset(dataset, "pipeline")
    host_rows(batch_size, shard)  # raises
    if not len(dataset):
        raise InputError(f"the data set {dataset.name} ({dataset.split}) has no examples to train on")
    if seed < 0 or threads < 0 or prefetch < 1:
        raise InputError(f"needs seed >= 0, threads >= 0, prefetch >= 1, got {seed}, {threads}, {prefetch}")
    check_augment(dataset, augment)
    if balance is not None and not shuffle:
        raise InputError("balance= draws the examples of an epoch, and shuffle=False takes them in order; drop one")
    drawn = None if balance is None else draws_of(dataset, balance, seed)
    if cache == "device":
        if augment is not None:
            raise InputError('cache="device" gathers batches on the device, augment works on the host; drop one')
        threads = 0
    if reader(dataset, augment) != dataset.read:  # it cuts from the files, which are then not decoded once and for all
        if cache == "memory":
            raise InputError(
                f'{dataset.name}: cache="memory" holds images resized, and the augmentation cuts parts from those in '
                f"the files; leave cache= out, or pass dataset.decoded() to cut from resized ones"
            )
        cache = None
    on_device = cache == "device"
    examples = held(dataset, cache)
    return Pipeline(examples, int(batch_size), shard, seed, augment, shuffle, threads, prefetch, on_device, drawn)


class Pipeline:
    """Batches by their number; made by `pipeline`.

    Attributes:
      dataset: the examples, decoded when they are cached.
      batch_size: examples of the global batch B.
      steps_per_epoch: batches until each example was seen once, N / B rounded up.
    """

    def __init__(self, dataset, batch_size, shard, seed, augment, shuffle, threads, prefetch, on_device, drawn=None):
        self.dataset = dataset
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(dataset) // batch_size)
        self._shard, self._seed, self._augment, self._shuffle = shard, seed, augment, shuffle
        self._threads, self._prefetch = threads, prefetch
        self._order, self._weights = drawn or (Order(len(dataset), batch_size, seed), None)
        self._gather = _device_gather(dataset) if on_device else None

    def batch(self, i: int) -> dict[str, np.ndarray]:
        """This host's part of batch `i`.

        Args:
          i: number of the batch, at least 0.

        Returns:
          The columns [b, ...], in NumPy, or on the device with `cache="device"`.
        """
        return self._part(host_rows(self.batch_size, self._shard), i)

    def _part(self, own: Rows, i: int) -> dict[str, np.ndarray]:
        if i < 0:
            raise InputError(f"batches are numbered from 0, got {i}")
        i = int(i)
        if self._gather is not None:
            return self._gather(self._examples(i, own))
        rng = np.random.default_rng([_AUGMENT, self._seed, i])
        read = reader(self.dataset, self._augment)
        return augmented(self._augment, lambda rows: read(self._examples(i, rows)), rng, own)

    def fingerprint(self) -> dict[str, Any]:
        """What the batches are, to be compared with what they were: the data set's fingerprint, the order, the size of
        a batch, and what the augmentation makes of the first examples.

        Returns:
          By part, JSON types.
        """
        return {
            **fingerprint(self.dataset),
            "batch size": self.batch_size,
            "data seed": self._seed,
            "shuffle": self._shuffle,
            "augmentation": self._effect(),
            **({} if self._weights is None else {"balance": of_array(self._weights)}),
        }

    def _effect(self) -> str | None:
        """A digest of some examples, augmented; None without augmentation, or where it doesn't follow from the seed."""
        if self._augment is None:
            return None
        examples = reader(self.dataset, self._augment)(np.arange(min(16, len(self.dataset))))
        chooses = getattr(self._augment, "chooses", 1)  # among how many, by batches: each is to be seen
        effects = set()
        for _ in range(2):
            made = []
            for number in range(1 if chooses == 1 else 8 * chooses):
                try:
                    batch = self._augment(copy.deepcopy(examples), np.random.default_rng(_AUGMENT + number))
                except Exception:  # one that takes whole batches alone
                    return "of whole batches"
                made.append(json.dumps({name: of_array(value) for name, value in sorted(batch.items())}))
            effects.add("".join(made))
        return hashlib.sha256(effects.pop().encode()).hexdigest() if len(effects) == 1 else "drawn anew each time"

    def iterate(self, start: int = 0) -> Stream:
        """An endless iterator over the batches from number `start` on.

        Args:
          start: the position, which is the step to resume at.

        Returns:
          The iterator, with `position`, `get_state`, `set_state` and `close`; its threads end when it is
          dropped.
        """
        part = functools.partial(self._part, host_rows(self.batch_size, self._shard))  # of who iterates, in all threads
        return Stream(part, start, ENDLESS, self._threads, self._prefetch)

    def _examples(self, i, rows):
        """Numbers of the examples in rows `start` to `stop` of batch i."""
        places = np.arange(i * rows.total + rows.start, i * rows.total + rows.stop)
        return self._order.rows(places) if self._shuffle else places % len(self.dataset)


def host_rows(batch_size: int, shard: tuple[int, int] | None) -> Rows:
    """The rows of a global batch that belong to a host.

    Args:
      batch_size: examples of the global batch.
      shard: (index, count) of the host; None asks JAX.

    Returns:
      A contiguous block of batch_size / count rows.

    Raises:
      InputError: for a batch size below 1 or not divisible by count, or an index outside of [0, count).
    """
    if shard is None:
        from jaxtransfer.devices import processes  # JAX is imported only where it is used

        shard = processes.index(), processes.count()
    index, count = shard
    if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool):
        raise InputError(f"batch_size must be a whole number, got {batch_size!r}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if count < 1 or not 0 <= index < count:
        raise InputError(f"shard must be (index, count) with 0 <= index < count, got {shard}")
    if batch_size % count:
        raise InputError(f"batch_size {batch_size} does not divide by the {count} hosts; take a multiple of {count}")
    size = batch_size // count
    return Rows(index * size, (index + 1) * size, batch_size)


def check_augment(dataset: Dataset, augment) -> None:
    """Raises where augmented images would go with a column that was computed on the images as they are."""
    if augment is not None and dataset.of_image:
        name = min(dataset.of_image)
        made = "was computed on unaugmented images, and augmentation would pair it with others"
        remedy = "run the live teacher in place of its cache"
        if name in dataset.sourced_entries:
            made = "has a value for each pixel of the images as they are, and augmentation would move the images alone"
            remedy = "take a transform that moves both and a data set that says so, dataclasses.replace(dataset, "
            remedy += "of_image=frozenset())"
        raise InputError(
            f"{dataset.name} ({dataset.split}): column {name!r} {made}; leave the augmentation out, or {remedy}"
        )


def held(dataset: Dataset, cache: str | None) -> Dataset:
    """The data set as the option `cache` wants it: decoded in memory or as it is."""
    if cache not in ("auto", "memory", "device", None):
        raise unknown("cache", str(cache), ["auto", "memory", "device", "None"])
    if cache is None or dataset.in_memory or (cache == "auto" and dataset.nbytes >= _MEMORY_LIMIT):
        return dataset
    return dataset.decoded()


def reader(dataset: Dataset, augment):
    """The method that reads examples for an augmentation: images as in their files for one that cuts parts out."""
    uncut = getattr(augment, "any_size", False) and dataset.resize and not dataset.in_memory
    return dataset.read_uncut if uncut else dataset.read


def augmented(augment, read, rng, rows):
    """The given rows of a global batch, augmented.

    Args:
      augment: a transform or None.
      read: `Rows -> batch`.
      rng: the batch's random numbers.
      rows: the wanted rows.
    """
    if augment is None:
        return read(rows)
    whole = Rows(0, rows.total, rows.total)
    if rows == whole:
        return augment(read(rows), rng)
    if getattr(augment, "per_example", False):
        return augment(read(rows), rng, rows)
    batch = augment(read(whole), rng)  # examples meet: each host makes the global batch and keeps its part
    return {key: value[rows.start : rows.stop] for key, value in batch.items()}


def _device_gather(dataset):
    import jax
    import jax.numpy as jnp

    arrays, every = dataset.decoded(), np.arange(len(dataset))
    columns = {name: column[every] for name, column in arrays.columns.items()}
    held = jax.device_put({**arrays.sourced(every), **columns})

    @jax.jit
    def gather(held, examples):
        return jax.tree.map(lambda array: jnp.take(array, examples, axis=0), held)

    return lambda examples: gather(held, examples.astype(np.int32))
