"""Meta-learning: inner loops that are differentiated through, and the objectives made of them."""

from jaxtransfer.meta.adapt import adapt
from jaxtransfer.meta.maml import maml, per_layer_and_step, per_parameter
from jaxtransfer.meta.statistics import Statistics, running, transductive

__all__ = ["Statistics", "adapt", "maml", "per_layer_and_step", "per_parameter", "running", "transductive"]
