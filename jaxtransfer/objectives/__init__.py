"""Objectives: each binds models and losses into a term that adds up."""

from jaxtransfer.objectives.anchors import fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.averaged import averaged
from jaxtransfer.objectives.byol import byol, simsiam
from jaxtransfer.objectives.classification import classification
from jaxtransfer.objectives.clusters import dino, swav
from jaxtransfer.objectives.crd import crd
from jaxtransfer.objectives.distillation import distillation
from jaxtransfer.objectives.fisher import fisher_diagonal
from jaxtransfer.objectives.mutual import mean_teacher, mutual_learning
from jaxtransfer.objectives.probe import online_probe
from jaxtransfer.objectives.queues import moco, nnclr
from jaxtransfer.objectives.regression import regression
from jaxtransfer.objectives.teachers import cached, peer
from jaxtransfer.objectives.views import barlow_twins, decoupled, info_nce, over_views, siglip, simclr, supcon, vicreg

__all__ = [
    "averaged",
    "barlow_twins",
    "byol",
    "cached",
    "classification",
    "crd",
    "decoupled",
    "dino",
    "distillation",
    "fisher_diagonal",
    "fisher_l2_sp",
    "info_nce",
    "l2",
    "l2_sp",
    "mean_teacher",
    "moco",
    "mutual_learning",
    "nnclr",
    "online_probe",
    "over_views",
    "peer",
    "regression",
    "siglip",
    "simclr",
    "simsiam",
    "supcon",
    "swav",
    "vicreg",
]
