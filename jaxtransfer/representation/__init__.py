"""How good a representation is: neighbours, a linear probe, retrieval, how it fills the sphere, and a picture."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.representation.blocks import banked, finite, nearest, potentials, unit, voted
from jaxtransfer.representation.embedding import Embedded, embed, embed_views, embedder

__all__ = [
    "Embedded",
    "alignment",
    "embed",
    "embed_views",
    "embedder",
    "knn_accuracy",
    "linear_probe",
    "neighbours",
    "plot_embedding",
    "recall_at_k",
    "uniformity",
]

_BLOCK = 1024  # queries that are compared at a time


def knn_accuracy(train: Embedded, test: Embedded, *, k: int = 200, temperature: float = 0.07) -> float:
    """Computes the accuracy of the weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978).

    Each of the k nearest training examples by the cosine votes for its class with the weight exp(cosine / τ); of
    classes with as many votes the first is chosen. Compiles once per shape, in memory that grows neither with the
    classes nor, beyond the embeddings themselves, with their number.

    Args:
      train: embeddings with labels.
      test: the same of the examples that are classified.
      k: neighbours; all training examples where there are fewer.
      temperature: τ.

    Returns:
      The share of test examples whose class has the most votes; NaN where an embedding is not finite.

    Raises:
      InputError: without labels, for embeddings of other dimensions, for k below one.
    """
    _check(train, test)
    if k < 1 or not temperature > 0:
        raise InputError(f"expected k of at least 1 and a positive temperature; got {k} and {temperature}")
    if not (finite(train.features) and finite(test.features)):
        return float("nan")
    k = min(k, len(train.features))
    bank, labels = jax.device_put(banked(unit(train.features), np.asarray(train.labels, np.int32)))
    guesses = [np.asarray(voted(rows, bank, labels, temperature, k=k)) for rows in _blocks(unit(test.features))]
    return float(np.mean(np.concatenate(guesses)[: len(test.labels)] == test.labels))


def neighbours(
    model: Model,
    train: Iterable[Batch],
    test: Iterable[Batch],
    *,
    k: int = 200,
    temperature: float = 0.07,
    tap: str = "features",
) -> Callable[[Any], dict[str, float]]:
    """Returns a measure of a state in training, for `jt.fit(measure=...)`: its features' nearest neighbours.

    Everything is compiled once, at the first call.

    Args:
      model: a model that trains, by whose name the state has weights.
      train: batches with labels that can be iterated again, such as `jt.data.eval_batches` gives: the bank.
      test: the same of the examples that are classified.
      k: as for `knn_accuracy`.
      temperature: as for `knn_accuracy`.
      tap: the output that is compared.

    Returns:
      `measure(state) -> {"knn_accuracy": accuracy}`.
    """
    run = embedder(model, tap=tap)

    def measure(state: Any) -> dict[str, float]:
        own = {"params": model.whole(state.params), **state.state.get(model.name, {})}
        variables = jax.device_get(own)  # from wherever a mesh placed them
        bank, asked = run(variables, train), run(variables, test)
        return {"knn_accuracy": knn_accuracy(bank, asked, k=k, temperature=temperature)}

    return measure


def linear_probe(
    train: Embedded, test: Embedded, *, strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), seed: int = 0
) -> float:
    """Fits an L2-regularised logistic regression to convergence (L-BFGS, scikit-learn) and returns its test accuracy.

    Minimises (1/n) Σ CE + strength · ½‖W‖² on standardised features. Where several strengths are given, a tenth of the
    training examples, held out by `seed`, chooses; the chosen one is fitted to all of them.

    Args:
      train: embeddings with labels.
      test: the same of the test examples.
      strengths: of the penalty.
      seed: of the held-out part.

    Returns:
      The share of test examples that it classifies rightly; NaN where an embedding is not finite.

    Raises:
      InputError: without labels, for a single class, embeddings of other dimensions, or a strength below or at 0.
    """
    from sklearn.linear_model import LogisticRegression

    _check(train, test)
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths must be positive; got {list(strengths)}")
    if len(np.unique(train.labels)) < 2:
        raise InputError(f"a linear probe tells classes apart; all {len(train.labels)} training examples are of one")
    if not (finite(train.features) and finite(test.features)):
        return float("nan")
    mean, std = (moment(train.features, axis=0, dtype=np.float64) for moment in (np.mean, np.std))
    x, others = (((one.features - mean) / np.maximum(std, 1e-6)).astype(np.float32) for one in (train, test))
    y = train.labels

    def fitted(x, y, strength):
        return LogisticRegression(C=1 / (strength * len(x)), max_iter=2000, tol=1e-5).fit(x, y)

    best = strengths[0]
    if len(strengths) > 1:
        order = np.random.default_rng(seed).permutation(len(x))
        stays = np.unique(y[order], return_index=True)[1]  # one of each class, which can't be held out
        held = np.delete(order, stays)[: max(1, len(x) // 10)]
        rest = np.setdiff1d(order, held)
        if len(held):
            best = max(strengths, key=lambda strength: fitted(x[rest], y[rest], strength).score(x[held], y[held]))
    return float(fitted(x, y, best).score(others, test.labels))


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
    parts = [np.asarray(nearest(rows, bank, k=most)) for rows in _blocks(unit(queries))]
    found = np.concatenate(parts)[: len(queries)]
    hits = np.take_along_axis(relevant, found, axis=1)
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in ks}


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Computes the mean of ‖x̂ − ŷ‖² over pairs [N, D] (Wang and Isola 2020, arXiv:2005.10242); 0 is best.

    NaN where an embedding is not finite.
    """
    if np.ndim(one) != 2 or np.shape(one) != np.shape(other) or not len(one):
        raise InputError(f"alignment is of pairs, [N, D] twice; got {np.shape(one)} and {np.shape(other)}")
    if not (finite(one) and finite(other)):
        return float("nan")
    return float(np.mean(np.sum(np.square(unit(one) - unit(other)), axis=1)))


def uniformity(features: np.ndarray, *, t: float = 2.0) -> float:
    """Computes log mean exp(−t ‖x̂ᵢ − x̂ⱼ‖²) over all pairs i ≠ j of [N, D] (Wang and Isola 2020); lower is better.

    NaN where an embedding is not finite.
    """
    if len(features) < 2:
        raise InputError(f"uniformity is of pairs; got {len(features)} embeddings")
    if not finite(features):
        return float("nan")
    x = unit(features)
    bank = jax.device_put(x)
    total = np.concatenate([np.asarray(potentials(rows, bank, t)) for rows in _blocks(x)])[: len(x)].astype(np.float64)
    own = np.exp(
        -t * (2 - 2 * np.sum(np.square(x.astype(np.float64)), axis=1))
    )  # 1, or e^(−2t) for a vector of length 0
    return float(np.log(max(total.sum() - own.sum(), 1e-300) / (len(x) * (len(x) - 1))))


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


def _check(train: Embedded, test: Embedded) -> None:
    for name, one in (("train", train), ("test", test)):
        if np.ndim(one.features) != 2 or not np.issubdtype(np.asarray(one.features).dtype, np.number):
            kind = np.asarray(one.features)
            raise InputError(f"{name}: expected embeddings, numbers [N, D]; got {kind.dtype} {list(kind.shape)}")
        if len(one.labels) != len(one.features) or not len(one.features):
            raise InputError(
                f"{name}: expected a label for each embedding; got {len(one.labels)} and {len(one.features)}"
            )
        kind = np.asarray(one.labels)
        if not np.issubdtype(kind.dtype, np.integer) or kind.min() < 0:
            raise InputError(f"{name}: labels are class numbers, integers of at least 0; got {kind.dtype} {kind[:3]}")
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(f"expected the same dimensions; got {train.features.shape[1]} and {test.features.shape[1]}")


def _blocks(rows: np.ndarray) -> Iterable[np.ndarray]:
    """Yields the rows in blocks of one shape, the last one filled with zeros: one program serves all."""
    size = min(_BLOCK, len(rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.concatenate([part, np.zeros((size - len(part), rows.shape[1]), rows.dtype)])
