"""The features of two domains as a picture: whether they lie apart, and whether their classes lie together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.embedding import Embedded

Pair = tuple[Embedded, Embedded]


def plot_domains(
    pairs: Mapping[str, Pair], path: str | Path | Any, *, names: Sequence[str] = (), method: Any = None
) -> None:
    """Draws the features of a source and a target in the plane: above by domain, below by class.

    Args:
      pairs: by title, a column each, embeddings of source and target examples: before and after adaptation, say. Labels
        may be missing.
      path: of the PNG, or an open binary file.
      names: of the classes.
      method: what brings them to two dimensions: anything with `fit_transform`, `sklearn.manifold.TSNE()` say, which is
        fitted to both domains of a column; principal components by default.

    Raises:
      InputError: for fewer than three examples or two dimensions, domains of other dimensions, no columns.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    if not pairs:
        raise InputError("a picture of domains needs a pair of them; got none")
    figure = Figure(figsize=(4.5 * len(pairs), 8), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False)
    for column, (title, (source, target)) in enumerate(pairs.items()):
        shapes = [one.features.shape for one in (source, target)]
        if shapes[0][1] != shapes[1][1] or shapes[0][1] < 2 or shapes[0][0] + shapes[1][0] < 3:
            raise InputError(
                f"a picture needs source and target of the same dimensions, two or more, and three examples; got "
                f"{shapes[0]} and {shapes[1]}"
            )
        points = (method or PCA(2)).fit_transform(np.concatenate([source.features, target.features]))
        parts = np.split(points, [len(source.features)])
        above, below = axes[:, column]
        for name, colour, part in zip(("source", "target"), ("tab:blue", "tab:orange"), parts, strict=True):
            above.scatter(part[:, 0], part[:, 1], s=6, alpha=0.6, color=colour, label=name)
        above.legend(frameon=False, markerscale=2, fontsize="small")
        above.set(title=title)
        for one, part, marker in zip((source, target), parts, ("o", "x"), strict=True):
            _by_class(below, one.labels, part, marker, names)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120, format="png")


def _by_class(axis: Any, labels: np.ndarray, points: np.ndarray, marker: str, names: Sequence[str]) -> None:
    """Draws the examples of a domain by class, those without a label in grey."""
    if not len(labels):
        axis.scatter(points[:, 0], points[:, 1], s=8, alpha=0.4, color="0.6", marker=marker)
        return
    legend = marker == "o" and len(names) <= 12
    for label in np.unique(labels):
        chosen = points[labels == label]
        name = names[label] if len(names) > label else str(label)
        axis.scatter(chosen[:, 0], chosen[:, 1], s=8, alpha=0.6, color=f"C{label % 10}", marker=marker, label=name)
    if legend:
        axis.legend(frameon=False, markerscale=2, fontsize="x-small", title="source o, target x")
