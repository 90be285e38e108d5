"""Weights of classes by how often they occur."""

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.errors import InputError


def balanced_weights(dataset: Dataset, *, label: str = "label") -> np.ndarray:
    """Returns n / (C · n_c) for each class c, float64 [C], so that all that occur weigh the same in a loss.

    Of n examples n_c are of class c, of C classes that occur; one that doesn't occur has weight 0.
    `jt.classification(model, weight=jt.data.balanced_weights(train))`. (King, Zeng 2001; scikit-learn's "balanced".)

    Args:
      dataset: with a class per example.
      label: the column that holds the classes.

    Raises:
      InputError: for what is no such data set.
    """
    check_dataset(dataset, "balanced_weights")
    entry = dataset.entry_of(label)
    if not entry.is_label:
        remedy = (
            "labels that hold together are balanced by jt.multilabel_classification(model, pos_weight=negatives / "
            "positives), positives the sum of the column"
            if entry.multi_hot or len(entry.shape) == 1
            else "name one by label="
        )
        raise InputError(
            f"{dataset.title}: balanced_weights is of one class per example, and {label!r} is {entry}; {remedy}"
        )
    labels = dataset.labels if label == "label" else dataset.column(label)
    counts = np.bincount(labels, minlength=len(entry.class_names or ()))
    there = counts > 0
    return np.divide(counts.sum(), there.sum() * counts, out=np.zeros(len(counts)), where=there)
