"""Objectives: each binds models and losses into a term that adds up."""

from jaxtransfer.objectives.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.classification import classification
from jaxtransfer.objectives.fisher import fisher_diagonal
from jaxtransfer.objectives.regression import regression

__all__ = ["classification", "fisher_diagonal", "fisher_l2_sp", "l2", "l2_sp", "regression"]
