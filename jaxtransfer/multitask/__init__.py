"""Many tasks at once: how their gradients, or their losses, are weighed against each other."""

from jaxtransfer.multitask.aligned_mtl import aligned_mtl
from jaxtransfer.multitask.balance import balance
from jaxtransfer.multitask.cagrad import cagrad
from jaxtransfer.multitask.con_fig import con_fig
from jaxtransfer.multitask.db_mtl import db_mtl
from jaxtransfer.multitask.dwa import dwa
from jaxtransfer.multitask.equal import equal
from jaxtransfer.multitask.fair_grad import fair_grad
from jaxtransfer.multitask.famo import famo
from jaxtransfer.multitask.geometric import geometric
from jaxtransfer.multitask.graddrop import graddrop
from jaxtransfer.multitask.gradnorm import gradnorm
from jaxtransfer.multitask.gradvac import gradvac
from jaxtransfer.multitask.imtl import imtl
from jaxtransfer.multitask.kinds import averages, of_values, remembers
from jaxtransfer.multitask.masked import masked
from jaxtransfer.multitask.mgda import mgda
from jaxtransfer.multitask.nash_mtl import nash_mtl
from jaxtransfer.multitask.pcgrad import pcgrad
from jaxtransfer.multitask.random_weights import random_weights
from jaxtransfer.multitask.stch import stch
from jaxtransfer.multitask.uncertainty import uncertainty
from jaxtransfer.multitask.up_grad import up_grad

__all__ = [
    "aligned_mtl",
    "averages",
    "balance",
    "cagrad",
    "con_fig",
    "db_mtl",
    "dwa",
    "equal",
    "fair_grad",
    "famo",
    "geometric",
    "graddrop",
    "gradnorm",
    "gradvac",
    "imtl",
    "masked",
    "mgda",
    "nash_mtl",
    "of_values",
    "pcgrad",
    "random_weights",
    "remembers",
    "stch",
    "uncertainty",
    "up_grad",
]
