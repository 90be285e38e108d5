"""What `evaluate` tells of a classifier besides means: its worst classes, and files with tables and pictures."""

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded
from jaxtransfer.measures import ClassScores, plot_confusion, plot_reliability
from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.report import print_table


def as_json(facts: Mapping[str, Any]) -> str:
    """Returns facts as one line of JSON, whatever they hold: numbers that are not finite become null."""
    return json.dumps(_plain(facts))


def check_out(out: Path | None) -> None:
    """Raises where --out names a file, or a folder that can't be made."""
    if out is None:
        return
    try:
        expanded(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: expected a folder to write to; {out}: {error.strerror or error}") from None


def write_scores(out: Path, facts: Mapping[str, Any], scores: ClassScores | None, names: Sequence[str]) -> None:
    """Writes `evaluation.json`, and of a classifier `classes.csv`, `confusion.csv` and two pictures.

    Args:
      out: the folder.
      facts: what was printed.
      scores: of a classifier.
      names: of its classes.
    """
    out = expanded(out)
    more: dict[str, Any] = {}
    if scores is not None:
        bins = scores.reliability
        columns = (bins.count, bins.accuracy, bins.confidence)
        parts = zip(*(column.tolist() for column in columns), strict=True)
        more["reliability"] = [
            {"above": m / bins.bins, "to": (m + 1) / bins.bins, "examples": n, "accuracy": right, "confidence": sure}
            for m, (n, right, sure) in enumerate(parts)
        ]
        _write_csv(out / "classes.csv", _HEADER, (_row(scores, names, k) for k in range(len(names))))
        if scores.confusion is not None:
            rows = ([name, *row] for name, row in zip(names, scores.confusion.tolist(), strict=True))
            _write_csv(out / "confusion.csv", ["true \\ predicted", *names], rows)
            plot_confusion(scores, out / "confusion.png", names=names)
        plot_reliability(scores, out / "reliability.png")
    write_atomically(out / "evaluation.json", json.dumps(_plain({**facts, **more}), indent=1) + "\n")


def print_worst(scores: ClassScores, names: Sequence[str], most: int) -> None:
    """Prints up to `most` classes on stderr, the least accurate first, and how many others there are."""
    from rich.console import Console

    known = np.flatnonzero(scores.support)
    order = known[np.argsort(scores.recall[known], kind="stable")]
    shown, rest = order[:most], order[most:]
    rows = []
    for k in shown:
        name, examples, recall, precision, f1, other = _row(scores, names, k)
        rows.append((name, str(examples), *(_percent(x) for x in (recall, precision, f1)), other))
    told = []
    if len(rest):
        told.append(f"{len(rest)} more from {_percent(scores.recall[rest[0]])} to {_percent(scores.recall[rest[-1]])}")
    if len(known) < len(names):
        told.append(f"{len(names) - len(known)} without examples")
    caption = ", ".join(told)
    header = ("class", "examples", "accuracy", "precision", "F1", "else mostly")
    print_table(Console(file=sys.stderr, markup=False, highlight=False), header, rows, caption=caption or None)


def print_several(rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Prints what was found on several data sets as a table on stderr, and writes it to `evaluation.json`.

    Args:
      rows: of each data set, what was printed of it.
      out: the folder; None for no file.
    """
    from rich.console import Console

    metrics = [
        name
        for name, value in rows[0].items()
        if isinstance(value, float) and all(isinstance(row.get(name), float) for row in rows)
    ][:_MOST]
    header = ("data", "split", "examples", *metrics)
    cells = [
        (*(str(row.get(name, "")) for name in header[:3]), *(f"{row[name]:.4g}" for name in metrics)) for row in rows
    ]
    means = [float(np.mean([row[name] for row in rows])) for name in metrics]
    cells.append(("mean", "", "", *(f"{mean:.4g}" for mean in means)))
    print_table(Console(file=sys.stderr, markup=False, highlight=False), header, cells)
    if out is not None:
        found = [*rows, {"data": "mean", **dict(zip(metrics, means, strict=True))}]
        write_atomically(expanded(out) / "evaluation.json", json.dumps(_plain(found), indent=1) + "\n")


_MOST = 6  # metrics in a table of several data sets
_HEADER = ("class", "examples", "accuracy", "precision", "f1", "else mostly")


def _row(scores: ClassScores, names: Sequence[str], k: int) -> tuple[Any, ...]:
    """The cells of a class; NaN where there is nothing to divide by."""
    other = ""
    if scores.confusion is not None:
        mistakes = scores.confusion[k].copy()
        mistakes[k] = 0
        other = names[int(mistakes.argmax())] if mistakes.any() else ""
    numbers = (float(column[k]) for column in (scores.recall, scores.precision, scores.f1))
    return (names[k], int(scores.support[k]), *numbers, other)


def _write_csv(path: Path, header: Sequence[Any], rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows)
    write_atomically(path, text.getvalue())


def _percent(share: Any) -> str:
    share = float(share)
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
