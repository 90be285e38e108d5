"""Labels that some examples lack: filled in for batches, with a column beside that says where there is one."""

from collections.abc import Iterable

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.sources import read_column
from jaxtransfer.errors import InputError

MISSING = -1  # how tfds writes the class of an example without a label
KNOWN = "has_"


def known_column(name: str) -> str:
    """Returns the name of the column that says which examples have a label: `has_<name>`."""
    return f"{KNOWN}{name}"


def known_labels(dataset: Dataset, labels: Iterable[str]) -> Dataset:
    """Returns the same examples with labels that may be missing: `has_<label>`, 1 where there is one and 0 elsewhere.

        faces = jt.data.known_labels(jt.data.load("faces", "train", label=("age", "smile")), ("age", "smile"))
        jt.multitask.masked(jt.classification(net, output="age", label="age").named("age"), "has_age")

    In tfds the class of an example without a label is -1, which is an error elsewhere. Here it becomes 0 in batches,
    which nothing may read, and the column `has_<label>` float32 tells. A column without gaps stays as it is, and has
    none beside it.

    Args:
      dataset: with columns of one class per example.
      labels: their names.

    Raises:
      InputError: for a column that isn't there or holds no classes, and for a class out of range.
    """
    check_dataset(dataset, "known_labels")
    for name in labels:
        entry = dataset.entry_of(name)
        if not entry.is_label:
            raise InputError(
                f"{dataset.title}: {name!r} is {entry}, and a label that may be missing is one class per example"
            )
        if name in dataset.columns:
            values = np.asarray(dataset.columns[name][np.arange(len(dataset))])
        else:
            values = np.asarray(read_column(dataset.source, name))
            values = values if dataset.rows is None else values[dataset.rows]
        there = values != MISSING
        if there.all():
            continue
        filled = np.where(there, values, 0).astype(np.int32)
        rest = dataset.without(name)
        columns = {name: filled, known_column(name): there.astype(np.float32)}
        dataset = rest.with_columns(columns, class_names={name: entry.class_names})
    return dataset
