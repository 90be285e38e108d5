"""Penalties that hold the parameters near where they were: the anchors of transfer learning."""

from jaxtransfer.objectives.anchored.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.anchored.fisher import fisher_diagonal

__all__ = [
    "fisher_diagonal",
    "fisher_l2_sp",
    "l2",
    "l2_sp",
]
