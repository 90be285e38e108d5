"""Self-training: predictions on unlabelled examples are targets, a model's own or those of models beside it."""

from jaxtransfer.adaptation.self_training.bnm import bnm
from jaxtransfer.adaptation.self_training.co_training import co_training
from jaxtransfer.adaptation.self_training.fixmatch import fixmatch
from jaxtransfer.adaptation.self_training.flexmatch import flexmatch
from jaxtransfer.adaptation.self_training.mcc import mcc
from jaxtransfer.adaptation.self_training.pseudo_label import pseudo_label
from jaxtransfer.adaptation.self_training.signal_annealing import signal_annealing
from jaxtransfer.adaptation.self_training.tri_training import tri_training
from jaxtransfer.adaptation.self_training.uda import uda
from jaxtransfer.adaptation.self_training.vat import vat

__all__ = [
    "bnm",
    "co_training",
    "fixmatch",
    "flexmatch",
    "mcc",
    "pseudo_label",
    "signal_annealing",
    "tri_training",
    "uda",
    "vat",
]
