"""Learning from what other networks say: teachers, averages and peers."""

from jaxtransfer.objectives.distillation.co_teaching import co_teaching
from jaxtransfer.objectives.distillation.crd import crd
from jaxtransfer.objectives.distillation.matching import distillation
from jaxtransfer.objectives.distillation.mean_teacher import mean_teacher
from jaxtransfer.objectives.distillation.mutual_learning import mutual_learning
from jaxtransfer.objectives.distillation.teachers import cached, peer

__all__ = [
    "cached",
    "co_teaching",
    "crd",
    "distillation",
    "mean_teacher",
    "mutual_learning",
    "peer",
]
