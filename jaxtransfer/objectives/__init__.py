"""Objectives: each binds models and losses into a term that adds up; a family a folder, a method a file."""

from jaxtransfer.objectives.anchored import fisher_diagonal, fisher_l2_sp, l2, l2_sp
from jaxtransfer.objectives.averaged import averaged
from jaxtransfer.objectives.distillation import cached, crd, distillation, mean_teacher, mutual_learning, peer
from jaxtransfer.objectives.selfsupervised import (
    barlow_twins,
    byol,
    decoupled,
    dino,
    info_nce,
    moco,
    nnclr,
    online_probe,
    over_views,
    siglip,
    simclr,
    simsiam,
    supcon,
    swav,
    vicreg,
)
from jaxtransfer.objectives.supervised import classification, regression

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
