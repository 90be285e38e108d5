"""Learning from labels."""

from jaxtransfer.objectives.supervised.classification import classification
from jaxtransfer.objectives.supervised.regression import regression

__all__ = [
    "classification",
    "regression",
]
