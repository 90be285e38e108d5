"""Embeddings as a picture in two dimensions."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.embedding import Embedded


def plot_embedding(
    embedded: Embedded, path: str | Path | IO[bytes], *, names: Sequence[str] = (), method: Any = None
) -> None:
    """Draws embeddings in the plane, coloured by class.

    Args:
      embedded: embeddings with labels.
      path: of the PNG, or an open binary file.
      names: of the classes.
      method: what brings them to two dimensions: anything with `fit_transform`, `sklearn.manifold.TSNE()` or
        `umap.UMAP()` say; principal components by default.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    if len(embedded.features) < 2 or embedded.features.shape[1] < 2:
        raise InputError(f"a picture needs two embeddings of two dimensions, or more; got {embedded.features.shape}")
    points = (method or PCA(2)).fit_transform(embedded.features)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    for label in np.unique(embedded.labels):
        chosen = points[embedded.labels == label]
        name = names[label] if len(names) > label else str(label)
        axis.scatter(chosen[:, 0], chosen[:, 1], s=6, alpha=0.6, label=name)
    axis.set(xticks=[], yticks=[])
    axis.legend(frameon=False, markerscale=2, fontsize="small")
    figure.savefig(path, dpi=120, format="png")
