"""What a run of several tasks came to: each task beside its own training, the weights, and whether the tasks fight."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.registry.multitask import METHODS
from jaxtransfer.cli.task_data import TaskSets, known_rows
from jaxtransfer.cli.task_scores import ACCURACY
from jaxtransfer.cli.validation import chosen_where
from jaxtransfer.runs.report import evaluation, save_figure, write_report
from jaxtransfer.runs.result import write_result

_PICTURE = "tasks.png"
SINGLE = "single"
_NAMED = 6
"""Pairs that a picture names."""


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      out: its directory.
      method: how its tasks were balanced.
      architecture: what they share.
      fitted: what training gave.
      step: the one that was chosen.
      test: its scores on the test examples.
      single: by task the scores of a network of its own; empty where none was asked for.
      sets: the data.
    """

    out: Path
    method: str
    architecture: str
    fitted: jt.Fitted
    step: int
    test: Mapping[str, float]
    single: Mapping[str, Mapping[str, float]]
    sets: TaskSets


class Fight(NamedTuple):
    """How the gradients of two tasks lay to each other.

    Attributes:
      pair: the tasks.
      steps: of the records.
      cosines: the means of the steps since the record before.
    """

    pair: tuple[str, str]
    steps: list[int]
    cosines: list[float]

    @property
    def against(self) -> float:
        """The share of the records below zero."""
        return float(np.mean(np.array(self.cosines) < 0))


def fights_of(history: Sequence[Mapping[str, Any]], tasks: Sequence[str], name: str) -> list[Fight]:
    """Returns the cosines of each pair of tasks over time, where they were noted."""
    found = []
    for pair in itertools.combinations(tasks, 2):
        key = f"train/{name}/cosine/{'/'.join(pair)}"
        records = [record for record in history if key in record]
        if records:
            found.append(Fight(pair, [one["step"] for one in records], [one[key] for one in records]))
    return found


def weights_of(history: Sequence[Mapping[str, Any]], tasks: Sequence[str], name: str) -> dict[str, Any]:
    """Returns by task the steps and the weights over time, where they were noted."""
    keys = {task: f"train/{name}/{task}" for task in tasks}
    records = [record for record in history if all(key in record for key in keys.values())]
    steps = [record["step"] for record in records]
    return {task: (steps, [record[key] for record in records]) for task, key in keys.items()} if records else {}


def reported(outcome: Outcome, facts: Mapping[str, Any]) -> tuple[Path, str]:
    """Writes the report, the picture and `result.json`; returns the report's path, and lines for the console.

    Args:
      outcome: of the run.
      facts: its configuration, for the report.
    """
    sets, row = outcome.sets, METHODS[outcome.method]
    tasks, history = list(sets.tasks), outcome.fitted.history
    fights = fights_of(history, tasks, row.facts.name)
    weights = weights_of(history, tasks, row.facts.name)
    tables: list[tuple[str, Sequence[str], list[Any]]] = [_tasks(outcome)]
    if weights:
        rows = [(task, own[0], float(np.mean(own)), own[-1]) for task, (_, own) in weights.items()]
        tables.append(("Weights of the tasks", ("task", "first", "mean", "last"), rows))
    if fights:
        rows = [
            (" and ".join(one.pair), float(np.mean(one.cosines)), one.cosines[-1], f"{100 * one.against:.0f} %")
            for one in fights
        ]
        heading = "Do the tasks fight? Cosines of their gradients, on what they share"
        tables.append((heading, ("pair", "mean", "last", "records below 0"), rows))
    picture = draw(outcome.out / _PICTURE, weights, fights)
    paper = f" ({row.paper})" if row.paper else ""
    page = write_report(
        outcome.out,
        f"{len(tasks)} tasks of {sets.train.name}, {outcome.architecture} by {outcome.method}{paper}",
        facts,
        tables=tables,
        pictures={"Weights, and cosines of gradients": _PICTURE} if picture else {},
        monitor=ACCURACY,
        note=" ".join([chosen_where(sets.val, sets.test, f"mean {ACCURACY}"), *sets.notes]),
    )
    chosen = next((record for record in reversed(history) if record["step"] == outcome.step and _noted(record)), {})
    result = {
        "step": outcome.step,
        "chosen on": (sets.test if sets.val is None else sets.val).title,
        "chosen by": evaluation(chosen),
        "test on": sets.test.title,
        "test": dict(outcome.test)
        | {f"{SINGLE}: {task}/{ACCURACY}": s[ACCURACY] for task, s in outcome.single.items()},
    }
    write_result(outcome.out, result)
    return page, "\n".join([_told(outcome), *_verdict(fights)])


def _noted(record: Mapping[str, Any]) -> bool:
    return f"eval/{ACCURACY}" in record


def _tasks(outcome: Outcome) -> tuple[str, Sequence[str], list[Any]]:
    """The table of the tasks: the share of the most frequent class tells what an accuracy is worth."""
    header = ["task", "classes", "labelled to train on", "most frequent class", f"test accuracy, step {outcome.step}"]
    header += ["single task", "difference"] if outcome.single else []
    rows: list[list[Any]] = []
    for task, names in outcome.sets.tasks.items():
        train, test = outcome.sets.train, outcome.sets.test
        labels = test.column(task)[known_rows(test, task)]
        accuracy = outcome.test[f"{task}/{ACCURACY}"]
        usual = float(np.bincount(labels).max() / len(labels))
        row = [task, len(names), int(known_rows(train, task).sum()), usual, accuracy]
        if outcome.single:
            alone = outcome.single[task][ACCURACY]
            row += [alone, f"{accuracy - alone:+.4f}"]
        rows.append(row)
    if outcome.single:
        alone = float(np.mean([scores[ACCURACY] for scores in outcome.single.values()]))
        rows.append(["mean", "", "", "", outcome.test[ACCURACY], alone, f"{outcome.test[ACCURACY] - alone:+.4f}"])
    else:
        rows.append(["mean", "", "", "", outcome.test[ACCURACY]])
    return f"Tasks, on {outcome.sets.test.title}", header, rows


def _told(outcome: Outcome) -> str:
    told = []
    for task in outcome.sets.tasks:
        beside = f" (single {outcome.single[task][ACCURACY]:.4g})" if outcome.single else ""
        told.append(f"{task} {outcome.test[f'{task}/{ACCURACY}']:.4g}{beside}")
    return f"test accuracy: {', '.join(told)}; mean {outcome.test[ACCURACY]:.4g}"


def _verdict(fights: Sequence[Fight]) -> list[str]:
    if not fights:
        return []
    worst = min(fights, key=lambda one: float(np.mean(one.cosines)))
    return [
        f"do the tasks fight? the least alike are {' and '.join(worst.pair)}: cosine {np.mean(worst.cosines):.3f} in "
        f"the mean, below 0 in {100 * worst.against:.0f} % of the records"
    ]


def draw(path: Path, weights: Mapping[str, Any], fights: Sequence[Fight]) -> bool:
    """Draws weights and cosines against the step; returns whether there were any."""
    if not weights and not fights:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * (bool(weights) + bool(fights)), 3.6), layout="constrained")
    axes = iter(figure.subplots(1, bool(weights) + bool(fights), squeeze=False).ravel())
    if weights:
        axis = next(axes)
        for task, (steps, values) in weights.items():
            axis.plot(steps, values, label=task, linewidth=1.4)
        axis.set(title="weights of the tasks", xlabel="step")
        axis.legend(frameon=False, fontsize="small")
    if fights:
        axis = next(axes)
        least = sorted(fights, key=lambda one: float(np.mean(one.cosines)))[:_NAMED]
        for one in fights:  # of eight tasks there are 28 pairs: names for the least alike, a table has them all
            name = " and ".join(one.pair) if one in least else None
            axis.plot(one.steps, one.cosines, label=name, linewidth=1.4 if name else 0.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title="cosines of their gradients", xlabel="step", ylim=(-1.02, 1.02))
        axis.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    return True
