"""The data sets of `merge`: examples for statistics, examples to choose by, and test examples to tell by."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.classes import labelled_as
from jaxtransfer.cli.domain_names import part_of
from jaxtransfer.cli.image_options import ImageOptions
from jaxtransfer.cli.merge_runs import Member
from jaxtransfer.cli.options import batch_for
from jaxtransfer.cli.task_data import TABLE, read_tasks
from jaxtransfer.cli.task_scores import check_tasks, entries_of
from jaxtransfer.cli.validation import share_of
from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES

_RENEWED = 10_000  # examples of all data sets together that statistics are of
_INFORMED = 2_000  # examples that Fisher information and Gram matrices are of


class Task(NamedTuple):
    """A data set of a merge.

    Attributes:
      name: as the command line names it.
      train: training examples, with labels where the runs know classes.
      val: to choose by; None where nothing is chosen.
      test: to tell by; None where the runs know no classes.
      learned: of runs of several tasks those that the data set has labels of.
    """

    name: str
    train: jt.data.Dataset
    val: jt.data.Dataset | None
    test: jt.data.Dataset | None
    learned: tuple[str, ...] = ()


def load_tasks(
    names: Sequence[str],
    first: Member,
    *,
    split: str,
    eval_split: str,
    val_split: str | None,
    data_dir: Path | None,
    seed: int,
) -> list[Task]:
    """Loads all data sets, prepared as the runs take them, labels by the names of the runs' classes.

    Args:
      names: of the data sets, with a training split after @ where one isn't `split`.
      first: the run whose inputs and classes they become.
      split: to take statistics of.
      eval_split: to test on.
      val_split: to choose by: a split, or a share of `split`; None for none.
      data_dir: folder of prepared tfds data sets.
      seed: of the choice of a share.
    """
    return [_task(name, first, split, eval_split, val_split, data_dir, seed) for name in names]


def _task(
    name: str, first: Member, split: str, eval_split: str, val_split: str | None, data_dir: Any, seed: int
) -> Task:
    run, share = first.run, share_of(val_split)
    scored = CLASSES in run.knows
    part = part_of(name, split, eval_split)
    known = [(one, part_of(one["data"], split, None).place) for one in (entries_of(run) if run.tasks else ())]
    entries = [{**one, "data": part.name} for one, place in known if place == part.place]
    rows = part.name.startswith(TABLE)
    if rows and view_of(run) != "features":
        raise InputError(f"--data {name}: {first.name} takes images, and a table has rows of columns")

    def load(one: str) -> jt.data.Dataset:
        if rows:
            return jt.data.load(part.name, one, like=run)
        shape, resizing = ImageOptions().for_run(run, part.name, resize=True)
        how: dict[str, Any] = {"data_dir": data_dir, "image_shape": shape, "resizing": resizing}
        if entries:
            found = read_tasks(entries, one, lambda data, split, label: jt.data.load(data, split, label=label, **how))
            check_tasks(run, found, entries)
            return found
        found = jt.data.load(part.name, one, **how)
        return labelled_as(run, found, first.name) if scored else found

    train, val = load(part.train), None
    if val_split is not None and share is None:
        _check_apart(part.name, eval_split, val_split, load)
        val = load(val_split)
    elif share is not None:
        train, val = jt.data.hold_out(train, share, seed=seed)
    if not scored and not entries:
        return Task(name, train, None, None)
    test = load(part.test or eval_split)
    if jt.data.share_examples(part.train, part.test or eval_split, lambda one: len(load(one))):
        raise InputError(
            f"--data {name}: {test.title} is to test on, and can't share examples with {part.train}, which --split "
            f"takes statistics of, and labels for some methods; slice them apart"
        )
    return Task(name, train, val, test, tuple(one["task"] for one in entries))


def _check_apart(name: str, eval_split: str, val_split: str, load: Any) -> None:
    if jt.data.share_examples(eval_split, val_split, lambda one: len(load(one))):
        raise InputError(
            f"--data {name}: --eval-split {eval_split} and --val-split {val_split} have examples in common, so that "
            f"the test would choose; slice them apart"
        )


def trained_on(tasks: Sequence[Task], members: Sequence[Member], val_split: str, seed: int) -> list[str]:
    """Returns, a sentence each, which runs have learned from the validation examples, as far as they say it."""
    told, share = [], share_of(val_split)
    for task in tasks:
        name, size = part_of(task.name, "", None).name, len(task.train)
        for member in members:
            config = member.run.config
            split, held = config.get("split"), config.get("val_split")
            same = share is not None and held == val_split and config.get("seed") == seed
            if config.get("data") != name or not isinstance(split, str) or same:
                continue
            try:
                shared = share is not None or jt.data.share_examples(split, val_split, lambda _, n=size: n)
            except InputError:  # nothing tells
                shared = True
            if shared:
                told.append(
                    f"{member.name} was trained on {split} of {name}, of which validation examples are taken: it looks "
                    f"better there than it is."
                )
    return told


def view_of(run: Any) -> str:
    """Returns the entry of a batch that a run's model sees."""
    if "image_shape" in run.config:
        return "image"
    return "tokens" if run.config.get("tokenizer") else "features"


def batches_of(dataset: jt.data.Dataset, rows: int) -> Any:
    """Returns evaluation batches of a data set."""
    images = "image" in dataset.entries
    return jt.data.eval_batches(dataset, batch_for(dataset, rows) if images else min(rows, len(dataset)))


def some_of(tasks: Sequence[Task], rows: int, seed: int) -> Any:
    """Returns evaluation batches of a run's own data: up to 2,000 training examples in all, drawn by the seed."""
    few = [_some(task.train, max(1, _INFORMED // len(tasks)), seed) for task in tasks]
    return _Joined([batches_of(one, min(rows, 200)) for one in few])


class _Joined:
    """Evaluation batches of several data sets, one set after another; can be gone through again."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part


def streams_of(tasks: Sequence[Task], rows: int, seed: int) -> dict[str, Any]:
    """Returns endless batches of each data set without its labels, `rows` together."""
    each = max(1, rows // len(tasks))
    return {
        f"data{number}": jt.data.pipeline(_unlabelled(task.train), each, seed=seed + number)
        for number, task in enumerate(tasks, 1)
    }


def mixed(tasks: Sequence[Task], view: str, rows: int, seed: int) -> tuple[Any, int]:
    """Returns batches in which all data sets have as many examples, for statistics, and how many examples these are.

    Each is gone through once, up to 10,000 examples in all; a smaller one again, in another order.
    """
    most = max(min(len(task.train), max(1, _RENEWED // len(tasks))) for task in tasks)
    each = min(max(1, rows // len(tasks)), most)
    streams = [
        jt.data.pipeline(_unlabelled(task.train), min(each, len(task.train)), seed=seed + number)
        for number, task in enumerate(tasks)
    ]
    count = max(1, most // each)
    return _Mixed(streams, view, count), count * sum(min(each, len(task.train)) for task in tasks)


class _Mixed:
    """Batches of which each stream gives a part; can be gone through again."""

    def __init__(self, streams: Sequence[Any], view: str, count: int):
        self.streams, self.view, self.count = streams, view, count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield {self.view: np.concatenate([stream.batch(number)[self.view] for stream in self.streams])}


def _unlabelled(dataset: jt.data.Dataset) -> jt.data.Dataset:
    return dataset.without("label") if "label" in dataset.entries else dataset


def _some(dataset: jt.data.Dataset, most: int, seed: int) -> jt.data.Dataset:
    if len(dataset) <= most:
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:most]))
