"""Accuracy against trained parameters: the table, the picture, and what both say.

`results[labels per class][method][seed]` has `accuracy` in per cent, `trained` parameters, their `share` of the full
network's in per cent, `rate` and `seconds`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.runs import report

FULL = "full"
FEW, NEAR = 5.0, 1.0  # per cent of the parameters; points of accuracy
Results = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]


def table_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows: what trains, and by labels per class the accuracy, the rate and the time."""
    header = ["method", "trained", "share, %"]
    for size in results:
        header += [f"{size} per class", "rate", "seconds"]
    rows = []
    for method in _methods(results):
        found = [one for by_method in results.values() for one in by_method.get(method, {}).values()]
        row = [method, *([f"{found[0]['trained']:,}", f"{found[0]['share']:.2f}"] if found else ["", ""])]
        for by_method in results.values():
            cells = list(by_method.get(method, {}).values())
            values = [one["accuracy"] for one in cells]
            each = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
            row.append(f"{np.mean(values):.2f}{each}" if values else "")
            row.append(f"{cells[0]['rate']:g}" if cells and "rate" in cells[0] else "")
            row.append(f"{np.mean([one['seconds'] for one in cells]):.0f}" if cells else "")
        rows.append(row)
    return header, rows


def verdict(results: Results) -> list[str]:
    """Returns what the table says: which deltas of few parameters are near full fine-tuning, which ahead of it."""
    lines = []
    for size, by_method in results.items():
        means = {
            method: (float(np.mean([one["accuracy"] for one in by_seed.values()])), next(iter(by_seed.values())))
            for method, by_seed in by_method.items()
            if by_seed
        }
        if FULL not in means:
            continue
        whole = means.pop(FULL)[0]
        near = [m for m, (mean, one) in means.items() if one["share"] <= FEW and mean >= whole - NEAR]
        ahead = [m for m, (mean, _) in means.items() if mean > whole]
        lines.append(
            f"{size} labels per class: full {whole:.2f}; at most {FEW:g} % of the parameters and within {NEAR:g} point "
            f"or ahead: {', '.join(near) or 'none'}; ahead of it: {', '.join(ahead) or 'none'}"
        )
    return lines


def write(results: Results, experiment: Any, title: str) -> None:
    """Writes report.md, results.json and accuracy.png into `experiment.out`."""
    page = [f"# {title}", "", "Test accuracy of the last step, %; behind a mean each seed's.", ""]
    page += [*report.table(*table_of(results)), "", *verdict(results), ""]
    page += ["![accuracy by trained parameters](accuracy.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    _plot(results, experiment.out / "accuracy.png", title)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    told = json.dumps({"results": results, "settings": settings}, indent=1)
    (experiment.out / "results.json").write_text(told + "\n")


def _methods(results: Results) -> list[str]:
    return list(dict.fromkeys(method for by_method in results.values() for method in by_method))


def _plot(results: Results, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(results), 4.4), layout="constrained")
    for axis, (size, by_method) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        for number, (method, by_seed) in enumerate(by_method.items()):
            values = [one["accuracy"] for one in by_seed.values()]
            if not values:
                continue
            share = next(iter(by_seed.values()))["share"]
            axis.plot([share] * len(values), values, "o", color=f"C{number % 10}", markersize=5)
            where = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": "small"}
            axis.annotate(method, (share, float(np.mean(values))), **where)
            if method == FULL:
                axis.axhline(float(np.mean(values)), color="0.6", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.axvline(FEW, color="0.8", linewidth=0.8)
        axis.margins(x=0.15)
        axis.set(title=f"{title}, {size} labels per class", xlabel="trained parameters, % of all", ylabel="accuracy, %")
        axis.grid(alpha=0.3)
    report.save_figure(figure, path)
