"""What a merge came to: the run that is written, each run on each data set, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import jaxtransfer as jt
from jaxtransfer.cli.merge_data import Task, batches_of
from jaxtransfer.cli.merge_runs import Member
from jaxtransfer.cli.runs import architecture
from jaxtransfer.cli.task_data import terms_of
from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text
from jaxtransfer.models.description import TASKS
from jaxtransfer.runs.checkpoints import Checkpoints
from jaxtransfer.runs.configuration import FORMAT
from jaxtransfer.runs.console import facts_of
from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.report import print_table, save_figure, write_report
from jaxtransfer.runs.result import write_result
from jaxtransfer.runs.table import FILE as TABLE_FILE
from jaxtransfer.runs.table import TABLE
from jaxtransfer.runs.tokens import TOKENIZER
from jaxtransfer.texts import saved

_PICTURE = "merged.png"
_SAME = ("knows", "class_names", *TASKS, "sets", "outputs", "resize", "preprocessing", TABLE, TOKENIZER)
MEAN = "mean"
Columns = Mapping[str, Mapping[str, float]]


class Scores:
    """`scores(variables)`: the accuracy on each data set's test examples, by its name; nothing without classes.

    Of a network of several tasks it is that of each task, by `<data set>/<task>`.

    Args:
      model: the architecture.
      view: the entry of a batch that it sees.
      tasks: the data sets.
      rows: examples at a time.
    """

    def __init__(self, model: jt.Model, view: str, tasks: Sequence[Task], rows: int):
        self.model, self._classes = model, jt.eval_step(jt.classification(model, view=view))
        tests = [(task, task.test, batches_of(task.test, rows)) for task in tasks if task.test is not None]
        self._tests = {task.name: batches for task, _, batches in tests if not task.learned}
        self._vals = [batches_of(task.val, rows) for task in tasks if task.val is not None]
        self._several = {}
        for task, test, batches in tests:
            if terms := terms_of(model, test, task.learned):
                self._several[task.name] = jt.eval_step(sum(terms[1:], start=terms[0])), task.learned, batches

    def __call__(self, variables: Any) -> dict[str, float]:
        """Returns the accuracies by data set, and their mean where there are several."""
        found = {name: self._accuracy(variables, batches) for name, batches in self._tests.items()}
        for name, (evaluate, learned, batches) in self._several.items():
            scores = evaluate(self._state(variables), batches)
            found |= {f"{name}/{task}": float(scores[f"{task}/accuracy"]) for task in learned}
        return found | ({MEAN: float(np.mean(list(found.values())))} if len(found) > 1 else {})

    def validation(self, variables: Any) -> float:
        """Returns the mean over data sets of the accuracy on their validation examples."""
        return float(np.mean([self._accuracy(variables, batches) for batches in self._vals]))

    def _accuracy(self, variables: Any, batches: Any) -> float:
        return float(self._classes(self._state(variables), batches)["accuracy"])

    def _state(self, variables: Any) -> jt.TrainState:
        name, state = self.model.name, {kind: value for kind, value in variables.items() if kind != "params"}
        return jt.TrainState.of({name: variables["params"]}, {name: state})


def merged_config(first: Member, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of a merged run: the network, inputs and classes of the first run, and how it came.

    Args:
      first: the run whose network it has.
      config: what more is noted of it.
    """
    known = {entry: first.run.config[entry] for entry in _SAME if entry in first.run.config}
    entries = {"format": FORMAT, "command": "merge", **known, "knows": list(first.run.knows)}
    return {**entries, **architecture(first.run.config), **config}


def write_merged(out: Path, variables: Any, first: Member, columns: Columns) -> None:
    """Writes the weights of a merged run into its directory, which is open and has its configuration.

    Args:
      out: the directory.
      variables: the merged network's.
      first: the run whose network, inputs and classes it has.
      columns: accuracies, the merged run's last.
    """
    run, merged = first.run, jax.device_get(variables)
    if not all(np.all(np.isfinite(leaf)) for leaf in map(_floats, jax.tree.leaves(merged))):
        raise InputError("the merged weights are not finite: has one of the runs diverged? Nothing was written")
    state = {kind: value for kind, value in merged.items() if kind != "params"}
    *_, scores = columns.values()
    meta = {"eval/accuracy": scores.get(MEAN, next(iter(scores.values())))} if scores else {}
    for entry, file in ((TABLE, TABLE_FILE), (TOKENIZER, saved.FILE)):
        if run.config.get(entry) is not None:
            write_atomically(out / file, read_text(run.directory / file))
    checkpoints = Checkpoints(out / "checkpoints")
    try:
        checkpoints.save(0, {"params": {run.model.name: merged["params"]}, "state": {run.model.name: state}}, meta)
    finally:
        checkpoints.close()


def reported(
    out: Path,
    method: str,
    config: Mapping[str, Any],
    columns: Columns,
    tasks: Sequence[Task],
    notes: Sequence[str],
) -> tuple[Path, str]:
    """Writes report.md, the picture and result.json; returns the report's path and a line for the console.

    Args:
      out: the run directory.
      method: by which it was merged.
      config: of the run.
      columns: accuracies by data set, by network.
      tasks: the data sets.
      notes: what is to be said, a sentence each.
    """
    *others, (_, scores) = columns.items()
    tables, pictures = [], {}
    if scores:
        header = ("accuracy on test examples", *scores)
        rows = [(name, *(found[task] for task in scores)) for name, found in columns.items()]
        tables.append(("What each is worth", header, rows))
        _plot(columns, out / _PICTURE)
        pictures["Accuracy"] = _PICTURE
        shown = [(name, *(f"{value:.4g}" for value in values)) for name, *values in rows]
        print_table(Console(stderr=True, markup=False, highlight=False), header, shown)
    page = write_report(
        out, f"Merged by {method}", facts_of(config), tables=tables, pictures=pictures, note=" ".join(notes)
    )
    vals = [task.val.title for task in tasks if task.val is not None]
    tests = [task.test.title for task in tasks if task.test is not None]
    write_result(
        out,
        {
            "step": 0,
            "chosen on": ", ".join(vals) or None,
            "chosen by": {},
            "test on": ", ".join(tests) or None,
            "test": dict(scores),
            "beside": {name: dict(found) for name, found in others},
        },
    )
    if not scores:
        return page, f"merged: {out}"
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return page, f"accuracy of the merged run: {told}"


def _floats(leaf: Any) -> Any:
    value = np.asarray(leaf)
    return value if value.dtype.kind in "fc" else np.zeros(0)


def _shown(name: str, most: int = 32) -> str:
    """Returns a name's end, which tells paths apart, so that pictures have room for it."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _plot(columns: Columns, path: Path) -> None:
    """Draws the accuracies as bars, a group for each data set."""
    from matplotlib.figure import Figure

    tasks = list(next(iter(columns.values())))
    rows = -(-len(columns) // 2)  # of the legend
    size = max(6.4, 1.2 * len(tasks) * max(1.0, len(columns) / 4)), 3.6 + 0.2 * rows
    figure = Figure(figsize=size, layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(columns)
    for number, (name, found) in enumerate(columns.items()):
        places = np.arange(len(tasks)) + (number - (len(columns) - 1) / 2) * width
        axis.bar(places, [found[task] for task in tasks], width, label=_shown(name))
    axis.set_xticks(range(len(tasks)), list(map(_shown, tasks)), rotation=20 if len(tasks) > 2 else 0)
    axis.set(ylabel="accuracy", ylim=(0, 1), title="on test examples")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, fontsize="small", ncols=2)
    save_figure(figure, path)
