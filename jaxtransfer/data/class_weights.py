"""Weights of classes by how often they occur."""

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset


def balanced_weights(dataset: Dataset) -> np.ndarray:
    """Returns n / (C · n_c) for each class c, float64 [C], so that all that occur weigh the same in a loss.

    Of n examples n_c are of class c, of C classes that occur; one that doesn't occur has weight 0.
    `jt.classification(model, weight=jt.data.balanced_weights(train))`. (King, Zeng 2001; scikit-learn's "balanced".)

    Args:
      dataset: with a class per example.

    Raises:
      InputError: for what is no such data set.
    """
    check_dataset(dataset, "balanced_weights")
    counts = np.bincount(dataset.labels, minlength=dataset.classes)
    there = counts > 0
    return np.divide(counts.sum(), there.sum() * counts, out=np.zeros(len(counts)), where=there)
