"""What a network of several tasks is worth on each, in training and afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.options import batch_for
from jaxtransfer.cli.runs import Run
from jaxtransfer.cli.scores import as_json, check_out, print_several, write_scores
from jaxtransfer.cli.task_data import classes_of, known_rows, read_tasks, terms_of
from jaxtransfer.errors import InputError

ACCURACY = "accuracy"
"""The mean over the tasks."""


class TaskScores:
    """`measure(state)` for `jt.fit`: loss and accuracy of each task, and the mean accuracy over the tasks.

    Args:
      model: what trains.
      dataset: labelled examples.
      tasks: by name.
      rows: examples at a time.
      **where: `mesh`, `shard` and `mode` of `jt.eval_step`.
    """

    def __init__(self, model: jt.Model, dataset: jt.data.Dataset, tasks: Sequence[str], rows: int, **where: Any):
        terms = terms_of(model, dataset, tasks)
        self.tasks, self.dataset = tuple(tasks), dataset
        self._run = jt.eval_step(sum(terms[1:], start=terms[0]), **where)
        self._batches = jt.data.eval_batches(dataset, rows)

    def __call__(self, state: Any) -> dict[str, float]:
        """Returns the scores of a training state, or of a run."""
        if isinstance(state, Run):
            state = jt.TrainState.of(state.params, state.state, step=state.step)
        found = self._run(state, self._batches)
        return {"loss": found.pop("loss"), ACCURACY: self.mean(found), **found}

    def mean(self, scores: Mapping[str, float]) -> float:
        """Returns the mean accuracy over the tasks."""
        return float(np.mean([scores[f"{task}/accuracy"] for task in self.tasks]))


def entries_of(run: Run) -> list[dict[str, str]]:
    """Returns what each task of a run is read from, as its configuration says.

    Raises:
      InputError: for a run of another making.
    """
    found = run.config.get("sets")
    told = isinstance(found, list) and all(
        isinstance(one, dict) and {"task", "data", "label"} <= one.keys() and one["task"] in run.tasks for one in found
    )
    if not found or not told:
        raise InputError(f"{run.directory} doesn't say what its tasks are read from, so that no data can be evaluated")
    return found


def evaluate_tasks(command: Any, run: Run) -> None:
    """Evaluates a run of several tasks, prints a JSON line for each data set that is asked for.

    Args:
      command: `jaxtransfer evaluate`.
      run: what is evaluated.
    """
    for name in ("worst", "ways", "shots", "queries"):
        if getattr(command, name) is not None:
            raise InputError(f"--{name} is not for runs of several tasks; leave it out")
    check_out(command.out)
    entries = entries_of(run)
    own = list(dict.fromkeys(one["data"] for one in entries))
    split = command.split or (str(run.config.get("eval_split", "test")) if not command.data else "test")
    if len(own) > 1:  # a data set for each task
        if wrong := [name for name in command.data if name not in own]:
            raise InputError(f"{run.directory} has a task for each of {', '.join(own)}, and none for {wrong[0]}")
        chosen = [[one for one in entries if one["data"] == name] for name in command.data] or [entries]
    else:
        chosen = [[{**one, "data": name} for one in entries] for name in command.data or own]
    rows = []
    for number, some in enumerate(chosen, 1):
        shape, resizing = command.images.for_run(run, some[0]["data"], resize=_resizes(command, run))
        how = {"data_dir": command.data_dir, "image_shape": shape, "resizing": resizing}

        def load(data: str, split: str, label: Any, how: Mapping[str, Any] = how) -> jt.data.Dataset:
            return jt.data.load(data, split, label=label, **how)

        dataset = read_tasks(some, split, load)
        facts = {"run": str(command.directory), "step": run.step, **_facts(run, dataset, some, command)}
        if command.out is not None:
            out = Path(command.out) / str(number) if len(chosen) > 1 else command.out
            check_out(out)
            write_scores(out, facts, None, ())
        print(as_json(facts))
        rows.append(facts)
    if len(rows) > 1:
        print_several(rows, command.out)


def check_tasks(run: Run, dataset: jt.data.Dataset, entries: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Returns how many examples have a label of each task.

    Raises:
      InputError: for a task of other classes than the run's, and one without a label.
    """
    counted = {}
    for task, names in classes_of(dataset, entries).items():
        if names != run.tasks[task]:
            raise InputError(
                f"{dataset.title}: the classes of {task!r} are not those of {run.directory}, in their order"
            )
        counted[task] = int(known_rows(dataset, task).sum())
        if not counted[task]:
            raise InputError(f"{dataset.title} has no label {task!r}, so that there is nothing to measure")
    return counted


def _resizes(command: Any, run: Run) -> bool:
    return command.resize or bool(run.config.get("resize"))


def _facts(run: Run, dataset: jt.data.Dataset, entries: Sequence[Mapping[str, str]], command: Any) -> dict[str, Any]:
    expected = run.config["image_shape"]
    if list(dataset.image_shape) != list(expected):
        raise InputError(
            f"{run.directory} was trained on images {tuple(expected)}, {dataset.name} has {dataset.image_shape}; add "
            f"--resize to bring them to that shape"
        )
    tasks = [one["task"] for one in entries]
    known = check_tasks(run, dataset, entries)
    counted = {f"{task}/examples": number for task, number in known.items() if number < len(dataset)}
    scores = TaskScores(run.model, dataset, tasks, batch_for(dataset, command.batch_size))(run)
    return {"data": dataset.name, "split": dataset.split, "examples": len(dataset), **counted, **scores}
