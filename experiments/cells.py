"""What tables of trainings share: cells that are trained once, rows by method, a column for each task.

An experiment trains a cell for each method and seed, in a folder of its own, and notes there what came out; the same
command reads what is done, goes on with what is unfinished, and writes report.md, results.json and accuracy.png anew
after each. `results` are accuracies in per cent, `results[method][seed][task]`, and whatever else a cell tells.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxtransfer as jt
from jaxtransfer.errors import unknown
from jaxtransfer.runs import report

NOTE = "cell.json"
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def check(experiment: Any, *positive: str, **known: Any) -> None:
    """Raises for an option that is not positive, and for names that are none: `methods=METHODS`, say."""
    for option, names in known.items():
        if not (given := getattr(experiment, option)):
            raise jt.InputError(f"--{option} needs at least one name of {', '.join(names)}")
        for name in given:
            if name not in names:
                raise unknown(option.removesuffix("s"), name, names)
    for name in positive:
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")


def cell(folder: Path, settings: Mapping[str, Any], train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a training came to: as it is noted in its folder, or trained, or gone on with, and noted.

    Args:
      folder: of the training.
      settings: what it depends on, JSON types; a folder with others is refused.
      train: `train(folder)`, what is to be told of it.
    """
    note = folder / NOTE
    if note.exists():
        found = json.loads(note.read_text())
        if found["settings"] != settings:
            raise jt.InputError(f"{folder} has a run with other settings, {found['settings']}; give another --out")
        return found
    begin = time.perf_counter()
    found = {**train(folder), "seconds": round(time.perf_counter() - begin, 1), "settings": dict(settings)}
    note.write_text(json.dumps(found, indent=1) + "\n")
    return found


def all_cells(
    experiment: Any,
    methods: Sequence[str],
    tasks: Sequence[str],
    make: Callable[[str, int], dict[str, Any]],
    title: str,
) -> dict[str, Any]:
    """Makes the cells of a table, all methods with one seed first, and writes the page anew after each.

    Args:
      experiment: its options: `seeds`, how many, and `out`.
      methods: the rows.
      tasks: the columns: keys of what `make` returns.
      make: `make(method, seed)`, a cell.
      title: of the page.

    Returns:
      By method and seed what the cells told.
    """
    results: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for seed in range(experiment.seeds):
        for method in methods:
            found = results[method][str(seed)] = make(method, seed)
            told = ", ".join(f"{task} {found[task]:.2f}" for task in tasks)
            print(f"{method}, seed {seed}: {told} % ({found['seconds']:.0f} s)", file=sys.stderr, flush=True)
            _write(results, tasks, experiment, title)
    return results


def means_of(results: Results, task: str) -> dict[str, float]:
    """Returns a task's accuracy by method, the mean over the seeds that there are."""
    return {
        method: float(np.mean([one[task] for one in by_seed.values()]))
        for method, by_seed in results.items()
        if by_seed
    }


def not_below(results: Results, tasks: Sequence[str], baseline: str) -> list[str]:
    """Returns the methods that are on no task below the mean of a baseline."""
    means = {task: means_of(results, task) for task in tasks}
    if any(baseline not in one for one in means.values()):
        return []
    rivals = [method for method in results if method != baseline and results[method]]
    return [method for method in rivals if all(one[method] >= one[baseline] for one in means.values())]


def table_of(results: Results, tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows: by method and task the mean and each seed's, the mean over tasks, the time."""
    rows = []
    for method, by_seed in results.items():
        row, values = [method], []
        for task in tasks:
            values.append([one[task] for one in by_seed.values()])
            own = f"{np.mean(values[-1]):.2f}" if values[-1] else ""
            row.append(own if len(values[-1]) < 2 else f"{own} ({', '.join(f'{v:.2f}' for v in values[-1])})")
        seconds = [one["seconds"] for one in by_seed.values()]
        row += [f"{np.mean(values):.2f}", f"{np.mean(seconds):.0f}"] if seconds else ["", ""]
        rows.append(row)
    return ["method", *tasks, "mean", "seconds"], rows


def _write(results: Results, tasks: Sequence[str], experiment: Any, title: str) -> None:
    page = [f"# {title}", "", "Test accuracy of the last step, %; behind a mean each seed's.", ""]
    page += [*report.table(*table_of(results, tasks)), "", "![accuracy by method](accuracy.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    _plot(results, tasks, experiment.out / "accuracy.png", title)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    (experiment.out / "results.json").write_text(
        json.dumps({"results": results, "settings": settings}, indent=1) + "\n"
    )


def _plot(results: Results, tasks: Sequence[str], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 0.9 * len(results), 4.2), layout="constrained")
    axis = figure.subplots()
    for number, task in enumerate(tasks):
        for place, by_seed in enumerate(results.values()):
            values = [one[task] for one in by_seed.values()]
            where = [place + 0.15 * (number - (len(tasks) - 1) / 2)] * len(values)
            axis.plot(where, values, "o", color=f"C{number}", label=None if place else task, markersize=4)
    axis.set_xticks(range(len(results)), list(results), rotation=45, ha="right")
    axis.set(ylabel="accuracy, %", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    report.save_figure(figure, path)
