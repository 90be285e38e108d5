"""Self-training: the model's own predictions on unlabelled examples are its targets."""

from jaxtransfer.adaptation.self_training.bnm import bnm
from jaxtransfer.adaptation.self_training.fixmatch import fixmatch
from jaxtransfer.adaptation.self_training.flexmatch import flexmatch
from jaxtransfer.adaptation.self_training.mcc import mcc
from jaxtransfer.adaptation.self_training.pseudo_label import pseudo_label
from jaxtransfer.adaptation.self_training.signal_annealing import signal_annealing
from jaxtransfer.adaptation.self_training.uda import uda
from jaxtransfer.adaptation.self_training.vat import vat

__all__ = ["bnm", "fixmatch", "flexmatch", "mcc", "pseudo_label", "signal_annealing", "uda", "vat"]
