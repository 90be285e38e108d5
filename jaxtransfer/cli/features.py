"""How good the features of a run of `contrast` are on test images."""

import numpy as np

import jaxtransfer as jt
from jaxtransfer import representation
from jaxtransfer.cli.runs import Run

_BANK = 20_000  # training images that the nearest neighbours and the linear probe learn from
PAIRS = 2_000
"""Test images of which two views are compared."""


def measured(
    run: Run, train: jt.data.Dataset, test: jt.data.Dataset, batch_size: int
) -> tuple[representation.Embedded, dict[str, float]]:
    """Returns the features of the test images, and the scores of all: nearest neighbours, linear probe, uniformity.

    Neighbours and probe learn from up to 20,000 training images, spread over all of them; of a single class they have
    nothing to tell.
    """
    if train.classes < 2:
        features = representation.embed(run.model, run.variables, jt.data.eval_batches(test, batch_size))
        return features, {"uniformity": representation.uniformity(features.features[:PAIRS])}
    bank = bank_of(train)
    of_bank, of_test = (
        representation.embed(run.model, run.variables, jt.data.eval_batches(split, batch_size))
        for split in (bank, test)
    )
    scores = {
        "knn": representation.knn_accuracy(of_bank, of_test),
        "linear_probe": representation.linear_probe(of_bank, of_test),
        "uniformity": representation.uniformity(of_test.features[:PAIRS]),
    }
    return of_test, scores


def bank_of(train: jt.data.Dataset) -> jt.data.Dataset:
    """Returns up to 20,000 examples, spread over all of them."""
    return train if len(train) <= _BANK else train.select(np.linspace(0, len(train) - 1, _BANK).astype(int))
