"""Numbered batches as an iterator that reads ahead on threads and knows its position."""

import weakref
from collections.abc import Callable
from typing import Any

from jaxtransfer.errors import InputError

ENDLESS = 2**62


class _Numbered:
    """The batches from `start` up to `stop` as a random-access source for grain."""

    def __init__(self, batch, start, stop):
        self._batch, self._start, self._stop = batch, start, stop

    def __len__(self):
        return self._stop - self._start

    def __getitem__(self, index):
        return self._batch(self._start + int(index))


class Stream:
    """An iterator over batches `start`, `start + 1`, ...; position and batch number are one.

    Its threads end when it is closed, dropped or used up. It is a context manager.
    """

    def __init__(self, batch: Callable[[int], Any], start: int, stop: int, threads: int, prefetch: int):
        if start < 0:
            raise InputError(f"a position is the number of the next batch, at least 0, got {start}")
        self._arguments = (batch, stop, threads, prefetch)
        self._close = lambda: None
        self._open(start)

    @property
    def position(self) -> int:
        """Number of the next batch; when one batch is one step, the step."""
        return self._position

    def get_state(self) -> dict[str, int]:
        """The position as a dictionary that fits into a checkpoint."""
        return {"position": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from the position that `get_state` gave."""
        self.close()
        self._open(int(state["position"]))

    def close(self) -> None:
        """Ends the threads; the iterator is then at its end."""
        self._close()
        self._iterator = iter(())

    def __iter__(self):
        return self

    def __next__(self):
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()
            raise
        self._position += 1
        return batch

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self, position):
        import grain

        batch, stop, threads, prefetch = self._arguments
        self._position = position
        self._iterator = iter(())
        if position >= stop:
            return
        # threads=0 makes each batch when it is asked for.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        source = grain.MapDataset.source(_Numbered(batch, position, stop))
        self._iterator = iter(source.to_iter_dataset(options))
        self._close = weakref.finalize(self, self._iterator.close)
