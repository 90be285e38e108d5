"""Self-training: the model's own predictions on unlabelled examples are its targets."""

from jaxtransfer.adaptation.self_training.bnm import bnm
from jaxtransfer.adaptation.self_training.mcc import mcc

__all__ = ["bnm", "mcc"]
