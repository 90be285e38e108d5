"""The data of several tasks: label columns of one data set, or a data set for each."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.options import DataDir, DataOptions, check_folder
from jaxtransfer.cli.validation import check_apart, share_of
from jaxtransfer.data.known_labels import known_column
from jaxtransfer.errors import InputError
from jaxtransfer.runs.console import shown

FOLDER, TABLE = "folder:", "table:"
_TAKEN = {
    "loss": "the metric of all tasks together",
    "accuracy": "the metric of all tasks together",
    "weight": "what batches call how much an example counts",
    "mask": "what batches tell padding by",
    "image": "what batches call images",
    "task": "the column that tells which task an example is of",
}
Load = Callable[[str, str, Any], jt.data.Dataset]
"""`load(data, split, label)`, the images in the shape that the network takes."""


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What to learn: several labels of one data set, or those of several."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
    """A name of tfds with several columns of classes, see --labels. Or several data sets, each a task, as for
    `pretrain`: digits/upright (offline), folder:PATH (class folders) or names of tfds."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: label)")] = ()
    """Of one data set the columns of classes, each a task: two or more. Of several the column of each. An example may
    lack some labels (-1 in tfds): it then doesn't count for these tasks, which is said."""
    temperature: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 1, all examples equally often)")
    ] = None
    """Of several data sets: how often each is seen, by its size to the power of one over this; inf for equally."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "test"
    """Split to evaluate on."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""

    def check(self) -> None:
        """Raises for what no tasks can be, before anything is loaded."""
        check_folder(self.data_dir)
        for name in self.data:
            if name.startswith(TABLE):
                raise InputError(f"multitask takes images; tasks of a table train from Python: jt.balance; got {name}")
        for task in self.labels if len(self.data) == 1 else map(name_of, self.data):
            if task in _TAKEN:
                where = "the column" if len(self.data) == 1 else "the folder"
                raise InputError(f"a task can't be called {task!r}, which is {_TAKEN[task]}; rename {where}")
        for option, given in (("data", self.data), ("labels", self.labels)):
            if option == "labels" and len(self.data) > 1:  # columns of several data sets may have one name
                continue
            if twice := [one for one in given if given.count(one) > 1]:
                raise InputError(f"--{option}: expected each once; {twice[0]!r} is there twice")
        if len(self.data) == 1:
            self._check_one()
            return
        if not self.data:
            raise InputError("--data needs a data set with several --labels, or several data sets")
        if self.labels and len(self.labels) != len(self.data):
            raise InputError(
                f"--labels: of several data sets the column of each, {len(self.data)} names, or none; got "
                f"{len(self.labels)}"
            )
        for data, label in zip(self.data, self.labels, strict=False):
            if data.startswith(FOLDER) and label != "label":
                raise InputError(f"--labels: {data} has one label for each image, its folder: 'label'; got {label!r}")
        if self.temperature is not None and not self.temperature > 0:
            raise InputError(f"--temperature must be positive; got {self.temperature}")
        if len(set(names := [name_of(one) for one in self.data])) < len(names):
            raise InputError(f"--data: two tasks would be called {max(names, key=names.count)!r}; rename a folder")

    def _check_one(self) -> None:
        name = self.data[0]
        if self.temperature is not None:
            raise InputError("--temperature is of tasks of several data sets, --data A B; leave it out")
        if name.startswith(FOLDER):
            raise InputError(
                f"{name} has one label for each image, its folder; tasks are several labels of a tfds data set, or "
                f"several data sets: --data A B"
            )
        if len(self.labels) < 2:
            got = f"got one, {self.labels[0]!r}" if self.labels else "got none"
            raise InputError(
                f"--labels names two columns of classes or more, each a task; {got}. One is for `pretrain`"
            )

    @property
    def entries(self) -> list[dict[str, str]]:
        """What each task is read from: its name, the data set, its column of classes."""
        if len(self.data) == 1:
            return [{"task": label, "data": self.data[0], "label": label} for label in self.labels]
        labels = self.labels or ("label",) * len(self.data)
        return [
            {"task": name_of(data), "data": data, "label": label} for data, label in zip(self.data, labels, strict=True)
        ]

    def one(self, data: str) -> DataOptions:
        """Returns the options of one of the data sets."""
        return DataOptions(data, self.split, self.eval_split, data_dir=self.data_dir)


class TaskSets(NamedTuple):
    """The examples of a run, with a column of classes for each task.

    Attributes:
      tasks: class names by task.
      train: what is learned from.
      val: what chooses the best step; None for `test`.
      test: what is tested on.
      weights: how often training examples are seen [N]; None for equally often.
      notes: what is to be said of them, a sentence each.
    """

    tasks: dict[str, tuple[str, ...]]
    train: jt.data.Dataset
    val: jt.data.Dataset | None
    test: jt.data.Dataset
    weights: np.ndarray | None
    notes: tuple[str, ...] = ()

    def alone(self, task: str) -> "TaskSets":
        """Returns one of the tasks, with the examples that have its label."""
        sets = (None if one is None else _labelled(one, task) for one in (self.train, self.val, self.test))
        train, val, test = sets
        assert train is not None
        assert test is not None
        return TaskSets({task: self.tasks[task]}, train, val, test, None)


def name_of(data: str) -> str:
    """Returns what the task of a data set is called."""
    path = data.removeprefix(FOLDER)
    return re.sub(r"[^\w.-]+", "_", path if path == data else Path(path).expanduser().resolve().name)


def load_tasks(options: TaskOptions, load: Load, val_split: str | None, *, seed: int) -> TaskSets:
    """Loads the examples of all tasks.

    Args:
      options: checked.
      load: reads a split.
      val_split: what chooses the best step: a split, or a share of the training examples.
      seed: of the choice of that share.

    Raises:
      InputError: for a column that isn't there, is no class, or has a single one; for splits that share examples, and
        a task without labels to test on.
    """
    share = share_of(val_split)
    for data in options.data if val_split is not None and share is None else ():
        for name in ("split", "eval_split"):
            check_apart(options.one(data), name, getattr(options, name), val_split or "")
    train, held = read_tasks(options.entries, options.split, load), None
    if share is not None:
        train, held = _held_out(train, options.entries, share, seed)
    elif val_split is not None:
        held = read_tasks(options.entries, val_split, load)
    test = read_tasks(options.entries, options.eval_split, load)
    tasks = classes_of(train, options.entries)
    for one in (test, *(() if held is None else (held,))):
        if (other := classes_of(one, options.entries)) != tasks:
            wrong = next(task for task in tasks if tasks[task] != other[task])
            raise InputError(f"{one.title}: {wrong!r} has other classes than in {train.title}")
        for task in tasks:
            if not known_rows(one, task).any():
                raise InputError(f"{one.title} has no label {task!r}; choose other examples: --eval-split, --val-split")
    weights = None
    if len(options.data) > 1 and options.temperature not in (None, 1.0):
        weights = jt.data.temperature_weights(train, options.temperature or 1.0)
    return TaskSets(tasks, train, held, test, weights, tuple(_notes(train, tasks, weights)))


def read_tasks(entries: Sequence[Mapping[str, str]], split: str, load: Load) -> jt.data.Dataset:
    """Returns the examples of a split with a column of classes for each task; `has_<task>` where some lack theirs.

    Args:
      entries: of `TaskOptions.entries`.
      split: of each data set.
      load: reads a split.
    """
    names = list(dict.fromkeys(entry["data"] for entry in entries))
    if len(names) == 1 and (len(entries) > 1 or entries[0]["task"] == entries[0]["label"]):
        labels = tuple(entry["label"] for entry in entries)
        found = _loaded(load, names[0], split, labels)
        for label in labels:
            if not found.entry_of(label).is_label:
                raise InputError(
                    f"--labels: {label!r} of {found.title} is {found.entry_of(label)}; a task is one class per example"
                )
        return jt.data.known_labels(found, labels)
    return jt.data.joined({one["task"]: _loaded(load, one["data"], split, one["label"]) for one in entries})


def classes_of(dataset: jt.data.Dataset, entries: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Returns the class names of each task."""
    return {one["task"]: tuple(dataset.entry_of(one["task"]).class_names or ()) for one in entries}


def known_rows(dataset: jt.data.Dataset, task: str) -> np.ndarray:
    """Returns which examples have a label of a task, bool [N]."""
    column = known_column(task)
    return dataset.column(column) > 0 if column in dataset.columns else np.ones(len(dataset), bool)


def terms_of(
    model: jt.Model, dataset: jt.data.Dataset, tasks: Any, *, label_smoothing: float = 0.0
) -> list[jt.Objective]:
    """Returns the cross-entropy of each task on the examples that have its label."""
    found = []
    for task in tasks:
        term = jt.classification(model, output=task, label=task, label_smoothing=label_smoothing).named(task)
        column = known_column(task)
        found.append(jt.multitask.masked(term, column) if column in dataset.columns else term)
    return found


def _loaded(load: Load, data: str, split: str, label: Any) -> jt.data.Dataset:
    try:
        return load(data, split, None if label == "label" else label)
    except InputError as error:
        if " is text, and batches are of numbers" in str(error):
            told = str(error).partition(", and batches")[0]
            raise InputError(f"--labels: {told}; a task is a column of one class per example") from None
        raise


def _held_out(train: jt.data.Dataset, entries: Any, share: float, seed: int) -> tuple[jt.data.Dataset, Any]:
    """Returns the training examples without a share, drawn by the classes of the first task, or by the data sets."""
    by = "task" if "task" in train.columns else entries[0]["task"]
    return jt.data.hold_out(train, share, seed=seed, by=by)


def _labelled(dataset: jt.data.Dataset, task: str) -> jt.data.Dataset:
    rows = known_rows(dataset, task)
    return dataset if rows.all() else dataset.select(np.flatnonzero(rows))


def _notes(train: jt.data.Dataset, tasks: Mapping[str, tuple[str, ...]], weights: Any) -> list[str]:
    notes, of_any = [], np.zeros(len(train), bool)
    for task, names in tasks.items():
        rows = known_rows(train, task)
        of_any |= rows
        there = np.unique(train.column(task)[rows])
        if len(there) < 2:
            has = f"one class, {names[there[0]]!r}" if len(there) else "no label at all"
            raise InputError(f"{train.title}: {task!r} has {has}; a task tells two classes or more apart")
        if "task" in train.columns:
            share = rows.mean() if weights is None else weights[rows].sum()
            notes.append(f"{task}: {rows.sum()} examples to train on, {100 * share:.1f} % of those that are seen.")
        elif not rows.all():
            notes.append(
                f"{task}: {np.sum(~rows)} of {len(rows)} training examples have no label; they don't count for it."
            )
        if absent := [name for number, name in enumerate(names) if number not in there]:
            notes.append(f"{task}: no training example of {shown(absent)}.")
    if not of_any.all():
        notes.append(f"{np.sum(~of_any)} training examples have no label of any task.")
    return notes
