"""Adversaries: a domain discriminator, or two classifiers, that the features must deceive."""

from jaxtransfer.adaptation.adversarial.bsp import bsp
from jaxtransfer.adaptation.adversarial.cdan import cdan
from jaxtransfer.adaptation.adversarial.dann import dann
from jaxtransfer.adaptation.adversarial.mcd import mcd
from jaxtransfer.adaptation.adversarial.mdd import mdd
from jaxtransfer.adaptation.adversarial.networks import classifier, discriminator

__all__ = ["bsp", "cdan", "classifier", "dann", "discriminator", "mcd", "mdd"]
