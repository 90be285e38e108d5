"""Losses: functions of arrays, one value per example where that has a meaning; they know no model."""

from jaxtransfer.losses.adversarial import bsp, classifier_discrepancy, gradient_reversal, mdd, open_set
from jaxtransfer.losses.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.losses.behaviour import delta
from jaxtransfer.losses.categorical import categorical_contrast
from jaxtransfer.losses.classification import class_weights, cross_entropy, top_k
from jaxtransfer.losses.co_tuning import co_tuning
from jaxtransfer.losses.contrastive import dcl, info_nce, nt_xent, siglip, supcon
from jaxtransfer.losses.crd import CRDMemory, crd, crd_memory
from jaxtransfer.losses.feature_maps import attention_transfer, fsp, hint, nst, review_kd, vid
from jaxtransfer.losses.feature_norm import afn
from jaxtransfer.losses.generalization import fishr, gradient_variance, group_weights, irm, vrex
from jaxtransfer.losses.metric import batch_all, batch_hard, mined_triplet, semi_hard, triplet
from jaxtransfer.losses.mmd import jmmd, mmd
from jaxtransfer.losses.moments import coral, moment_distance
from jaxtransfer.losses.multilabel import answers_right, binary_cross_entropy
from jaxtransfer.losses.predictions import bnm, entropy, information_maximization, mcc
from jaxtransfer.losses.redundancy import barlow_twins, vicreg
from jaxtransfer.losses.regression import squared_error
from jaxtransfer.losses.relations import (
    correlation_congruence,
    gaussian_correlation,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from jaxtransfer.losses.self_distillation import dino, dino_center, negative_cosine, sinkhorn, swav
from jaxtransfer.losses.sliced_wasserstein import sliced_wasserstein
from jaxtransfer.losses.soft_targets import dist, dkd, kd, standardize_logits
from jaxtransfer.losses.spectral import bss
from jaxtransfer.losses.virtual_adversarial import vat

__all__ = [
    "CRDMemory",
    "afn",
    "answers_right",
    "attention_transfer",
    "barlow_twins",
    "batch_all",
    "batch_hard",
    "binary_cross_entropy",
    "bnm",
    "bsp",
    "bss",
    "categorical_contrast",
    "class_weights",
    "classifier_discrepancy",
    "co_tuning",
    "coral",
    "correlation_congruence",
    "crd",
    "crd_memory",
    "cross_entropy",
    "dcl",
    "delta",
    "dino",
    "dino_center",
    "dist",
    "dkd",
    "entropy",
    "fisher_l2_sp",
    "fishr",
    "fsp",
    "gaussian_correlation",
    "gradient_reversal",
    "gradient_variance",
    "group_weights",
    "hint",
    "info_nce",
    "information_maximization",
    "irm",
    "jmmd",
    "kd",
    "l2",
    "l2_sp",
    "mcc",
    "mdd",
    "mined_triplet",
    "mmd",
    "moment_distance",
    "negative_cosine",
    "nst",
    "nt_xent",
    "open_set",
    "pkt",
    "review_kd",
    "rkd_angle",
    "rkd_distance",
    "semi_hard",
    "siglip",
    "similarity_preserving",
    "sinkhorn",
    "sliced_wasserstein",
    "squared_error",
    "standardize_logits",
    "supcon",
    "swav",
    "top_k",
    "triplet",
    "vat",
    "vicreg",
    "vid",
    "vrex",
]
