"""Nearest neighbours: the accuracy of their vote, after training and in it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.representation.blocks import banked, finite, in_blocks, unit, voted
from jaxtransfer.representation.checks import check_embedded
from jaxtransfer.representation.embedding import Embedded, embedder


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
    check_embedded(train, test)
    if k < 1 or not temperature > 0:
        raise InputError(f"expected k of at least 1 and a positive temperature; got {k} and {temperature}")
    if not (finite(train.features) and finite(test.features)):
        return float("nan")
    k = min(k, len(train.features))
    bank, labels = jax.device_put(banked(unit(train.features), np.asarray(train.labels, np.int32)))
    guesses = [np.asarray(voted(rows, bank, labels, temperature, k=k)) for rows in in_blocks(unit(test.features))]
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
