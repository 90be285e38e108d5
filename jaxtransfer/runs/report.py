"""What a run came to, for people: learning curves as a picture and a page of numbers."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.loggers import read_jsonl


def write_report(
    directory: str | Path,
    title: str,
    facts: Mapping[str, Any],
    *,
    earlier: Sequence[str] = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Any]]] = (),
    pictures: Mapping[str, str] = {},
    monitor: str | None = "accuracy",
    note: str = "",
) -> Path:
    """Writes `report.md` and `curves.png` of a run from its `metrics.jsonl` and `timing.jsonl`.

    Args:
      directory: the run directory.
      title: the heading.
      facts: rows of the first table, such as the configuration.
      earlier: folders in it with the reports of the stages before.
      tables: further tables, each a title, a header and rows.
      pictures: further pictures that lie there, by title.
      monitor: the metric whose largest value is the best evaluation; None where the last one is what counts.
      note: what is to be said of the evaluations: on which examples they are; or of the run, where it has none.

    Returns:
      The path of the report.
    """
    directory = Path(directory)
    history = read_jsonl(directory / "metrics.jsonl")
    curves = _curves(history)
    lines = [f"# {title}", "", *table(("", ""), [(key, value) for key, value in facts.items()])]
    for stage in earlier:
        lines += ["", f"The stage before: [{stage}]({stage}/report.md)"]
    if evals := [record for record in history if evaluation(record)]:
        last, values = evals[-1], evaluation(evals[-1])
        header, rows = ["metric", f"step {last['step']} (last)"], [[name, value] for name, value in values.items()]
        if monitor is not None:
            best = max(evals, key=lambda record: record.get(f"eval/{monitor}", 0.0))
            header.append(f"step {best['step']} (best {monitor})")
            bests = evaluation(best)
            rows = [[*row, bests.get(row[0])] for row in rows]
        lines += [
            "",
            "## Evaluation",
            "",
            *([note, ""] if note else []),
            *table(header, rows),
        ]
    elif note:
        lines += ["", note]
    for heading, header, rows in tables:
        lines += ["", f"## {heading}", "", *table(header, rows)]
    if timing := read_jsonl(directory / "timing.jsonl"):
        rows = timing_rows(timing[-1])
        lines += ["", "## Time (since the last start)", "", *table(("", ""), rows)]
    if curves:
        plot_curves(curves, directory / "curves.png")
        lines += ["", "## Learning curves", "", "![learning curves](curves.png)"]
    for heading, name in pictures.items():
        lines += ["", f"## {heading}", "", f"![{heading}]({name})"]
    write_atomically(directory / "report.md", "\n".join(lines) + "\n")
    return directory / "report.md"


def timing_rows(told: Mapping[str, float]) -> list[tuple[str, Any]]:
    """Returns the rows of a report on the time of a run, from the last record of it.

    Args:
      told: what a run notes in `timing.jsonl`; of runs of old less is known.
    """
    names = {
        "seconds": "seconds",
        "compile_seconds": "of it compiling",
        "steps_per_second": "steps/s",
        "examples_per_second": "examples/s",
    }
    rows: list[tuple[str, Any]] = [(label, told.get(name)) for name, label in names.items()]
    rows.append(("waiting for data", f"{100 * told.get('data_wait_fraction', math.nan):.2f} %"))
    if "flops_per_step" in told:
        rows.append(("operations of a step on each device, a loop inside counted once", told["flops_per_step"]))
    for name, of in (("peak_flops", "by its data sheet"), ("matmul_flops", "measured by a product of matrices")):
        if name in told:
            label = f"operations of the steps, of the {told[name] / 1e12:.3g} T/s of the device {of}"
            rows.append((label, f"{100 * told['flop_utilisation']:.1f} %"))
    for name, label in (("peak_memory_bytes", "of a device"), ("peak_host_memory_bytes", "of the process")):
        if name in told:
            rows.append((f"most memory {label}", f"{told[name] / 2**20:,.0f} MiB"))
    return rows


def evaluation(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluation's metrics of a record by name, without a term that is all of the loss."""
    values = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
    return {k: v for k, v in values.items() if k == "loss" or not _same([v], [values.get("loss")])}


def _same(values: list, others: list) -> bool:
    """Returns whether two lists of numbers are the same to rounding."""
    pairs = zip(values, others, strict=False)
    return len(values) == len(others) and all(b is not None and math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a Markdown table; floats with four significant digits."""

    def cell(value):
        if value is None or value == "":
            return "–"
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]


def print_table(console: Any, header: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> None:
    """Prints a table on a rich console, 120 columns wide where that is no terminal.

    Args:
      console: of rich.
      header: the columns.
      rows: their cells.
      **options: those of `rich.table.Table`, such as `title` and `caption`.
    """
    from rich.table import Table

    shown = Table(*header, **options)
    for row in rows:
        shown.add_row(*row)
    if not console.is_terminal:
        console.width = 120
    console.print(shown)


def plot_curves(curves: Mapping[str, Mapping[str, tuple[list, list]]], path: Path) -> None:
    """Draws one panel per metric, with the curves of training and evaluation against the step.

    Args:
      curves: by metric, by name of the curve: the steps and the values.
      path: of the PNG; replaced atomically.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (metric, series) in zip(axes, curves.items(), strict=False):
        for name, (steps, values) in series.items():
            axis.plot(steps, values, label=name, marker="." if len(steps) < 30 else None, linewidth=1.4)
        axis.set(title=metric, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Saves a matplotlib figure as PNG, replacing an older one atomically."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _curves(history: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list, list]]]:
    curves: dict[str, dict[str, tuple[list, list]]] = {}
    for record in history:
        for name, value in record.items():
            if "/" in name:  # beside the step
                side, metric = name.split("/", 1)
                steps, values = curves.setdefault(metric, {}).setdefault(side, ([], []))
                steps.append(record["step"])
                values.append(value)
    for name in [
        name for name in curves if "/" in name and not name.startswith("weight/")
    ]:  # teacher/accuracy stands beside accuracy
        who, _, metric = name.partition("/")
        if metric in curves:
            curves[metric] |= {f"{side}, {who}": values for side, values in curves.pop(name).items()}
    loss = curves.get("loss", {})
    for name, sides in list(curves.items()):
        if name != "loss" and sides.keys() == loss.keys() and all(_same(sides[s][1], loss[s][1]) for s in sides):
            del curves[name]  # one term is all of the loss
    return dict(sorted(curves.items(), key=lambda item: (item[0] not in ("loss", "accuracy"), item[0])))
