"""Scores of a network that gives each example any number of labels."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.errors import InputError
from jaxtransfer.measures.ranking import auroc, average_precision


@dataclasses.dataclass(frozen=True, eq=False)
class LabelScores:
    """How good a multi-label classifier is; every example counts once. A label is predicted where its logit is above 0.

    A label without positives has no average precision, and none without positives or negatives an AUROC: they are NaN,
    and means leave them out.

    Attributes:
      examples: n, how many counted.
      support: int64 [L], the positives of each label.
      average_precision: float64 [L], step-wise; see `jt.measures.average_precision`.
      auroc: float64 [L], the area under the ROC curve.
      exact_match: the share of examples all of whose labels are right.
      binary_accuracy: the share of all n · L answers that is right, 1 − the Hamming loss.
    """

    examples: int
    support: np.ndarray
    average_precision: np.ndarray
    auroc: np.ndarray
    exact_match: float
    binary_accuracy: float

    @property
    def mean_average_precision(self) -> float:
        """mAP, over the labels that have positives; NaN where none has."""
        return _mean(self.average_precision)

    @property
    def mean_auroc(self) -> float:
        """The mean AUROC of the labels that have positives and negatives; NaN where none has both."""
        return _mean(self.auroc)

    @property
    def left_out(self) -> tuple[int, ...]:
        """The numbers of the labels without positives, which `mean_average_precision` leaves out."""
        return tuple(np.flatnonzero(self.support == 0).tolist())

    def summary(self) -> dict[str, float]:
        """Returns the scores that are one number each, by name."""
        return {
            "mean_average_precision": self.mean_average_precision,
            "mean_auroc": self.mean_auroc,
            "exact_match": self.exact_match,
            "binary_accuracy": self.binary_accuracy,
        }

    def __repr__(self):
        told = ", ".join(f"{name} {value:.4g}" for name, value in self.summary().items())
        left = f"; {len(self.left_out)} labels without positives are left out" if self.left_out else ""
        return f"LabelScores({self.examples} examples, {len(self.support)} labels: {told}{left})"


def label_scores(logits: ArrayLike, targets: ArrayLike, *, mask: ArrayLike | None = None) -> LabelScores:
    """Scores logits that are there already; `jt.measures.multilabel_classification(model)` measures a model.

    Args:
      logits: float [N, L].
      targets: 0 or 1 [N, L], numbers or booleans.
      mask: [N]; examples with 0 do not count. None where all do.

    Returns:
      A `LabelScores`.

    Raises:
      InputError: where nothing counts, logits are NaN, targets are not 0 or 1, or shapes do not fit.
    """
    known, truth = np.asarray(logits), np.asarray(targets)
    if known.ndim != 2 or known.shape != truth.shape:
        raise InputError(
            f"expected logits and targets, 0 or 1 for each label, [examples, labels]; got {list(known.shape)} and "
            f"{list(truth.shape)}"
        )
    if mask is not None:
        keep = np.asarray(mask) > 0
        if keep.shape != known.shape[:1]:
            raise InputError(f"mask must have one entry per example, {known.shape[:1]}; got {keep.shape}")
        known, truth = known[keep], truth[keep]
    if not len(known):
        raise InputError("no example counts: there are none, or the mask is 0 everywhere; is the split empty?")
    if known.dtype.kind == "V":  # bfloat16, as NumPy sees it
        known = known.astype(np.float32)
    precisions = average_precision(known, truth)  # checks the values
    right = (known > 0) == (truth > 0)
    return LabelScores(
        examples=len(known),
        support=truth.sum(axis=0, dtype=np.float64).astype(np.int64),
        average_precision=precisions,
        auroc=auroc(known, truth),
        exact_match=float(right.all(axis=1).mean()),
        binary_accuracy=float(right.mean()),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
