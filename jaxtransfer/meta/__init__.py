"""Meta-learning: inner loops that are differentiated through, and the objectives made of them."""

from jaxtransfer.meta.baseline_plus_plus import baseline_plus_plus, cosine_classification
from jaxtransfer.meta.embed import Embedded, few_shot, per_task
from jaxtransfer.meta.implicit_maml import implicit_maml
from jaxtransfer.meta.inner_loop import adapt
from jaxtransfer.meta.linear_head import linear_head
from jaxtransfer.meta.maml import maml, per_layer_and_step, per_parameter
from jaxtransfer.meta.matching import matching
from jaxtransfer.meta.prototypical import cosine_distance, prototypical, squared_euclidean
from jaxtransfer.meta.r2d2 import r2d2, ridge_weights
from jaxtransfer.meta.relation import relation, score_error
from jaxtransfer.meta.reptile import reptile
from jaxtransfer.meta.simpleshot import mean_features, simpleshot
from jaxtransfer.meta.statistics import Statistics, per_step, running, transductive

__all__ = [
    "Embedded",
    "Statistics",
    "adapt",
    "baseline_plus_plus",
    "cosine_classification",
    "cosine_distance",
    "few_shot",
    "implicit_maml",
    "linear_head",
    "maml",
    "matching",
    "mean_features",
    "per_layer_and_step",
    "per_parameter",
    "per_step",
    "per_task",
    "prototypical",
    "r2d2",
    "relation",
    "reptile",
    "ridge_weights",
    "running",
    "score_error",
    "simpleshot",
    "squared_euclidean",
    "transductive",
]
