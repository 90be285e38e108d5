"""Self-supervised learning: a method a file."""

from jaxtransfer.objectives.selfsupervised.barlow_twins import barlow_twins
from jaxtransfer.objectives.selfsupervised.byol import byol
from jaxtransfer.objectives.selfsupervised.decoupled import decoupled
from jaxtransfer.objectives.selfsupervised.dino import dino
from jaxtransfer.objectives.selfsupervised.info_nce import info_nce
from jaxtransfer.objectives.selfsupervised.moco import moco
from jaxtransfer.objectives.selfsupervised.moco_v3 import moco_v3
from jaxtransfer.objectives.selfsupervised.nnclr import nnclr
from jaxtransfer.objectives.selfsupervised.online_probe import online_probe
from jaxtransfer.objectives.selfsupervised.over_views import over_views
from jaxtransfer.objectives.selfsupervised.siglip import siglip
from jaxtransfer.objectives.selfsupervised.simclr import simclr
from jaxtransfer.objectives.selfsupervised.simsiam import simsiam
from jaxtransfer.objectives.selfsupervised.supcon import supcon
from jaxtransfer.objectives.selfsupervised.swav import swav
from jaxtransfer.objectives.selfsupervised.vicreg import vicreg

__all__ = [
    "barlow_twins",
    "byol",
    "decoupled",
    "dino",
    "info_nce",
    "moco",
    "moco_v3",
    "nnclr",
    "online_probe",
    "over_views",
    "siglip",
    "simclr",
    "simsiam",
    "supcon",
    "swav",
    "vicreg",
]
