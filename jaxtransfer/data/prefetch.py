"""Transfers to the device ahead of time."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxtransfer.errors import InputError


def prefetch_to_device(iterator: Iterable[Any], put: Callable[[Any], Any], size: int = 2) -> Iterator[Any]:
    """Puts batches on the device before they are asked for, in order.

    While the device works on one batch the transfers of the next ones run. An exception of the iterator or of
    `put` comes after the batches before it.

    Args:
      iterator: batches.
      put: moves a batch, e.g. `lambda batch: jax.device_put(batch, sharding)`.
      size: batches on their way, at least 1.

    Returns:
      An iterator over what `put` returns. Closing it closes the given one.

    Raises:
      InputError: for a size below 1.
    """
    if size < 1:
        raise InputError(f"prefetch_to_device needs a size of at least 1, got {size}")
    return _ahead(iterator, put, size)


def _ahead(iterable, put, size):
    iterator = iter(iterable)
    queue = collections.deque()
    ended: Exception | None = None
    try:
        while True:
            while ended is None and len(queue) < size:
                try:
                    queue.append(put(next(iterator)))
                except Exception as error:
                    ended = error
            if not queue:
                if ended is None or isinstance(ended, StopIteration):
                    return
                raise ended
            yield queue.popleft()
    finally:
        if close := getattr(iterator, "close", None):
            close()
