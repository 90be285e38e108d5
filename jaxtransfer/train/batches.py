"""Where the steps of the loop get their batches: from the host, or drawn inside the program."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import jax

from jaxtransfer.devices import processes
from jaxtransfer.devices.ahead import Cost
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective, view_of
from jaxtransfer.train import identity
from jaxtransfer.train.arguments import check_rows
from jaxtransfer.train.patience import Patience
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.step import TrainStep, train_step, transformed

_STEPS_PER_CALL = 100
_TRAINING = "the training data"


class FromHost:
    """Steps on batches that come from the host, the transfer of the next one under way."""

    def __init__(self, objective, optimizer, data: Any, where: dict[str, Any], transform, key, patience: Patience):
        self._patience = patience
        self._own, self._iterate = _first(data, patience)
        self._drawn = processes.gathered(self._own)
        self._data, self._transform = data, transform
        self.first = _seen(transform, key, self._drawn)
        self._step = train_step(objective, optimizer, **where, transform=transform, watch=True)
        self._stream: Generator[Batch] | None = None

    def facts(self, key: jax.Array) -> dict[str, Any]:
        """Returns what the batches are, by part."""
        return {**identity.of_data(self._data, self._drawn), **identity.of_transform(self._transform, key, self._drawn)}

    def steps_per_call(self, state: TrainState, asked: int | None, at_most: int) -> int:
        """Returns how many steps run in one call: one."""
        if asked not in (None, 1):
            raise InputError("steps_per_call needs sample=..., which draws the batches inside the program")
        return 1

    def compile(self, state: TrainState, size: int, **options: Any) -> Cost | None:
        """Compiles the step ahead of its first call; see `TrainStep.compile`."""
        return self._step.compile(state, self._step.place(self._own), **options)

    def open(self, start: int, steps: int) -> None:
        """Begins to read at step `start` of `steps`."""
        self._stream = _placed(self._iterate(start), self._step, range(start, steps), self._patience)

    def next(self, size: int) -> Callable:
        """Returns the next update of a state; waits for the batch."""
        assert self._stream is not None
        batch = next(self._stream)
        return lambda state: self._step.placed(state, batch)

    def close(self) -> None:
        """Ends the reading."""
        if self._stream is not None:
            self._stream.close()


class DrawnInside:
    """Steps whose batches are drawn inside the program, several in one call."""

    def __init__(self, objective, optimizer, data: Any, where: dict[str, Any], transform, key, sample):
        options = {**where, "sample": sample, "transform": transform, "watch": True}
        self._step_of = functools.cache(lambda size: train_step(objective, optimizer, steps_per_call=size, **options))
        self._data = self._step_of(None).place(jax.device_put(data))
        self._in_loops = True
        self._drawn = jax.jit(sample)(key, processes.local(self._data))
        self._sample, self._transform = sample, transform
        self.first = _seen(transform, key, self._drawn)

    def facts(self, key: jax.Array) -> dict[str, Any]:
        """Returns what the batches are, by part."""
        drawn = identity.of_draws(self._sample, key, processes.local(self._data), self._drawn)
        return {**drawn, **identity.of_transform(self._transform, key, self._drawn)}

    def steps_per_call(self, state: TrainState, asked: int | None, at_most: int) -> int:
        """Returns how many steps run in one call, by default one where a loop would be slow."""
        if asked is not None:
            if asked < 1 or int(asked) != asked:
                raise InputError(f"steps_per_call must be a positive whole number; got {asked}")
            return asked
        slow_in_loops = jax.default_backend() == "cpu" and self._step_of(None).has_convolutions(state, self._data)
        self._in_loops = not slow_in_loops
        return 1 if slow_in_loops else min(_STEPS_PER_CALL, at_most)

    def compile(self, state: TrainState, size: int, **options: Any) -> Cost | None:
        """Compiles a call of `size` steps ahead; see `TrainStep.compile`."""
        return self._step_of(size if self._in_loops else None).compile(state, self._data, **options)

    def open(self, start: int, steps: int) -> None:
        """Does nothing: the state knows its step."""

    def next(self, size: int) -> Callable:
        """Returns the next `size` updates of a state."""
        return lambda state: self._step_of(size if self._in_loops else None).placed(state, self._data)

    def close(self) -> None:
        """Does nothing: nothing is open."""


def parts_of(data: Any) -> dict[tuple[str, ...], Any]:
    """Returns what batches are made of, by their path in the batch: zipped data have several parts, others one, ()."""
    if not isinstance(inner := getattr(data, "parts", None), Mapping):
        return {(): data}
    return {(name, *path): part for name, more in inner.items() for path, part in parts_of(more).items()}


def check_transform(transform: Any, data: Any) -> None:
    """Raises for a transform of batches of which a part has columns that hold for the images as they are."""
    for path, part in parts_of(data).items() if transform is not None else ():
        if fixed := getattr(getattr(part, "dataset", None), "of_image", ()):
            name = "/".join((*path, min(fixed)))
            raise InputError(f"column {name!r} of the data holds for the images as they are: fit without transform=")


def rows_in(data: Any, batch: Batch) -> int:
    """Returns the number of examples in a batch: of zipped data, in all its parts."""
    return sum(len(jax.tree.leaves(view_of(batch, path))[0]) for path in parts_of(data))


def check_apart(objective: Objective, data: Any) -> None:
    """Raises where an objective would take an example of a pipeline for another one: too few for a batch or a queue.

    Of zipped data each part is looked at, by the terms that read it.
    """
    for path, part in parts_of(data).items():
        apart = [term.apart for _, term in objective.terms if term.apart is not None and _reads(term, path)]
        if apart:
            where = f"{'/'.join(path)}: " if path else ""
            _check_part(max(apart), part, where)


def _reads(term: Objective, path: tuple[str, ...]) -> bool:
    views = [view for forward in term.forwards for view in forward.views]
    return not path or not views or any(view[: len(path)] == path for view in views)


def _check_part(apart: int, part: Any, where: str) -> None:
    dataset, size = getattr(part, "dataset", None), getattr(part, "batch_size", None)
    if size is None or dataset is None or not hasattr(dataset, "with_columns"):
        return  # loaders of other libraries have a `dataset` and a `batch_size`, too
    count = len(dataset)
    if size > count:
        raise InputError(
            f"{where}a batch of {size} of {count} examples holds some of them twice, and this objective would tell an "
            f"example from its own copy; make batches of at most {count}"
        )
    if size + apart > count and "index" not in {*dataset.columns, *dataset.entries}:
        raise InputError(
            f"{where}a queue of {apart} and a batch of {size} are more than the {count} examples, so an example "
            f"would be told from its own copy in the queue; take a queue of at most {count - size}, or number the "
            f"examples, which leaves such copies out: dataset.with_columns({{'index': np.arange(len(dataset))}})"
        )


def _seen(transform, key: jax.Array, batch: Batch) -> Batch:
    """Returns a batch as the objective sees it; without a transform as it is."""
    return batch if transform is None else jax.jit(lambda batch: transformed(transform, key, 0, batch))(batch)


def _first(data: Any, patience: Patience) -> tuple[Batch, Callable[[int], Iterator[Batch]]]:
    """Returns the first batch and how to iterate from a position; an iterator is read only once."""
    with patience.on(_TRAINING, 1):
        stream = iter(data.iterate(0) if hasattr(data, "iterate") else data)
        first = next(stream, None)
    if first is None:
        raise InputError("expected batches to train on; the data is empty")
    if hasattr(data, "iterate"):
        return first, data.iterate
    return first, lambda start: islice(chain([first], stream), start, None)


def _placed(batches: Iterator[Batch], step: TrainStep, numbers: range, patience: Patience) -> Generator[Batch]:
    """Yields batches that are already on the devices, the transfer of the next one under way; reads those `numbers`."""
    batches = islice(batches, count := len(numbers))
    ahead: deque[Batch] = deque()
    for number in numbers:
        while len(ahead) < 2:
            with patience.on(_TRAINING, number + len(ahead) + 1):
                batch = next(batches, None)
            if batch is None:
                break
            check_rows(batch)
            ahead.append(step.place(batch))
        if not ahead:
            raise InputError(f"the data ended before {count} steps; give an endless pipeline or fewer steps")
        yield ahead.popleft()
