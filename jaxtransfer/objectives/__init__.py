"""Objectives: each binds models and losses into a term that adds up; a family a folder, a method a file."""

from jaxtransfer.objectives import selfsupervised
from jaxtransfer.objectives.anchored import (
    bi_tuning,
    bss,
    co_tuning,
    delta,
    filter_weights,
    fisher_diagonal,
    fisher_l2_sp,
    l2,
    l2_sp,
)
from jaxtransfer.objectives.averaged import averaged
from jaxtransfer.objectives.distillation import (
    cached,
    co_teaching,
    crd,
    distillation,
    mean_teacher,
    mutual_learning,
    peer,
)
from jaxtransfer.objectives.selfsupervised import *  # noqa: F403
from jaxtransfer.objectives.supervised import classification, multilabel_classification, regression

__all__ = [
    "averaged",
    "bi_tuning",
    "bss",
    "cached",
    "classification",
    "co_teaching",
    "co_tuning",
    "crd",
    "delta",
    "distillation",
    "filter_weights",
    "fisher_diagonal",
    "fisher_l2_sp",
    "l2",
    "l2_sp",
    "mean_teacher",
    "multilabel_classification",
    "mutual_learning",
    "peer",
    "regression",
]
__all__ += selfsupervised.__all__
