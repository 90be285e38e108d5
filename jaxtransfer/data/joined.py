"""Several data sets as one: each a task of its own, whose label the examples of the others lack."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.known_labels import known_column, known_labels
from jaxtransfer.errors import InputError

TASK = "task"


def joined(
    parts: Mapping[str, Dataset] | None = None, /, *, inputs: str = "image", label: str = "label", **more: Dataset
) -> Dataset:
    """Returns one data set of the examples of several, one after another, each of them a task.

        both = jt.data.joined(letters=letters, digits=digits)
        weights = jt.data.temperature_weights(both, 2.0)  # how often each is seen
        net = jt.models.with_heads(encoder, letters=jt.models.head(26), digits=jt.models.head(10))
        tasks = [
            jt.multitask.masked(jt.classification(net, output=name, label=name).named(name), f"has_{name}")
            for name in ("letters", "digits")
        ]
        batches = jt.data.pipeline(both, 64, balance=weights)
        jt.fit(jt.balance(tasks, jt.multitask.pcgrad), optimizer, batches, steps=1000)

    A batch then holds examples of several tasks, of which each term counts its own: one run of the network for all of
    them, in one batch norm, and of a shape that doesn't depend on how many there are of each. `jt.data.zipped` is for
    tasks that want batches of their own.

    Args:
      parts: by the name of the task; or as keywords.
      inputs: the column that the network reads, of one shape and type in all of them.
      label: the column of classes; an example without one (-1) has none for its task either.
      **more: further ones.

    Returns:
      The data set: `inputs`; for each task its classes `<name>`, 0 for the examples of others, and `has_<name>`, 1 for
      its own; and `task`, which one an example is of.

    Raises:
      InputError: for no parts, a name that is taken, inputs that differ, and a label that is no class.
    """
    given = {**(parts or {}), **more}
    if not given:
        raise InputError("joined makes one data set of several, got none: joined(letters=letters, digits=digits)")
    for name in given:
        # `weight` and `mask` say how much an example counts, to every loss
        if name in (inputs, TASK, "weight", "mask") or name in map(known_column, given):
            raise InputError(f"joined: a task can't be called {name!r}, which is another column; call it otherwise")
    found = {}
    for name, part in given.items():
        check_dataset(part, "joined")
        found[name] = known_labels(part, (label,))
    first = next(iter(found.values()))
    for part in found.values():
        if part.entry_of(inputs) != first.entry_of(inputs):
            raise InputError(
                f"joined: {inputs!r} must be alike; {first.title} has {first.entry_of(inputs)}, {part.title} "
                f"{part.entry_of(inputs)}; load both with one image_shape="
            )
    several = tuple(part.without(*(set(part.entries) - {inputs})) for part in found.values())
    sizes = [len(part) for part in several]
    columns: dict[str, Any] = {TASK: np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)}
    names: dict[str, Any] = {TASK: tuple(given)}
    for number, (name, part) in enumerate(found.items()):
        own = columns[TASK] == number
        columns[name], there = np.zeros(len(own), np.int32), np.zeros(len(own), np.float32)
        columns[name][own] = part.column(label)
        known = known_column(label)
        there[own] = part.column(known) if known in part.columns else 1
        columns[known_column(name)], names[name] = there, part.entry_of(label).class_names
    whole = Dataset(
        " + ".join(dict.fromkeys(part.name for part in several)),
        " + ".join(dict.fromkeys(part.split for part in several)),
        source=Joined(several),
        entries={inputs: first.entry_of(inputs)},
        of_image=(),
    )
    return whole.with_columns(columns, class_names=names)


@dataclass(frozen=True, eq=False)
class Joined:
    """The examples of several data sets, one after another."""

    parts: tuple[Dataset, ...]

    @property
    def starts(self) -> np.ndarray:
        """The number of each one's first example, int64 [parts]."""
        return np.cumsum([0, *(len(part) for part in self.parts[:-1])])

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        return next(iter(self.many(np.array([index]))))

    def many(self, indices: np.ndarray) -> Iterable[dict[str, Any]]:
        """The examples of several numbers, those of one data set read together."""
        indices = np.asarray(indices)
        starts = self.starts
        whose = np.searchsorted(starts, indices, side="right") - 1
        rows: list[Any] = [None] * len(indices)
        for number in np.unique(whose):
            here = np.flatnonzero(whose == number)
            found = self.parts[number].read(indices[here] - starts[number])
            for place, row in enumerate(here):
                rows[row] = {name: values[place] for name, values in found.items()}
        return rows

    def read_labels(self):
        """There are none: labels are columns beside."""
        raise InputError("joined data sets have a column of classes for each task, and no 'label'")
