"""Adversaries: a domain discriminator, or two classifiers, that the features must deceive."""

from jaxtransfer.adaptation.adversarial.adda import adda
from jaxtransfer.adaptation.adversarial.bsp import bsp
from jaxtransfer.adaptation.adversarial.cdan import cdan
from jaxtransfer.adaptation.adversarial.dann import dann
from jaxtransfer.adaptation.adversarial.mcd import mcd
from jaxtransfer.adaptation.adversarial.mdd import mdd
from jaxtransfer.adaptation.adversarial.networks import classifier, discriminator
from jaxtransfer.adaptation.adversarial.osbp import osbp
from jaxtransfer.adaptation.adversarial.pada import pada
from jaxtransfer.adaptation.adversarial.wdgrl import wdgrl

__all__ = [
    "adda",
    "bsp",
    "cdan",
    "classifier",
    "dann",
    "discriminator",
    "mcd",
    "mdd",
    "osbp",
    "pada",
    "wdgrl",
]
