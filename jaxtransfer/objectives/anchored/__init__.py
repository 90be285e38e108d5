"""Penalties that hold a model near what was pretrained: its weights, its features, what its classes meant."""

from jaxtransfer.objectives.anchored.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.anchored.bi_tuning import bi_tuning
from jaxtransfer.objectives.anchored.bss import bss
from jaxtransfer.objectives.anchored.co_tuning import co_tuning
from jaxtransfer.objectives.anchored.delta import delta
from jaxtransfer.objectives.anchored.filter_weights import filter_weights
from jaxtransfer.objectives.anchored.fisher import fisher_diagonal

__all__ = [
    "bi_tuning",
    "bss",
    "co_tuning",
    "delta",
    "filter_weights",
    "fisher_diagonal",
    "fisher_l2_sp",
    "l2",
    "l2_sp",
]
