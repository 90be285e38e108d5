"""Alignment: features of both domains are drawn together by a distance between their distributions."""

from jaxtransfer.adaptation.alignment.afn import afn
from jaxtransfer.adaptation.alignment.branches import branched
from jaxtransfer.adaptation.alignment.dan import dan
from jaxtransfer.adaptation.alignment.deep_coral import deep_coral
from jaxtransfer.adaptation.alignment.jan import jan
from jaxtransfer.adaptation.alignment.m3sda import m3sda
from jaxtransfer.adaptation.alignment.mfsan import mfsan
from jaxtransfer.adaptation.alignment.swd import swd

__all__ = ["afn", "branched", "dan", "deep_coral", "jan", "m3sda", "mfsan", "swd"]
