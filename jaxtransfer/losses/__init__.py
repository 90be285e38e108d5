"""Losses: functions of arrays, one value per example where that has a meaning; they know no model."""

from jaxtransfer.losses.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.losses.classification import cross_entropy, top_k
from jaxtransfer.losses.regression import squared_error

__all__ = ["cross_entropy", "fisher_l2_sp", "l2", "l2_sp", "squared_error", "top_k"]
