"""Losses: functions of arrays, one value per example where that has a meaning; they know no model."""

from jaxtransfer.losses.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.losses.classification import cross_entropy, top_k
from jaxtransfer.losses.crd import CRDMemory, crd, crd_memory
from jaxtransfer.losses.feature_maps import attention_transfer, fsp, hint, nst, review_kd, vid
from jaxtransfer.losses.regression import squared_error
from jaxtransfer.losses.relations import (
    correlation_congruence,
    gaussian_correlation,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from jaxtransfer.losses.soft_targets import dist, dkd, kd, standardize_logits

__all__ = [
    "CRDMemory",
    "attention_transfer",
    "correlation_congruence",
    "crd",
    "crd_memory",
    "cross_entropy",
    "dist",
    "dkd",
    "fisher_l2_sp",
    "fsp",
    "gaussian_correlation",
    "hint",
    "kd",
    "l2",
    "l2_sp",
    "nst",
    "pkt",
    "review_kd",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "squared_error",
    "standardize_logits",
    "top_k",
    "vid",
]
