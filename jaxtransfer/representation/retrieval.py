"""Finding the other view, or the other modality, among all."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.blocks import finite, in_blocks, nearest, unit


def recall_at_k(
    queries: np.ndarray, gallery: np.ndarray, relevant: np.ndarray, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Computes how often the k nearest of a gallery, by the cosine, have a relevant one among them.

    Args:
      queries: float [N, D], embeddings by one tower.
      gallery: float [M, D], by the other.
      relevant: bool [N, M], or the pair's number in the gallery, integers [N].
      ks: the k's, each at most M.

    Returns:
      The share of queries, by k; NaN where an embedding is not finite.

    Raises:
      InputError: for shapes that do not fit, or a k out of range.
    """
    queries, gallery, relevant = map(np.asarray, (queries, gallery, relevant))
    count = len(gallery)
    if relevant.ndim == 1:
        relevant = relevant[:, None] == np.arange(count)[None]
    if queries.ndim != 2 or queries.shape[1:] != gallery.shape[1:] or relevant.shape != (len(queries), count):
        raise InputError(
            f"expected queries [N, D], gallery [M, D], relevant [N, M] or [N]; got {queries.shape}, {gallery.shape}, "
            f"{relevant.shape}"
        )
    if not len(ks) or min(ks) < 1 or max(ks) > count or not len(queries):
        raise InputError(
            f"expected a query or more, and k between 1 and the gallery's {count}; got {len(queries)} queries and k in "
            f"{list(ks)}"
        )
    if not (finite(queries) and finite(gallery)):
        return dict.fromkeys(ks, float("nan"))
    bank, most = jax.device_put(unit(gallery)), max(ks)
    parts = [np.asarray(nearest(rows, bank, k=most)) for rows in in_blocks(unit(queries))]
    found = np.concatenate(parts)[: len(queries)]
    hits = np.take_along_axis(relevant, found, axis=1)
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in ks}
