"""Generalisation to domains that are never seen in training, from several that are.

Methods that look at what a model gives take it and the names of the domains, and are penalties that are added to the
mean of the domains' losses: `irm`, `fishr`, `coral_of_sources`. Those that look at the losses take these, one objective
for each domain: `vrex` is a penalty, too, while `group_dro` is the loss itself, as is `mldg`, of one objective.

    erm = [jt.classification(model).on(name) for name in names]
    objective = jt.together(sum(erm) / len(erm) + 10 * jt.adaptation.vrex(erm))
    objective = jt.together(jt.adaptation.group_dro(erm))

What isn't a loss stands elsewhere: `jt.models.mixstyle` changes a model, `dense_average` averages its weights.
"""

from jaxtransfer.adaptation.generalization.coral_of_sources import coral_of_sources
from jaxtransfer.adaptation.generalization.fishr import fishr
from jaxtransfer.adaptation.generalization.group_dro import group_dro
from jaxtransfer.adaptation.generalization.irm import irm
from jaxtransfer.adaptation.generalization.mldg import mldg
from jaxtransfer.adaptation.generalization.swad import dense_average, swad_interval
from jaxtransfer.adaptation.generalization.vrex import vrex

__all__ = [
    "coral_of_sources",
    "dense_average",
    "fishr",
    "group_dro",
    "irm",
    "mldg",
    "swad_interval",
    "vrex",
]
