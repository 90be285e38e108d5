"""Learning from labels."""

from jaxtransfer.objectives.supervised.classification import classification
from jaxtransfer.objectives.supervised.multilabel import multilabel_classification
from jaxtransfer.objectives.supervised.regression import regression

__all__ = [
    "classification",
    "multilabel_classification",
    "regression",
]
