"""Scores of a classifier as pictures: which classes are taken for which, and how far confidence can be trusted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.measures.class_scores import ClassScores
from jaxtransfer.runs.report import save_figure

_NAMED, _NUMBERED = 60, 20  # up to so many classes names and counts can be read


def plot_confusion(scores: ClassScores, path: str | Path, *, names: Sequence[str] = ()) -> None:
    """Draws the confusion matrix; colours are the shares of each true class, numbers the examples.

    Args:
      scores: of a classifier.
      path: of the PNG; replaced atomically.
      names: of the classes.

    Raises:
      InputError: where there are too many classes for a confusion matrix.
    """
    from matplotlib.figure import Figure

    if scores.confusion is None:
        raise InputError(f"there is no confusion matrix of {len(scores.support)} classes, only of up to 4,096")
    matrix, count = scores.confusion, len(scores.support)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(2.5 + 0.3 * count, 4.5, 16))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
    if count <= _NAMED:
        shown = [_short(names[k]) if len(names) > k else str(k) for k in range(count)]
        axis.set_xticks(range(count), shown, rotation=90, fontsize=8)
        axis.set_yticks(range(count), shown, fontsize=8)
    if count <= _NUMBERED:
        for true, guess in np.argwhere(matrix):
            colour = "white" if shares[true, guess] > 0.5 else "black"
            axis.text(guess, true, str(matrix[true, guess]), ha="center", va="center", color=colour, fontsize=7)
    axis.set(xlabel="predicted", ylabel="true", title=f"accuracy {scores.accuracy:.1%} of {scores.examples:,} examples")
    save_figure(figure, Path(path))


def plot_reliability(scores: ClassScores, path: str | Path) -> None:
    """Draws accuracy against confidence, bin by bin, above how many examples are in each bin.

    Args:
      scores: of a classifier.
      path: of the PNG; replaced atomically.
    """
    from matplotlib.figure import Figure

    bins = scores.reliability
    width = 1 / bins.bins
    centres = (np.arange(bins.bins) + 0.5) * width
    some = bins.count > 0
    figure = Figure(figsize=(4.8, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.bar(centres[some], bins.accuracy[some], width, color="C0", edgecolor="white", label="accuracy")
    above.plot(bins.confidence[some], bins.accuracy[some], ".", color="C3", label="at the mean confidence")
    above.plot((0, 1), (0, 1), "--", color="grey", linewidth=1, label="calibrated")
    title = f"expected calibration error {scores.ece:.1%} ({bins.bins} bins)"
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    above.legend(loc="lower right", framealpha=0.9, fontsize=8)
    below.bar(centres, bins.count / scores.examples, width, color="grey", edgecolor="white")
    below.set(xlabel="confidence", ylabel="share")
    save_figure(figure, Path(path))


def _short(name: str) -> str:
    name = name.replace("$", r"\$")  # not mathematics
    return name if len(name) <= 24 else f"{name[:23]}…"
