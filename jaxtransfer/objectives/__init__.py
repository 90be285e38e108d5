"""Objectives: each binds models and losses into a term that adds up."""

from jaxtransfer.objectives.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.classification import classification
from jaxtransfer.objectives.crd import crd
from jaxtransfer.objectives.distillation import distillation
from jaxtransfer.objectives.fisher import fisher_diagonal
from jaxtransfer.objectives.mutual import mean_teacher, mutual_learning
from jaxtransfer.objectives.regression import regression
from jaxtransfer.objectives.teachers import cached

__all__ = [
    "cached",
    "classification",
    "crd",
    "distillation",
    "fisher_diagonal",
    "fisher_l2_sp",
    "l2",
    "l2_sp",
    "mean_teacher",
    "mutual_learning",
    "regression",
]
